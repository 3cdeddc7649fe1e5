"""Autoencoding transformations."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.data.views import center_square, random_shift_flip
from selfsup_fastai.encoders.heads import linear_head
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pictures import draw_rows
from selfsup_fastai.pretext.base import PretextTask, per_image
from selfsup_fastai.transfer import constant

GRAY = 128 / 255  # What lies beyond the image
FAR = 5.0  # Further away nobody looks, in half sides from the center
CORNERS = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))  # x then y, clockwise from above left
# Deviations of the eight free coefficients of a projective map, in coordinates -1..1; their means are 0, because turns
# and mirror images are equally likely. Measured once, and averaged over coefficients that are equal by symmetry:
#   projective_maps(100_000, torch.Generator().manual_seed(0)).flatten(1)[:, :8].std(0)
SLOPE, SHIFT, TILT = 0.730, 0.105, 0.0805
DEVIATIONS = (SLOPE, SLOPE, SHIFT, SLOPE, SLOPE, SHIFT, TILT, TILT)


class AET(PretextTask):
    """How was the image turned, moved, scaled and bent to make the warped copy beside it?

    Zhang, Qi, Wang & Luo, AET vs. AED: Unsupervised Representation Learning by Auto-Encoding Transformations rather
    than Data, 2019 (arXiv 1901.04596). To answer, the network must know things by their shape, in the image and in its
    warped copy.

    In: the center square of each image and its warped copy, gray where nothing is known, as one input (B, 2, C, S, S).
    `transform='affine'`: turned by up to 180° either way, moved by up to .2 of the side, scaled by .7 to 1.3, sheared
    by up to 30°. Target (B, 6): cosine and sine of the turn, then shift across, shift down, scale and shear, each from
    -1 to 1 over its range. Prediction (B, 6), through a tanh. `transform='projective'`: scaled by .8 to 1.2, turned by
    0 to 3 quarters, each corner moved by up to 1/8 of the side. Target and prediction (B, 8): the coefficients of the
    map from places in the warped copy to places in the image, both in -1..1, divided by their deviations over 100,000
    draws. Loss: the mean squared error of these numbers, as in the authors' code; `compare='matrix'` is the paper's,
    half the squared distance between the two maps as 3 x 3 matrices. Metric: the share of the targets' variance that
    is explained; 0 is guessing, 1 perfect.
    The authors' code rounds shifts to whole pixels, and standardizes projective maps in pixels by constants that go
    with one size of image; here nothing depends on the size.

    Guards: `border='reflect'` (ours) shows the mirror image beyond the border. The authors' gray tells much of an
    affine map without a look at what is shown, and the features are the poorer for it: on CIFAR-10 (bench/tasks.py)
    the best frozen layer named .437 with gray, and .463 and .486 in two runs with the mirror image; .444 untrained. Of
    a projective map little of what lies beyond is to be seen: .480 and .466 with gray, .458 with the mirror image. It
    is the default, as it was the better one in the paper. Traces of interpolation are not hidden. In training images
    are first shifted by whole pixels, reflected at the borders, where the authors fill with black.

    Suits photographs and scans of things with a shape, small images too. Does not suit textures, which look the same
    turned and moved.
    """

    name = "aet"
    paper = "Zhang et al. 2019"
    passes = 2

    def __init__(
        self,
        transform: str = "projective",  # The kind of map: 'projective' or 'affine'
        compare: str = "parameters",  # 'parameters', as the authors' code does, or the 'matrix', as in the paper
        turn: float = 180,  # Greatest turn in degrees, either way; 0: none (affine)
        shift: float = 0.2,  # Greatest shift as a share of the side (affine)
        scale: float = 0.3,  # Greatest change of scale: from 1 - scale to 1 + scale (affine)
        shear: float = 30,  # Greatest shear in degrees, either way (affine)
        crop: float = 0.125,  # Before warping, a shift by up to this share of the side (authors: 4 of 32 pixels)
        flip: float = 0.5,  # Probability of a mirror image before warping; 0 where left and right matter
        border: str = "gray",  # What the copy shows beyond the image: 'gray', as in the authors' code, or 'reflect'
    ):
        check_choice("transform", transform, ("affine", "projective"))
        check_choice("compare", compare, ("parameters", "matrix"))
        check_choice("border", border, ("gray", "reflect"))
        check_number("turn", turn, 0, 180)
        check_number("shift", shift, 0, 1)
        check_number("scale", scale, 0, 0.9)
        check_number("shear", shear, 0, 60)
        check_number("crop", crop, 0, 0.5)
        check_number("flip", flip, 0, 1)
        if transform == "affine" and not any((turn, shift, scale, shear)):
            raise TaskError("turn, shift, scale and shear are all 0: there is nothing to ask about.")
        self.transform, self.compare = transform, compare
        self.turn, self.shift, self.scale, self.shear = turn, shift, scale, shear
        self.crop, self.flip, self.border = crop, flip, border
        if transform == "projective":
            self.check_idle("transform='projective'", "turn", "shift", "scale", "shear")
        self.metrics = (self.explained,)

    # --- the question -------------------------------------------------------------------------------------------------

    def make_batch(self, x, *, generator, train, idx=None):
        x = center_square(x)
        if train:
            x = random_shift_flip(x, generator, pad=round(self.crop * x.shape[-1]), flip=self.flip)
        target = self.draw(len(x), generator)
        return (torch.stack([x, warp(x, self.matrix(target), self.border)], 1),), (target,)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """The parameters of `n` random maps, as the network is to name them: (n, 6) or (n, 8)."""
        if self.transform == "projective":
            maps = projective_maps(n, generator).flatten(1)[:, :8]
            return maps / constant(DEVIATIONS, maps.dtype, maps.device)
        share = 2 * torch.rand(n, 5, generator=generator, device=generator.device) - 1
        used = tuple(r > 0 for r in (self.turn, self.shift, self.shift, self.scale, self.shear))
        share = share * constant(used, share.dtype, share.device)
        turn = share[:, 0] * math.radians(self.turn)
        return torch.cat([turn.cos()[:, None], turn.sin()[:, None], share[:, 1:]], 1)

    def matrix(self, parameters: Tensor) -> Tensor:
        """Parameters (B, 6 or 8) -> maps (B, 3, 3) from places in the warped copy to places in the image, in -1..1."""
        if self.transform == "projective":
            free = parameters * constant(DEVIATIONS, parameters.dtype, parameters.device)
            return torch.cat([free, torch.ones_like(free[:, :1])], 1).unflatten(1, (3, 3))
        cos, sin, across, down, scale, shear = parameters.unbind(1)
        shear = shear * math.radians(self.shear)
        # the image's axes become (cos, sin) and (-sin, cos) turned on by the shear, as in torchvision of 2018
        slanted_cos, slanted_sin = cos * shear.cos() - sin * shear.sin(), sin * shear.cos() + cos * shear.sin()
        linear = torch.stack([slanted_cos, slanted_sin, -sin, cos], 1).unflatten(1, (2, 2))
        linear = linear / ((1 + self.scale * scale) * shear.cos())[:, None, None]
        moved = 2 * self.shift * torch.stack([across, down], 1)[..., None]
        last = constant((0.0, 0.0, 1.0), parameters.dtype, parameters.device).expand(len(parameters), 1, 3)
        return torch.cat([torch.cat([linear, -linear @ moved], 2), last], 1)

    # --- the answer ---------------------------------------------------------------------------------------------------

    def model(self, encoder):
        return AETNet(encoder, *((6, True) if self.transform == "affine" else (8, False)))

    def loss(self, pred, target, reduction="mean"):
        if self.compare == "parameters":
            return per_image((pred - target).square(), reduction)
        return per_image((self.matrix(pred) - self.matrix(target)).square().sum((1, 2)) / 2, reduction)

    def activation(self, pred):
        return pred

    def decode(self, pred):
        """The map that was named, (B, 3, 3); of an affine one cosine and sine are made those of an angle."""
        if self.transform == "affine":
            pred = torch.cat([F.normalize(pred[:, :2], dim=1), pred[:, 2:]], 1)
        return self.matrix(pred)

    def explained(self, pred: Tensor, target: Tensor) -> Tensor:
        """The share of the parameters' variance over all draws that the predictions explain."""
        return 1 - (pred - target).square().mean() / self.variance()

    def variance(self) -> float:
        """The mean squared error of the best constant answer."""
        if self.transform == "projective":
            return 1.0
        turn = math.radians(self.turn)
        of_turn = 1 - (math.sin(turn) / turn) ** 2 if turn else 0  # of cosine and sine together
        ranges = (self.shift, self.shift, self.scale, self.shear)
        return (of_turn + sum(r > 0 for r in ranges) / 3) / 6

    def chance(self):
        return 0.0

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """Image and warped copy; after training also the copy as un-warped by the map that the network names, which
        should be the image again, turned the right way."""
        rows = [list(pair) for pair in inputs[0][:max_n]]
        titles = [f"turned {turn}°, size {size:.2f}" for turn, size in map(_turn_and_size, self.matrix(targets[0]))]
        if pred is not None:
            for i, row in enumerate(rows):
                turn, size = _turn_and_size(pred[i])
                titles[i] += f"; named {turn}°, size {size:.2f}"
                row.append(warp(row[1][None], inverse(pred[i : i + 1].float()))[0])
        return draw_rows(rows, titles, ctxs, figsize)


