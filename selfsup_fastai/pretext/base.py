"""`PretextTask`, the contract: what a task writes, and what the base does for it."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import pandas as pd
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.torch_core import TensorImage
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.data.companions import Companions
from selfsup_fastai.data.loader import float_images
from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.data.views import square_view
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.messages import say
from selfsup_fastai.metrics import explained
from selfsup_fastai.pictures import draw, draw_restored, draw_rows, grid_axes, see_through


class PretextTask(ABC):
    """A question about unlabeled images.

    Axis 0 is the image, always: B images in; B rows in every input, target and prediction. Turns, tiles and views are
    axis 1. A task never opens a file, never sees a normalized image, and draws only from the generator it is given.
    Constructor arguments are its settings: each is kept under its own name.
    """

    name: ClassVar[str]  # Key in TASKS, word in the CLI, name of the docs page
    paper: ClassVar[str]  # Authors and year
    n_inp: ClassVar[int] = 1  # How many tensors of the new batch go to the model
    n_targets: ClassVar[int] = 1  # How many tensors of the new batch are what it should answer
    needs: ClassVar[tuple[str, ...]] = ()  # 'index': each image's place in its dataset; 'facts': what `known` says
    items: str = "images"  # What make_batch is given: 'images' alone, or 'companions', too, as `others`
    n_known: int = 0  # How many numbers `known` has of each image; known after `setup`
    normalized: ClassVar[tuple[bool, ...]] = (True,)  # Per input: an image of the data's channels, for Normalize?
    channels: ClassVar[tuple[int, ...]] = (1, 3)  # Of images that the task can work with
    instead: ClassVar[str] = ""  # Said to people whose images have other channels: which tasks to take
    input: str | None = None  # What the encoder is fed with: a kind of `encoders.inputs`; None: the images
    split: bool = False  # Whether the encoder is two nets of half the width, for lightness and for color
    arch: ClassVar[str] = "resnet18"  # The network when nothing is said
    of_color: ClassVar[tuple[str, ...]] = ()  # Settings that change nothing in grey images
    by_map: ClassVar[bool] = False  # Whether the encoder is trained through its last map alone
    alone: ClassVar[str] = ""  # Why the task cannot be one of several at once, if so
    min_side: ClassVar[int] = 8  # Pixels
    accumulates: ClassVar[bool] = True  # Whether a batch's loss is the mean over its images: so gradients add up
    length_counts: ClassVar[bool] = False  # Whether the length of `embedded` is part of the loss
    scaled: tuple[tuple[str, str], ...] = ()  # Settings whose defaults suit small batches and short runs; the papers'
    collapse_hint: ClassVar[str] = ""  # What usually makes the task collapse, and what to try
    passes: float = 1  # Image-sized passes through the encoder for each image: what budgets count
    metrics: Sequence = ()

    def arch_settings(self, side: int) -> dict:
        """What the constructor of `arch` is told, beside the rest, for images of this side in pixels."""
        return {}

    def setup(self, dls: DataLoaders, encoder: Encoder) -> None:  # noqa: B027  (most tasks need none)
        """Called once by `pretext_learner`: sizes that depend on the data. `TaskError` for an unsuitable encoder."""

    def known(self, facts: pd.DataFrame) -> Tensor:
        """For tasks that need 'facts': what make_batch is to know of each image, (N, K) float32, NaN if nobody knows.

        `facts` has a row for each image of a loader's dataset: its `facts`. New images come without: make_batch is
        given `known` None then.
        """
        raise NotImplementedError(f"{self.name} needs facts, so it says by `known` which.")

    def companions(self, facts: pd.DataFrame) -> Companions | None:
        """For tasks with `items` 'companions': which images of the same dataset come with each image.

        make_batch is given them as `others`, (B, n, C, H, W); None for new images, of which no facts are known.
        """
        return None

    @abstractmethod
    def make_batch(self, x: Tensor, *, generator: torch.Generator, train: bool, idx: Tensor | None = None):
        """x (B, C, H, W) in [0, 1], on the device -> (inputs, targets), two tuples of tensors with B rows each.

        Tasks that need 'facts' take a further argument `known`, those with 'companions' `others`.
        """

    @abstractmethod
    def model(self, encoder: Encoder) -> nn.Module:
        """The module that is trained; it owns `.encoder`."""

    @abstractmethod
    def loss(self, pred, *targets: Tensor, reduction: str = "mean") -> Tensor:
        """A scalar; with reduction='none' one number for each image, (B,)."""

    def activation(self, pred):
        """Raw predictions -> what `get_preds` returns; probabilities by default."""
        return pred.softmax(-1)

    def decode(self, pred):
        """Predictions -> what a person reads; the likeliest class by default."""
        return pred.argmax(-1)

    def callbacks(self) -> list[Callback]:
        """fastai callbacks that the method needs."""
        return []

    def chance(self) -> float | None:
        """What the first metric would be by guessing, where that is known."""
        return None

    def embedded(self, pred) -> Tensor | None:
        """Of a prediction what would be the same for all images if the task had collapsed, (B, D); None: it cannot."""
        return None

    def product(self, model: nn.Module) -> nn.Module:
        """The encoder that is saved: of some methods, the teacher's."""
        return model.encoder

    def show(self, inputs, targets, pred=None, ctxs=None, max_n: int = 9, figsize=None) -> list[Axes]:
        """The first input with target (and prediction) as title; inputs in [0, 1] again, on the CPU."""
        images = inputs[0].flatten(1, -4) if inputs[0].ndim > 4 else inputs[0].unsqueeze(1)  # (B, V, C, H, W)
        axes = grid_axes(min(max_n, len(images)), ctxs, figsize)
        for i, ax in enumerate(axes):
            guess = "" if pred is None else f" → {_short(pred[i])}"
            draw(ax, images[i, 0], f"{_short(targets[0][i])}{guess}")
        return axes

    # --- what the base does -------------------------------------------------------------------------------------------

    def batch(
        self,
        x: Tensor,
        *,
        generator: torch.Generator,
        train: bool,
        idx: Tensor | None = None,
        known: Tensor | None = None,
        others: Tensor | None = None,
        common: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        """`make_batch` with its input checked and its output typed: (*inputs, *targets)."""
        float_images(x)
        x = x.as_subclass(Tensor)
        self.check_shape(x.shape)
        extras = self.wanted(known=known, others=others, common=common)
        inputs, targets = self.make_batch(x, generator=generator, train=train, idx=idx, **extras)
        self._check_made(inputs, targets, len(x))
        images = zip(inputs, self.normalized, strict=True)
        return (*(t.as_subclass(TensorImage) if n and t.numel() else t for t, n in images), *targets)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises `TaskError` for batches (B, C, H, W) that the task cannot work with."""
        _, channels, height, width = shape
        if channels not in self.channels:
            wanted = " or ".join(map(str, self.channels))
            said = f"{self.name} works on images of {wanted} channels, these have {channels}. {self.instead}"
            raise TaskError(said.rstrip())
        if min(height, width) < self.min_side:
            raise TaskError(
                f"{self.name} needs images of at least {self.min_side} pixels a side, these are {height} x {width}."
            )

    def _check_made(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], n: int) -> None:
        """Raises `TaskError` where a task's own file breaks the contract: fastai would go on without a word."""
        said = f"make_batch of {self.name} must return (inputs, targets), two tuples of tensors"
        if not (isinstance(inputs, tuple) and isinstance(targets, tuple)):
            raise TaskError(f"{said}; it returned {type(inputs).__name__} and {type(targets).__name__}.")
        if not len(inputs) == len(self.normalized) == self.n_inp:
            counts = f"n_inp is {self.n_inp}, normalized has {len(self.normalized)} entries"
            raise TaskError(f"{said}, n_inp of them inputs; it returned {len(inputs)} inputs, {counts}.")
        if not targets:
            raise TaskError(f"{said}, with at least one target, or fastai takes no step; it returned none.")
        if len(targets) != self.n_targets:
            raise TaskError(f"{said}, n_targets ({self.n_targets}) of them targets; it returned {len(targets)}.")
        rows = [len(t) for t in (*inputs, *targets)]
        if set(rows) != {n}:
            raise TaskError(f"{said}, in which axis 0 is the image; from {n} images it made {rows} rows.")

    def wanted(
        self,
        known: Tensor | None = None,
        others: Tensor | None = None,
        common: torch.Generator | None = None,  # Where several processes train: the same in all of them
    ) -> dict:
        """What make_batch takes of these."""
        facts = {"known": known} if "facts" in self.needs else {}
        return {**facts, "others": others} if self.items == "companions" else facts

    @classmethod
    def setting_names(cls) -> list[str]:
        """Names of the constructor's arguments."""
        return [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "args", "kwargs")]

    def settings(self) -> dict:
        """Constructor arguments by name, as they travel in the encoder's card."""
        return {name: getattr(self, name) for name in self.setting_names()}

    def check_idle(self, where: str, *names: str) -> None:
        """Raises `TaskError` if one of these settings, without effect `where` it says, was given. At a constructor's
        end."""
        for name, value in self.given().items():
            if name in names:
                raise TaskError(f"{self.name}: {name}={value!r} has no effect with {where}. Leave it out.")

    def say_scaled(self) -> None:
        """Says which defaults are smaller than the paper's."""
        ours = [f"{k}={getattr(self, k)} (the paper's: {v})" for k, v in self.scaled if k not in self.given()]
        if ours:
            say(f"{self.name}: for small batches and short runs {', '.join(ours)}.")

    def given(self) -> dict:
        """Settings that are not the defaults."""
        defaults = inspect.signature(type(self).__init__).parameters
        return {name: value for name, value in self.settings().items() if value != defaults[name].default}

    @classmethod
    def kind(cls) -> str:
        """The family: the name of the folder that the task lives in."""
        return cls.__module__.split(".")[-2].replace("_", " ")

    @classmethod
    def asks(cls) -> str:
        """The question, in the first line of the docstring."""
        return inspect.getdoc(cls).splitlines()[0].rstrip(".")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"


