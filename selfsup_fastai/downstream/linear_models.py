"""Linear models on frozen features, one for each kind of label, and how strongly to regularize them.

All minimize `C * loss + |weights|² / 2`, as scikit-learn does. The strength C is chosen by cross-validation on the
training images alone: `chosen_strength` never sees a test label.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, r2_score
from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

from selfsup_fastai.errors import TaskError
from selfsup_fastai.messages import say

GRID = tuple(10.0**power for power in range(-6, 3))  # Strengths that are tried, the strongest penalty first
DEFAULT_STRENGTH = 0.01  # Where nothing can be held out: one image a class
FOLDS, FEW = 3, 1000  # Two folds more for few images: there is time, and each image counts
STEPS = 1000
_PATIENCE = 2  # Strengths in a row that are worse than the best, if that beats guessing; then the rest is not tried

Folds = list[tuple[np.ndarray, np.ndarray]]  # (rows to fit on, rows held out)


class Softmax:
    """Logistic regression of one class out of several; a fit goes on from the one before."""

    def fit(self, x: np.ndarray, y: np.ndarray, C: float, tol: float = 1e-4) -> "Softmax":
        """x (N, D), y (N,) class numbers."""
        if not hasattr(self, "model"):
            self.model = LogisticRegression(warm_start=True, max_iter=STEPS)
        self.model.set_params(C=C, tol=tol).fit(x, y)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Class numbers (N,)."""
        return self.model.predict(x)


class OneVsRest:
    """A logistic regression for each label: several may be true of an image."""

    def fit(self, x: np.ndarray, y: np.ndarray, C: float, tol: float = 1e-4) -> "OneVsRest":
        """x (N, D), y (N, labels) of 0 and 1."""
        if not hasattr(self, "models"):
            self.models = [LogisticRegression(warm_start=True, max_iter=STEPS) for _ in range(y.shape[1])]
        self.constant = {i: float(column[0]) for i, column in enumerate(y.T) if (column == column[0]).all()}
        for i, model in enumerate(self.models):
            if i not in self.constant:
                model.set_params(C=C, tol=tol).fit(x, y[:, i])
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Scores (N, labels): the logits; infinite where all training images agree."""
        return np.column_stack([self._scores(i, x) for i in range(len(self.models))])

    def _scores(self, i: int, x: np.ndarray) -> np.ndarray:
        if i in self.constant:
            return np.full(len(x), np.finfo(float).max * (2 * self.constant[i] - 1))
        return self.models[i].decision_function(x)


class Ridge:
    """Least squares with an L2 penalty of 1 / C: all strengths from one decomposition of the features."""

    def fit(self, x: np.ndarray, y: np.ndarray, C: float, tol: float = 0.0) -> "Ridge":
        """x (N, D), y (N, values)."""
        if not hasattr(self, "_spectrum"):
            self._means = x.mean(0), y.mean(0)
            centered = x - self._means[0]
            self._dual = len(x) < x.shape[1]
            self._spectrum = np.linalg.eigh(centered @ centered.T if self._dual else centered.T @ centered)
            self._right = (y - self._means[1]) if self._dual else centered.T @ (y - self._means[1])
        values, vectors = self._spectrum
        solved = vectors @ ((vectors.T @ self._right) / (values.clip(min=0) + 1 / C)[:, None])
        self.weights = (x - self._means[0]).T @ solved if self._dual else solved
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Values (N, values)."""
        return (x - self._means[0]) @ self.weights + self._means[1]


MODELS = {"category": Softmax, "multicategory": OneVsRest, "regression": Ridge}


def fitted(kind: str, name: str, x: np.ndarray, y: np.ndarray, C: float) -> Softmax | OneVsRest | Ridge:
    """The model of a kind on all training images. A fit that stopped early is still a fair lower bound: it is said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = MODELS[kind]().fit(x, y, C)
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn(warning.message, stacklevel=2)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        say(f"linear probe: the fit on {name} had not converged after {STEPS} steps; a smaller C helps.")
    return model


def chosen_strength(kind: str, x: np.ndarray, y: np.ndarray, folds: Folds, grid: Sequence[float] = GRID) -> float:
    """The strength whose predictions of held-out images score best; the strongest penalty of several best ones."""
    if not folds:
        return DEFAULT_STRENGTH
    models, held = [MODELS[kind]() for _ in folds], np.concatenate([rows for _, rows in folds])
    x, scores = x.astype(np.float32), []  # half the time, and as good to choose by
    for C in grid:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = [m.fit(x[rows], y[rows], C, tol=1e-3).predict(x[out]) for m, (rows, out) in zip(models, folds)]
        scores.append(score_of(kind, np.concatenate(found), y[held]))
        if _past_the_best(scores):
            break
    return grid[int(np.argmax(scores))]


def _past_the_best(scores: list[float]) -> bool:
    """The first score is about that of guessing: while nothing was better, go on."""
    return max(scores) > scores[0] and max(scores[-_PATIENCE:]) < max(scores)


def folds_of(kind: str, y: np.ndarray, groups: np.ndarray | None, seed: int) -> Folds:
    """Parts to hold out in turn: each class in all of them, a patient in one; none where nothing can be held out.

    As many as the smallest class allows, leaving classes of one image (or patient) aside; at most three, with fewer
    than a thousand images five.
    """
    n_units = len(y) if groups is None else len(np.unique(groups))
    if kind == "category":
        sizes = np.array([_units(np.flatnonzero(y == c), groups) for c in np.unique(y)])
        n_units = min(sizes[sizes > 1], default=1)
    n = min(n_units, FOLDS if len(y) >= FEW else FOLDS + 2)
    if n < 2:
        return []
    strata = y if kind == "category" else np.zeros(len(y), int)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # that one is learned from, never held out
        if groups is not None:
            parts = list(StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(strata, strata, groups))
        else:
            split = StratifiedKFold if kind == "category" else KFold
            parts = list(split(n, shuffle=True, random_state=seed).split(strata, strata))
    return [(rows, out) for rows, out in parts if len(out) and (kind != "category" or len(np.unique(y[rows])) > 1)]


def _units(rows: np.ndarray, groups: np.ndarray | None) -> int:
    return len(rows) if groups is None else len(np.unique(groups[rows]))


def in_own_span(x: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both features (N, D) in N coordinates, where N < D: a turn that changes no penalized fit, and no prediction.

    The weights of such a fit lie in the span of the training features: what lies across counts for nothing.
    """
    if len(x) >= x.shape[1]:
        return x, other
    q, _ = np.linalg.qr(x.T)
    return x @ q, other @ q


def score_of(kind: str, predictions: np.ndarray, y: np.ndarray) -> float:
    """Accuracy, mAP or R2: higher is better."""
    if kind == "category":
        return float((predictions == y).mean())
    if kind == "multicategory":
        return mean_precision(predictions, y)
    return float(r2_score(y, predictions))


def mean_precision(scores: np.ndarray, y: np.ndarray) -> float:
    """Mean over the labels of the average precision; labels that all images have, or none, are left out."""
    told = np.flatnonzero((y.min(0) == 0) & (y.max(0) == 1))
    if not len(told):
        raise TaskError("There is no label that some of the images have and others have not: nothing can be ranked.")
    return float(np.mean([average_precision_score(y[:, i], scores[:, i]) for i in told]))
