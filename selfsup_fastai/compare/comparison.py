"""What a comparison found, in one object that can be kept in a folder and read again."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from selfsup_fastai.compare.tables import as_label_curve, as_probe
from selfsup_fastai.data.files import result_folder
from selfsup_fastai.errors import DataError
from selfsup_fastai.writing import write_whole

FILE = "comparison.json"
TABLES = ("runs", "summary", "race", "probes", "signals")


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Starts side by side: every run, the summary, and one sentence. Made by `compare_pretexts`.

    `print(comparison)` says the sentence, `comparison.show()` draws the curves.
    """

    verdict: str  # For a person who has never heard of pretraining
    runs: pd.DataFrame | None = None  # A row a run, as `label_curve` gives them; None: there were no labels
    summary: pd.DataFrame | None = None  # A row for each start and number of labels, as `summarize` gives them
    race: pd.DataFrame | None = None  # A row for each task and rung: images, seconds, score, kept, reason
    probes: pd.DataFrame | None = None  # What a linear classifier makes of each layer
    signals: pd.DataFrame | None = None  # A row a task: what embeddings say without labels
    settings: dict = field(default_factory=dict)  # What was asked for, and what was taken where nothing was said
    data: dict = field(default_factory=dict)  # Counts of images, classes, channels, size
    leaks: dict = field(default_factory=dict)  # What was checked, and found
    versions: dict = field(default_factory=dict)  # Of the libraries
    encoders: dict = field(default_factory=dict)  # Start -> its files, one a pretraining seed
    command: str | None = None  # The shell command that does it again

    def __repr__(self) -> str:
        return f"Comparison({self.verdict})"

    __str__ = __repr__

    def show(self, ax=None):
        """The label curves with their intervals; without labels nothing is drawn, as nothing is known."""
        if self.runs is None:
            raise DataError("Without labels there are no curves to draw; `signals` and `race` are tables.")
        return as_label_curve(self.runs).show(ax)

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes comparison.json and a CSV file for each table; returns the folder."""
        folder = result_folder(folder)
        for name in TABLES:
            table = getattr(self, name)
            if table is None:
                (folder / f"{name}.csv").unlink(missing_ok=True)
            else:
                write_whole(folder / f"{name}.csv", table.to_csv(index=False).encode())
        rest = {name: value for name, value in vars(self).items() if name not in TABLES}
        rest["encoders"] = {s: [_within(f, folder) for f in files] for s, files in self.encoders.items()}
        rest["attrs"] = {name: _attrs(getattr(self, name)) for name in TABLES}
        write_whole(folder / FILE, (json.dumps(plain(rest), indent=2, allow_nan=False) + "\n").encode())
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Comparison":
        """What `save` wrote. The predictions of the runs are not in it. Raises `DataError`."""
        folder = Path(folder)
        try:
            found = json.loads((folder / FILE).read_text("utf-8"))
            attrs = found.pop("attrs")
            tables = {name: _read(folder / f"{name}.csv", attrs[name] or {}) for name in TABLES}
            found["encoders"] = {s: [folder / f for f in files] for s, files in found["encoders"].items()}
            return cls(**found, **tables)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            fix = "Comparison.save writes one; compare_pretexts with out= does, too."
            raise DataError(f"There is no whole comparison in this folder ({type(error).__name__}). {fix}") from error


def plain(value: Any) -> Any:
    """The same in JSON's types: paths and other objects as texts, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _within(file: str | os.PathLike, folder: Path) -> str:
    """A file's name as seen from the folder, where it lies in it: the folder may be moved."""
    file = Path(file).resolve()
    return str(file.relative_to(folder.resolve()) if folder.resolve() in file.parents else file)


def _attrs(table: pd.DataFrame | None) -> dict | None:
    """Those that JSON keeps as they are: plain values, and lists of names."""
    if table is None:
        return None
    return {k: v for k, v in table.attrs.items() if isinstance(v, bool | int | float | str) or _is_names(v)}


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _read(file: Path, attrs: dict) -> pd.DataFrame | None:
    if not file.exists():
        return None
    table = pd.read_csv(file, dtype={"labels": str, "start": str, "task": str, "verdict": str}, keep_default_na=True)
    if "labels" in table:
        table["labels"] = pd.Series([_amount(text) for text in table["labels"]], dtype=object)
    for name in ("verdict", "reason"):
        if name in table:
            table[name] = table[name].fillna("")
    table.attrs |= attrs
    return {"runs": as_label_curve, "probes": as_probe}.get(file.stem, lambda t: t)(table)


def _amount(text: str) -> int | float:
    return int(text) if text.isdigit() else float(text)