def restored_pixels(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Answer and truth, and that all pixels count."""
    return pred.sigmoid(), target, torch.ones_like(target[:, :1])


class RestoringTask(PretextTask):
    """A task whose one input is a spoiled image and whose answer is the whole one, raw until it is made 0..1."""

    metrics = (explained("explained_variance", restored_pixels),)

    def activation(self, pred):
        return pred.sigmoid()

    def decode(self, pred):
        """The image itself."""
        return pred

    def chance(self):
        return 0.0

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """Each image as it was spoiled, (as the network restores it,) and as it was."""
        return draw_restored(inputs[0], targets[0], pred, ctxs, max_n, figsize)


class HiddenTask(PretextTask):
    """A task whose inputs are a view of the image and what of it is hidden, and whose answer paints that.

    Settings `min_area` and `flip` say how views are cut.
    """

    n_inp = 2
    n_targets = 2
    normalized = (True, False)

    def view(self, x: Tensor, side: int, generator: torch.Generator, train: bool) -> Tensor:
        """Crop and flip in training, else the center square, (B, C, side, side)."""
        recipe = Recipe(scale=(self.min_area, 1.0), flip=self.flip, jitter_p=0, grey_p=0)
        return square_view(x, side, recipe if train else None, generator)

    @abstractmethod
    def hidden_pixels(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Of views (B, C, S, S) and the second input, (B, 1, S, S), True where hidden."""

    @abstractmethod
    def painted(self, x: Tensor, hidden: Tensor, pred: Tensor) -> Tensor:
        """The views in [0, 1] with the answer (decoded) where they were hidden, (B, C, S, S)."""

    def activation(self, pred):
        return pred

    def decode(self, pred):
        return pred

    def chance(self):
        return 0.0

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """What the network sees | what it paints | the image."""
        x, hidden = (t[:max_n] for t in inputs)
        pixels = self.hidden_pixels(x, hidden)
        panels, titles = [see_through(x, pixels), x], ["seen | whole"] * len(x)
        if pred is not None:
            painted = self.painted(x, hidden, pred[: len(x)])
            panels.insert(1, painted)
            off = ((painted - x).abs() * pixels).flatten(1).sum(1) / (pixels.flatten(1).sum(1) * x.shape[1])
            titles = [f"seen | painted | whole, {100 * error:.0f} % off" for error in off.tolist()]
        return draw_rows(list(zip(*panels)), titles, ctxs, figsize)


class PretextLoss:
    """A task's loss as fastai calls one: with `reduction`, `activation` and `decodes`."""

    def __init__(self, task: PretextTask):
        self.task, self.reduction = task, "mean"

    def __call__(self, pred, *targets, reduction: str | None = None):
        return self.task.loss(pred, *targets, reduction=reduction or self.reduction)

    def activation(self, pred):
        return self.task.activation(pred)

    def decodes(self, pred):
        return self.task.decode(pred)


class PerView(nn.Module):
    """Encoder and head on every view of every image: (B, V, C, H, W) -> (B, V, d)."""

    def __init__(self, encoder: Encoder, head: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: Tensor) -> Tensor:
        b, v = x.shape[:2]
        return self.head(self.encoder(x.flatten(0, 1))).unflatten(0, (b, v))


def per_image(loss: Tensor, reduction: str) -> Tensor:
    """Reduces losses (B, ...) of one image each to their mean, or to one number for each image, (B,)."""
    loss = loss.flatten(1).mean(1) if loss.ndim > 1 else loss
    return loss.mean() if reduction == "mean" else loss


def class_loss(
    pred: Tensor,  # (B, ..., classes) logits
    target: Tensor,  # (B, ...) int64
    reduction: str,
) -> Tensor:
    """Cross-entropy, the mean over the questions about an image."""
    each = F.cross_entropy(pred.flatten(0, -2), target.flatten(), reduction="none")
    return per_image(each.view(target.shape), reduction)


def _short(value: Tensor) -> str:
    return f"{value.item():.3g}" if value.numel() == 1 else f"{tuple(value.shape)}"
