"""Exemplar networks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup_fastai.checks import check_number
from selfsup_fastai.data.blocks import Cover
from selfsup_fastai.data.colors import bend_saturation_value, column, scale_components, turn_hue_
from selfsup_fastai.data.loader import fit_batch_size, luma
from selfsup_fastai.data.patches import windows
from selfsup_fastai.data.sampling import sample_squares
from selfsup_fastai.encoders.heads import Classifier, linear_head
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pictures import draw_rows
from selfsup_fastai.pretext.base import PretextTask, class_loss
from selfsup_fastai.transfer import constant, sent


def seed_found(pred, target, seed=None):
    """Share of variants whose own seed is the likeliest."""
    return (pred.argmax(1) == target).float().mean()


def seed_in_top_5(pred, target, seed=None):
    """Share of variants whose own seed is among the five likeliest."""
    top = pred.topk(min(5, pred.shape[1]), dim=1).indices
    return (top == target.unsqueeze(1)).any(1).float().mean()


class Exemplar(PretextTask):
    """Of which of thousands of patches is this a variant?

    Dosovitskiy, Springenberg, Riedmiller & Brox, Discriminative Unsupervised Feature Learning with Convolutional Neural
    Networks, 2014 (arXiv 1406.6909). Each seed patch is a class of its own; its variants, moved, turned, scaled and
    recolored, are the class's members. What the network ignores is what the variants change.

    In: a variant of one patch of each image, (B, C, p, p), with p a third of the shorter side (the paper's 32 of 96
    pixels). The patch is drawn once and for all, by the image's number and `seed`, with probability proportional to its
    mean squared gradient. Target: the number of the seed, (B,), and for people's eyes alone the seed itself,
    (B, C, p, p) in [0, 1]. Prediction: (B, N) logits for N seeds. Images beyond `max_classes` are left out, by a draw
    that is fixed, too. Each visit makes a new variant (the paper: a stock of 150). Validation asks for other variants
    of training images (a fixed sample of as many as there are validation images), as new images have no class;
    `predict` and a `test_dl` of new images therefore name the seed that a patch resembles, and their targets mean
    nothing. So does `predict` where there are no validation images.

    Order of a variant: shift, turn and scale in one sampling that reads around the patch, principal components of the
    colors, saturation and value to a power, times a factor, plus an offset, hue. Ours: factors and powers are uniform
    in their logarithm; the components are those of the image's own colors; grey pixels stay grey; the lower limit of
    scale and factor is 1/1.4 (the paper's .7); the head is one linear layer on the encoder. On 1 channel saturation
    and hue change nothing.

    Guards: the variants themselves; if they kept color and contrast, those alone would name an image's seed. Nothing
    hides noise or the traces of compression.

    Suits a few thousand images without near duplicates: two like seeds in two classes teach nothing. Does not suit
    large data (the head grows with N) nor data in which all images look alike; more than 16,000 seeds made the paper's
    features worse. Seeds stay in their places only while images always come alike: leave out RandomResizedCrop and
    batch augmentation (windows of `size=` are cut from the center). An encoder of fixed input size (ViT) sees each
    patch enlarged: one pass for each image.
    """

    name = "exemplar"
    paper = "Dosovitskiy et al. 2014"
    of_color = ("hue",)
    n_targets = 2
    needs = ("index",)
    min_side = 24  # patches of 8 pixels
    metrics = (seed_found, seed_in_top_5)
    alone = "it leaves out images and validates on training images."

    def __init__(
        self,
        max_classes: int = 16_000,  # Most seeds, one from an image; images beyond are left out
        patch: float = 1 / 3,  # Side of a patch, as a share of the image's shorter side
        seed: int = 0,  # Of the choice of images and patches
        shift: float = 0.2,  # Largest shift in each direction, as a share of the patch's side
        scale: float = 1.4,  # Largest factor of the patch's size; 1 over it is the smallest
        turn: float = 20.0,  # Largest turn, degrees
        contrast: float = 2.0,  # Largest factor along each principal component of the colors
        power: float = 4.0,  # Largest power of saturation and value
        factor: float = 1.4,  # Largest factor of saturation and value
        offset: float = 0.1,  # Largest offset of saturation and value, up or down
        hue: float = 0.1,  # Largest shift of the hue, in turns of the color wheel
    ):
        check_number("max_classes", max_classes, 2, whole=True)
        check_number("patch", patch, above=0, most=1)
        check_number("seed", seed, 0, 2**31 - 1, whole=True)
        check_number("shift", shift, 0, 1)
        for name, largest in {"scale": scale, "contrast": contrast, "power": power, "factor": factor}.items():
            check_number(name, largest, 1, 10)
        check_number("turn", turn, 0, 180)
        check_number("offset", offset, 0, 1)
        check_number("hue", hue, 0, 0.5)
        self.max_classes, self.patch, self.seed, self.shift, self.scale = max_classes, patch, seed, shift, scale
        self.turn, self.contrast, self.power, self.factor = turn, contrast, power, factor
        self.offset, self.hue = offset, hue
        self.min_side = math.ceil(8 / patch)
        self.passes = patch**2
        self.n_classes, self.valid_seeds = None, None  # known after setup

    def setup(self, dls, encoder):
        n = len(dls.train_ds)
        if n < 2:
            raise TaskError("exemplar tells training images apart: it needs 2 or more, not 1.")
        if dls.train.bs is not None and dls.train.bs < 2:
            raise TaskError("exemplar tells images of a batch apart: it needs a batch size of 2 or more, not 1.")
        self.n_classes = min(n, self.max_classes)
        for tfm in dls.train.after_item.fs:
            if isinstance(tfm, Cover):
                tfm.still = True
        if self.n_classes < n:
            bs = dls.train.bs and fit_batch_size(dls.train.bs, self.n_classes)
            dls.train = dls.train.over(dls.train, self._sample(n, self.n_classes), bs=bs)
        if len(dls.loaders) > 1 and len(dls.valid_ds):
            self.valid_seeds = torch.tensor(self._sample(self.n_classes, len(dls.valid_ds)))
            dls.valid = dls.valid.over(dls.train, self.valid_seeds.tolist())
        self.passes = 1 if encoder.fixed_size else self.patch**2

    def _sample(self, n: int, k: int) -> list[int]:
        """`k` of `n` places (all, if there are fewer), in order; always the same ones."""
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[:k].sort().values.tolist()

    def make_batch(self, x, *, generator, train, idx=None):
        if self.valid_seeds is not None and not train:
            idx = sent(self.valid_seeds, idx.device)[idx % len(self.valid_seeds)]  # there may be more images to predict
        elif self.n_classes is not None:
            idx = idx % self.n_classes  # without a validation set these may be new images, too
        size = max(8, round(self.patch * min(x.shape[-2:])))
        corners = self.corners(x, idx, size)
        rows, columns = (corners[:, i].view(-1, 1, 1, 1) + torch.arange(size, device=x.device) for i in (0, 1))
        return (self.vary(x, corners, size, generator),), (idx, windows(x, rows, columns)[:, 0])

    def corners(self, x: Tensor, idx: Tensor, size: int) -> Tensor:
        """Row and column of the seed patch of each image, (B, 2) int64: a function of the image and its number."""
        weights = _mean_squared_gradient(x, size)  # (B, rows, columns)
        shares = weights.flatten(1).cumsum(1)
        number = ((idx + 1) * 2_654_435_761 + self.seed * 2_246_822_519) % 2**32 / 2**32  # Knuth's hash: even over 0..1
        place = torch.searchsorted(shares, number.unsqueeze(1) * shares[:, -1:], right=True)[:, 0]
        place = place.clamp(max=shares.shape[1] - 1)
        return torch.stack([place // weights.shape[2], place % weights.shape[2]], 1)

    def vary(self, x: Tensor, corners: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """A variant of the patch at `corners` of each image, (B, C, size, size)."""
        drawn = self.draw(len(x), generator)
        centers = corners + size / 2 + drawn.shift * size
        patches = sample_squares(x, centers, drawn.scale * size, drawn.turn, size)
        patches = scale_components(patches, drawn.contrast[:, -x.shape[1] :], of=x).clamp(0, 1)
        patches = bend_saturation_value(patches, drawn.saturation.unbind(1), drawn.value.unbind(1))
        if x.shape[1] == 3:
            turn_hue_(patches, column(6 * drawn.hue))
        return patches.clamp(0, 1).to(x.dtype)

    def draw(self, n: int, generator: torch.Generator) -> "Variants":
        """Everything that is random in `n` variants; powers and factors uniform in their logarithm."""
        u = torch.rand(n, 14, generator=generator, device=generator.device) * 2 - 1
        bend = constant((self.power, self.factor), u.dtype, u.device)
        saturation, value = (
            torch.cat([bend ** u[:, i : i + 2], self.offset * u[:, i + 2 : i + 3]], 1) for i in (7, 10)
        )
        return Variants(
            shift=self.shift * u[:, 0:2],
            scale=self.scale ** u[:, 2],
            turn=self.turn * u[:, 3],
            contrast=self.contrast ** u[:, 4:7],
            saturation=saturation,
            value=value,
            hue=self.hue * u[:, 13],
        )

    def model(self, encoder):
        return Classifier(encoder, linear_head(encoder.num_features, self.n_classes))

    def loss(self, pred, target, seed=None, reduction="mean"):
        return class_loss(pred, target, reduction)

    def chance(self):
        return None if self.n_classes is None else 1 / self.n_classes

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """Seed and variant side by side, with the number of the training image and, after training, of the named
        one."""
        numbers, seeds = targets[0][:max_n].tolist(), targets[1][:max_n]
        titles, right = [f"seed {number} | variant" for number in numbers], None
        if pred is not None:
            named = pred[:max_n].tolist()
            titles = [f"{title},\nnamed {guess}" for title, guess in zip(titles, named)]
            right = [guess == number for guess, number in zip(named, numbers)]
        return draw_rows(list(zip(seeds, inputs[0][:max_n])), titles, ctxs, figsize, right)


class Variants(NamedTuple):
    """What was drawn for B variants; 0 for a shift, a turn, an offset and the hue and 1 elsewhere: the seed itself."""

    shift: Tensor  # (B, 2): down and right, as shares of the patch's side
    scale: Tensor  # (B,)
    turn: Tensor  # (B,) degrees
    contrast: Tensor  # (B, 3): of each principal component, that of the largest variance last
    saturation: Tensor  # (B, 3): power, factor, offset
    value: Tensor  # (B, 3): the same
    hue: Tensor  # (B,) turns


def _mean_squared_gradient(x: Tensor, size: int) -> Tensor:
    """Of every square of `size` pixels in each image, (B, H - size + 1, W - size + 1); a little above 0."""
    grey = luma(x) if x.shape[1] == 3 else x
    across, down = grey[:, 0].diff(dim=2), grey[:, 0].diff(dim=1)
    squared = F.pad(across, (0, 1)).square() + F.pad(down, (0, 0, 0, 1)).square()
    return _window_means(_window_means(squared, size).mT, size).mT.clamp(min=0) + 1e-9


def _window_means(x: Tensor, size: int) -> Tensor:
    """(B, H, W) -> (B, H, W - size + 1)"""
    sums = F.pad(x.cumsum(2), (1, 0))
    return (sums[..., size:] - sums[..., :-size]) / size
