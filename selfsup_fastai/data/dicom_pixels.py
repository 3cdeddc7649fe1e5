"""`read_dicom`: one DICOM file to pixels in [0, 1] and a record of every step.

The order, always: decode, mask padding, modality rescale or table (of each frame its own), window, invert (once, where
the file asks for it), float32 in [0, 1]. Anything that goes wrong is a `BadImage` whose text holds nothing of the file.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

import numpy as np

from selfsup_fastai.data.dicom import quiet_pydicom
from selfsup_fastai.data.dicom_colors import is_color, luma, to_rgb
from selfsup_fastai.data.dicom_decoders import syntax_name
from selfsup_fastai.data.dicom_decoding import PixelFile, pixel_file
from selfsup_fastai.data.dicom_elements import code, codes
from selfsup_fastai.data.dicom_info import MODALITIES, DicomInfo
from selfsup_fastai.data.dicom_mapping import Settings, in_unit
from selfsup_fastai.data.dicom_values import Table, Values, real_values
from selfsup_fastai.data.reasons import diagnosis
from selfsup_fastai.data.windows import (
    WindowSetting,
    as_limits,
    as_window,
    quantiles,
)
from selfsup_fastai.errors import DataError

__all__ = ["DicomImage", "DicomInfo", "quantiles_of", "read_dicom", "values_of"]

READER = 1
"""Counts changes of what `read_dicom` makes of a file: pixels that an older one made are not used."""

SETTINGS = "frame", "window", "limits", "n_in"
"""Of a `DicomImage`."""

_WRITTEN_ON = {"US", "IVUS", "ES", "XA", "RF", "SC"}
_NEAR_LOSSLESS = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81"}

Source = str | os.PathLike | BinaryIO
T = TypeVar("T")


@dataclass(frozen=True)
class DicomImage(os.PathLike):
    """One image within a DICOM file, and how it is to be seen: an item of a data set."""

    path: str = field(repr=False)  # It may name a patient
    frame: int = 0
    window: WindowSetting = None
    limits: tuple[float, float] | None = None
    n_in: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "path", os.fspath(self.path))
        for name in "window", "limits":  # lists, too, are to be equal and to have a hash
            object.__setattr__(self, name, _plain(getattr(self, name)))
        object.__setattr__(self, "frame", int(self.frame))

    def __fspath__(self) -> str:
        return self.path

    @property
    def identity(self) -> bytes:
        """Frame and settings, without the path."""
        limits = self.limits and tuple(map(float, self.limits))
        return repr((READER, self.frame, as_window(self.window), limits, self.n_in)).encode()

    @property
    def settings(self) -> dict:
        """All but the path, as JSON can hold it."""
        return {name: getattr(self, name) for name in SETTINGS}

    @classmethod
    def from_settings(cls, path: str, settings: dict) -> "DicomImage":
        """What `settings` came from; other keys are passed over."""
        return cls(path, **{name: settings[name] for name in SETTINGS})

    def read(self) -> tuple[np.ndarray, DicomInfo]:
        """As `read_dicom`."""
        return read_dicom(self.path, self.frame, self.window, self.n_in, self.limits)


def _plain(value: object) -> object:
    """Tuples in place of lists, Python's numbers in place of NumPy's."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def read_dicom(
    source: Source,  # A path, or a binary file that can be sought in
    frame: int | None = None,  # Of a file of several frames: this one alone is decoded; None: all, (N, H, W[, 3])
    window: WindowSetting = None,  # None: by modality; 'file'; 'full'; 'lung', ...; (width, center); or three of these
    n_in: int | None = None,  # Channels: 1: grey (CT: wide window), 3, None: as the image is (CT: three windows)
    limits: tuple[float, float] | None = None,  # Values that become 0 and 1, in place of a window
) -> tuple[np.ndarray, DicomInfo]:  # float32 in [0, 1], ([N,] H, W) grey or ([N,] H, W, 3)
    """A DICOM file's pixels, right for its modality, and a record of what was done to them.

    CT: windows for lung, mediastinum and bone as three channels. MR: percentiles 1 to 99 of what is read; give `limits`
    (from `quantiles_of`) for one scale over a series. PT, NM: 0 to percentile 99.9. MG: the file's own window. Color,
    and what is like a photograph, by its bits. Others: percentiles 0.5 to 99.5. Padding never counts, and is black.
    Windows and limits are for grey images: color stays as it is.

    Raises `BadImage` where the file cannot be used, `DataError` for a setting that makes no sense.
    """
    chosen = Settings(as_window(window), as_limits(limits), n_in, window)
    return _reported(lambda: _read(source, frame, chosen))


def values_of(
    source: Source,  # As for `read_dicom`
    frame: int = 0,
) -> tuple[np.ndarray, np.ndarray | None, DicomInfo]:  # Values; where padding is, None: nowhere; the steps so far
    """The real-world values of a frame, float32 (H, W): Hounsfield units of a CT. Of color: grey in [0, 1]."""

    def work():
        with pixel_file(source) as file:
            info = _about(file, _check_frame(file, frame))
            if is_color(file.photometric):
                return luma(_colors(file, frame, info)), None, info
            (found,) = _grey(file, frame, info)
            return found.values.astype(np.float32, copy=False), found.mask, info

    return _reported(work)


