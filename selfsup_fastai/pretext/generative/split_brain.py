"""Split-brain autoencoders."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.data.loader import training_images
from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.data.views import center_square, random_view, shift_flip_by_share
from selfsup_fastai.encoders import ab_bins
from selfsup_fastai.encoders.decoders import MapDecoder, map_decoder
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.inputs import from_input, lab_to_rgb, rgb_to_lab, to_input
from selfsup_fastai.errors import TaskError
from selfsup_fastai.metrics import average, explained
from selfsup_fastai.pictures import draw_rows, see_through
from selfsup_fastai.pretext.base import PretextTask, per_image
from selfsup_fastai.pretext.loader import PretextTransform

ASKED = {"both": ("color", "lightness"), "L_to_ab": ("color",), "ab_to_L": ("lightness",)}
EATEN = {"both": "lab", "L_to_ab": "L", "ab_to_L": "ab"}


class SplitBrain(PretextTask):
    """What is in the other half of the image: which color has this lightness, which lightness these colors?

    Zhang, Isola & Efros, Split-Brain Autoencoders: Unsupervised Learning by Cross-Channel Prediction, 2017 (arXiv
    1611.09842). Two networks of half the width, side by side: one sees lightness and predicts color, the other sees
    color and predicts lightness. Together they are one encoder that sees the whole image, and whose features are those
    of both.

    In: each image as L, a and b of CIE Lab, one input (B, 3, H, W). Target: the mean L, a and b in each of 12 x 12
    cells, (B, 3, 12, 12); half as many cells as pixels at most. Prediction: logits of 313 colors and of `l_bins` shades
    for each cell, (B, 313 + l_bins, 12, 12). Loss: the cross-entropies of the two, summed, with the nearest bin; mean
    over the cells. `get_preds` gives the means over the predicted bins, (B, 3, 12, 12) in units of Lab. Metrics: the
    share of the variance of a and b that these means explain, then that of L, each 0 for naming one always; and the
    shares of cells whose bin is named. Ours: the number of shades, 100, the shift and the mirror images, and the
    decoders. The paper's 12 x 12 is the grid of its net's own last map; here the encoder's last map, of an ordinary net
    a thirty-second of the side, is laid out to it. ResNet, ConvNeXt, ViT and Swin of timm are built at half their
    width; of other networks each half is a whole one.

    `direction='L_to_ab'` or `'ab_to_L'` is one of the two with an ordinary encoder that eats L, (B, 1, H, W), or ab,
    (B, 2, H, W): input, target and prediction have the channels concerned.

    `halves='diagonal'` is ours, for grey images, too: the center square with the triangle above the diagonal hidden and
    with the one below, each filled with the mean color of what is left, (B, 2, C, S, S), for an ordinary encoder.
    Target and prediction are the mean colors of the cells, (B, C, 12, 12) and (B, 2, C, 12, 12); the squared error
    counts in cells that are hidden altogether. S is a multiple of the number of cells. The metric is the share of the
    variance around the mean color of the other cells that is explained.

    Guards: nothing is done against traces that color leaves in the lightness (fringes of the lens, JPEG). Of the
    diagonal no pixel of a cell that counts is seen, nor a mirror copy of one: in training the square is cut at random,
    up to `shift` smaller, and enlarged, where a shift reflected at the border would copy some.

    Suits color photographs; the diagonal suits whatever has large structures. Does not suit grey images otherwise, nor
    stains and other false colors.
    """

    name = "split_brain"
    paper = "Zhang et al. 2017"
    by_map = True
    input = "lab"
    channels = (3,)
    instead = "Grey images have no color: take split_brain with halves='diagonal', rotation or jigsaw."
    split = True
    min_side = 16

    def __init__(
        self,
        direction: str = "both",  # 'both': two half networks; 'L_to_ab' or 'ab_to_L': one ordinary network
        halves: str = "channels",  # 'channels': lightness and color; 'diagonal': the triangles of the center square
        grid: int = 12,  # Cells a side that are predicted
        l_bins: int = 100,  # Shades of lightness
        shift: float = 0.125,  # In training, a shift by up to this share of the side; 0: none
        flip: float = 0.5,  # Probability of a mirror image in training
    ):
        check_choice("direction", direction, tuple(ASKED))
        check_choice("halves", halves, ("channels", "diagonal"))
        check_number("grid", grid, 2, 256, whole=True)
        check_number("l_bins", l_bins, 2, 1000, whole=True)
        check_number("shift", shift, 0, 0.5)
        check_number("flip", flip, 0, 1)
        self.direction, self.halves, self.grid, self.l_bins = direction, halves, grid, l_bins
        self.shift, self.flip = shift, flip
        self.asked = ASKED[direction]
        self.split = direction == "both" and halves == "channels"
        self.input = EATEN[direction]
        if direction == "L_to_ab":
            self.check_idle("direction='L_to_ab'", "l_bins")
        if halves == "diagonal":
            self.check_idle("halves='diagonal'", "direction", "l_bins")
            self.input, self.channels, self.passes = None, (1, 3), 2

    def chance(self):
        return 0.0

    def setup(self, dls, encoder):
        if self.halves == "diagonal":
            return
        found = [ab_bins.has_color(rgb_to_lab(x)[:, 1:]).any() for x in training_images(dls, drop=(PretextTransform,))]
        if not any(found):
            raise TaskError(f"split_brain found no color in the training images. {self.instead}")

    def make_batch(self, x, *, generator, train, idx=None):
        if self.halves == "diagonal":
            x = self.square(x, generator if train else None)
            return (hide_triangles(x),), (F.adaptive_avg_pool2d(x, sides(self.grid, x.shape[-2:])),)
        if train:
            x = shift_flip_by_share(x, generator, self.shift, self.flip)
        return (to_input(x, self.input),), (self.cells(x)[:, self.asked_channels()],)

    def square(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """A square whose side is a multiple of the number of cells: no cell then lies on both triangles.

        The center, or with a generator a random square up to `shift` smaller, enlarged. Shifts that are reflected at
        the border would leave some hidden pixels a mirror copy that is seen.
        """
        height, width = x.shape[-2:]
        cells = min(sides(self.grid, (height, width)))
        side = min(height, width) // cells * cells
        if generator is None:
            return center_square(x, side)
        most = side**2 / (height * width)
        area = (most * (1 - self.shift) ** 2, most)
        return random_view(x, Recipe(scale=area, ratio=(1, 1), flip=self.flip, jitter_p=0, grey_p=0), generator, side)

    def cells(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> mean L, a and b of each cell, (B, 3, g, g)."""
        return F.adaptive_avg_pool2d(rgb_to_lab(x), sides(self.grid, x.shape[-2:]))

    def asked_channels(self) -> slice:
        """Which of L, a and b are predicted."""
        return slice(0 if "lightness" in self.asked else 1, 3 if "color" in self.asked else 1)

    def n_bins(self, kind: str) -> int:
        return ab_bins.N_BINS if kind == "color" else self.l_bins

    def bins(self, kind: str, cells: Tensor) -> Tensor:
        """Cells (B, 1..3, g, g) that hold L first or a and b last -> the bin of each, (B, g, g)."""
        if kind == "color":
            return ab_bins.nearest_bins(cells[:, -2:])
        return (cells[:, 0] / 100 * self.l_bins).long().clamp(0, self.l_bins - 1)

    def logits(self, pred: Tensor) -> dict[str, Tensor]:
        """The parts of a prediction by what they predict."""
        return dict(zip(self.asked, pred.split([self.n_bins(kind) for kind in self.asked], 1)))

    def model(self, encoder):
        if self.halves == "diagonal":
            return TriangleNet(encoder, self.grid)
        return CrossNet(encoder, [self.n_bins(kind) for kind in self.asked], self.grid)

    def loss(self, pred, target, reduction="mean"):
        if self.halves == "diagonal":
            hidden = hidden_cells(pred)
            losses = ((pred - target.unsqueeze(1)).square() * hidden).flatten(1).sum(1)
            return per_image(losses / (hidden.sum() * pred.shape[2]), reduction)
        losses = [F.cross_entropy(p, self.bins(k, target), reduction="none") for k, p in self.logits(pred).items()]
        return per_image(sum(losses), reduction)

    @property
    def metrics(self):
        if self.halves == "diagonal":
            return (explained("explained", hidden_colors, around_mean=False),)
        shares = {"color": ("ab_explained", self.mean_colors), "lightness": ("L_explained", self.mean_lightness)}
        accuracies = {"color": self.color_accuracy, "lightness": self.lightness_accuracy}
        named = (average(accuracies[kind].__name__, accuracies[kind]) for kind in self.asked)
        return *(explained(*shares[kind]) for kind in self.asked), *named

    def mean_colors(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a and b as `get_preds` gives them, the truth, and that all cells count."""
        return self.activation(pred)[:, -2:], target[:, -2:], torch.ones_like(target[:, :1])

    def mean_lightness(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L as `get_preds` gives it, the truth, and that all cells count."""
        return self.activation(pred)[:, :1], target[:, :1], torch.ones_like(target[:, :1])

    def color_accuracy(self, pred: Tensor, target: Tensor) -> Tensor:
        """The share of cells whose nearest of the 313 colors is named."""
        return (self.logits(pred)["color"].argmax(1) == self.bins("color", target)).float().mean()

    def lightness_accuracy(self, pred: Tensor, target: Tensor) -> Tensor:
        """The share of cells whose shade is named."""
        return (self.logits(pred)["lightness"].argmax(1) == self.bins("lightness", target)).float().mean()

    def activation(self, pred):
        """Mean of the predicted bins: (B, 3, 2 or 1, g, g) in units of Lab; of the diagonal the colors as they are."""
        if self.halves == "diagonal":
            return pred
        probabilities = {kind: logits.float().softmax(1) for kind, logits in self.logits(pred).items()}
        shades = (torch.arange(self.l_bins, device=pred.device) + 0.5) * 100 / self.l_bins
        parts = {
            "lightness": lambda p: (p * shades.view(1, -1, 1, 1)).sum(1, keepdim=True),
            "color": ab_bins.mean_color,
        }
        return torch.cat([parts[kind](probabilities[kind]) for kind in parts if kind in self.asked], 1)

    def decode(self, pred):
        return pred

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """What is seen; after training what the network adds to it; then the truth."""
        draws = self._triangles if self.halves == "diagonal" else self._channels
        rows = [draws(i, inputs[0], targets[0], pred) for i in range(min(max_n, len(inputs[0])))]
        titles = [" | ".join(name for name, _ in row) for row in rows]
        return draw_rows([[picture for _, picture in row] for row in rows], titles, ctxs, figsize)

    def _channels(self, i: int, x: Tensor, target: Tensor, pred: Tensor | None) -> list[tuple[str, Tensor]]:
        """The pictures about image i by name: each question, with what the network made of it, and the truth."""
        seen = x[i : i + 1]
        asked, answer = target[i : i + 1], None if pred is None else pred[i : i + 1]
        pictures = []
        for kind in self.asked:
            known = "L" if kind == "color" else "ab"
            part = seen if self.input == known else seen[:, :1] if known == "L" else seen[:, 1:]
            pictures.append((known, from_input(part, known).expand(-1, 3, -1, -1)))
            if pred is not None:
                name = "colored" if kind == "color" else "lit"
                pictures.append((name, completed(part, answer, kind)))
        truth = from_input(seen, "lab") if self.input == "lab" else completed(seen, asked, self.asked[0])
        return [(name, picture[0]) for name, picture in chain(pictures, [("true", truth)])]

    def _triangles(self, i: int, x: Tensor, target: Tensor, pred: Tensor | None) -> list[tuple[str, Tensor]]:
        """The two questions in turn: image i with one triangle hidden, the hidden cells painted, and all cells."""
        at = i % 2
        cells = F.interpolate(target[i : i + 1], x.shape[-2:], mode="nearest")[0]
        above = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
        seen = see_through(x[i, at : at + 1], above.T if at else above)[0]
        if pred is None:
            return [("seen", seen), ("true", cells)]
        hidden = F.interpolate(hidden_cells(pred)[:1, at], x.shape[-2:], mode="nearest")[0]
        guess = F.interpolate(pred[i : i + 1, at], x.shape[-2:], mode="nearest")[0]
        return [("seen", seen), ("painted", torch.where(hidden > 0, guess, x[i, at])), ("true", cells)]


class CrossNet(nn.Module):
    """An encoder's map to logits (B, sum of bins, g, g); of a split encoder each half predicts what the other sees."""

    def __init__(self, encoder: Encoder, n_bins: list[int], grid: int):
        super().__init__()
        image = (encoder.side, encoder.side)
        channels, *at = encoder.map_shape(image)
        self.encoder, self.grid = encoder, grid
        decoders = [MapDecoder(channels // len(n_bins), tuple(at), n, sides(grid, image)) for n in n_bins]
        self.decoders = nn.ModuleList(decoders)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.encoder.feature_map(x).chunk(len(self.decoders), 1)  # lightness first
        return torch.cat([d(part, sides(self.grid, x.shape[-2:])) for d, part in zip(self.decoders, parts)], 1)


class TriangleNet(nn.Module):
    """Encoder and decoder on images with one triangle hidden: (B, 2, C, S, S) -> cells (B, 2, C, g, g)."""

    def __init__(self, encoder: Encoder, grid: int):
        super().__init__()
        image = (encoder.side, encoder.side)
        self.encoder, self.grid = encoder, grid
        self.decoder = map_decoder(encoder, encoder.in_chans, image, sides(grid, image))

    def forward(self, x: Tensor) -> Tensor:
        out = self.decoder(self.encoder.feature_map(x.flatten(0, 1)), sides(self.grid, x.shape[-2:]))
        return out.unflatten(0, x.shape[:2])


def sides(grid: int, size: tuple[int, int]) -> tuple[int, int]:
    """Cells down and across for images of this size: each at least two pixels wide."""
    return min(grid, size[0] // 2), min(grid, size[1] // 2)


def hide_triangles(x: Tensor) -> Tensor:
    """(B, C, S, S) -> (B, 2, C, S, S): above the diagonal, then below it, the mean color of what is left."""
    above = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    questions = []
    for hidden in (above, above.T):
        fill = (x * ~hidden).sum((-2, -1), keepdim=True) / (~hidden).sum()
        questions.append(torch.where(hidden, fill, x))
    return torch.stack(questions, 1)


def hidden_cells(pred: Tensor) -> Tensor:
    """(1, 2, 1, g, g): 1 for the cells that each of the two questions hides altogether."""
    above = torch.ones(pred.shape[-2:], dtype=pred.dtype, device=pred.device).triu(1)
    return torch.stack([above, above.T])[None, :, None]


def hidden_colors(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Answer and truth, both less the mean color of what is seen, and which cells are hidden."""
    hidden, truth = hidden_cells(pred), target.unsqueeze(1)
    mean = (truth * (1 - hidden)).sum((-2, -1), keepdim=True) / (1 - hidden).sum((-2, -1), keepdim=True)
    return pred - mean, truth - mean, hidden


def completed(seen: Tensor, cells: Tensor, kind: str) -> Tensor:
    """What is seen, L or ab (1, 1 or 2, H, W) in [0, 1], and `kind`, 'color' or 'lightness', of cells: (1, 3, H, W)."""
    cells = F.interpolate(cells.float(), seen.shape[-2:], mode="bilinear", align_corners=False)
    if kind == "color":
        return lab_to_rgb(torch.cat([100 * seen, cells[:, -2:]], 1))
    return from_input(torch.cat([cells[:, :1] / 100, seen], 1), "lab")
