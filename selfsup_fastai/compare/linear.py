"""The cheap trial: a linear model on frozen features, which are computed once."""

import warnings

import numpy as np
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from selfsup_fastai.compare.starts import Start, made
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.errors import TaskError
from selfsup_fastai.features import embed, finite
from selfsup_fastai.messages import quiet


def frozen_features(
    dls: DataLoaders,  # Labeled
    start: Start,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # Of the training images, their labels, features of the test images
    """What the encoder makes of all images, before it has seen a label."""
    set_seed(seed, reproducible=True)
    with quiet():
        learn = downstream_learner(dls, made(start.source(seed)), metrics=[])
        train, test = (embed(learn.model.encoder, dl) for dl in (learn.dls.train, learn.dls.valid))
    return finite(train.x).numpy(), train.y.numpy(), finite(test.x).numpy()


def linear_predictions(
    x: np.ndarray,  # (n, features) with labels
    y: np.ndarray,  # (n, ...)
    test_x: np.ndarray,
    kind: str,  # Of the labels
    n_out: int,  # Classes, or numbers
    C: float = 1.0,  # Inverse strength of the penalty
) -> np.ndarray:  # As `trial.predicted` returns it
    """Logistic regression, or ridge regression for numbers, on standardized features."""
    if kind == "mask":
        raise TaskError("Masks have no linear trial: use method='fine_tune'.")
    if kind == "category":
        return _probabilities(x, y, test_x, n_out, C)
    if kind == "multicategory":
        each = [_probabilities(x, y[:, c].astype(int), test_x, 2, C)[:, 1] for c in range(y.shape[1])]
        return np.stack(each, axis=1)
    model = make_pipeline(StandardScaler(), Ridge(alpha=1 / C))
    return model.fit(x, y.reshape(len(y), -1)).predict(test_x).reshape(len(test_x), -1).astype(np.float32)


def _probabilities(x: np.ndarray, y: np.ndarray, test_x: np.ndarray, n_classes: int, C: float) -> np.ndarray:
    """(n, n_classes); of classes without a label 0."""
    found = np.zeros((len(test_x), n_classes), np.float32)
    seen = np.unique(y)
    if len(seen) == 1:
        found[:, seen[0]] = 1
        return found
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that stops early is a fair one, too
        found[:, seen] = model.fit(x, y).predict_proba(test_x)
    return found
