"""Linear support vector machines on a few images of each class: the low-shot protocol of VOC07.

Goyal, Mahajan, Gupta & Misra 2019, "Scaling and Benchmarking Self-Supervised Visual Representation Learning"
(arXiv 1905.01235) and its code: features scaled to length 1, squared hinge, L2 penalty, one machine a class. Their
code reports the cost that does best on the *test* images; here costs are chosen on the images drawn.
"""

from collections.abc import Callable

import numpy as np
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from selfsup_fastai.downstream.linear_models import in_own_span

COSTS = tuple(10.0**power for power in range(-3, 3))
DEFAULT_COST = 1.0  # Of one image a class, where nothing can be held out
POSITIVE = 2  # Weight of the images that have the label, where they are few among many: as in their code
FOLDS = 3


def classes_score(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, k: int, rng, seed: int):
    """Accuracy on the test images after `k` random images of each class, one common cost."""
    rows = np.concatenate([rng.choice(np.flatnonzero(y == c), k, replace=False) for c in np.unique(y)])
    x, x_test = in_own_span(x[rows], x_test)
    cost = _chosen(x, y[rows], k, seed, lambda machine, x, y: machine.score(x, y))
    return _machine(cost).fit(x, y[rows]).score(x_test, y_test)


def labels_score(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, k: int, rng, seed: int):
    """mAP on the test images after, for each label, `k` random images with it and (labels - 1) `k` without."""
    precisions = []
    for i in _told(y, y_test):
        having, others = np.flatnonzero(y[:, i] == 1), np.flatnonzero(y[:, i] == 0)
        n_others = min((y.shape[1] - 1) * k, len(others))
        rows = np.concatenate([rng.choice(having, k, replace=False), rng.choice(others, n_others, replace=False)])
        few, test = in_own_span(x[rows], x_test)
        cost = _chosen(few, y[rows, i], min(k, n_others), seed, _precision, {0: 1, 1: POSITIVE})
        machine = _machine(cost, {0: 1, 1: POSITIVE}).fit(few, y[rows, i])
        precisions.append(_precision(machine, test, y_test[:, i]))
    return float(np.mean(precisions))


def most_shots(kind: str, y: np.ndarray, y_test: np.ndarray) -> int:
    """Images of the smallest class."""
    if kind == "category":
        return int(np.unique(y, return_counts=True)[1].min())
    return int(min((y[:, i].sum() for i in _told(y, y_test)), default=0))


def _told(y: np.ndarray, y_test: np.ndarray) -> np.ndarray:
    """Labels that some images have and others have not, in training and in testing."""
    varies = [(part.min(0) == 0) & (part.max(0) == 1) for part in (y, y_test)]
    return np.flatnonzero(varies[0] & varies[1])


def _machine(cost: float, weights: dict | None = None) -> LinearSVC:
    """The primal problem, which is solved exactly in a few steps where there are few images."""
    return LinearSVC(C=cost, class_weight=weights, dual=False, max_iter=10_000, random_state=0)


def _chosen(x: np.ndarray, y: np.ndarray, smallest: int, seed: int, score: Callable, weights=None) -> float:
    """The cost that does best on images held out in turn; of several the smallest."""
    n = min(FOLDS, smallest)
    if n < 2:
        return DEFAULT_COST
    folds = list(StratifiedKFold(n, shuffle=True, random_state=seed).split(x, y))
    scores = [
        np.mean([score(_machine(cost, weights).fit(x[rows], y[rows]), x[out], y[out]) for rows, out in folds])
        for cost in COSTS
    ]
    return COSTS[int(np.argmax(scores))]


def _precision(machine: LinearSVC, x: np.ndarray, y: np.ndarray) -> float:
    return float(average_precision_score(y, machine.decision_function(x)))
