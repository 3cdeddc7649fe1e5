"""Real-world values of grey frames to [0, 1]: what becomes 0 and 1 is the user's to say, else it goes by modality."""

import numpy as np

from selfsup_fastai.data.dicom_decoding import PixelFile
from selfsup_fastai.data.dicom_elements import code
from selfsup_fastai.data.dicom_info import DicomInfo
from selfsup_fastai.data.dicom_values import Map, Values, file_window
from selfsup_fastai.data.windows import WINDOWS, Window, WindowSetting, between, linear, quantiles
from selfsup_fastai.errors import DataError

__all__ = ["Settings", "in_unit"]

CT_WINDOWS = "lung", "mediastinum", "bone"
"""A CT's three channels where nothing else is asked for; its one channel is 'wide'."""

PERCENTILES = {"MR": (1.0, 99.0), "PT": (None, 99.9), "NM": (None, 99.9)}
"""What becomes 0 and 1, by modality; None: the value 0."""
OTHERS = (0.5, 99.5)

_PHOTOS = {"US", "IVUS", "ES", "XC", "GM", "SM", "OP", "SC", "OT", "DG", "VL", ""}  # of 8 bits: shown as stored


class Settings:
    """What the user asked for, checked."""

    def __init__(self, window, limits, n_in: int | None, written: WindowSetting):
        if n_in not in (None, 1, 3):
            raise DataError(f"n_in is the number of channels, 1 (grey), 3 or None (as the image is); got {n_in!r}.")
        if window is not None and limits is not None:
            raise DataError("window and limits both say what becomes 0 and 1: give one of them.")
        if n_in == 1 and isinstance(window, tuple) and len(window) == 3:
            raise DataError("Three windows are three channels: with n_in=1 give one window.")
        self.window, self.limits, self.n_in = window, limits, n_in
        self.names = [written] if isinstance(written, str) or window is None else list(written)
        self.hounsfield = any(isinstance(name, str) and name in WINDOWS for name in self.names)


def in_unit(file: PixelFile, found: list[Values], settings: Settings, info: DicomInfo) -> list[np.ndarray]:
    """Each frame in [0, 1]: (H, W) or (H, W, 3). The last steps: inversion, and padding to black."""
    maps = _maps(file, found, settings, info)
    info.inverted = _is_inverted(file, info)
    out = [_mapped(one, channels, info.inverted) for one, channels in zip(found, maps)]
    return [_repeated(image) for image in out] if settings.n_in == 3 else out


def _mapped(found: Values, channels: list[Map], inverted: bool) -> np.ndarray:
    """(H, W) or (H, W, C) float32; one channel takes the place of the values."""
    values, mask = found.values, found.mask
    if len(channels) == 1:
        (make,) = channels
        out = make(values) if callable(make) else between(values, *make, scratch=values)
        out = out.astype(np.float32, copy=False)
        if inverted:
            np.subtract(1, out, out=out)
        if mask is not None:
            out[mask] = 0
        return out
    if mask is not None:
        values[mask] = np.inf if inverted else -np.inf  # black in each channel: faster than to make each so
    out, scratch = np.empty((*values.shape, len(channels)), np.float32), np.empty_like(values)
    for i, ends in enumerate(channels):
        between(values, *ends, scratch=scratch, out=out[..., i])
    return np.subtract(1, out, out=out) if inverted else out


def _repeated(image: np.ndarray) -> np.ndarray:
    if image.ndim == 3:
        return image
    out = np.empty((*image.shape, 3), np.float32)
    out[...] = image[..., None]
    return out


def _is_inverted(file: PixelFile, info: DicomInfo) -> bool:
    first, shape = file.photometric == "MONOCHROME1", code(file.dataset, "PresentationLUTShape")
    if first and shape == "IDENTITY":
        info.flag("presentation")
    return first or shape == "INVERSE"


def _maps(file: PixelFile, found: list[Values], settings: Settings, info: DicomInfo) -> list[list[Map]]:
    """What makes [0, 1] of values, for each channel of each frame."""
    window = settings.window
    if settings.limits:
        return _ends(found, settings.limits, "({:g} to {:g})", info)
    if window == "file" or (window is None and info.modality == "MG"):
        own = [file_window(file.dataset, i) for i in ([info.frame] if info.frame is not None else range(len(found)))]
        if all(make for make, _ in own):
            info.window = own[0][1] if len({about for _, about in own}) == 1 else "each frame's own"
            return [[make] for make, _ in own]
        if window == "file":
            info.flag("bad_window")
    if isinstance(window, tuple):
        if settings.hounsfield and not info.hounsfield:
            info.flag("not_ct")
        return _linear(found, window, settings.names if len(settings.names) == len(window) else [window[0]], info)
    return _by_modality(file, found, settings, info)


def _by_modality(file: PixelFile, found: list[Values], settings: Settings, info: DicomInfo) -> list[list[Map]]:
    if settings.window == "full":
        return _percentiles(found, (0.0, 100.0), info)
    if info.hounsfield:
        names = ["wide"] if settings.n_in == 1 or settings.window == "file" else CT_WINDOWS
        return _linear(found, [WINDOWS[name] for name in names], names, info)
    if file.bits <= 8 and file.keyword == "PixelData" and info.modality in _PHOTOS and not info.rescale:
        return _ends(found, (0.0, 2.0**file.bits - 1), "({:g} to {:g}, all that the bits hold)", info)
    return _percentiles(found, PERCENTILES.get(info.modality, OTHERS), info)


def _linear(found: list[Values], windows: list[Window], names: list, info: DicomInfo) -> list[list[Map]]:
    named = [f"{name} " if isinstance(name, str) else "" for name in names]
    info.window = ", ".join(f"{name}({w:g}, {c:g})" for name, (w, c) in zip(named, windows))
    return [[linear(w, c) for w, c in windows]] * len(found)


def _ends(found: list[Values], ends: tuple[float, float], text: str, info: DicomInfo) -> list[list[Map]]:
    info.window = text.format(*ends)
    return [[ends]] * len(found)


def _percentiles(found: list[Values], percents: tuple, info: DicomInfo) -> list[list[Map]]:
    low, high = percents
    q = np.array([0, (low or 0) / 100, high / 100, 1])
    least, first, last, most = _quantiles(found, q)
    first = 0.0 if low is None else first
    if not first < last:
        first, last, low, high = least, most, 0.0, 100.0
    if not first < last:
        info.flag("constant")
    start = "0" if low is None else f"percentile {low:g}"
    return _ends(found, (float(first), float(last)), f"({{:g}} to {{:g}}, {start} to percentile {high:g})", info)


def _quantiles(found: list[Values], q: np.ndarray) -> np.ndarray:
    if len(found) == 1:
        return found[0].quantiles(q)
    return quantiles(np.concatenate([v.values.ravel() if v.mask is None else v.values[~v.mask] for v in found]), q)
