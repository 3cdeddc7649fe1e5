"""One file or array to right pixels, or to a `BadImage` that says why not.

Light on purpose (no torch, no fastai): `python -m selfsup_fastai.data.opening` is the child process in which
`selfsup_fastai.data.files` tries unknown files. Nothing here names a file: an error is about pixels, and a file name
may identify a patient.
"""

import io
import json
import os
import signal
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from selfsup_fastai.data.covering import Size, cover, to_stored
from selfsup_fastai.data.pixels import depth, from_array, is_grey, pixel_hash, to_pixels
from selfsup_fastai.data.reasons import MAX_PIXELS, REASONS, BadImage, bad, diagnosis
from selfsup_fastai.errors import DataError

__all__ = ["MAX_PIXELS", "REASONS", "BadImage", "Facts", "Source", "decode", "describe", "image_size", "open_image"]

MEMORY_LIMIT = 2 << 30
"""Bytes of address space of the process that checks files."""

Source = str | bytes | os.PathLike | BinaryIO | np.ndarray | Image.Image
"""What an image can be opened from; `bytes` are an encoded image, not a path. A path may be a `DicomImage`."""

Facts = dict[str, int | float | str | None]
"""What `describe` says of an image."""

T = TypeVar("T")


class _NoDicom(str):
    """The path of a file that is not to be opened if it is DICOM: its header must be read first."""


OF_DICOM = ("pixel_hash", "flags")
"""Facts of DICOM files alone."""

# Drawings, films and stubs: Pillow knows their header, but for the pixels calls Ghostscript, or nothing at all.
_NO_PIXELS = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(
    source: Source,  # A path, the bytes of a file, a binary file object, a NumPy array or a PIL image
    n_in: int | None = None,  # 1: grey, 3: RGB, None: as the image is
    min_side: int | None = None,  # A JPEG may be decoded at 1/2, 1/4 or 1/8 while its shorter side keeps 2 * min_side
) -> Image.Image:
    """A new PIL image of mode 'L' or 'RGB' (8 bits), or 'F' for a grey image of more than 8 bits.

    'F' is float32 on the 0..255 scale, so that a batch may mix depths and a division by 255 is right for all:

    - 16-bit integers: value / 65535 * 255, never clipped;
    - 32-bit integers ('I'): as 16-bit ones if all lie within 0..65535, else stretched: minimum to 0, maximum to 255;
    - floats (and arrays of other number types): times 255 if all lie within [0, 1]; unchanged if within [0, 255];
      / 65535 * 255 if within [0, 65535]; else stretched. First, NaN and -inf become the smallest finite value and
      inf the largest.

    PIL has no float RGB: a deep image asked for as RGB is rounded to 8 bits, and so are deep color arrays.
    DICOM: the first frame as `read_dicom` maps it to [0, 1] (a CT in three windows, in one wide one if n_in is 1).
    Alpha is dropped, not blended, as PIL's `convert`, OpenCV and torchvision do; grey from color is the luma of BT.601.
    Of several pages or frames it is the first. The EXIF orientation is applied; no metadata is kept.

    Arrays are (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a PIL image is not changed, but loaded if it was not.
    Raises `BadImage` (its `code` says why, see `REASONS`) or, where `source` is none of the above, `DataError`.
    """
    if n_in not in (None, 1, 3):
        raise DataError(f"n_in is the number of channels, 1 (grey), 3 (RGB) or None (as the image is); got {n_in!r}.")
    return _reported(lambda: _open(source, n_in, min_side))


