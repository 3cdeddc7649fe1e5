"""A DICOM file's frames as they are stored: all that the file claims is checked before anything is allocated.

Nothing here quotes what a file contains. Details of errors name keywords of elements and standard syntaxes only.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np

from selfsup_fastai.data.dicom import open_dataset
from selfsup_fastai.data.dicom_decoders import decoded, is_known, is_supported, native_order, syntax_name
from selfsup_fastai.data.dicom_elements import check_object, code, element, is_there, whole_number
from selfsup_fastai.data.opening import looks_like_dicom
from selfsup_fastai.data.reasons import MAX_PIXELS, BadImage, bad
from selfsup_fastai.errors import DataError

__all__ = ["PixelFile", "Stored", "pixel_file"]

_UNDEFINED = 0xFFFFFFFF
_ITEM = b"\xfe\xff\x00\xe0"
_KEYWORDS = {0x0010: "PixelData", 0x0008: "FloatPixelData", 0x0009: "DoubleFloatPixelData"}
_VRS = b"OB", b"OW", b"OF", b"OD", b"OV", b"UN"  # as a length of pixel data each would be odd, which none is
_FLOATS = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_LITTLE, _BIG = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
_COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_GREYS = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"


class Stored(NamedTuple):
    """One frame, or several stacked, as decoded."""

    array: np.ndarray  # ([N,] H, W[, 3]) integers or floats, of this machine's byte order
    photometric: str  # What the values are after decoding: 'RGB' also where the file says YBR_RCT


class _Exact:
    """A file whose end may not lie within what is read at once, unless it is that of a codestream, or of a tag."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.tell, self.seek = file, size, file.tell, file.seek

    def read(self, n: int = -1) -> bytes:
        """The next `n` bytes."""
        left = max(self.size - self.tell(), 0)  # a claim of 4 GiB is not to allocate them
        data = self.file.read(left if n < 0 else min(n, left))
        if len(data) < n and n > 8 and b"\xff\xd9" not in data[-16:]:
            raise bad("truncated")
        return data


@contextmanager
def pixel_file(source: str | os.PathLike | BinaryIO) -> Iterator["PixelFile"]:
    """A file, its elements read and checked, its pixels not yet. Raises `BadImage` and whatever pydicom raises."""
    with _binary(source) as file:
        file.seek(0)
        head = file.read(132)
        if not head:
            raise bad("empty")
        if not looks_like_dicom(head):
            raise bad("not_dicom")
        file.seek(0)
        yield PixelFile(file)


@contextmanager
def _binary(source: str | os.PathLike | BinaryIO) -> Iterator[BinaryIO]:
    if hasattr(source, "read"):
        seekable = getattr(source, "seekable", lambda: False)()
        yield source if seekable else io.BytesIO(source.read())
        return
    if not isinstance(source, (str, os.PathLike)):
        raise DataError(f"A DICOM file is read from a path or a binary file object; got {type(source).__name__}.")
    if not stat.S_ISREG(os.stat(source).st_mode):
        raise bad("not_a_file")
    with open(source, "rb") as file:
        yield file


