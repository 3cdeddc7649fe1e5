"""What the order of slices depends on: clean arrays, whatever the table that `scan_dicoms` returns holds."""

import numpy as np
import pandas as pd

from selfsup_fastai.errors import DataError

__all__ = ["SliceFacts"]

_UNIT = 0.01  # by which directions may miss unit length and a right angle


class SliceFacts:
    """What stacks depend on, as arrays with one entry a row of the table."""

    def __init__(self, table: pd.DataFrame):
        _check(table)
        self.n, self.rows = len(table), list(table.index)
        self.name, self.instance = _texts(table, "series"), _texts(table, "instance")
        self.plane, self.image_type = _texts(table, "plane"), _texts(table, "image_type")
        self.series = [name or i for i, name in enumerate(self.name)]  # nameless: each for itself
        self.position = np.array([_vector(value, 3) for value in table["position"]]).reshape(-1, 3)
        self.orientation = np.array([_orientation(value) for value in table["orientation"]]).reshape(-1, 6)
        self.known = np.isfinite(self.position).all(1) & np.isfinite(self.orientation).all(1)
        self.number, self.frames = _numbers(table, "number"), _numbers(table, "frames")
        self.acquisition = _numbers(table, "acquisition")
        self.sizes = np.stack([_numbers(table, name) for name in ("height", "width", "echo_time")], 1)
        self.along = np.full(self.n, np.nan)  # mm along the normal of the stack, as soon as that is known

    def key(self, i: int) -> tuple:
        """What is the same in all slices of a stack, beside the orientation."""
        return (*self.sizes[i].tolist(), i if self.frames[i] > 1 else -1)


def _check(table: object) -> None:
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"Expected a table (DataFrame) as `scan_dicoms` returns; got {type(table).__name__}.")
    missing = [name for name in ("series", "position", "orientation") if name not in table.columns]
    if missing:
        raise DataError(f"The table lacks {', '.join(missing)}; `scan_dicoms` returns one with all that is needed.")


def _texts(table: pd.DataFrame, name: str) -> list[str]:
    if name not in table.columns:
        return [""] * len(table)
    return ["" if blank else str(value).strip() for value, blank in zip(table[name], table[name].isna())]


def _numbers(table: pd.DataFrame, name: str) -> np.ndarray:
    """-1 where there is none."""
    if name not in table.columns:
        return np.full(len(table), -1.0)
    return pd.to_numeric(table[name], errors="coerce").fillna(-1).to_numpy(float)


def _vector(value: object, n: int) -> np.ndarray:
    """Finite numbers (n,), or NaN."""
    try:
        vector = np.asarray(value, float)
    except (TypeError, ValueError):
        vector = np.empty(0)
    return vector if vector.shape == (n,) and np.isfinite(vector).all() else np.full(n, np.nan)


def _orientation(value: object) -> np.ndarray:
    """Two directions (6,) of unit length at a right angle, or NaN."""
    vector = _vector(value, 6)
    lengths = np.linalg.norm(vector.reshape(2, 3), axis=1)
    fits = np.abs(lengths - 1).max() < _UNIT and abs(vector[:3] @ vector[3:]) < _UNIT
    return vector if fits else np.full(6, np.nan)
