"""`JointTask`: what tasks that compare the embeddings of several views of an image have in common.

`MultiCropTask`: likewise, for those that add small crops.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.checks import check_flag, check_number
from selfsup_fastai.data.loader import are_scans, n_in_of
from selfsup_fastai.data.recipes import SIMCLR, Recipe, adapted, for_scans
from selfsup_fastai.data.views import multi_crop, random_view
from selfsup_fastai.encoders.crops import crop_cost, crop_features, crop_side, nearest_side
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.encoders.inputs import from_input, to_input
from selfsup_fastai.encoders.memories import NEGATIVES, ContrastBank
from selfsup_fastai.encoders.teacher import Teacher
from selfsup_fastai.errors import TaskError
from selfsup_fastai.features import direction_std
from selfsup_fastai.messages import say
from selfsup_fastai.metrics import OfSums
from selfsup_fastai.pictures import draw_rows, side_by_side
from selfsup_fastai.pretext.base import PretextTask

SMALL = 96 / 224  # Side of small crops, as a share of the image's
LEAST_AREA = 0.05  # Share of the image in the smallest crops


def embeddings(pred: Tensor | Sequence) -> Tensor:
    """Of a prediction the student's embeddings of the views, (B, V, D)."""
    return pred if isinstance(pred, Tensor) else pred[0]


def found_pair(pred: Tensor | Sequence, target: Tensor, *_) -> Tensor:
    """Share of images whose second view is nearest to the first among all second views of the batch.

    An image alone in its batch counts as not found: there was nothing to find it among.
    """
    z = embeddings(pred)
    if len(z) == 1:
        return z.new_zeros((), dtype=torch.float32)
    z = F.normalize(z.float(), dim=-1)
    return ((z[:, 0] @ z[:, 1].T).argmax(1) == target).float().mean()


def spread(pred: Tensor | Sequence, *_) -> Tensor:
    """How different the embeddings of different images are: `feature_std` of the first views of a batch.

    Where it falls to 0 the network has collapsed: it says the same of every image. One image alone counts as 0.
    """
    return direction_std(embeddings(pred)[:, 0])


def _shares(pred: Sequence, *_) -> tuple[Tensor, Tensor, Tensor]:
    """Of codes (B, 2, K): the sum of all, the sum of their entropies, and their number."""
    codes = pred[2].flatten(0, 1).double()
    return codes.sum(0), torch.special.entr(codes).sum(), torch.tensor(len(codes))


def _told_apart(total: Tensor, entropy: Tensor, n: Tensor) -> Tensor:
    return (torch.special.entr(total / n).sum() - entropy / n).exp()


clusters = OfSums("clusters", _shares, _told_apart)
"""How many groups the codes of a prediction (embeddings, logits, codes) sort the images into.

e to the mutual information of image and prototype: 1 where all images get the same code, whether it is one prototype or
all of them a little; K where every image has one of K prototypes, each as often as the others.
"""


