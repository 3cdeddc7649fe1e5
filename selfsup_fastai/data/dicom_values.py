"""Stored pixels of a DICOM file to real-world values: padding, modality rescale and tables, and the file's own window.

Of multi-frame files each frame has its own: the functional groups come before what the file says as a whole.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from selfsup_fastai.data.dicom_elements import code, first_item, number, numbers
from selfsup_fastai.data.windows import between, linear, linear_exact, quantiles, sigmoid, table

__all__ = ["Map", "Table", "Values", "as_table", "file_window", "real_values"]

HU_RANGE = (-1024.0, 3071.0)
"""What CT values are cut to: air outside of the body, and 12 bits from there on."""

Map = tuple[float, float] | Callable[[np.ndarray], np.ndarray]
"""What makes [0, 1] of values: those that become 0 and 1, or a function."""


class Table(NamedTuple):
    """A lookup table of a file."""

    entries: np.ndarray
    first: int  # The value that the first entry is for
    bits: int  # Of an entry

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Each value's entry."""
        wrong_sign = self.first >= 1 << 15 and values.min() < 0  # written as unsigned
        return table(values, self.entries, self.first - (1 << 16 if wrong_sign else 0))


class Values(NamedTuple):
    """The real-world values of one frame."""

    stored: np.ndarray  # (H, W) as decoded
    values: np.ndarray  # (H, W) float32; float64 of more than 24 bits
    mask: np.ndarray | None  # (H, W) bool: padding, and what is no number; None: there is none
    rescale: tuple[float, float] | Table | None  # Slope and intercept, or a table; None: the stored values as they are
    hounsfield: bool
    flags: tuple[str, ...]

    def quantiles(self, q: np.ndarray) -> np.ndarray:
        """Quantiles of the values outside of padding."""
        q = np.asarray(q, np.float64)
        if isinstance(self.rescale, Table) or self.stored.dtype.kind not in "iu" or self.stored.dtype.itemsize > 2:
            return quantiles(self.values, q, self.mask)
        slope, intercept = self.rescale or (1.0, 0.0)
        found = quantiles(self.stored, q if slope > 0 else 1 - q, self.mask) * slope + intercept
        return np.clip(found, *HU_RANGE) if self.hounsfield else found


def real_values(dataset, stored: np.ndarray, frame: int, signed: bool, modality: str) -> Values:
    """What the stored numbers of a grey frame mean. CT: Hounsfield units within -1024..3071, padding as air."""
    mask = _padding(dataset, stored, signed)
    rescale, flags = _rescale(dataset, frame)
    if mask is not None and mask.all():
        mask, flags = None, [*flags, "all_padding"]
    values = _rescaled(stored, rescale)
    if stored.dtype.kind == "f":
        mask = _finite(values, mask)
    hounsfield = modality == "CT" and (rescale is not None or (stored.min() <= -500 and stored.dtype.kind == "i"))
    if hounsfield:
        if mask is not None:
            values[mask] = HU_RANGE[0]
        np.clip(values, *HU_RANGE, out=values)
    flags += _ct_flags(values, rescale) if modality == "CT" else []
    return Values(stored, values, mask, rescale, hounsfield, tuple(flags))


def _rescaled(stored: np.ndarray, rescale: tuple[float, float] | Table | None) -> np.ndarray:
    if isinstance(rescale, Table):
        return rescale(stored).astype(np.float32)
    wide = stored.dtype.itemsize > 2 and stored.dtype != np.float32
    values = stored.astype(np.float64 if wide else np.float32)
    slope, intercept = rescale or (1.0, 0.0)
    if slope != 1:
        values *= slope
    if intercept:
        values += intercept
    return values


