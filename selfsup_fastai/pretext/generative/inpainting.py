"""Inpainting (context encoders)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.rates import RateOfPart
from selfsup_fastai.checks import check_choice, check_flag, check_number
from selfsup_fastai.data.draws import Draw
from selfsup_fastai.data.patches import boxes_mask
from selfsup_fastai.data.views import shift_flip_by_share
from selfsup_fastai.encoders.decoders import PerPixel
from selfsup_fastai.encoders.frozen import as_it_stands
from selfsup_fastai.metrics import average, explained
from selfsup_fastai.pictures import draw_rows, see_through
from selfsup_fastai.pretext.base import RestoringTask
from selfsup_fastai.transfer import constant

REGIONS = ("irregular", "blocks", "center")
RIM_WEIGHT = 10.0
L2_SHARE = 0.999  # of the maker's loss; the rest is the adversarial term
JUDGE_RATE = 0.1  # of the maker's learning rate: 2e-4 and 2e-3
CELLS = 0.06 * 128  # cells of the noise along a side of 128 pixels, 6 % of it
BLOCKS, BLOCK_SIDES = 6, (0.125, 0.2)  # together at most 6 / 25 of the image
PLAIN = (117 + 104 + 123) / (3 * 255)  # the authors' fill, where nothing is known of the images


def filled_pixels(pred: Tensor | tuple, target: Tensor, hole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Answer and truth, and that the pixels in the hole count."""
    return (pred if isinstance(pred, Tensor) else pred[0]).sigmoid(), target, hole


