"""Relative positions of patches."""

from functools import lru_cache

import torch
from fastai.metrics import accuracy
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.checks import check_choice, check_flag, check_number
from selfsup_fastai.data.colors import FRINGES, without_fringes
from selfsup_fastai.data.patches import windows
from selfsup_fastai.encoders.crops import check_takes_parts
from selfsup_fastai.pictures import draw, grid_axes, side_by_side
from selfsup_fastai.pretext.base import PretextTask, class_loss
from selfsup_fastai.transfer import constant, sent

STEPS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))  # rows down, columns right
NAMES = ("above left", "above", "above right", "left", "right", "below left", "below", "below right")
QUESTIONS = tuple(  # (first patch, second patch, answer): the second lies STEPS[answer] from the first; 40 of them
    (3 * row + col, 3 * (row + down) + col + right, answer)
    for row in range(3)
    for col in range(3)
    for answer, (down, right) in enumerate(STEPS)
    if 0 <= row + down < 3 and 0 <= col + right < 3
)
FIRST, SECOND, ANSWERS = zip(*QUESTIONS)
MIN_PATCH = 8  # Pixels
MIN_DEVIATION = 0.01  # Flatter patches stay flat instead of turning into noise


@lru_cache
def shrunken(size: int) -> Tensor:
    """(size + 1, size, size): matrix s turns a row of pixels into what is left of it after a shrinking to s pixels and
    back up, bilinearly; 0 and `size` leave it as it is."""
    pixels = torch.eye(size)[:, None]  # a batch of rows with one bright pixel each
    each = [F.interpolate(F.interpolate(pixels, s, mode="linear"), size, mode="linear") for s in range(1, size)]
    return torch.stack([pixels[:, 0], *(e[:, 0].T for e in each), pixels[:, 0]])