def quantiles_of(
    source: Source,  # As for `read_dicom`
    frame: int = 0,
    n: int = 1025,  # How many, from the smallest value to the largest
) -> np.ndarray:  # (n,) float64, sorted
    """Quantiles of a frame's values outside of padding: merge a series' for limits that all of it shares."""
    if not isinstance(n, int) or n < 2:
        raise DataError(f"n is the number of quantiles, an integer from 2 up; got {n!r}.")

    def work():
        with pixel_file(source) as file:
            info = _about(file, _check_frame(file, frame))
            q = np.linspace(0, 1, n)
            if is_color(file.photometric):
                return quantiles(luma(_colors(file, frame, info)), q)
            return _grey(file, frame, info)[0].quantiles(q)

    return _reported(work)


def _reported(work: Callable[[], T]) -> T:
    """Whatever goes wrong as a `BadImage`, raised outside the handlers: the error it replaces may quote the file."""
    try:
        with quiet_pydicom():
            return work()
    except DataError as err:
        reason = err
    except Exception as err:  # pydicom and the decoders raise anything
        reason = diagnosis(err)
    try:
        raise reason
    finally:
        del reason  # else error and traceback hold each other, and the pixels read so far


def _check_frame(file: PixelFile, frame: int | None) -> int | None:
    if frame is None:
        return 0 if file.frames == 1 else None
    if not isinstance(frame, (int, np.integer)) or isinstance(frame, bool) or not 0 <= frame < file.frames:
        counts = "there is one, frame 0" if file.frames == 1 else f"they count from 0 to {file.frames - 1}"
        raise DataError(f"frame is a frame's number in the file, where {counts}; got {frame!r}.")
    return int(frame)


def _about(file: PixelFile, frame: int | None) -> DicomInfo:
    """The record, as far as elements alone go."""
    ds = file.dataset
    modality = code(ds, "Modality")
    info = DicomInfo(
        modality=modality if modality in MODALITIES else "",
        height=file.rows,
        width=file.columns,
        frames=file.frames,
        frame=frame,
        bits=file.bits,
        photometric=file.photometric,
        syntax=syntax_name(file.syntax),
    )
    if code(ds, "LossyImageCompression") == "01" or file.syntax in _NEAR_LOSSLESS:
        info.flag("lossy")
    if code(ds, "PresentationIntentType") == "FOR PROCESSING":
        info.flag("for_processing")
    burned = code(ds, "BurnedInAnnotation")
    risky = modality in _WRITTEN_ON or "SECONDARY" in codes(ds, "ImageType")
    if burned == "YES" or (burned != "NO" and risky):
        info.flag("burned_in" if burned == "YES" else "burned_in_risk")
    if "SequenceOfUltrasoundRegions" in ds:
        info.flag("regions")
    return info


def _read(source: Source, frame: int | None, settings: Settings) -> tuple[np.ndarray, DicomInfo]:
    with pixel_file(source) as file:
        frame = _check_frame(file, frame)
        info = _about(file, frame)
        if is_color(file.photometric):
            return _in_channels(_colors(file, frame, info), settings.n_in, info), info
        found = _grey(file, frame, info)
        mapped = in_unit(file, found, settings, info)
    return (mapped[0] if frame is not None else np.stack(mapped)), info


# --- color ---


def _colors(file: PixelFile, frame: int | None, info: DicomInfo) -> np.ndarray:
    """([N,] H, W, 3) float32 in [0, 1]."""
    stored = file.read(frame)
    info.decoder = file.decoder
    info.flag(*file.flags)
    info.window = f"0 to {2**file.bits - 1}" if file.samples == 3 else "that of the palette"
    if stored.photometric != "RGB":
        info.color = "palette to RGB" if stored.photometric.startswith("PALETTE") else "YBR to RGB"
    if frame is not None:
        return to_rgb(file.dataset, stored.array, stored.photometric, file.bits)
    return np.stack([to_rgb(file.dataset, a, stored.photometric, file.bits) for a in stored.array])


def _in_channels(rgb: np.ndarray, n_in: int | None, info: DicomInfo) -> np.ndarray:
    if n_in == 3:
        return rgb
    equal = _is_grey(rgb[..., ::16, :, :]) and _is_grey(rgb)  # a few rows settle it for nearly every color image
    if not equal and n_in is None:
        return rgb
    info.color = ", ".join(filter(None, (info.color, "one of three equal channels" if equal else "luma of RGB")))
    return np.ascontiguousarray(rgb[..., 0]) if equal else luma(rgb)


def _is_grey(rgb: np.ndarray) -> bool:
    return all(bool((rgb[..., 0] == rgb[..., i]).all()) for i in (1, 2))


# --- grey ---


def _grey(file: PixelFile, frame: int | None, info: DicomInfo) -> list[Values]:
    """The values of one frame, or of each."""
    stored = file.read(frame)
    info.decoder = file.decoder
    info.flag(*file.flags)
    frames = {frame: stored.array} if frame is not None else dict(enumerate(stored.array))
    found = [real_values(file.dataset, a, i, bool(file.signed), info.modality) for i, a in frames.items()]
    info.flag(*(flag for one in found for flag in one.flags))
    masked = sum(np.count_nonzero(one.mask) for one in found if one.mask is not None)
    info.padding = masked / stored.array.size
    info.rescale, info.hounsfield = _rescale_text([one.rescale for one in found]), found[0].hounsfield
    return found


def _rescale_text(rescales: list) -> str:
    if any(r != rescales[0] for r in rescales if not isinstance(r, Table)):
        return "each frame's own slope and intercept"
    first = rescales[0]
    if first is None:
        return ""
    return "a table" if isinstance(first, Table) else f"slope {first[0]:g}, intercept {first[1]:g}"