class JointTask(PretextTask):
    """A task whose input are random views of each image, (B, V, C, S, S), and whose first target is the image's row.

    `recipes` has a recipe for each view; the setting `views` adapts them (`data.recipes.adapted`). A prediction is, or
    begins with, the embeddings of the views, (B, V, D). Validation draws the same views every time.
    """

    recipes: ClassVar[tuple[Recipe, ...]] = (SIMCLR, SIMCLR)
    tells_apart: ClassVar[bool] = True  # Whether an image is compared with others of its batch
    metrics = (found_pair,)
    views: str | Mapping | None = None
    of_scans = False  # Whether the images are scans; known after `setup`

    collapse_hint = (
        "one embedding for all images. Usually the rate is too high, or the images are too much alike: try a tenth of "
        "the rate, larger batches, or stronger views."
    )

    def embedded(self, pred):
        """The embeddings of the first views."""
        return embeddings(pred)[:, 0]

    def check_views(self, views: object) -> None:
        """Raises `TaskError` unless a setting `views` makes sense. For constructors."""
        for recipe in self.recipes:
            adapted(recipe, views)

    def setup(self, dls, encoder):
        if dls.train.bs is not None and dls.train.bs < 2:
            why = "compares images of a batch" if self.tells_apart else "has batch norms, which see a batch as a whole"
            raise TaskError(f"{self.name} {why}: it needs a batch size of 2 or more, not 1.")
        for dl in dls.loaders[1:]:
            if dl.n == 1 and self.tells_apart:
                say(f"{self.name}: one validation image has nobody to be told from; its validation loss says nothing.")
            dl.bs = none_alone(dl.n, dl.bs)
        self.say_scaled()
        self.of_scans = are_scans(dls)
        if self.views is None:
            grey = (n_in_of(dls) if self.input else encoder.image_channels) == 1
            if grey or self.of_scans:
                say(
                    f"{self.name}: {'grey images' if grey else 'scans'} get views for scans, which are never mirrored. "
                    "views='photo' gives the paper's, views='microscopy' any turn."
                )

    def recipe(self, view: int, channels: int, side: int) -> Recipe:
        """Of one view of images of so many channels and pixels a side."""
        return adapted(self.recipes[view], self.asked_views(), channels, side)

    def asked_views(self) -> str | Mapping | None:
        """The setting `views`, as the images need it."""
        return for_scans(self.views) if self.of_scans else self.views

    def draw_views(self, x: Tensor, generator: torch.Generator, n: int | None = None) -> Tensor:
        """One view of each recipe (of the first `n`) of each image as the encoder eats it, (B, V, C, S, S)."""
        channels, side = x.shape[1], min(x.shape[-2:])
        recipes = [self.recipe(v, channels, side) for v in range(len(self.recipes) if n is None else n)]
        views = (random_view(x, recipe, generator) for recipe in recipes)
        return torch.stack([to_input(view, self.input) if self.input else view for view in views], 1)

    def make_batch(self, x, *, generator, train, idx=None):
        return (self.draw_views(x, generator),), (torch.arange(len(x), device=x.device),)

    def activation(self, pred):
        """Embeddings of length 1; what else there is stays as it is."""
        units = F.normalize(embeddings(pred), dim=-1)
        return units if isinstance(pred, Tensor) else (units, *pred[1:])

    def decode(self, pred):
        """Cosine of the first two views of each image, (B,)."""
        z = embeddings(pred)
        return F.cosine_similarity(z[:, 0], z[:, 1], dim=-1)

    def pictured(self, views: Tensor) -> Tensor:
        """Views (B, V, C, S, S) as people can look at them, whatever the encoder is fed with."""
        return from_input(views.flatten(0, 1), self.input).unflatten(0, views.shape[:2]) if self.input else views

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """The views of each image side by side; after training with the cosine of the first two."""
        views = self.pictured(inputs[0][:max_n])
        count = {1: "one view", 2: "two views", 3: "three views"}.get(views.shape[1], f"{views.shape[1]} views")
        said = [f"{count} of image {i}" if pred is None else f"cosine {pred[i]:.2f}" for i in range(len(views))]
        return draw_rows(views, said, ctxs, figsize)


