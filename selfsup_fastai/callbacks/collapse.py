"""What embeddings look like without any label, after each epoch; and an alarm when they become all the same."""

import math
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from selfsup_fastai.callbacks.columns import Columns
from selfsup_fastai.data.loader import IndexedDL, are_scans, derive_loaders
from selfsup_fastai.data.recipes import SIMCLR, adapted, for_scans
from selfsup_fastai.data.views import random_view
from selfsup_fastai.errors import TaskError
from selfsup_fastai.features import alignment, effective_rank, embed, feature_std, uniformity
from selfsup_fastai.messages import say
from selfsup_fastai.processes import gathered
from selfsup_fastai.seeding import VALID_SEED, Generator

SIGNALS = {
    "rank": "effective rank",
    "std": "deviation of directions",
    "alignment": "alignment",
    "uniformity": "uniformity",
}
LOW, FALLEN, RISING = 0.1, 0.5, 1.05  # See `has_collapsed`
MOST = 2048  # Embeddings of the validation set that the alarm looks at


class Signals(Columns):
    """After each epoch, what the embeddings of some images say without labels: four more columns, and one picture.

    `signals = Signals()`, `learn.fit_one_cycle(20, 3e-3, cbs=signals)`, `signals.plot()`. All are of the features of
    the encoder that will be saved, on the same images and views each time, in evaluation mode:

    - `rank`: the effective rank, RankMe (Garrido et al. 2023): how many directions are in use
    - `std`: how different the directions of different images are, 0 after a collapse, 1 if they lie anywhere
    - `alignment`: how far apart an image and a view of it are, 0 to 4 (Wang & Isola 2020)
    - `uniformity`: how evenly embeddings lie on the sphere, -8 (evenly) to 0 (all alike) (the same)

    None of them is a quality by itself; compare epochs of one run, or runs of one task and network. To choose an epoch
    the validation loss is the better guide (bench/signals.py): features of random weights have a high rank, which falls
    before it rises. fastai's callbacks take them like any column. Costs two passes of `n` images an epoch, without
    gradients.
    """

    names = tuple(SIGNALS)

    def __init__(
        self,
        n: int = 1024,  # Images, of the validation set and then of the training set
        views=None,  # Of `alignment`: 'photo', 'scan', 'microscopy' or fields of a recipe; None: by the images
    ):
        super().__init__()
        self.n, self.views, self.parts, self.of_scans = n, views, None, False

    def before_fit(self):
        super().before_fit()
        if self.run and self.parts is None:
            plain = derive_loaders(self.dls, dl_type=IndexedDL, drop=_questions(self.dls.valid))
            self.of_scans = are_scans(plain)
            rest = self.n - len(plain.valid.dataset)
            parts = _some(plain.valid, self.n), _some(_as_valid(plain), rest) if rest > 0 else None
            self.parts = [part for part in parts if part is not None]

    def look(self, encoder: nn.Module) -> dict[str, float]:
        """The four numbers of an encoder as it is now; once a run has begun."""
        pairs = Pairs(encoder, for_scans(self.views) if self.of_scans else self.views)
        both = torch.cat([embed(pairs, part).x for part in self.parts])
        x, y = both.chunk(2, 1)
        return {
            "rank": effective_rank(x),
            "std": feature_std(x),
            "alignment": alignment(x, y),
            "uniformity": uniformity(x),
        }

    @property
    def history(self) -> pd.DataFrame:
        """A row for each epoch of all fits: epoch, rank, std, alignment, uniformity."""
        return pd.DataFrame(self.rows, columns=["epoch", *SIGNALS])

    def plot(self) -> list[Axes]:
        """The four signals over the epochs."""
        if not self.rows:
            raise TaskError("There are no signals yet: train with cbs=Signals() first.")
        history = self.history
        _, axes = plt.subplots(1, 4, figsize=(14, 2.8))
        for ax, (name, title) in zip(axes, SIGNALS.items()):
            ax.plot(history["epoch"] + 1, history[name], "o-", markersize=3)
            ax.set(xlabel="epoch", title=title)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        plt.tight_layout()
        return list(axes)


class Level(NamedTuple):
    """How different the embeddings of different images are."""

    deviation: float  # `feature_std`, or the plain deviation where the length of embeddings is part of the loss
    rank: float  # Effective rank: directions in use