class Inpainting(RestoringTask):
    """What was in the hole that was cut into the image?

    Pathak, Krahenbuhl, Donahue, Darrell & Efros, Context Encoders: Feature Learning by Inpainting, 2016
    (arXiv 1604.07379). To fill the hole, the network must recognize from what is left what is missing there.

    In: the image (B, C, H, W) in [0, 1], a hole in it filled with the mean color that the network's input is centered
    by: that of the training images, of a pretrained network that of the images it has seen (ImageNet's, as in the
    authors' code). In training the image is first shifted and mirrored at random. Targets: the whole image (B, C, H, W)
    and the hole, (B, 1, H, W) of 0 and 1. Prediction: whole images (B, C, H, W), raw until `activation` makes them
    0..1; what it says outside of the region does not count. Holes by `region`:
    'irregular': blobs of random shape, 20-30 % of the area; the error is that of the whole image, as in the code.
    'blocks': six squares that may overlap, under 1/4 of the area (number and sides are ours); error in the hole.
    'center': the center, half of each side long, less a rim of 1/32 of the side (4 of 128 pixels in the code, 7 in the
    paper) that stays visible and counts ten times in the mean squared error of the center.

    Loss: mean squared error on the code's scale of -1..1, four times that of [0, 1]. With `adversarial` it is .999 of
    that plus .001 of how well a second network, the judge, tells what was painted from true images (of 'center' it sees
    the half of each side alone, else the whole), and the judge's own loss is added: in one backward pass each of the
    two gets its own gradients. The judge learns at a tenth of the maker's rate. Most of that loss is the judge's, which
    rises when the painter gets better; the painter's own squared error is a metric then. Metric: share of the variance
    inside the holes that is explained, 0 for filling them with their mean color. For features the paper took random
    regions and the squared error alone, and so do the defaults; 'center' with `adversarial` gives the nicer pictures.
    Ours: irregular holes get their exact area by the threshold, where the code draws until the area fits; the encoder's
    last map goes straight to the decoder, without the paper's bottleneck of 4,000; Adam's momentum is fastai's
    (beta1 .9, under a one-cycle schedule .95 to .85), where the paper's is .5.

    Guards against features that look for the border of one square alone, as the paper says of the center: regions of
    random shape and place. None is needed against going on with lines and colors from the rim: that is part of it.

    Suits photographs, scenes and anatomy: whatever has a layout from which parts can be foretold. Does not suit
    textures without layout, or findings that nothing around them foretells: they are what it learns to leave out.
    """

    name = "inpainting"
    paper = "Pathak et al. 2016"
    by_map = True
    n_targets = 2
    min_side = 16

    def __init__(
        self,
        region: str = "irregular",  # Shape of the hole: 'irregular', 'blocks' or 'center'
        adversarial: bool = False,  # Add a network that judges what was painted
        shift: float = 0.125,  # In training, a shift by up to this share of the side; 0: none
        flip: float = 0.5,  # In training, probability of a mirror image; 0 where left and right matter
    ):
        check_choice("region", region, REGIONS)
        check_flag("adversarial", adversarial)
        check_number("shift", shift, 0, 0.5)
        check_number("flip", flip, 0, 1)
        self.region, self.adversarial, self.shift, self.flip = region, adversarial, shift, flip
        self.fill = (PLAIN,)
        if adversarial:
            self.n_inp, self.normalized = 2, (True, False)
            self.alone = "its judge has a learning rate of its own. Set adversarial=False."

    def setup(self, dls, encoder):
        self.fill = tuple(encoder.mean)

    def make_batch(self, x, *, generator, train, idx=None):
        if train:
            x = shift_flip_by_share(x, generator, self.shift, self.flip)
        hole = self.holes(len(x), *x.shape[-2:], Draw(generator))
        cut = torch.where(hole, constant(self.fill, x.dtype, x.device).view(1, -1, 1, 1), x)
        return ((cut, x) if self.adversarial else (cut,)), (x, hole.to(x.dtype))

    def holes(self, b: int, h: int, w: int, draw: Draw) -> Tensor:
        """What is cut out, (b, 1, h, w) of bool."""
        if self.region == "center":
            hole = torch.zeros(b, 1, h, w, dtype=torch.bool, device=draw.generator.device)
            rows, columns = center(h, w, rim=rim(h, w))
            hole[..., rows, columns] = True
            return hole
        return blobs(b, h, w, draw) if self.region == "irregular" else blocks(b, h, w, draw)

    def model(self, encoder):
        if not self.adversarial:
            return PerPixel(encoder, encoder.in_chans)
        return JudgedPainter(encoder, centered=self.region == "center")

    @property
    def metrics(self):
        judged = (average("squared_error", self.mean_squared_error),) if self.adversarial else ()
        return explained("explained_in_hole", filled_pixels), *judged

    def weights(self, hole: Tensor) -> Tensor:
        """How much each pixel counts in the squared error, (B, 1, H, W)."""
        if self.region == "irregular":
            return torch.ones_like(hole)
        if self.region == "blocks":
            return hole
        rows, columns = center(*hole.shape[-2:])
        counted = torch.zeros_like(hole)
        counted[..., rows, columns] = RIM_WEIGHT
        return torch.where(hole > 0, 1.0, counted)

    def loss(self, pred, target, hole, reduction="mean"):
        painted, *judged = (pred,) if isinstance(pred, Tensor) else pred
        loss = self.squared_error(painted, target, hole)
        if judged:
            of_true, of_painted, of_maker = judged  # logits that the image is a true one
            judge_loss = F.softplus(-of_true) + F.softplus(of_painted)
            loss = L2_SHARE * loss + (1 - L2_SHARE) * F.softplus(-of_maker) + judge_loss
        return loss.mean() if reduction == "mean" else loss

    def squared_error(self, painted: Tensor, target: Tensor, hole: Tensor) -> Tensor:
        """The painter's own, of each image, (B,)."""
        weights = self.weights(hole)
        squared = 4 * (painted.sigmoid() - target).square().mean(1, keepdim=True)  # on the scale of -1..1
        return (weights * squared).sum((1, 2, 3)) / (weights > 0).sum((1, 2, 3)).clamp(min=1)

    def mean_squared_error(self, pred: tuple[Tensor, ...], target: Tensor, hole: Tensor) -> Tensor:
        """The painter's own, of a batch."""
        return self.squared_error(pred[0], target, hole).mean()

    def activation(self, pred):
        return (pred if isinstance(pred, Tensor) else pred[0]).sigmoid()

    def callbacks(self):
        return [RateOfPart("judge", JUDGE_RATE)] if self.adversarial else []

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """Each image with its hole, (with the hole as the network fills it,) and whole."""
        image, hole = (target[:max_n] for target in targets)
        panels, titles = [see_through(image, hole > 0), image], ["hole | true"] * len(image)
        if pred is not None:
            filled = torch.where(hole > 0, pred[: len(image)].float(), image)
            off = (filled - image).abs().mean(1, keepdim=True).sum((1, 2, 3)) / hole.sum((1, 2, 3)).clamp(min=1)
            panels.insert(1, filled)
            titles = [f"hole | filled | true, {error:.0%} off" for error in off.tolist()]
        return draw_rows(list(zip(*panels)), titles, ctxs, figsize)


