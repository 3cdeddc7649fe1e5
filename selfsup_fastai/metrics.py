"""Metrics made of sums over all images: batches of any size give the same number."""

from collections.abc import Callable
from typing import Any

import torch
from fastai.learner import Metric
from torch import Tensor


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
