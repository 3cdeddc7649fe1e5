"""Figures and names as a person reads them: '57.3 %', '+4.1 points (0.2 to 8.0)', '5 labels a class'."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

SHARES = {"accuracy", "balanced accuracy", "balanced_accuracy"}  # Said in percent, their differences in points
NAMES = {  # Keys of settings and data, as a person says them
    "arch": "network",
    "baselines": "what the tasks are compared with",
    "bs": "images in a batch",
    "budget": "budget of each task",
    "channels": "channels",
    "choice": "what chose between tasks",
    "classes": "classes",
    "epochs": "passes over the labeled images",
    "finalists": "tasks that come to the end, at most",
    "groups": "patients, or other groups",
    "kind": "what is predicted",
    "label_kind": "kind of labels",
    "labels": "numbers of labels",
    "metric": "what is measured",
    "n_labeled": "labeled images to train with",
    "n_test": "labeled images to test with",
    "n_unlabeled": "unlabeled images",
    "rungs": "rounds of the race",
    "seed": "first seed",
    "seeds": "repeats (seeds)",
    "size": "side of the images, pixels",
    "steps": "steps of training with labels",
    "tasks": "pretext tasks",
}
MARKS = {"better": "▲", "worse": "▼", "not distinguishable": "≈"}  # Words beside them say the same


def is_known(value: object) -> bool:
    """Whether this is a number, and finite: the interval of a single run is not."""
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def score_text(value: float, metric: str) -> str:
    """0.573 -> '57.3 %' for shares, '0.573' for other metrics."""
    if not is_known(value):
        return "not known"
    return f"{100 * value:.1f} %" if metric in SHARES else _signed(f"{value:.3f}")


def gain_text(value: float, metric: str, unit: bool = True) -> str:
    """0.041 -> '+4.1 points' for shares, '+0.041' for other metrics."""
    if not is_known(value):
        return "not known"
    if metric not in SHARES:
        return _signed(f"{value:+.3f}")
    return _signed(f"{100 * value:+.1f}") + " points" * unit


def interval_text(low: float, high: float, metric: str, gain: bool = False) -> str:
    """'51.2 % to 63.4 %'; of gains '−1.0 to +9.2'; '' where there is none."""
    if not (is_known(low) and is_known(high)):
        return ""
    if gain:
        return f"{gain_text(low, metric, False)} to {gain_text(high, metric, False)}"
    return f"{score_text(low, metric)} to {score_text(high, metric)}"


def labels_text(labels: float) -> str:
    """5 -> '5 labels a class', 0.1 -> '10 % of the labels', 1.0 -> 'all labels'."""
    if not isinstance(labels, float | np.floating) or labels > 1:  # floats also in a column that holds shares, too
        return f"{int(labels):,} label{'' if labels == 1 else 's'} a class"
    return "all labels" if labels == 1 else f"{100 * labels:.3g} % of the labels"


def start_text(start: str, baseline: str) -> str:
    return "from scratch" if start == baseline == "scratch" else start


def p_text(p: float) -> str:
    """Of a test's p: not more digits than it is worth."""
    if not is_known(p):
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def value_text(value: object) -> str:
    """Any value of settings, data and so on in words."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {value_text(v)}" for key, v in value.items()) or "none"
    if isinstance(value, list | tuple | set | np.ndarray | pd.Series):
        return ", ".join(map(value_text, value)) or "none"
    if value is None or value == "":
        return "not said"
    if isinstance(value, int | np.integer):
        return _signed(f"{value:,}")
    if isinstance(value, float | np.floating):
        return _signed(f"{value:.4g}") if math.isfinite(value) else "not known"
    return str(value)


def name_text(key: str) -> str:
    """'n_test' -> 'labeled images to test with'; other keys without their underscores."""
    return NAMES.get(key, str(key).replace("_", " "))


def facts(values: Mapping | None) -> list[tuple[str, str]]:
    """Names and values of a dict, in words; what nobody said is left out."""
    return [(name_text(key), value_text(value)) for key, value in (values or {}).items() if value is not None]


def count_text(n: int, what: str) -> str:
    """3, 'run' -> '3 runs'."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def list_text(names: list[str], last: str = "and") -> str:
    """'a, b and c'"""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _signed(text: str) -> str:
    return text.replace("-", "−")