class BankTask(JointTask):
    """A task that tells an image from others by a bank with a row for each training image (NPID, PIRL).

    The last inputs are the place of each image in the training set, (B,), and places drawn uniformly from it. New
    images have no row there: outside of training an image comes in two views, and the second stands for its row.
    Settings: `negatives` that are drawn, `temperature`, `dim`, `bank_momentum`, and whether embeddings are `centered`.
    """

    needs = ("index",)
    tells_apart = False
    negatives: int | None = None
    n_rows, n_negatives = 1, 1  # known after setup

    def setup(self, dls, encoder):
        super().setup(dls, encoder)
        self.n_rows = len(dls.train_ds)
        self.n_negatives = self.negatives or min(NEGATIVES, self.n_rows)
        if self.negatives is None and self.n_rows < NEGATIVES:
            say(f"{self.name}: each image is told from {self.n_negatives:,} draws out of as many training images.")

    def check_bank(self) -> None:
        """Raises `TaskError` unless the settings make sense. For constructors."""
        check_number("temperature", self.temperature, above=0)
        check_number("dim", self.dim, 1, whole=True)
        check_number("bank_momentum", self.bank_momentum, 0, below=1)
        check_flag("centered", self.centered)
        if self.negatives is not None:
            check_number("negatives", self.negatives, 1, whole=True)

    def embedding(self, n_in: int) -> nn.Module:
        """A layer that makes embeddings of features, (B, n_in) -> (B, dim)."""
        return mlp(n_in, self.dim, self.dim, n_layers=1, last_batchnorm="plain" if self.centered else None)

    def bank(self) -> ContrastBank:
        """A new one."""
        return ContrastBank(self.n_rows, self.dim, self.bank_momentum, self.temperature)

    def draw_negatives(self, *shape: int, generator: torch.Generator) -> Tensor:
        """Places of rows of the bank, (*shape, n_negatives)."""
        return torch.randint(self.n_rows, (*shape, self.n_negatives), generator=generator, device=generator.device)

    def callbacks(self):
        return [KeepMemories()]


class MultiCropTask(JointTask):
    """A `JointTask` with small crops too (SwAV, Caron et al. 2020): two large ones and `n_small` small ones.

    Inputs: (B, 2, C, S, S), and (B, n_small, C, s, s), s about 96 / 224 of S. Large crops have more than the share
    `border` of the image's area, small ones less. A prediction is (embeddings, logits, codes): of all crops, the large
    ones first, (B, 2 + n_small, D) and (B, 2 + n_small, K), and of the large ones, (B, 2, K). Constructors call
    `keep_crops`. Fields of `views` are for all crops, but for `scale`, which is for the large ones.
    """

    n_inp = 2
    normalized = (True, True)
    min_side = 16
    metrics = (found_pair, clusters)
    small: Recipe = SIMCLR
    further: ClassVar[float] = 0  # Image-sized passes besides those of the student
    small_side: int | None = None  # Pixels; known after `setup`

    def keep_crops(self, n_small: int, border: float, views: object) -> None:
        """Check and keep the settings about crops, and what follows from them."""
        check_number("n_small", n_small, 0, whole=True)
        check_number("border", border, above=LEAST_AREA, below=1)
        self.check_views(views)
        self.n_small, self.border, self.views = n_small, border, views
        self.recipes = tuple(replace(recipe, scale=(border, 1.0)) for recipe in type(self).recipes)
        self.small = replace(type(self).small, scale=(LEAST_AREA, border))
        self.passes = 2 + n_small * SMALL**2 + self.further

    def setup(self, dls, encoder):
        super().setup(dls, encoder)
        if not self.n_small:
            return
        self.small_side = crop_side(encoder, SMALL)
        cost = crop_cost(encoder, self.small_side)
        self.passes = 2 + self.n_small * cost + self.further
        if cost == 1:
            said = f"takes images of {encoder.side} pixels only" if encoder.fixed_size else "runs on no smaller ones"
            say(f"{self.name}: {encoder.arch} {said}: a small crop costs as much as a large one.")

    def small_recipe(self, channels: int, side: int) -> Recipe:
        """Of small crops with so many channels and pixels a side."""
        views = self.asked_views()
        views = {k: v for k, v in views.items() if k != "scale"} if isinstance(views, Mapping) else views
        return adapted(self.small, views, channels, side)

    def draw_small(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """The small crops of each image, (B, n_small, C, s, s)."""
        channels, whole = x.shape[1], min(x.shape[-2:])
        side = self.small_side or min(nearest_side(SMALL * whole), whole)
        crops = multi_crop(x, [self.small_recipe(channels, side)] * self.n_small, generator, [side] * self.n_small)
        return torch.stack(crops, 1) if crops else x.new_empty(len(x), 0, channels, side, side)

    def make_batch(self, x, *, generator, train, idx=None):
        inputs = self.draw_views(x, generator), self.draw_small(x, generator)
        return inputs, (torch.arange(len(x), device=x.device),)

    def activation(self, pred):
        """Embeddings of length 1; what else the loss needs is left out."""
        return F.normalize(embeddings(pred), dim=-1)

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """The crops of each image side by side; after training with the cosine of the two large ones."""
        pictures = [[_beside(*crops)] for crops in zip(*(t[:max_n] for t in inputs))]
        said = [f"crops of image {i}" if pred is None else f"cosine {pred[i]:.2f}" for i in range(len(pictures))]
        return draw_rows(pictures, said, ctxs, figsize)


def each_view(
    net: Callable[[Tensor], Tensor] | nn.Module,  # (B, C, H, W) -> (B, D)
    x: Tensor,  # (B, V, C, H, W)
) -> Tensor:  # (B, V, D)
    """Views one after the other, as most authors' codes do: batch norms never see two views of one image together."""
    return torch.stack([net(x[:, v]) for v in range(x.shape[1])], 1)


class StudentTeacher(nn.Module):
    """Views (B, V, C, H, W) to the student's predictions and its teacher's projections of them, (B, V, D) each."""

    def __init__(self, encoder: Encoder, projector: nn.Module, predictor: nn.Module):
        super().__init__()
        self.encoder, self.projector, self.predictor = encoder, projector, predictor
        self.teacher = Teacher(nn.Sequential(encoder, projector))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return each_view(self.predicted, x), each_view(self.teacher, x)

    def predicted(self, view: Tensor) -> Tensor:
        """What the student makes of one view of each image, (B, D)."""
        return self.predictor(self.projector(self.encoder(view)))


class ViewByView(nn.Module):
    """Encoder and projector on every view of every image, one view after the other: (B, V, C, S, S) -> (B, V, D)."""

    def __init__(self, encoder: nn.Module, projector: nn.Module):
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, x: Tensor) -> Tensor:
        return each_view(self.embed, x)

    def embed(self, x: Tensor) -> Tensor:
        """Of one view, (B, C, S, S) -> (B, D)."""
        return self.projector(self.encoder(x))