def describe(
    source: Source,  # As for `open_image`
    min_side: int = 128,  # Of a JPEG that is decoded at a reduced scale, as in `open_image`
) -> Facts:
    """Decode all of an image and say what it is.

    width, height: in pixels, after orientation. mode, format: as PIL names them (format is None for an array).
    frames: pages or frames. channels: 1 for grey, also where an RGB file has R = G = B everywhere; else 3.
    bits: 8, 16 or 32 a channel, as PIL decodes it (an integer image that fits 0..65535 counts as 16).
    max: the largest value in the file's own units for images of more than 8 bits, else None.
    pixel_hash, flags (`DicomInfo`'s, in one text): of DICOM only.

    Raises `BadImage` or `DataError`, as `open_image` does.
    """
    return _reported(lambda: _described(source, None, min_side, lambda *_: None)[0])


def decode(
    source: Source,  # As for `open_image`
    size: Size,  # Height and width of the windows that will be cut
    n_in: int | None = None,  # 1: grey; None: as the image is, one channel where all of it is grey
) -> tuple[Facts, np.ndarray]:  # What `describe` says, and (C, H, W) uint8 or uint16, as `covering.to_stored` makes it
    """All that is kept of an image, from decoding it once. Raises `BadImage` or `DataError`, as `open_image` does."""
    return _reported(lambda: _decoded(source, size, n_in))


def image_size(source: Source) -> tuple[int, int]:
    """Width and height in pixels, after orientation, from the header alone: whether the pixels can be read stays open.

    Raises `BadImage` or `DataError`, as `open_image` does.
    """
    return _reported(lambda: _header_size(source))


def _reported(read: Callable[[], T]) -> T:
    """Whatever goes wrong as a `BadImage`, raised outside the handlers: the error it replaces may hold the path."""
    try:
        with silence():
            return read()
    except DataError as err:
        reason = err
    except Exception as err:  # plugins raise anything: SystemError, RecursionError, struct.error, ...
        reason = diagnosis(err)
    try:
        raise reason
    finally:
        del reason  # else error and traceback hold each other, and the pixels read so far, until the next collection