class AETNet(nn.Module):
    """One encoder on the image and its warped copy, one layer on both: (B, 2, C, S, S) -> (B, n)."""

    def __init__(self, encoder: nn.Module, n: int, bounded: bool):
        super().__init__()
        self.encoder, self.head = encoder, linear_head(2 * encoder.num_features, n)
        self.last = nn.Tanh() if bounded else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1)))


def projective_maps(n: int, generator: torch.Generator) -> Tensor:
    """`n` random maps (n, 3, 3) from places in the warped copy to places in the image, both in -1..1, last entry 1.

    The corners of the image lie in the copy where the scaled square's do, some quarter turns on, each moved a little.
    """
    device = generator.device
    scale = 0.8 + 0.4 * torch.rand(n, 1, 1, generator=generator, device=device)
    quarters = torch.randint(4, (n, 1), generator=generator, device=device)
    moved = (2 * torch.rand(n, 4, 2, generator=generator, device=device) - 1) / 4
    corners = constant(CORNERS, torch.float32, device)
    turned = corners[(torch.arange(4, device=device) + quarters) % 4]
    return homographies(scale * turned + moved, corners.expand(n, 4, 2))


def homographies(start: Tensor, end: Tensor) -> Tensor:
    """The maps (B, 3, 3), last entry 1, that take four places (B, 4, 2) to four others."""
    (x, y), (u, v) = start.unbind(-1), end.unbind(-1)
    one, nought = torch.ones_like(x), torch.zeros_like(x)
    across = torch.stack([x, y, one, nought, nought, nought, -u * x, -u * y], -1)
    down = torch.stack([nought, nought, nought, x, y, one, -v * x, -v * y], -1)
    free = torch.linalg.solve_ex(torch.cat([across, down], 1), torch.cat([u, v], 1)).result  # `solve` waits for a GPU
    return torch.cat([free, torch.ones_like(free[:, :1])], 1).unflatten(1, (3, 3))


