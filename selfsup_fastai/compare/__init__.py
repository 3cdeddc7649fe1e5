"""Did it help? Encoders side by side on the same few labels, drawn several times."""

from collections.abc import Mapping
from typing import Any

import fastai.callback.progress  # noqa: F401  (brings no_bar to Learner)
import numpy as np
import pandas as pd
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from scipy import stats
from tqdm.auto import tqdm

from selfsup_fastai.callbacks.log import SkipValidation
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.downstream.learner import DownstreamLearner, downstream_learner
from selfsup_fastai.downstream.schedule import check_count
from selfsup_fastai.encoders.checkpoint import is_fresh
from selfsup_fastai.errors import DataError
from selfsup_fastai.features import embed, knn_accuracy
from selfsup_fastai.messages import quiet


def label_draws(labels: pd.Series, per_class: int, draws: int, seed: int = 42) -> list[np.ndarray]:
    """`draws` times the positions of `per_class` random images of each class."""
    counts = labels.value_counts()
    if counts.min() < per_class:
        raise DataError(f"Class {counts.idxmin()!r} has {counts.min()} images, {per_class} a class were asked for.")
    positions = [np.flatnonzero(labels == label) for label in sorted(labels.unique())]
    rng = np.random.default_rng(seed)
    return [np.concatenate([rng.choice(p, per_class, replace=False) for p in positions]) for _ in range(draws)]


def compare_encoders(
    starts: Mapping[str, Any],  # Name -> a saved encoder, an Encoder or a learner; or an architecture, from scratch
    train: pd.DataFrame,  # Columns file and label: where the few labels are drawn from
    test: pd.DataFrame,  # The same for the images to test on; pretraining must not have seen them
    per_class: int = 5,  # Labels a class
    draws: int = 5,  # Times the labels are drawn; every start gets the same
    epochs: int = 20,  # Over the labeled images, the same for every start; at least 2
    size: int = 32,  # Pixels
    n_in: int = 3,  # Channels of nets from scratch
    bs: int = 16,
    k: int = 5,  # Of kNN on the frozen encoder
    lr: float = 5e-3,  # Peak rate of all layers from scratch, and of the head of pretrained nets (twice that alone)
    seed: int = 42,
    cache: bool | str = True,  # Where decoded pixels are kept, as in `UnlabeledDataLoaders`
) -> pd.DataFrame:
    """One row a run: start, draw, accuracy on the test set after the last epoch, and kNN accuracy before fine-tuning.

    A pretrained encoder is fine-tuned gradually. A net from scratch is trained by one cycle with all layers at one
    rate, for as many epochs: low rates and frozen layers would hold it back, and flatter the others.

    Test labels choose nothing: neither the epoch nor any setting. The interval that `summarize` makes of it covers the
    draw of the labels and the order and initialization of fine-tuning, not the one pretraining run behind each encoder.
    """
    check_count("epochs", epochs, 2)
    for table in (train, test):
        if not isinstance(table, pd.DataFrame) or not {"file", "label"} <= set(table.columns):
            got = list(table.columns) if isinstance(table, pd.DataFrame) else type(table).__name__
            raise DataError(f"train and test are DataFrames with columns file and label, got {got}. See labeled_files.")
    chosen = label_draws(train["label"], per_class, draws, seed)
    runs = []
    with tqdm(total=draws * len(starts), desc="fine-tuning", disable=None, leave=False) as bar:
        for draw, rows in enumerate(chosen):
            table = pd.concat([train.iloc[rows].assign(is_valid=False), test.assign(is_valid=True)], ignore_index=True)
            for name, start in starts.items():
                set_seed(seed + draw)
                with quiet():
                    learn = downstream_learner(
                        labeled_loaders(table, n_in, size, bs, cache=cache), start, metrics=accuracy
                    )
                knn = _knn(learn, k)
                accuracy_after = _trained(learn, epochs, lr, is_fresh(start))
                runs.append({"start": name, "draw": draw, "accuracy": accuracy_after, "knn": knn})
                bar.update()
    return pd.DataFrame(runs)


def _knn(learn: DownstreamLearner, k: int) -> float:
    encoder = learn.model.encoder
    return knn_accuracy(embed(encoder, learn.dls.train), embed(encoder, learn.dls.valid), k=k)


def _trained(learn: DownstreamLearner, epochs: int, lr: float, fresh: bool) -> float:
    """Accuracy on the validation set after training, which does not look at it."""
    with quiet(), learn.no_bar(), learn.no_logging():
        if fresh:
            learn.fit_one_cycle(epochs, lr, cbs=SkipValidation())
        else:  # fine_tune halves its base rate once the head has been trained
            learn.fine_tune(epochs - 1, 2 * lr, freeze_epochs=1, cbs=SkipValidation())
        return learn.validate()[1]


def summarize(runs: pd.DataFrame, baseline: str = "scratch", confidence: float = 0.95) -> pd.DataFrame:
    """A row a start: mean accuracy with its interval, the paired difference to the baseline with its own, and kNN.

    Intervals are Student's over the draws. `verdict` is 'better' or 'worse' only where the interval of the difference
    excludes zero.
    """
    accuracy = runs.pivot(index="draw", columns="start", values="accuracy")
    knn = runs.groupby("start")["knn"].mean()
    rows = []
    for start in runs["start"].unique():
        mean, half = mean_interval(accuracy[start], confidence)
        row = {"start": start, "accuracy": mean, "±": half}
        if start != baseline and baseline in accuracy:
            gain, gain_half = mean_interval(accuracy[start] - accuracy[baseline], confidence)
            verdict = "better" if gain > gain_half else "worse" if gain < -gain_half else "not distinguishable"
            row |= {"gain": gain, "gain ±": gain_half, "verdict": verdict}
        rows.append(row | {"kNN, frozen": knn[start]})
    return pd.DataFrame(rows).set_index("start")


def mean_interval(values: pd.Series, confidence: float = 0.95) -> tuple[float, float]:
    """Mean of independent draws and half the width of Student's interval for it (infinite for a single draw)."""
    n = len(values)
    if n < 2:
        return float(values.mean()), float("inf")
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / n**0.5
    return float(values.mean()), float(half)