@contextmanager
def silence() -> Iterator[None]:
    """No warnings. In other threads than the main one they are left to those who started them: filters are global."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(source: Source, n_in: int | None, min_side: int | None) -> Image.Image:
    with _lazy(source, n_in) as lazy:
        image, _ = _load(lazy, min_side, "L" if n_in == 1 else None)
        return _turned(to_pixels(image, n_in), _orientation(image))


def _decoded(source: Source, size: Size, n_in: int | None) -> tuple[Facts, np.ndarray]:
    def keep(pixels: Image.Image, orientation: int) -> np.ndarray:
        if pixels.mode == "RGB" and (n_in == 1 or is_grey(pixels)):
            pixels = pixels.convert("L")
        return to_stored(cover(_turned(pixels, orientation), size))

    return _described(source, n_in, max(size), keep)


def _described(
    source: Source, n_in: int | None, min_side: int, keep: Callable[[Image.Image, int], T]
) -> tuple[Facts, T]:
    """What an image is, and what `keep` makes of its pixels (not yet turned) and its orientation."""
    with _lazy(source, n_in) as lazy:
        mode, form = lazy.mode, lazy.format
        image, size = _load(lazy, min_side, mode=None)
        orientation = _orientation(image)
        width, height = size[::-1] if orientation >= 5 else size
        pixels = to_pixels(image, None)
        bits, largest = depth(image)
        kept = keep(pixels, orientation)
        frames = _frames(lazy)  # last: it moves on in the file
        more = {name: lazy.info[name] for name in OF_DICOM} if form == "DICOM" else {}
    facts = {"width": width, "height": height, "mode": mode, "format": form, "frames": frames}
    return {**facts, "channels": 1 if is_grey(pixels) else 3, "bits": bits, "max": largest, **more}, kept


def _header_size(source: Source) -> tuple[int, int]:
    with _lazy(source, 1) as lazy:
        turned = _orientation(lazy) >= 5 and lazy.format != "TIFF"  # Pillow turns TIFFs itself
        return lazy.size[::-1] if turned else lazy.size


@contextmanager
def _lazy(
    source: Source,
    n_in: int | None,  # Channels that DICOM files are wanted with
) -> Iterator[Image.Image]:
    """A PIL image of which at most the header is read (of DICOM all); its file is closed at the end if it was opened
    here."""
    if isinstance(source, Image.Image):
        yield source
    elif isinstance(source, np.ndarray):
        yield from_array(source)
    elif isinstance(source, bytes):
        yield _identify(io.BytesIO(source), source, n_in)
    elif isinstance(source, (str, os.PathLike)):
        _refuse_non_file(os.stat(source))
        with open(source, "rb") as file:
            yield _identify(file, source, n_in)
    elif hasattr(source, "read"):
        seekable = getattr(source, "seekable", lambda: False)()
        yield _identify(source if seekable else io.BytesIO(source.read()), source, n_in)
    else:
        raise DataError(
            f"An image is opened from a path, bytes, a binary file object, a NumPy array or a PIL image; "
            f"got {type(source).__name__}. For a tensor of shape (C, H, W) pass `x.permute(1, 2, 0).numpy()`."
        )


def _refuse_non_file(info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise bad("not_a_file")
    if info.st_size == 0:
        raise bad("empty")


def _identify(file: BinaryIO, source: Source, n_in: int | None) -> Image.Image:
    """The image behind an open file, told by its first bytes."""
    file.seek(0)
    head = file.read(132)
    if not head:
        raise bad("empty")
    if head[128:] == b"DICM":
        return _from_dicom(file, source, n_in)
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        image = None
    if image is None and not head.startswith(_MAGIC) and looks_like_dicom(head):
        return _from_dicom(file, source, n_in)
    if image is None:
        raise bad("unreadable" if head.startswith(_MAGIC) else "not_an_image")
    if image.format in _NO_PIXELS:
        raise bad("unsupported", f"(format {image.format})")
    return image


def looks_like_dicom(head: bytes) -> bool:
    """Whether the first bytes (132, or all) of a file may be those of DICOM, with its preamble or without."""
    if head[128:132] == b"DICM":
        return True
    group, element = head[:2], head[2:4]
    little = group in (b"\x02\x00", b"\x08\x00") and element[1:] == b"\x00"
    big = group in (b"\x00\x02", b"\x00\x08") and element[:1] == b"\x00"
    return len(head) >= 8 and (little or big)


def _from_dicom(file: BinaryIO, source: Source, n_in: int | None) -> Image.Image:
    """Mode F on the 0..1 scale, or RGB; of a `DicomImage` as its settings say."""
    if isinstance(source, _NoDicom):
        raise bad("dicom")
    from selfsup_fastai.data.dicom_pixels import DicomImage, read_dicom  # brings pydicom, which most people never need

    image = source if isinstance(source, DicomImage) else DicomImage("")
    n_in = (
        1 if n_in == 1 else image.n_in or n_in
    )  # who asks for one channel gets it; a CT seen in one stays so in three
    pixels, info = read_dicom(file, frame=image.frame, window=image.window, limits=image.limits, n_in=n_in)
    made = Image.fromarray(pixels if pixels.ndim == 2 else np.rint(pixels * 255).astype(np.uint8))
    made.format, made.info = "DICOM", {"pixel_hash": pixel_hash(pixels), "flags": ", ".join(info.flags)}
    return made


def _load(image: Image.Image, min_side: int | None, mode: str | None) -> tuple[Image.Image, tuple[int, int]]:
    """The image with its pixels decoded, perhaps at reduced scale, and the width and height of the full scale."""
    size = image.size
    if size[0] * size[1] > MAX_PIXELS:
        raise bad("too_large")
    if min_side:
        image.draft(mode, (2 * min_side, 2 * min_side))
    reduced = image.size != size
    image.load()
    return image, size if reduced else image.size  # TIFF turns itself and ICO finds its size while loading


def _frames(image: Image.Image) -> int:
    """How many frames there are; a file that is damaged after the first one counts as one image."""
    try:
        return getattr(image, "n_frames", 1)
    except MemoryError:
        raise
    except Exception:  # plugins raise anything; the frame we use has been read
        return 1


def _orientation(image: Image.Image) -> int:
    """1..8 as EXIF counts; 1, unturned, also where EXIF is broken: that must not cost the image."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the EXIF parser raises anything on broken bytes
        return 1
    return value if value in _TURNS else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def answer(asked: dict) -> tuple[dict[str, object], np.ndarray | None]:
    """What `main` answers to a request: facts, or code and message; and pixels, if they were asked for."""
    try:
        return ANSWERS[asked.get("what", "image")](asked)
    except DataError as err:  # of a setting that does not suit this file, too
        return {"code": getattr(err, "code", "unsupported"), "message": str(err)}, None


