"""How good an encoder looks to the labels that one may look at: those of the training images."""

from typing import Any

import numpy as np
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

from selfsup_fastai.compare.linear import linear_predictions
from selfsup_fastai.compare.scores import Score
from selfsup_fastai.data.subsets import subset
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.features import embed, finite
from selfsup_fastai.messages import quiet

MOST, FOLDS, LEAST, PENALTY = 2000, 5, 10, 0.1
"""Images looked at, parts they are divided in, images without which nothing can be said, C of the linear model."""


def training_score(
    encoder: Any,  # A saved one, for one
    dls: DataLoaders,  # Labeled; the test images are not looked at
    kind: str,  # Of the labels
    score: Score,
    groups: np.ndarray | None = None,  # (n,) whose the training images are
) -> float:  # NaN where it cannot be had: for masks, and for fewer than ten images
    """The score of a linear model on the frozen features of all layers, cross-validated within the training images."""
    n = len(dls.train_ds)
    if kind == "mask" or n < LEAST:
        return float("nan")
    places = np.sort(np.random.default_rng(0).permutation(n)[:MOST])
    set_seed(0, reproducible=True)
    with quiet():
        some = subset(dls.train, places, shuffle=False, drop_last=False)
        learn = downstream_learner(DataLoaders(some, dls.valid, path=dls.path, device=dls.device), encoder)
        found = embed(learn.model.encoder, learn.dls.train, layers=learn.model.encoder.layer_names or None)
    x, y = finite(found.x).numpy(), found.y.numpy()
    y = y.astype(int) if kind == "category" else y.reshape(len(y), -1)
    n_out = int(y.max()) + 1 if kind == "category" else y.shape[1]
    answers = np.zeros((len(y), n_out), np.float32)
    for fit, rest in _folds(x, y, kind, None if groups is None else groups[places]):
        answers[rest] = linear_predictions(x[fit], y[fit], x[rest], kind, n_out, PENALTY)
    return score(answers, y)


def _folds(x: np.ndarray, y: np.ndarray, kind: str, groups: np.ndarray | None) -> list:
    """Whole groups on one side; else with the classes' shares."""
    if groups is not None and 2 <= (n := len(np.unique(groups))) < len(x):
        return list(GroupKFold(min(FOLDS, n)).split(x, y, groups))
    fewest = np.unique(y, return_counts=True)[1].min() if kind == "category" else 0
    if fewest >= 2:
        return list(StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=0).split(x, y))
    return list(KFold(FOLDS, shuffle=True, random_state=0).split(x))
