"""Windows: real-world values of medical images to [0, 1], as DICOM PS3.3 C.11.2 defines them, and by quantiles."""

import math
from collections.abc import Sequence

import numpy as np

from selfsup_fastai.errors import DataError, unknown

__all__ = [
    "WINDOWS",
    "WindowSetting",
    "as_window",
    "between",
    "linear",
    "linear_exact",
    "quantiles",
    "sigmoid",
    "table",
]

WINDOWS = {
    "lung": (1500.0, -600.0),
    "mediastinum": (400.0, 40.0),
    "bone": (1800.0, 400.0),
    "brain": (80.0, 40.0),
    "wide": (2000.0, 0.0),
    "abdomen": (400.0, 50.0),
    "angio": (600.0, 300.0),
    "liver": (150.0, 30.0),
    "soft_tissue": (350.0, 50.0),
    "spine": (250.0, 50.0),
    "stroke": (40.0, 40.0),
    "subdural": (200.0, 75.0),
    "temporal_bone": (2800.0, 600.0),
}
"""Name -> (width, center) in Hounsfield units, as radiologists set them for CT."""

SPECIAL = ("file", "full")
"""Windows that depend on the image: the one its file asks for; all of its values."""

Window = tuple[float, float]
"""Width and center."""

WindowSetting = str | Window | Sequence[str | Window] | None
"""None: by modality; 'file'; 'full'; a name; (width, center); or three names or pairs: three channels."""


def as_window(
    window: WindowSetting,  # What the user wrote
) -> str | tuple[Window, ...] | None:  # None, 'file', 'full', or one or three pairs
    """A setting in its one form. Raises `DataError` or, for a name that does not exist, `UnknownNameError`."""
    if window is None or (isinstance(window, str) and window in SPECIAL):
        return window
    if isinstance(window, str) or _is_pair(window):
        return (_pair(window),)
    if isinstance(window, Sequence) and len(window) == 3:
        return tuple(_pair(w) for w in window)
    kinds = "None, 'file', 'full', a name such as 'lung', (width, center), or a list of three of the latter two"
    raise DataError(f"window is {kinds}; got {window!r}.")


def is_three(
    window: WindowSetting,
) -> bool:
    """Whether three windows are asked for. Raises what `as_window` does."""
    asked = as_window(window)
    return isinstance(asked, tuple) and len(asked) == 3


def _is_pair(window: object) -> bool:
    return isinstance(window, Sequence) and len(window) == 2 and not any(isinstance(w, str) for w in window)


def _pair(window: object) -> Window:
    if isinstance(window, str):
        if window not in WINDOWS:
            raise unknown("window", window, [*WINDOWS, *SPECIAL])
        return WINDOWS[window]
    if _is_pair(window) and all(_is_finite(w) for w in window) and window[0] > 1:
        return float(window[0]), float(window[1])
    fix = "For a narrower range give its ends: limits=(low, high)."
    raise DataError(f"A window is (width, center), two numbers, the width above 1; got {window!r}. {fix}")


def as_limits(limits: object) -> tuple[float, float] | None:
    """Two values, the first below the second. Raises `DataError`."""
    if limits is None:
        return None
    pair = isinstance(limits, (Sequence, np.ndarray)) and len(limits) == 2 and all(_is_finite(x) for x in limits)
    if not pair or not limits[0] < limits[1]:
        raise DataError(f"limits are (low, high), the values that become 0 and 1, low below high; got {limits!r}.")
    return float(limits[0]), float(limits[1])


def _is_finite(x: object) -> bool:
    number = isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)
    return number and math.isfinite(x)


def linear(width: float, center: float) -> tuple[float, float]:
    """DICOM's LINEAR: the values that become 0 and 1. With a width of 1 they are one, and the window is a step."""
    half = max(width - 1, 0) / 2
    return center - 0.5 - half, center - 0.5 + half


def linear_exact(width: float, center: float) -> tuple[float, float]:
    """DICOM's LINEAR_EXACT: the values that become 0 and 1."""
    return center - width / 2, center + width / 2


def sigmoid(values: np.ndarray, width: float, center: float) -> np.ndarray:
    """DICOM's SIGMOID: 1 / (1 + exp(-4 (x - center) / width)). A new array."""
    steep = np.clip((values - center) * (-4 / width), -80, 80)  # exp stays within float32
    return 1 / (1 + np.exp(steep, out=steep))


def between(
    values: np.ndarray,  # Floats
    low: float,
    high: float,
    scratch: np.ndarray | None = None,  # Like `values`, to compute in (may be `values`): memory is slow to come by
    out: np.ndarray | None = None,  # Where the result goes
) -> np.ndarray:
    """`low` and below becomes 0, `high` and above 1, linear between them."""
    if high > low:
        scratch = np.subtract(values, values.dtype.type(low), out=scratch)
        scratch /= values.dtype.type(high - low)
    else:
        scratch = np.greater(values, high).astype(values.dtype)
    return np.clip(scratch, 0, 1, out=scratch if out is None else out)


def table(values: np.ndarray, entries: np.ndarray, first: int) -> np.ndarray:
    """The entry for each value: the first one for `first` and below, the last one for all beyond the end."""
    index = values if values.dtype.kind in "iu" else np.rint(values)
    index = np.clip(index.astype(np.int64) - first, 0, len(entries) - 1)
    return entries[index]


def quantiles(
    values: np.ndarray,  # Of any shape and number type
    q: Sequence[float],  # Shares, 0 to 1
    mask: np.ndarray | None = None,  # True where a value does not count
) -> np.ndarray:  # As many as `q`, float64; interpolated as `np.quantile` does
    """Quantiles of the values outside of a mask. Of integers of 8 or 16 bits they come from counts, which is faster."""
    q = np.asarray(q, np.float64)
    chosen = values.ravel() if mask is None else values[~mask]
    if values.dtype.kind not in "iu" or values.dtype.itemsize > 2:
        return np.quantile(chosen.astype(np.float64, copy=False), q)
    least = int(chosen.min())
    return from_counts(np.bincount(np.subtract(chosen, least, dtype=np.intp)), least, q)


def from_counts(counts: np.ndarray, least: int, q: np.ndarray) -> np.ndarray:
    """Quantiles of integers of which there are `counts[i]` of the value `least + i`."""
    upto = np.cumsum(counts)
    place = q * (upto[-1] - 1)
    below = np.floor(place)
    lower = np.searchsorted(upto, below, side="right")
    upper = np.searchsorted(upto, np.ceil(place), side="right")
    return least + lower + (upper - lower) * (place - below)