def _image(asked: dict) -> tuple[Facts, np.ndarray | None]:
    if "offset" in asked:
        return _reported(lambda: describe(_member(asked), asked.get("min_side", 128))), None
    source = _frame(asked) if "frame" in asked else _NoDicom(asked["path"])
    if asked["size"] is None:
        return describe(source, asked.get("min_side", 128)), None
    return decode(source, tuple(asked["size"]), asked["channels"])


def _member(asked: dict) -> bytes:
    """A part of a file: of a tar file, an image."""
    with open(asked["path"], "rb") as file:
        file.seek(asked["offset"])
        data = file.read(asked["bytes"])
    if len(data) < asked["bytes"]:
        raise bad("truncated")
    if data[128:132] == b"DICM":
        raise bad("dicom")
    return data


def _quantiles(asked: dict) -> tuple[Facts, None]:
    from selfsup_fastai.data.dicom_pixels import quantiles_of

    return {"quantiles": _reported(lambda: quantiles_of(asked["path"], asked["frame"])).tolist()}, None


def _headers(asked: dict) -> tuple[dict, None]:
    from selfsup_fastai.data.headers import read_header  # brings pydicom

    def read(path: str) -> dict:
        try:
            return _reported(lambda: read_header(path, asked["identifying"]))
        except BadImage as err:
            return {"code": err.code, "message": str(err)}

    return {"rows": [read(path) for path in asked["paths"]]}, None


def _frame(asked: dict) -> os.PathLike:
    from selfsup_fastai.data.dicom_pixels import DicomImage

    return DicomImage.from_settings(asked["path"], asked)


ANSWERS = {"image": _image, "quantiles": _quantiles, "headers": _headers}
"""What can be asked about a file."""


def _limit_resources() -> None:
    """At most `MEMORY_LIMIT`, and no core dumps: they fill disks and hold pixels. Windows has neither."""
    try:
        import resource
    except ImportError:
        return
    for kind, limit in (resource.RLIMIT_AS, MEMORY_LIMIT), (resource.RLIMIT_CORE, 0):
        hard = resource.getrlimit(kind)[1]
        with suppress(ValueError, OSError):  # some systems refuse; the deadline of the parent still holds
            resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main() -> None:
    """Answer JSON lines {"what", "path", "size", "channels", "min_side"} on stdin with JSON lines on stdout.

    With a `DicomImage`'s settings in the line a frame is read; else a DICOM file gets the code 'dicom'.
    These are `describe`'s facts, or code and message. Where size is not null, facts have `stored`: channels, height,
    width and bytes a value of what `decode` keeps, and that follows the line. The first line, {"ready": true}, says
    that the process has started.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # codecs print; the answers must stay clean
    os.dup2(nowhere, 2)
    _limit_resources()
    answers.write(b'{"ready": true}\n')
    answers.flush()
    for request in iter(sys.stdin.buffer.readline, b""):
        facts, array = answer(json.loads(request))
        stored = {} if array is None else {"stored": [*array.shape, array.itemsize]}
        answers.write(json.dumps({**facts, **stored}).encode() + b"\n")
        answers.write(b"" if array is None else array.tobytes())
        answers.flush()


if __name__ == "__main__":
    main()