class PixelFile:
    """An open DICOM file: its elements, what its pixels are, and its frames one by one or all at once."""

    def __init__(self, file: BinaryIO):
        self.dataset = open_dataset(file)
        check_object(self.dataset)
        self.flags: list[str] = []
        self.decoder = ""
        self.syntax = str(self.dataset.file_meta.TransferSyntaxUID)
        self.file = self._inflated(file) if self.syntax == _DEFLATED else file
        self._find_pixels()
        self._read_options()
        self._check_size()
        self._choose_form()

    # --- what is in the file ---

    def _inflated(self, file: BinaryIO) -> BinaryIO:
        """The pixel data of a file that is compressed as a whole, with the head that `_find_pixels` expects."""
        file.seek(0)
        self.dataset = open_dataset(file, pixels=True)
        for number, keyword in _KEYWORDS.items():
            if keyword in self.dataset:
                value = element(self.dataset, keyword)
                vr = b"OW" if number == 0x0010 else b"OF" if number == 0x0008 else b"OD"
                head = b"\xe0\x7f" + number.to_bytes(2, "little") + vr + bytes(2) + len(value).to_bytes(4, "little")
                return io.BytesIO(head + value)
        return io.BytesIO()

    def _find_pixels(self) -> None:
        """Where the pixel data begins, how long it claims to be and how long it can be."""
        order = "little" if self.dataset.original_encoding[1] else "big"
        head = self.file.read(12)
        group, number = int.from_bytes(head[:2], order), int.from_bytes(head[2:4], order)
        if len(head) < 8 or group != 0x7FE0 or number not in _KEYWORDS:
            raise bad("no_pixels")
        self.keyword = _KEYWORDS[number]
        if head[4:6] not in _VRS:  # implicit; what the syntax says of it need not be true
            self.vr, self.length = "OW", int.from_bytes(head[4:8], order)
            self.file.seek(8 - len(head), os.SEEK_CUR)
        else:
            self.vr, self.length = head[4:6].decode("latin-1"), int.from_bytes(head[8:12], order)
        self.start = self.file.tell()
        self.available = self.file.seek(0, os.SEEK_END) - self.start
        if not self.length or not self.available:
            raise bad("no_pixels" if not self.length else "truncated")

    def _read_options(self) -> None:
        ds = self.dataset
        self.rows, self.columns = whole_number(ds, "Rows", 1, 65535), whole_number(ds, "Columns", 1, 65535)
        self.allocated = _FLOATS.get(self.keyword) or whole_number(ds, "BitsAllocated", 1, 64)
        self.photometric = self._photometric()
        self.samples = self._samples()
        self.frames = self._frames()
        self.bits, self.signed, planar = self.allocated, 0, 0
        if self.keyword == "PixelData":
            self.bits = self._assumed("BitsStored", 1, self.allocated, self.allocated)
            self.signed = self._assumed("PixelRepresentation", 0, 1, 0)
        if self.allocated != 1 and self.allocated % 8:
            raise bad("bad_tag", "(BitsAllocated)")
        if self.samples == 3:
            planar = self._assumed("PlanarConfiguration", 0, 1, 0)
        self.options = {
            "rows": self.rows,
            "columns": self.columns,
            "samples_per_pixel": self.samples,
            "bits_allocated": self.allocated,
            "bits_stored": self.bits,
            "pixel_representation": self.signed,
            "photometric_interpretation": self.photometric,
            "number_of_frames": self.frames,
            "planar_configuration": planar,
            "pixel_keyword": self.keyword,
            "pixel_vr": self.vr,
        }

    def _photometric(self) -> str:
        value = code(self.dataset, "PhotometricInterpretation")
        if not value:
            raise bad("missing_tag", "(PhotometricInterpretation)")
        if value not in (*_COLORS, *_GREYS, PALETTE):
            raise bad("bad_tag", "(PhotometricInterpretation)")
        return value

    def _samples(self) -> int:
        samples = 3 if self.photometric in _COLORS else 1
        if not is_there(self.dataset, "SamplesPerPixel"):
            self.flags.append("assumed")
            return samples
        if whole_number(self.dataset, "SamplesPerPixel", 1, 65535) != samples:
            raise bad("bad_tag", "(SamplesPerPixel)")
        return samples

    def _frames(self) -> int:
        try:
            value = element(self.dataset, "NumberOfFrames")
            frames = 1 if value in (None, "", 0) else int(value)
        except (ValueError, TypeError, BadImage):
            frames = 0
        if frames < 1:
            raise bad("bad_frames")
        return frames

    def _assumed(self, keyword: str, least: int, most: int, default: int) -> int:
        if not is_there(self.dataset, keyword):
            self.flags.append("assumed")
            return default
        return whole_number(self.dataset, keyword, least, most)

    # --- whether it can be ---

    def _check_size(self) -> None:
        pixels = self.rows * self.columns
        if pixels > MAX_PIXELS or pixels * self.samples * self.allocated / 8 > MAX_PIXELS * 12:
            raise bad("too_large")

    def _choose_form(self) -> None:
        """Whether the frames are encapsulated, whatever the syntax says, and whether they can all be there."""
        from pydicom.uid import UID

        known = is_known(self.syntax)
        claims = UID(self.syntax).is_encapsulated if known else True
        self.file.seek(self.start)
        begins = self.file.read(8)
        self.encapsulated = claims
        if begins[:4] == _ITEM and self.length == _UNDEFINED:
            self.encapsulated = True
        elif claims and self.length != _UNDEFINED and self.length >= self._needed() and not _is_codestream(begins):
            self.encapsulated = False
        if (not known and not self.encapsulated) or (known and not is_supported(self.syntax)):
            raise bad("unsupported_syntax", f"({syntax_name(self.syntax)})")
        if self.encapsulated != claims:
            self.flags.append("wrong_syntax")
        if self.encapsulated:
            if self.frames > 1 and self.frames * 8 > self.available:
                raise bad("bad_frames")
        else:
            self._check_native(begins)

    def _needed(self, frames: int | None = None) -> int:
        bits = self.rows * self.columns * self.samples * self.allocated * (frames or self.frames)
        return -(-bits // 8) * (2 if self.photometric == "YBR_FULL_422" else 3) // 3

    def _check_native(self, begins: bytes) -> None:
        available = min(self.length, self.available)
        full = self.rows * self.columns * self.samples * self.allocated * self.frames // 8
        if self.photometric == "YBR_FULL_422" and available >= full:
            self.flags.append("not_subsampled")
            self.photometric = self.options["photometric_interpretation"] = "YBR_FULL"
        if available >= self._needed():
            return
        if _is_codestream(begins):
            self.flags.append("wrong_syntax")
            self.encapsulated = True
        elif self.length == _UNDEFINED or self.length > self.available:
            raise bad("truncated")
        else:
            raise bad("bad_frames" if self.frames > 1 and available >= self._needed(1) else "truncated")

    # --- frames ---

    def read(self, frame: int | None) -> Stored:
        """Frame `frame`; None: all of them, stacked."""
        if frame is None and self.frames * self.rows * self.columns > MAX_PIXELS:
            raise bad("too_large", "(All frames together: read them one by one.)")
        if not self.encapsulated:
            return self._native(frame)
        if frame is not None:
            return self._decoded(self._source(frame))
        found = [self._decoded(source) for source in self._sources()]
        return Stored(np.stack([f.array for f in found]), found[0].photometric)

    def _native(self, frame: int | None) -> Stored:
        plain = self.keyword == "PixelData" and self.allocated in (8, 16, 32) and self.photometric != "YBR_FULL_422"
        little = self.dataset.original_encoding[1]
        if plain and (little or self.allocated > 8):
            return Stored(self._plain(frame, "<" if little else ">"), self.photometric)
        from pydicom.pixels import get_decoder

        self.file.seek(self.start)
        decoder = get_decoder(_LITTLE if little else _BIG)
        array, about = decoder.as_array(self.file, index=frame, raw=True, **self.options)
        return Stored(native_order(array), about["photometric_interpretation"])

    def _plain(self, frame: int | None, order: str) -> np.ndarray:
        """Whole bytes straight into an array: the same as pydicom's, with less ado."""
        size = self.rows * self.columns * self.samples
        array = np.empty(
            size * (self.frames if frame is None else 1), f"{order}{'ui'[self.signed]}{self.allocated // 8}"
        )
        self.file.seek(self.start + (frame or 0) * size * self.allocated // 8)
        data = memoryview(array.view(np.uint8))
        data[:] = self.file.read(len(data))
        array = native_order(array)
        unused = self.allocated - self.bits  # what stands in these bits is no part of the value
        if unused:
            np.right_shift(np.left_shift(array, unused, out=array), unused, out=array)
        return self._shaped(array, self.frames if frame is None else 1)

    def _shaped(self, array: np.ndarray, frames: int) -> np.ndarray:
        stacked = (frames,) if frames > 1 else ()
        if self.samples == 1:
            return array.reshape(*stacked, self.rows, self.columns)
        if self.options["planar_configuration"] == 0:
            return array.reshape(*stacked, self.rows, self.columns, self.samples)
        return np.moveaxis(array.reshape(*stacked, self.samples, self.rows, self.columns), -3, -1)

    def _source(self, frame: int) -> bytes:
        """The compressed bytes of one frame."""
        from pydicom.encaps import get_frame

        self.file.seek(self.start)
        begins = self.file.read(4)
        self.file.seek(self.start)
        if begins != _ITEM:  # not in items: a codestream where native pixels should be
            return self.file.read(min(self.length, self.available))
        try:
            return get_frame(
                _Exact(self.file, self.start + self.available),
                frame,
                number_of_frames=self.frames,
                extended_offsets=self._offsets(),
            )
        except ValueError as err:  # there are not so many
            reason = err if isinstance(err, BadImage) else bad("bad_frames")
        raise reason

    def _sources(self) -> Iterator[bytes]:
        """The compressed bytes of every frame."""
        from pydicom.encaps import generate_frames

        self.file.seek(self.start)
        options = {"number_of_frames": self.frames, "extended_offsets": self._offsets()}
        found = 0
        for source in generate_frames(_Exact(self.file, self.start + self.available), **options):
            if found == self.frames:
                break  # more than the header says: not asked for
            place = self.file.tell()
            yield source
            self.file.seek(place)
            found += 1
        if found < self.frames:
            raise bad("bad_frames")

    def _offsets(self) -> tuple[bytes, bytes] | None:
        tables = [element(self.dataset, f"ExtendedOffsetTable{end}") for end in ("", "Lengths")]
        return tuple(tables) if all(tables) else None

    def _decoded(self, source: bytes) -> Stored:
        found = decoded(source, self.syntax, self.options)
        self.decoder = found.decoder
        if found.wrong_syntax and "wrong_syntax" not in self.flags:
            self.flags.append("wrong_syntax")
        return Stored(found.array, found.photometric)


def _is_codestream(begins: bytes) -> bool:
    return begins[:3] == b"\xff\xd8\xff" or begins[:4] == b"\xff\x4f\xff\x51"