def warp(x: Tensor, maps: Tensor, border: str = "gray") -> Tensor:
    """Images (B, C, S, S) seen through maps (B, 3, 3): at place p of the result is what lies at map(p) of x.

    Beyond the image lies gray or, with 'reflect', its mirror image, again and again.
    """
    side = x.shape[-1]
    steps = (torch.arange(side, device=x.device, dtype=maps.dtype) + 0.5) * (2 / side) - 1
    places = torch.stack([*torch.meshgrid(steps, steps, indexing="xy"), torch.ones_like(steps).expand(side, side)])
    across, down, depth = (maps @ places.flatten(1)).unflatten(2, (side, side)).unbind(1)  # (B, S, S) each
    seen = torch.stack([across, down], -1) / depth.clamp(min=1e-6)[..., None]
    seen = torch.where(depth[..., None] > 1e-6, seen, FAR).clamp(-FAR, FAR)  # behind the eye there is nothing
    padding = "reflection" if border == "reflect" else "zeros"
    return F.grid_sample(x - GRAY, seen.to(x.dtype), padding_mode=padding, align_corners=False) + GRAY


def inverse(maps: Tensor) -> Tensor:
    """The maps (B, 3, 3) the other way round, last entry positive; something near it for those that have none."""
    back = torch.linalg.pinv(maps)
    return torch.where(back[:, 2:, 2:] < 0, -back, back)


def _turn_and_size(map_: Tensor) -> tuple[int, float]:
    """By how much the copy's content is turned (degrees, clockwise) and magnified near its center."""
    (a, b, _), (c, d, _), _ = map_.tolist()
    return round(math.degrees(math.atan2(b - c, a + d))), 1 / max(abs(a * d - b * c), 1e-4) ** 0.5