class JudgedPainter(nn.Module):
    """A painter and its judge: (B, C, H, W) with holes and whole -> images, raw, and the judge's logits, (B,) each, of
    the true images, of the painted ones, and of these once more for the painter, the judge held constant."""

    def __init__(
        self,
        encoder: nn.Module,
        centered: bool,  # The judge sees the center alone
    ):
        super().__init__()
        self.painter, self.centered = PerPixel(encoder, encoder.in_chans), centered
        side = encoder.side // 2 if centered else encoder.side
        self.judge = judge_network(encoder.in_chans, side)

    @property
    def encoder(self) -> nn.Module:
        return self.painter.encoder

    def forward(self, cut: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raw = self.painter(cut)
        painted = self.judged_part(raw.sigmoid())
        of_true, of_painted = self.judge(self.judged_part(whole)), self.judge(painted.detach())
        return raw, of_true[:, 0], of_painted[:, 0], as_it_stands(self.judge, painted)[:, 0]

    def judged_part(self, x: Tensor) -> Tensor:
        """What the judge sees of images in [0, 1]; on the authors' scale of -1..1."""
        rows, columns = center(*x.shape[-2:]) if self.centered else (slice(None), slice(None))
        return 2 * x[..., rows, columns] - 1


def judge_network(channels: int, side: int) -> nn.Sequential:
    """DCGAN's discriminator for images of about `side` pixels: strided 4 x 4 convolutions down to 4 x 4 places."""
    halvings = max(1, round(math.log2(max(side, 8) / 4)))
    widths = [channels, *(min(512, 64 * 2**i) for i in range(halvings))]
    layers = []
    for i in range(halvings):
        norm = [nn.BatchNorm2d(widths[i + 1])] if i else []  # none on the first, as in the code
        layers += [nn.Conv2d(widths[i], widths[i + 1], 4, 2, 1), *norm, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * widths[-1], 1))


def rim(h: int, w: int) -> int:
    """Pixels of the center's border that stay visible: 4 of 128."""
    return max(1, round(min(h, w) / 32))


def center(h: int, w: int, rim: int = 0) -> tuple[slice, slice]:
    """Rows and columns of the center, half of each side long, less a rim."""
    return tuple(slice((n - n // 2) // 2 + rim, (n - n // 2) // 2 + n // 2 - rim) for n in (h, w))


def blocks(b: int, h: int, w: int, draw: Draw) -> Tensor:
    """Six squares that may overlap, (b, 1, h, w) of bool."""
    side = (draw.uniform((b, BLOCKS), *BLOCK_SIDES) * min(h, w)).long()
    return boxes_mask((draw.below(h - side + 1), draw.below(w - side + 1)), (side, side), (h, w))


def blobs(b: int, h: int, w: int, draw: Draw) -> Tensor:
    """Where coarse noise, enlarged, is lowest: 20 to 30 % of each image, (b, 1, h, w) of bool."""
    cells = [max(2, math.ceil(CELLS * n / min(h, w))) for n in (h, w)]
    noise = F.interpolate(draw.uniform((b, 1, *cells)), (h, w), mode="bicubic", align_corners=False)
    area = draw.uniform((b, 1), 0.2, 0.3)
    ranked = noise.flatten(1).sort(1).values
    limit = ranked.gather(1, (area * h * w).round().long())
    return noise < limit.view(b, 1, 1, 1)
