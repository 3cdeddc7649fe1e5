"""What test images are scored by. Higher is better, always.

A score takes weights of the images, many sets of them at once: so `statistics` can ask what it would have been on
other test images. Without weights the values are scikit-learn's.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from selfsup_fastai.errors import TaskError, unknown

_CELLS = 2**24  # Weights held at once: 128 MB


class Score(NamedTuple):
    """A way to score predictions (n, ...) of n images, given what is true (n, ...)."""

    name: str
    kinds: tuple[str, ...]  # Of labels that it suits
    of: Callable  # (predictions, truth, weights (R, n)) -> (R,)
    is_share: bool = True  # Whether it lies in [0, 1]

    def __call__(
        self,
        predicted: np.ndarray,  # (n, classes) probabilities; (n, numbers); of masks (n,) the Dice of each image
        truth: np.ndarray,  # (n,) class numbers; (n, classes) 0 or 1; (n, numbers); of masks anything of length n
        weights: np.ndarray | None = None,  # (R, n): how much each image counts, R times anew; None: all the same
    ) -> np.ndarray | float:  # (R,), or one number without weights
        """The score; with weights one for each set of them."""
        predicted, truth = np.asarray(predicted, float), np.asarray(truth)
        if weights is None:
            return float(self.of(predicted, truth, np.ones((1, len(truth))))[0])
        chunks = np.array_split(weights, max(1, -(-weights.size // _CELLS)))
        return np.concatenate([self.of(predicted, truth, chunk) for chunk in chunks])


def score_for(
    kind: str,  # Of labels: 'category', 'multicategory', 'regression', 'points' or 'mask'
    metric: str | None = None,  # A name in `SCORES`; None: the usual one of the kind
) -> Score:
    """The score by its name. Raises `UnknownNameError`, and `TaskError` for one that does not suit the labels."""
    if metric is None:
        return SCORES[DEFAULTS[kind]]
    if metric not in SCORES:
        raise unknown("score", metric, SCORES)
    score = SCORES[metric]
    if kind not in score.kinds:
        fitting = ", ".join(name for name, one in SCORES.items() if kind in one.kinds)
        raise TaskError(f"metric={metric!r} does not suit labels of the kind {kind}; take one of: {fitting}.")
    return score


def _accuracy(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean(predicted.argmax(1) == truth, weights)


def _balanced_accuracy(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over the classes that there are of the share of their images named rightly."""
    right = predicted.argmax(1) == truth
    return np.mean([_mean(right[truth == c], weights[:, truth == c]) for c in np.unique(truth)], axis=0)


def _auc(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: of two classes that of the second, else the mean of each against all others."""
    classes = [1] if predicted.shape[1] == 2 else range(predicted.shape[1])
    areas = [_area(predicted[:, c], truth == c, weights) for c in classes if 0 < (truth == c).sum() < len(truth)]
    return np.mean(areas, axis=0) if areas else np.full(len(weights), np.nan)


def _area(values: np.ndarray, is_one: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Of two images, one of the class and one not, how often the first has the higher value; ties count half."""
    ones, others = _blocks(values, (weights * is_one, weights * ~is_one))
    below = others.cumsum(1) - others / 2
    return (ones * below).sum(1) / (ones.sum(1) * others.sum(1))


def _mean_precision(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """mAP: the mean of the average precision over the classes that some images have."""
    classes = [c for c in range(predicted.shape[1]) if truth[:, c].any()]
    if not classes:
        return np.full(len(weights), np.nan)
    return np.mean([_precision(predicted[:, c], truth[:, c] > 0, weights) for c in classes], axis=0)


def _precision(values: np.ndarray, is_one: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The precision at each value taken as threshold, weighted by the recall that it adds."""
    ones, every = _blocks(-values, (weights * is_one, weights))
    precision = ones.cumsum(1) / np.maximum(every.cumsum(1), np.finfo(float).tiny)
    return (ones * precision).sum(1) / ones.sum(1)


def _blocks(values: np.ndarray, parts: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Weights (R, n) summed over images of the same value, in ascending order of the values: (R, different values)."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))
    return [np.add.reduceat(part[:, order], starts, axis=1) for part in parts]


def _r2(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the variance that is explained; of several numbers the mean."""
    predicted, truth = predicted.reshape(len(truth), -1), truth.reshape(len(truth), -1).astype(float)
    share = weights / weights.sum(1, keepdims=True)
    left = share @ (truth - predicted) ** 2
    there = np.stack([(share * (column - share @ column[:, None]) ** 2).sum(1) for column in truth.T], axis=1)
    safe = np.where(there > 0, there, 1)
    return np.where(there > 0, 1 - left / safe, np.where(left > 0, 0.0, 1.0)).mean(1)


def _negative_error(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean absolute error, below zero: so that higher is better."""
    wrong = np.abs(predicted.reshape(len(truth), -1) - truth.reshape(len(truth), -1))
    return -_mean(wrong.mean(1), weights)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) weighted by each row of (R, n)."""
    return weights @ values.astype(float) / weights.sum(1)


def _dice(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _mean(predicted, weights)


SCORES = {
    score.name: score
    for score in (
        Score("accuracy", ("category",), _accuracy),
        Score("balanced accuracy", ("category",), _balanced_accuracy),
        Score("AUC", ("category",), _auc),
        Score("mAP", ("multicategory",), _mean_precision),
        Score("R2", ("regression", "points"), _r2, False),
        Score("negative MAE", ("regression", "points"), _negative_error, False),
        Score("dice", ("mask",), _dice),
    )
}
DEFAULTS = {"category": "accuracy", "multicategory": "mAP", "regression": "R2", "points": "R2", "mask": "dice"}