class RelativePosition(PretextTask):
    """Where does one patch of the image lie as seen from another: above left, above, ..., below right?

    Doersch, Gupta & Efros, Unsupervised Visual Representation Learning by Context Prediction, 2015 (arXiv 1505.05192).
    To answer, the network must know the parts of things and how they are placed.

    In: nine patches on a 3 x 3 grid with gaps, row by row, as one input (B, 9, C, p, p); the grid lies at a random
    place in the image. A patch takes .22 of the image's shorter side (at least 8 pixels), the gap half a patch: the
    grid spans 8/9 of the side. Every patch goes through the encoder once; each of the 20 pairs of neighbors is asked
    about in both orders. Target: one of 8 places for each of the 40 questions, row by row without the middle, (B, 40).
    Prediction: (B, 40, 8) logits; chance is 15 % (straight neighbors are more frequent than diagonal ones).

    Guards against answers without understanding, as in the authors' code: gaps and jitter (lines that continue), one
    random color channel of each patch kept and the others filled with faint noise (chromatic aberration, which tells
    where in the image a patch lies), the mean taken out and the deviation set to 1 (brightness gradients), a third of
    the patches shrunk to as little as a tenth of their side and back (sharpness). `color='project'` is the paper's
    other way: it takes the axis from green to magenta away. On gray images there is no color to drop.
    Differences: the authors' grid has as many cells as fit in an image of 150,000 to 450,000 pixels, with patches of
    96; the layers after the encoder are narrower (the authors': 4096), for thousands of images rather than a million.
    Their batch norms without scale and shift, so that no unit can fall silent, are in these layers only: the encoder's
    stay as they are.

    Suits images of things with parts, of at least 33 pixels, better 64 (patches of 14) or more. Does not suit textures,
    nor images without an up. An encoder of fixed input size (ViT) sees every patch enlarged to that size: nine passes
    for each image, not half of one.
    """

    name = "relative_position"
    paper = "Doersch et al. 2015"
    of_color = ("color",)
    normalized = (False,)  # the patches are standardized already
    min_side = 33  # three patches of 8 pixels and two gaps of 4
    metrics = (accuracy,)

    def __init__(
        self,
        patch: float = 0.22,  # Side of a patch as a share of the image's shorter side, at most .25
        gap: float = 0.5,  # Between patches, as a share of the patch (authors: 48 of 96 pixels); 0: patches touch
        jitter: float = 0.073,  # Largest shift of a patch, as a share of it (authors: 7 of 96); 0: none
        color: str = "drop",  # 'drop': one channel kept; 'project': green to magenta taken away; 'keep'
        standardize: bool = True,  # Each channel of a patch to mean 0, the patch to deviation 1
        shrink: float = 0.33,  # Share of the patches shrunk and enlarged again; 0: none
        patch_features: int = 512,  # Width per patch after the encoder
        hidden: int = 512,  # Width of the two layers that see a pair of patches
    ):
        check_choice("color", color, FRINGES)
        check_flag("standardize", standardize)
        check_number("patch", patch, above=0, most=0.25)
        check_number("gap", gap, 0, 0.5)
        check_number("jitter", jitter, 0, 0.5)
        check_number("shrink", shrink, 0, 1)
        check_number("patch_features", patch_features, 1, whole=True)
        check_number("hidden", hidden, 1, whole=True)
        self.patch, self.gap, self.jitter, self.color = patch, gap, jitter, color
        self.standardize, self.shrink = standardize, shrink
        self.patch_features, self.hidden = patch_features, hidden
        self.passes = self._area()

    def setup(self, dls, encoder):
        check_takes_parts(encoder, self._side(encoder.side), self.name)
        self.passes = 9 if encoder.fixed_size else self._area()

    def _side(self, side: int) -> int:
        """Of patches of images of this side, in pixels."""
        return max(MIN_PATCH, int(self.patch * side))

    def _area(self) -> float:
        """Of the nine patches together, as a share of the image."""
        return 9 * self.patch**2

    def make_batch(self, x, *, generator, train, idx=None):
        patches = self.cut(x, generator)
        if self.shrink:
            patches = self.blurred(patches, generator)
        patches = without_fringes(patches, self.color, generator)
        answers = constant(ANSWERS, torch.long, x.device)
        return (_standardized(patches) if self.standardize else patches,), (answers.repeat(len(x), 1),)

    def cut(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, H, W) -> patches (B, 9, C, p, p), row by row: a grid at a random place, each patch jittered."""
        b, side = len(x), min(x.shape[-2:])
        size = self._side(side)
        gap = min(round(self.gap * size), (side - 3 * size) // 2)  # all that rounding leaves
        reach = max(1, round(self.jitter * size)) if self.jitter else 0
        shifts = torch.randint(-reach, reach + 1, (2, b, 9), generator=generator, device=x.device)
        cells = torch.arange(9, device=x.device)
        places = []
        for cell, shift, length in zip((cells // 3, cells % 3), shifts, x.shape[-2:]):
            room = length - 3 * size - 2 * gap
            origin = torch.randint(room + 1, (b, 1), generator=generator, device=x.device)
            start = (origin + cell * (size + gap) + shift).clamp(0, length - size)
            places.append(start[..., None] + torch.arange(size, device=x.device))  # (B, 9, p)
        rows, columns = (place.unsqueeze(2) for place in places)
        return windows(x, rows, columns)

    def blurred(self, patches: Tensor, generator: torch.Generator) -> Tensor:
        """Some patches shrunk and back up; the area that is left is uniform between about 1 % and 98 %."""
        size = patches.shape[-1]
        smallest, largest = 10 / 96 * size, 95 / 96 * size
        drawn, area = torch.rand(2, *patches.shape[:2], generator=generator, device=patches.device)
        left = (smallest**2 + area * (largest**2 - smallest**2)).sqrt().long().clamp(min=2)
        left = torch.where(drawn < self.shrink, left, size)
        matrix = sent(shrunken(size), patches.device).to(patches.dtype)[left].unsqueeze(2)  # (B, 9, 1, p, p)
        return matrix @ patches @ matrix.mT

    def model(self, encoder):
        return PairNet(encoder, self.patch_features, self.hidden)

    def loss(self, pred, target, reduction="mean"):
        return class_loss(pred, target, reduction)

    def chance(self):
        return 6 / 40  # of always naming one straight neighbor, the most frequent answer

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """One question an image, the first patch in the middle and the second where it lay; after training also, on the
        right, where the network puts it."""
        axes = grid_axes(min(max_n, len(inputs[0])), ctxs, figsize, aspect=1 if pred is None else 2)
        for i, ax in enumerate(axes):
            at = 7 * i % len(QUESTIONS)
            first, second, _ = QUESTIONS[at]
            pair, truth = inputs[0][i, [first, second]], int(targets[0][i, at])
            if pred is None:
                draw(ax, self._placed(pair, truth), NAMES[truth])
            else:
                named = int(pred[i, at])
                boards = torch.stack([self._placed(pair, truth), self._placed(pair, named)])
                draw(
                    ax,
                    side_by_side(boards, gap=pair.shape[-1]),
                    f"{NAMES[truth]}, named {NAMES[named]}",
                    named == truth,
                )
        return axes

    def _placed(self, pair: Tensor, answer: int) -> Tensor:
        """A pair (2, C, p, p), stretched to [0, 1], on a board (C, S, S) of 3 x 3 places, the first in its middle."""
        low, high = pair.amin((1, 2, 3), keepdim=True), pair.amax((1, 2, 3), keepdim=True)
        pair = (pair - low) / (high - low).clamp(min=1e-6)
        _, c, size, _ = pair.shape
        step = size + max(1, round(self.gap * size))
        board = torch.ones(c, 2 * step + size, 2 * step + size)
        for patch, (down, right) in (*((0.88, place) for place in STEPS), (pair[0], (0, 0)), (pair[1], STEPS[answer])):
            top, left = (1 + down) * step, (1 + right) * step
            board[:, top : top + size, left : left + size] = patch
        return board


class PairNet(nn.Module):
    """One encoder on each of nine patches, a classifier on each pair: (B, 9, C, p, p) -> (B, 40, 8)."""

    def __init__(self, encoder: nn.Module, patch_features: int, hidden: int):
        super().__init__()
        self.encoder = encoder
        self.patch = nn.Sequential(*_block(encoder.num_features, patch_features))
        self.pair = nn.Sequential(
            *_block(2 * patch_features, hidden), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = self.patch(self.encoder(x.flatten(0, 1))).unflatten(0, x.shape[:2])  # (B, 9, d)
        first, second = (constant(patches, torch.long, x.device) for patches in (FIRST, SECOND))
        pairs = torch.cat([features[:, first], features[:, second]], -1)  # (B, 40, 2d)
        return self.pair(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])


def _block(n_in: int, n_out: int) -> list[nn.Module]:
    """A layer whose units cannot fall silent: their deviation is kept at 1."""
    return [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out, affine=False), nn.ReLU()]


def _standardized(patches: Tensor) -> Tensor:
    """Each channel with mean 0, each patch with root mean square 1 (the authors': 50, of 255)."""
    patches = patches - patches.mean((-2, -1), keepdim=True)
    return patches / patches.square().mean((-3, -2, -1), keepdim=True).sqrt().clamp(min=MIN_DEVIATION)