class CollapseAlarm(Callback):
    """Says when a task gives up: the embeddings of all images become one and the same, or use ever fewer directions.

    It looks at what the task compares (`PretextTask.embedded`: projections, of validation images, which go through the
    network anyway), after each epoch; `has_collapsed` has the rule. The line names what usually causes that in this
    task and what to try. Nothing is stopped or changed; `learn.collapse_alarm.epochs` lists the epochs in question,
    `levels` what was measured after each.
    """

    order = 46

    def __init__(self):
        self.epochs, self.levels, self.seen = [], [], []

    def before_validate(self):
        self.seen = []

    def after_pred(self):
        if not self.training and sum(map(len, self.seen)) < MOST:
            z = self.learn.task.embedded(self.learn.pred)
            if z is not None:
                self.seen.append(z.detach().float().cpu())

    def after_validate(self):
        seen, self.seen = self.seen, []
        recorder = getattr(self.learn, "recorder", None)  # `FetchPredsCallback` looks without one
        if not getattr(recorder, "losses", None) or not seen:  # `validate()` takes no step
            return
        z = gathered(torch.cat(seen))
        if len(z) < 2:
            return
        self.levels.append(self.measure(z))
        task = self.learn.task
        if has_collapsed(self.levels, 0 if task.length_counts else LOW):
            if not self.epochs:
                deviation, rank = self.levels[-1]
                say(f"{task.name} is collapsing (deviation {deviation:.2g}, rank {rank:.2g}): {task.collapse_hint}")
            self.epochs.append(len(self.levels) - 1)

    def measure(self, z: Tensor) -> Level:
        """Of embeddings (N, D), one of each image."""
        if not torch.isfinite(z).all():
            return Level(float("nan"), float("nan"))
        if self.learn.task.length_counts:
            return Level(z.std(0).mean().item(), effective_rank(z))
        return Level(feature_std(z), effective_rank(F.normalize(z, dim=1)))


def has_collapsed(
    levels: list[Level],  # After each epoch so far
    low: float = LOW,  # A deviation below this is none, unless it rises
) -> bool:
    """Whether the last level is that of a collapse: numbers that are none; or, from the second epoch on, a deviation
    that does not rise and is below `low` or half of what it was once, or a rank that does not rise and is below half.

    Measured on runs of some hundred images: in healthy ones the rank kept .65 of its greatest or more, and a deviation
    below .1 was rising. Without SimSiam's stop-gradient or predictor, BYOL's predictor or VICReg's variance term one of
    both fell to a third or less (tests/callbacks/test_collapse.py). A collapse may be slow: without its predictor
    SimSiam still had .57 of its rank after 60 epochs at a rate of 1e-2, which raises no alarm.
    """
    *before, now = levels
    if not all(math.isfinite(value) for value in now):
        return True
    if not before:
        return False
    falls = [value <= RISING * last for value, last in zip(now, before[-1])]
    most = [max(values) for values in zip(*before)]
    fallen = [fall and value < FALLEN * top for fall, value, top in zip(falls, now, most)]
    return any(fallen) or (falls[0] and now.deviation < low)


class Pairs(nn.Module):
    """An encoder on images as they are and on a view of each: (B, C, H, W) in [0, 1] -> (B, 2 D)."""

    def __init__(self, encoder: nn.Module, views: object):
        super().__init__()
        self.encoder, self.views, self.generator = encoder, views, None

    def forward(self, x: Tensor) -> Tensor:
        if self.generator is None:
            self.generator = Generator(x.device, VALID_SEED)
        recipe = adapted(SIMCLR, self.views, x.shape[1], min(x.shape[-2:]))
        view = random_view(x, recipe, self.generator)
        return torch.cat([self.encoder(self.encoder.prepare(part)) for part in (x, view)], 1)


def _questions(dl) -> tuple[type, ...]:
    """The classes of batch transforms that make questions of images."""
    return tuple(type(t) for t in dl.after_batch.fs if hasattr(t, "task") or hasattr(t, "prepares"))


def _some(dl: IndexedDL, n: int) -> IndexedDL | None:
    """The loader over at most n of its images, evenly spread; None if that is none."""
    total = len(dl.dataset)
    n = min(n, total)
    return None if n < 1 else dl.over(dl, [i * total // n for i in range(n)], shuffle=False, drop_last=False)


def _as_valid(dls: object) -> IndexedDL:
    """The training images as validation images are looked at."""
    return dls.valid.over(dls.train, range(len(dls.train.dataset)))