def of_batch(loss: Tensor, n: int, reduction: str) -> Tensor:
    """A loss that a batch of `n` images has as a whole: itself, or the same number for each of them, (n,)."""
    return loss if reduction == "mean" else loss.expand(n)


def each_crop(
    encoder: Encoder,
    large: Tensor,  # (B, 2, C, S, S)
    small: Tensor,  # (B, n, C, s, s)
) -> Tensor:  # (B, 2 + n, num_features)
    """Features of large and small crops. Those of one size go through together, as in SwAV's and DINO's codes."""
    found = [encoder(large.flatten(0, 1)).unflatten(0, large.shape[:2])]
    if small.shape[1]:
        found.append(crop_features(encoder, small.flatten(0, 1)).unflatten(0, small.shape[:2]))
    return torch.cat(found, 1)


def _beside(large: Tensor, small: Tensor, gap: int = 2) -> Tensor:
    """The large crops side by side, then the small ones as many to a column as fit: (C, S, W)."""
    side, n = large.shape[-1], small.shape[-1]
    column = max(1, (side + gap) // (n + gap))
    parts = [side_by_side(large, gap)]
    for crops in small.split(column) if len(small) else ():
        room = side - (len(crops) * (n + gap) - gap)
        rows = side_by_side(crops.mT, gap).mT  # one below the other
        parts.append(F.pad(rows, (gap, 0, room // 2, room - room // 2), value=1.0))
    return torch.cat(parts, -1)


def none_alone(n: int, bs: int) -> int:
    """The smallest batch size from `bs` up that leaves no batch of one image (unless there is only one)."""
    while n > 1 and n % bs == 1 % bs:
        bs += 1
    return bs
