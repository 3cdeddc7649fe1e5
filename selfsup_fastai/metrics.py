"""Metrics made of sums over all images: batches of any size give the same number."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fastai.learner import Metric
from torch import Tensor

from selfsup_fastai.errors import TaskError


class OfSums(Metric):
    """A fastai metric that adds numbers up over the batches and divides at the end, never before.

    fastai's `AvgMetric` takes the mean over the batches of what each of them came to. Of a ratio whose denominator
    varies from batch to batch that is another number, which depends on the batch size.
    """

    def __init__(
        self,
        name: str,  # Of the column
        sums: Callable[..., tuple[Tensor, ...]],  # (pred, *targets) of a batch -> what is added up
        finish: Callable[..., Tensor],  # The sums -> the number
    ):
        self.__name__, self.sums, self.finish, self.totals = name, sums, finish, None

    def __call__(self, pred: Any, *targets: Tensor) -> Tensor:
        """The number of one batch alone."""
        return self.finish(*self.sums(pred, *targets))

    def reset(self):
        self.totals = None

    def accumulate(self, learn):
        self.add(learn.pred, *learn.yb)

    def add(self, pred: Any, *targets: Tensor) -> None:
        """Take a batch in."""
        sums = [x.detach().cpu().double() for x in self.sums(pred, *targets)]
        self.totals = sums if self.totals is None else [a + b for a, b in zip(self.totals, sums)]

    @property
    def value(self) -> Tensor | None:
        return None if self.totals is None else self.finish(*self.totals)

    @property
    def name(self) -> str:
        return self.__name__


def average(
    name: str,
    metric: Callable[..., Tensor],  # (pred, *targets) -> the mean over the images of a batch
) -> OfSums:
    """An ordinary metric, each batch weighted by its images."""
    return OfSums(name, _Weighted(metric), torch.div)


def share(
    name: str,
    counted: Callable[..., tuple[Tensor, Tensor]],  # (pred, *targets) -> how much is right, of how much
) -> OfSums:
    """Right answers by all answers; 0 where there are none."""
    return OfSums(name, counted, _share)


def explained(
    name: str,
    compared: Callable[..., tuple[Tensor, Tensor, Tensor]],  # (pred, *targets) -> prediction, truth (B, C, ...), weight
    around_mean: bool = True,  # Variance around the truth's mean of each of C; False: around 0
) -> OfSums:
    """The share of the variance that predictions explain: 1 - squared error / squared distance from the mean (R^2).

    1 is perfect, 0 is as good as always naming the mean (or 0); what is worse is below 0. Weights are broadcast to the
    truth.
    """
    return OfSums(name, _Compared(compared), _explained if around_mean else _explained_around_0)


class _Weighted:
    """A batch's mean as a sum and a count. A class, as lambdas could not be exported with a learner."""

    def __init__(self, metric: Callable):
        self.metric = metric

    def __call__(self, pred: Any, *targets: Tensor) -> tuple[Tensor, Tensor]:
        value, n = self.metric(pred, *targets), len(targets[0])
        return value * n, torch.tensor(n)


class _Compared:
    """Squared error, weight, sum and sum of squares of the truth, each of them for each channel, (C,)."""

    def __init__(self, compared: Callable):
        self.compared = compared

    def __call__(self, pred: Any, *targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        answer, truth, weight = (x.float() for x in self.compared(pred, *targets))
        weight = weight.expand_as(truth)
        others = [axis for axis in range(truth.ndim) if axis != 1]
        numbers = (answer - truth).square(), torch.ones_like(truth), truth, truth.square()
        return tuple((weight * x).sum(others) for x in numbers)


def _explained(error: Tensor, n: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    return 1 - error.sum() / (squares - total.square() / n.clamp(min=1e-6)).sum().clamp(min=1e-6)


def _explained_around_0(error: Tensor, n: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    return 1 - error.sum() / squares.sum().clamp(min=1e-6)


def _share(right: Tensor, of: Tensor) -> Tensor:
    return right / of.clamp(min=1e-6)


def image_dice(
    predicted: np.ndarray,  # (n, H, W) class numbers
    truth: np.ndarray,  # (n, H, W)
    n_classes: int,
    ignored: int | None = None,  # A value of `truth` that does not count
) -> np.ndarray:  # (n,)
    """The Dice coefficient of each image: the mean over the classes, but 0 (the background), that are in it or were
    found in it. An image that rightly shows none of them gets 1.
    """
    kept = np.ones(truth.shape, bool) if ignored is None else truth != ignored
    sums, counts = np.zeros(len(truth)), np.zeros(len(truth))
    for c in range(1, n_classes):
        found, there = (predicted == c) & kept, (truth == c) & kept
        size = (found.sum((1, 2)) + there.sum((1, 2))).astype(float)
        sums += 2 * (found & there).sum((1, 2)) / np.maximum(size, 1)
        counts += size > 0
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)


class Dice(Metric):
    """The mean of `image_dice` over all images."""

    def __init__(
        self,
        n_classes: int,
        ignored: int | None = None,  # A value of masks that does not count
    ):
        self.n_classes, self.ignored, self.found = n_classes, ignored, []

    def reset(self):
        self.found = []

    def accumulate(self, learn):
        masks = learn.pred.argmax(1), learn.yb[0]
        self.found += [image_dice(*(mask.cpu().numpy() for mask in masks), self.n_classes, self.ignored)]

    @property
    def value(self) -> float | None:
        return float(np.concatenate(self.found).mean()) if self.found else None

    @property
    def name(self) -> str:
        return "dice"


class OfAll(Metric):
    """A score of all predictions together, such as one of ranks."""

    def __init__(
        self,
        name: str,  # Of the column
        score: Callable[[np.ndarray, np.ndarray], float],  # Predictions (N, n) and truth (N, n)
    ):
        self.__name__, self.score = name, score
        self.reset()

    def reset(self):
        self.predicted, self.truth = [], []

    def accumulate(self, learn):
        for kept, values in ((self.predicted, learn.pred), (self.truth, learn.yb[0])):
            kept.append(values.detach().as_subclass(Tensor).reshape(len(values), -1).cpu().double())

    @property
    def value(self) -> float | None:
        """None of fewer than two images, where they tell nothing, and where the network diverged."""
        if sum(map(len, self.truth)) < 2:
            return None
        predicted, truth = torch.cat(self.predicted), torch.cat(self.truth)
        if not (predicted.isfinite().all() and truth.isfinite().all()):
            return None
        try:
            return self.score(predicted.numpy(), truth.numpy())
        except TaskError:
            return None

    @property
    def name(self) -> str:
        return self.__name__