def _finite(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray | None:
    """NaN and -inf become the smallest number of the frame, inf the largest; they count as padding."""
    odd = ~np.isfinite(values)
    if not odd.any():
        return mask
    fine = values[~odd]
    low, high = (fine.min(), fine.max()) if fine.size else (0, 0)
    np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
    odd = odd if mask is None else odd | mask
    return None if odd.all() else odd


def _ct_flags(values: np.ndarray, rescale: tuple | None) -> list[str]:
    flags = [] if rescale is not None else ["no_rescale"]
    low, high = values.min(), values.max()
    return [*flags, "suspicious_range"] if low >= 0 and high <= 4095 else flags


def _padding(dataset, stored: np.ndarray, signed: bool) -> np.ndarray | None:
    """Where padding is; None where it is nowhere."""
    found = numbers(dataset, "PixelPaddingValue", "")[:1]
    if not found:
        return None
    found += numbers(dataset, "PixelPaddingRangeLimit", "")[:1]
    ends = [_as_stored(value, stored, signed) for value in found]
    low, high = min(ends), max(ends)
    mask = stored == low if low == high else (stored >= low) & (stored <= high)
    return mask if mask.any() else None


def _as_stored(value: float, stored: np.ndarray, signed: bool) -> float:
    """A stored value that was written with the wrong sign, as it was meant: 63536 for -2000."""
    if stored.dtype.kind not in "iu":
        return value
    span = 1 << (8 * stored.dtype.itemsize)
    if signed and value >= span // 2:
        return value - span
    return value + span if not signed and value < 0 else value


def _groups(dataset, name: str, frame: int) -> list:
    """Where a frame's own elements may stand, the most particular place first; last, the dataset itself."""
    found = []
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") if "PerFrameFunctionalGroupsSequence" in dataset else ()
    if per_frame and frame < len(per_frame):
        found.append(first_item(per_frame[frame], name))
    shared = first_item(dataset, "SharedFunctionalGroupsSequence")
    if shared is not None:
        found.append(first_item(shared, name))
    return [*(item for item in found if item is not None), dataset]


def _rescale(dataset, frame: int) -> tuple[tuple[float, float] | Table | None, list[str]]:
    for item in _groups(dataset, "PixelValueTransformationSequence", frame):
        lut = first_item(item, "ModalityLUTSequence")
        found = lookup_table(lut) if lut is not None else None
        if found:
            return found, []
        if "RescaleSlope" in item or "RescaleIntercept" in item:
            slope, intercept = number(item, "RescaleSlope"), number(item, "RescaleIntercept")
            if slope and intercept is not None and max(abs(slope), abs(intercept)) < 1e30:
                return (slope, intercept), []
            return None, ["bad_rescale"]
    return None, []


def lookup_table(item) -> Table | None:
    """The table of an item with LUT Descriptor and LUT Data; None where it makes no sense."""
    described = numbers(item, "LUTDescriptor", "")
    if len(described) != 3:
        return None
    n, first, bits = (int(v) for v in described)
    return as_table(item, "LUTData", n, first, bits)


def as_table(item, keyword: str, n: int, first: int, bits: int) -> Table | None:
    """A table whose entries, of 8 or 16 bits, stand in an element as numbers or as bytes."""
    n = (n & 0xFFFF) or 1 << 16
    data = item[keyword].value if keyword in item else None
    if not data or not 1 <= bits <= 16:
        return None
    if isinstance(data, bytes):
        size = 1 if len(data) < 2 * n else 2  # 8-bit entries may be packed, or have 16 bits each
        order = ">" if item.original_encoding[1] is False else "<"
        data = np.frombuffer(data[: len(data) // size * size], f"{order}u{size}")
    entries = np.asarray(data)
    if len(entries) < n and bits <= 8 and 2 * len(entries) >= n:
        entries = entries.astype("<u2").view(np.uint8)
    return Table(entries[:n].astype(np.uint16), first, bits) if len(entries) >= n else None


def file_window(dataset, frame: int) -> tuple[Map | None, str]:
    """What the file itself says is to be seen of a frame, and its description; None: nothing that makes sense."""
    for item in _groups(dataset, "FrameVOILUTSequence", frame):
        found = _window_of(item)
        if found:
            return found
    return None, ""


def _window_of(item) -> tuple[Map, str] | None:
    """The table of an item, else the first of its windows; None where there is neither, or none that makes sense."""
    lut = first_item(item, "VOILUTSequence")
    entries = lookup_table(lut) if lut is not None else None
    if entries and entries.entries.max() > entries.entries.min():
        ends = float(entries.entries.min()), float(entries.entries.max())
        return lambda values: between(entries(values).astype(np.float32), *ends), "the file's table"
    width, center = number(item, "WindowWidth"), number(item, "WindowCenter")
    if width is None or center is None or width <= 0:
        return None
    about, function = f"the file's ({width:g}, {center:g})", code(item, "VOILUTFunction")
    if function == "SIGMOID":
        return lambda values: sigmoid(values, width, center), f"{about}, sigmoid"
    if function == "LINEAR_EXACT":
        return linear_exact(width, center), f"{about}, exact"
    return (linear(width, center), about) if width >= 1 else None
