"""The score over the number of labels: does a start help, and does it still when there are more labels?"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from fastai.data.core import DataLoaders
from tqdm.auto import tqdm

from selfsup_fastai.callbacks.precision import KINDS
from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.compare.draws import check_amounts, classes_in, draw_labels, groups_in, say_cut
from selfsup_fastai.compare.keeping import Runs, data_print, key_of
from selfsup_fastai.compare.linear import frozen_features, linear_predictions
from selfsup_fastai.compare.scores import Score, score_for
from selfsup_fastai.compare.starts import SCRATCH, Start, content_of, starts_of
from selfsup_fastai.compare.summary import summarize
from selfsup_fastai.compare.tables import Predictions, as_label_curve
from selfsup_fastai.compare.trial import (
    budget_for,
    check_length,
    check_tested,
    fine_tuned,
    labeled_with,
    predicted,
    truth_of,
)
from selfsup_fastai.downstream.targets import kind_of
from selfsup_fastai.plots import ShownFrame
from selfsup_fastai.processes import check_single

METHODS = ("fine_tune", "linear")


class _Setup(NamedTuple):
    """What all runs of a curve share."""

    dls: DataLoaders
    kind: str
    score: Score
    method: str
    budget: dict  # steps, epochs, lr
    how: dict  # precision, channels_last
    classes: np.ndarray | None
    groups: np.ndarray | None  # Of the training images
    test_groups: np.ndarray
    truth: np.ndarray
    print: str
    runs: Runs


def label_curve(
    encoders: Mapping[
        str, Any
    ],  # Name -> a saved encoder, an Encoder, a learner; a list, one for each pretraining seed
    dls: DataLoaders,  # Labels are drawn from dls.train; dls.valid is the test set, which chooses nothing
    labels: Sequence[float | int] = (0.01, 0.05, 0.1, 1.0),  # Shares of the training images (floats), or a class (ints)
    seeds: int = 5,  # Times that everything is repeated: labels, order, head, and pretraining where a list is given
    method: str = "fine_tune",  # Or 'linear': a linear model on frozen features
    *,
    steps: int | None = None,  # Of fine-tuning, the same for all starts; None: 200, and 5 epochs at least
    epochs: int | None = None,  # Instead of steps: passes over the labeled images
    lr: float | None = None,  # Peak rate from scratch, and of pretrained heads; None: 5e-3, without batch norm 1e-3
    metric: str | None = None,  # None: accuracy, mAP, R2 or dice, by the labels; or another name in `compare.scores`
    groups: str | None = None,  # Column that tells whose an image is; None: the patient, where the loaders know them
    precision: str | None = None,  # Of fine-tuning, the same for all starts: 'bf16', 'fp16', 'fp32'; None: fp32
    channels_last: bool = False,  # Likewise, in memory
    folder: str | Path | None = None,  # Where finished runs are kept: the same call goes on where it was stopped
) -> ShownFrame:
    """One row a run: start, labels, n_labels, seed, score, metric; `.show()` draws it, `summarize` says what it bears.

    'scratch' is added unless it is among the names: the same architecture with new weights. A seed draws labels, the
    order of the images and the head, the same for every start; seed s of a list of encoders is entry s % len. The
    score is that after the last step: the test set chooses neither the epoch nor anything else.

    Pretrained nets are fine-tuned; new ones are trained by one cycle, all layers at one rate, for as many steps.
    """
    check_single("Fine-tuning")
    check_choice("precision", precision, (None, *KINDS))  # 'auto' could choose otherwise from run to run
    how = {} if precision in (None, "fp32") else {"precision": precision}
    how |= {"channels_last": True} if channels_last else {}
    setup = _set_up(dls, method, dict(steps=steps, epochs=epochs, lr=lr), how, metric, groups, folder)
    amounts = check_amounts(labels)
    check_number("seeds", seeds, 1, whole=True)
    starts = starts_of(encoders)
    say_cut(setup.classes, amounts)
    if setup.classes is None and any(isinstance(amount, int) for amount in amounts):
        draw_labels(len(dls.train_ds), next(a for a in amounts if isinstance(a, int)), 0)  # says what is wrong
    rows = []
    contents = {start.name: [content_of(source) for source in start.sources] for start in starts}
    with tqdm(total=seeds * len(starts) * len(amounts), desc="label curve", disable=None, leave=False) as bar:
        for seed in range(seeds):
            for start in starts:
                content = contents[start.name][start.pretrained(seed) % len(start.sources)]
                features = _Features(setup.dls, start, seed)
                for amount in amounts:
                    bar.set_description(f"label curve: {start.name}, {_asked(amount)}, seed {seed}")
                    rows.append(_row(setup, start, content, features, amount, seed))
                    bar.update()
    return _table(setup, rows)


def _set_up(dls, method, budget, how, metric, groups, folder) -> _Setup:
    kind = kind_of(dls)
    check_choice("method", method, METHODS)
    check_length(budget["steps"], budget["epochs"])
    if budget["lr"] is not None:
        check_number("lr", budget["lr"], above=0)
    check_tested(dls)
    score, classes, truth = score_for(kind, metric), classes_in(dls.train, kind), truth_of(dls, kind)
    known = [values for values in (classes, truth) if values is not None]
    budget, how = (budget, how) if method == "fine_tune" else ({}, {})
    whose = groups_in(dls.train, groups)
    print_ = data_print(dls, *known, *([] if whose is None else [whose]))
    of_test = groups_in(dls.valid, groups)
    of_test = np.arange(len(truth)) if of_test is None else of_test
    return _Setup(dls, kind, score, method, budget, how, classes, whose, of_test, truth, print_, Runs(folder))


class _Features:
    """Frozen features of one start, computed when first asked for."""

    def __init__(self, dls: DataLoaders, start: Start, seed: int):
        self.args, self.found = (dls, start, seed), None

    def __call__(self) -> tuple:
        self.found = self.found or frozen_features(*self.args)
        return self.found


def _row(setup: _Setup, start: Start, content: str, features: _Features, amount: float | int, seed: int) -> dict:
    """A run, made or found."""
    settings = {"content": content, "fresh": start.fresh, "about": start.about, "seed": seed, "labels": repr(amount)}
    key = key_of(**settings, method=setup.method, data=setup.print, **setup.budget, **setup.how)
    facts = setup.runs.facts(key)
    if facts is None:
        places = draw_labels(len(setup.dls.train_ds), amount, seed, setup.classes, setup.groups)
        began = time.perf_counter()
        answer, facts = (_linear if setup.method == "linear" else _fine_tuned)(setup, start, features, places, seed)
        facts |= {"n_labels": len(places), "seconds": round(time.perf_counter() - began, 2)}
        setup.runs.keep(key, answer, facts)
    known = Predictions(setup.truth, setup.test_groups, {key: setup.runs.held[key]})
    row = {"start": start.name, "labels": amount, "n_labels": facts.pop("n_labels"), "seed": seed}
    row |= {"score": setup.score(known[key], setup.truth), "metric": setup.score.name}
    return row | facts | {"pretrained": start.pretrained(seed), "run": key}


def _fine_tuned(setup: _Setup, start: Start, features: _Features, places: np.ndarray, seed: int):
    budget = budget_for(len(places), setup.dls.train.bs, setup.budget["steps"], setup.budget["epochs"])
    learn = fine_tuned(labeled_with(setup.dls, places, budget), start, seed, budget, setup.budget["lr"], **setup.how)
    steps = budget.epochs * len(learn.dls.train)
    return predicted(learn, setup.kind), {"steps": steps, "images": steps * learn.dls.train.bs}


def _linear(setup: _Setup, start: Start, features: _Features, places: np.ndarray, seed: int):
    x, y, test_x = features()
    n_out = int(max(y.max(), setup.truth.max())) + 1 if setup.kind == "category" else 0
    return linear_predictions(x[places], y[places], test_x, setup.kind, n_out), {}


def _table(setup: _Setup, rows: list[dict]) -> ShownFrame:
    table = pd.DataFrame(rows)
    table["labels"] = pd.Series([row["labels"] for row in rows], dtype=object)
    table.attrs |= {"metric": setup.score.name, "n_test": len(setup.truth), "baseline": SCRATCH}
    table.attrs["predictions"] = Predictions(setup.truth, setup.test_groups, setup.runs.held)
    return as_label_curve(table, summarize)


def _asked(amount: float | int) -> str:
    return f"{amount} a class" if isinstance(amount, int) else f"{amount:.3g} of the labels"
