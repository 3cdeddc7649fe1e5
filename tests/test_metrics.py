"""Metrics that are sums over all images: batches of any size give one number, that of numpy over everything."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup_fastai.metrics import OfSums, average, explained, share


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PRED, TRUTH = numbers(64, 2, 3, 5), 1 + 2 * numbers(64, 2, 3, 5, seed=1)
WEIGHT = numbers(64, 1, 3, 5, seed=2).abs() * (torch.arange(64) % 3 > 0).view(-1, 1, 1, 1)  # some images do not count


def weighted(pred: Tensor, truth: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return pred, truth, weight


def right(pred: Tensor, truth: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (weight * (pred > 0) * (truth > 0)).sum(), weight.sum() * pred.shape[1]


def mean_distance(pred: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    return (pred - truth).abs().mean()


def metrics() -> dict[str, tuple[OfSums, float]]:
    """Each with its number, computed by numpy over all images."""
    pred, truth, weight = (x.double().numpy() for x in (PRED, TRUTH, WEIGHT.expand(-1, 2, -1, -1)))
    error = (weight * (pred - truth) ** 2).sum()
    mean = (weight * truth).sum((0, 2, 3), keepdims=True) / weight.sum((0, 2, 3), keepdims=True)
    return {
        "average": (average("average", mean_distance), np.abs(pred - truth).mean()),
        "share": (share("share", right), (weight * (pred > 0) * (truth > 0)).sum() / weight.sum()),
        "explained": (explained("explained", weighted), 1 - error / (weight * (truth - mean) ** 2).sum()),
        "around_0": (explained("around_0", weighted, around_mean=False), 1 - error / (weight * truth**2).sum()),
    }


def value(metric: OfSums, bs: int) -> float:
    """As fastai computes it."""
    metric.reset()
    for i in range(0, 64, bs):
        metric.accumulate(SimpleNamespace(pred=PRED[i : i + bs], yb=(TRUTH[i : i + bs], WEIGHT[i : i + bs])))
    return float(metric.value)


@pytest.mark.parametrize("name", metrics())
def test_batches_of_any_size_give_the_number_over_all_images(name):
    metric, expected = metrics()[name]
    assert [value(metric, bs) for bs in (1, 4, 24, 64)] == pytest.approx([expected] * 4, rel=1e-5)
    assert metric(PRED, TRUTH, WEIGHT).item() == pytest.approx(expected, rel=1e-5)
    assert metric.name == name


def test_means_over_batches_would_be_another_number():
    """What these metrics are for."""
    metric, expected = metrics()["explained"]
    parts = [metric(PRED[i : i + 4], TRUTH[i : i + 4], WEIGHT[i : i + 4]).item() for i in range(0, 64, 4)]
    assert abs(np.mean(parts) - expected) > 1e-3


def test_ends_of_the_scale():
    metric = explained("explained", weighted)
    everywhere = torch.ones_like(TRUTH[:, :1])
    mean = TRUTH.mean((0, 2, 3), keepdim=True).expand_as(TRUTH)
    assert metric(TRUTH, TRUTH, everywhere) == 1
    assert metric(mean, TRUTH, everywhere).item() == pytest.approx(0, abs=1e-5)
    assert metric(-TRUTH, TRUTH, everywhere) < 0
    around_0 = explained("explained", weighted, around_mean=False)
    assert around_0(torch.zeros_like(TRUTH), TRUTH, everywhere) == 0


def test_where_nothing_counts_nothing_is_right_and_no_error_comes():
    nothing = torch.zeros_like(WEIGHT)
    assert share("share", right)(PRED, TRUTH, nothing) == 0
    assert torch.isfinite(explained("explained", weighted)(PRED, TRUTH, nothing))
    assert average("average", mean_distance).value is None
