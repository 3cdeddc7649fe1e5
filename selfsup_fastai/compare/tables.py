"""Tables of runs that draw themselves, and the predictions that stand behind their rows."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from selfsup_fastai.plots import ShownFrame, plot_label_curve, plot_probe


class Predictions:
    """What was predicted for each test image in each run, by the run's key; and what is true.

    Tables carry it in their `attrs`, which pandas copies at every step: copies are the same object.
    """

    def __init__(
        self,
        truth: np.ndarray,  # (n, ...)
        groups: np.ndarray,  # (n,) numbers of the patients or other groups, each image its own where none are known
        known: Mapping[str, np.ndarray | Path],  # Key -> predictions, or the file that holds them
    ):
        self.truth, self.groups, self.known = truth, groups, dict(known)

    def __getitem__(self, key: str) -> np.ndarray:
        found = self.known[key]
        if isinstance(found, Path):
            with np.load(found, allow_pickle=False) as arrays:
                return arrays["predicted"]
        return found

    def __contains__(self, key: object) -> bool:
        return key in self.known

    def __deepcopy__(self, memo: dict) -> "Predictions":
        return self

    def __repr__(self) -> str:
        return f"Predictions of {len(self.known)} runs for {len(self.truth)} test images"


def as_label_curve(runs: pd.DataFrame, summarized: Callable | None = None) -> ShownFrame:
    """Rows of runs as a table that draws itself; with the intervals of `summarized(runs)`, if that is given."""

    def drawn(table: pd.DataFrame, ax=None):
        return plot_label_curve(table if summarized is None else summarized(table), ax)

    return _shown(runs, drawn)


def as_probe(rows: pd.DataFrame) -> ShownFrame:
    """Rows of probes as a table that draws itself."""
    return _shown(rows, plot_probe)


def _shown(table: pd.DataFrame, plot: Callable) -> ShownFrame:
    """pandas leaves `attrs` behind when it makes a table of a table."""
    shown = ShownFrame(table, plot=plot)
    shown.attrs = dict(table.attrs)
    return shown
