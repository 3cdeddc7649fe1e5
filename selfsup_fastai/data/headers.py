"""The header of one DICOM file as a row: what can be known without its pixels, or a reason why there are none.

Rows hold ids as they stand in the file. They are made in a child process (`opening.main`); `scanning`, which asks for
them, replaces the ids at once. Light: no torch, no fastai, no pandas; pydicom only for files that are not plain.
"""

import math
import os
import stat
from collections.abc import Sequence
from struct import iter_unpack
from typing import BinaryIO

from selfsup_fastai.data.dicom import decoded, open_dataset, tag_of
from selfsup_fastai.data.dicom_terms import is_image
from selfsup_fastai.data.dicom_walk import FUNCTIONAL_GROUPS, PIXEL_TAGS, SYNTAX, Elements, walk
from selfsup_fastai.data.opening import looks_like_dicom
from selfsup_fastai.data.reasons import MAX_PIXELS, bad

__all__ = ["IDS", "IMAGE_MAGIC", "read_header"]

IDS = {
    "patient_id": "PatientID",
    "issuer": "IssuerOfPatientID",
    "study_uid": "StudyInstanceUID",
    "series_uid": "SeriesInstanceUID",
    "sop_uid": "SOPInstanceUID",
}
PERSONAL = {"patient_age": "PatientAge", "patient_sex": "PatientSex"}
NUMBERS = {"number": "InstanceNumber", "acquisition": "AcquisitionNumber", "echo_time": "EchoTime"}
CODES = {"modality": "Modality", "body_part": "BodyPartExamined", "view": "ViewPosition"}
CODES |= {"burned_in": "BurnedInAnnotation", "intent": "PresentationIntentType"}

_OTHERS = """SpecificCharacterSet SOPClassUID ImageType ImageLaterality Laterality Rows Columns SamplesPerPixel
    PhotometricInterpretation NumberOfFrames BitsAllocated BitsStored PixelSpacing ImagerPixelSpacing SliceThickness
    WindowCenter WindowWidth RescaleSlope RescaleIntercept ImagePositionPatient ImageOrientationPatient
    LossyImageCompression DirectoryRecordSequence FrameLaterality SharedFunctionalGroupsSequence
    PerFrameFunctionalGroupsSequence"""
_KEYWORDS = [*_OTHERS.split(), *IDS.values(), *PERSONAL.values(), *NUMBERS.values(), *CODES.values()]
_TAGS = {keyword: tag_of(keyword) for keyword in _KEYWORDS}
_META_KIND = 0x00020002
_WANTED = frozenset([*_TAGS.values(), SYNTAX, _META_KIND])

_GROUPS = {  # the sequence of a functional group that each of these stands in
    "PixelSpacing": "PixelMeasuresSequence",
    "SliceThickness": "PixelMeasuresSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "WindowCenter": "FrameVOILUTSequence",
    "WindowWidth": "FrameVOILUTSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "FrameLaterality": "FrameAnatomySequence",
}

_WHOLE = {"Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored"}
_BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d", "UV": "Q", "SV": "q"}
_TEXT = {"DS", "IS", "LO", "SH", "CS", "ST", "LT", "UT", "UC", "AE", "AS", "UI", "DA", "TM", "DT", "PN"}
_LONGEST = 4096  # bytes of a value: what is longer is none of what is looked for

_NATIVE = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"}
_DEFLATED = "1.2.840.10008.1.2.1.99"
_LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 81, 91, 93, 203)}
_UNDEFINED = 0xFFFFFFFF
_FLOATS = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}
_WITHIN = math.cos(math.radians(30))  # of an axis: else it is oblique

_HEAD = 1 << 16  # bytes that are read at first: nearly every header ends within them
IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"BM", b"\0\0\0\x0cjP  ", b"RIFF")
"""How files of other image formats begin."""


def read_header(
    path: str | os.PathLike,
    identifying: bool = False,  # With age and sex
) -> dict:
    """The row, with ids as they stand in the file; {'image': True} for an image that is not DICOM.

    Raises `BadImage` where there is nothing to learn from, and what reading a file raises.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise bad("not_a_file")
    if not info.st_size:
        raise bad("empty")
    with open(path, "rb", buffering=_HEAD) as file:
        head = file.peek(_HEAD)[:_HEAD]
        if not looks_like_dicom(head):
            if head.startswith(IMAGE_MAGIC):
                return {"image": True}
            raise bad("not_dicom")
        header = _Header(walk(head, info.st_size, _WANTED) or _parsed(file, info.st_size))
    header.check()
    return header.row(info.st_size, identifying)


def _parsed(file: BinaryIO, n_bytes: int) -> Elements:
    """As `walk`, by pydicom: any file that it can read."""
    dataset = open_dataset(file, tags=_KEYWORDS)
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    little = bool(dataset.original_encoding[1])
    values = _raw(dataset, _TAGS) | _raw(dataset.file_meta, {"": _META_KIND})
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        values |= _of_group(dataset, groups)
    values[SYNTAX] = "UI", syntax.encode()
    if syntax == _DEFLATED:
        return Elements(values, little, *_inflated_pixels(file))
    return Elements(values, little, *_pixels_at(file, n_bytes, *map(bool, dataset.original_encoding)))


def _raw(dataset, tags: dict[str, int]) -> dict[int, tuple[str | None, bytes]]:
    """VR and bytes of elements that have not been made sense of."""
    found = {}
    for tag in tags.values():
        if tag in dataset and tag not in FUNCTIONAL_GROUPS:
            element = dataset.get_item(tag)
            value = getattr(element, "value", None)
            if isinstance(value, bytes) or value is None:
                found[tag] = (element.VR, value or b"")
            elif isinstance(value, str):  # pydicom has converted it on its way
                found[tag] = (element.VR, value.encode("ascii", "replace"))
    return found


def _of_group(dataset, groups: str) -> dict[int, tuple[str | None, bytes]]:
    """What the first item of functional groups says."""
    found: dict[int, tuple[str | None, bytes]] = {}
    try:
        group = dataset[groups].value[0]
        for keyword, sequence in _GROUPS.items():
            items = group[sequence].value if sequence in group else None
            if items:
                found |= _raw(items[0], {keyword: _TAGS[keyword]})
    except MemoryError:
        raise
    except Exception:  # absent, empty or broken: parsing it raises anything
        return found
    return found


def _pixels_at(file: BinaryIO, n_bytes: int, implicit: bool, little: bool) -> tuple[str, int, int]:
    """Keyword, claimed length and room of the pixel data that pydicom has stopped in front of."""
    order = "little" if little else "big"
    at, head = file.tell(), file.read(12)
    tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)
    if len(head) < 8 or tag not in PIXEL_TAGS:
        return "", 0, 0
    of_length = head[4:8] if implicit else head[8:12]
    return PIXEL_TAGS[tag], int.from_bytes(of_length, order), n_bytes - at - (8 if implicit else 12)


def _inflated_pixels(file: BinaryIO) -> tuple[str, int, int]:
    """The same of a file that is compressed as a whole."""
    file.seek(0)
    dataset = open_dataset(file, pixels=True, tags=list(PIXEL_TAGS.values()))
    for keyword in PIXEL_TAGS.values():
        if keyword in dataset:
            n_bytes = len(dataset.get_item(keyword).value or b"")
            return keyword, n_bytes, n_bytes
    return "", 0, 0


class _Header:
    """Elements as numbers and texts; what makes no sense is as if it were absent."""

    def __init__(self, elements: Elements):
        self.values, self.little, self.pixels, self.claimed, self.room = elements
        self.syntax = self._ascii(self.values.get(SYNTAX))
        self.kind = self.text("SOPClassUID") or self._ascii(self.values.get(_META_KIND))
        self.allocated = _FLOATS.get(self.pixels) or self.whole("BitsAllocated")

    # --- values ---

    def has(self, keyword: str) -> bool:
        value = self.values.get(_TAGS[keyword], (None, b""))[1]
        return bool(value if keyword in _WHOLE else value.strip(b"\0 "))  # a blank is the number 32

    def numbers(self, keyword: str) -> list[float]:
        """All numbers of an element, if all of it are finite numbers."""
        vr, value = self.values.get(_TAGS[keyword], (None, b""))
        if not value or len(value) > _LONGEST:
            return []
        if vr not in _TEXT and vr not in _BINARY:
            vr = "US" if keyword in _WHOLE else "DS"
        try:
            if vr in _BINARY:
                found = [float(v) for (v,) in iter_unpack("><"[self.little] + _BINARY[vr], value)]
            else:
                found = [float(v) for v in value.decode("ascii").strip("\0 ").split("\\")]
        except ValueError:  # struct.error below
            return []
        except Exception:  # struct.error: bytes left over
            return []
        return found if all(map(math.isfinite, found)) else []

    def number(self, keyword: str) -> float | None:
        """The first number."""
        found = self.numbers(keyword)
        return found[0] if found else None

    def whole(self, keyword: str) -> int | None:
        """The first number, if it is a whole one."""
        found = self.number(keyword)
        return int(found) if found is not None and found == int(found) else None

    def vector(self, keyword: str, n: int) -> list[float] | None:
        found = self.numbers(keyword)
        return found if len(found) == n else None

    def texts(self, keyword: str) -> list[str]:
        """Code strings in upper case."""
        value = self._ascii(self.values.get(_TAGS[keyword]))
        return [part.strip().upper() for part in value.split("\\")] if value else []

    def text(self, keyword: str) -> str:
        """The first code string, or ''."""
        found = self.texts(keyword)
        return found[0] if found else ""

    def identifier(self, keyword: str) -> str:
        """A text as it stands in the file, without the padding."""
        value = self.values.get(_TAGS[keyword], (None, b""))[1]
        if len(value) > _LONGEST:
            return ""
        charset = self._ascii(self.values.get(_TAGS["SpecificCharacterSet"])).split("\\")
        plain = value.isascii() and b"\x1b" not in value
        return (value.decode("ascii") if plain else decoded(value, charset)).strip("\0 \t\r\n")

    def _ascii(self, element: tuple[str | None, bytes] | None) -> str:
        value = element[1] if element else b""
        return value.decode("latin-1").strip("\0 ") if len(value) <= _LONGEST else ""

    # --- whether there is an image ---

    def check(self) -> None:
        """Raises `BadImage` where there is none to learn from."""
        if _TAGS["DirectoryRecordSequence"] in self.values or self.kind == "1.2.840.10008.1.3.10":
            raise bad("dicomdir")
        if not is_image(self.kind, self.text("Modality")):
            raise bad("excluded")
        if not self.pixels or not self.claimed:
            raise bad("no_pixels")
        for keyword in ("Rows", "Columns", "PhotometricInterpretation", "BitsAllocated"):
            if not self.has(keyword) and not (keyword == "BitsAllocated" and self.allocated):
                raise bad("missing_tag", f"({keyword})")
        self._check_size()

    def _check_size(self) -> None:
        height, width, samples = self.whole("Rows"), self.whole("Columns"), self.samples()
        for keyword, value in {"Rows": height, "Columns": width, "BitsAllocated": self.allocated}.items():
            if not value or not 0 < value < 65536:
                raise bad("bad_tag", f"({keyword})")
        if samples not in (1, 3):
            raise bad("bad_tag", "(SamplesPerPixel)")
        if height * width > MAX_PIXELS:
            raise bad("too_large")
        frames = self.frames()
        if frames is None:
            raise bad("bad_frames")
        self._check_room(height * width * samples, frames)

    def _check_room(self, n_values: int, frames: int) -> None:
        room = self.room if self.claimed == _UNDEFINED else min(self.room, self.claimed)
        if self.syntax not in _NATIVE or self.claimed == _UNDEFINED:
            if frames * 8 > room and frames > 1:  # each is an item with a head of 8 bytes
                raise bad("bad_frames")
            return
        if self.text("PhotometricInterpretation") == "YBR_FULL_422":
            n_values = n_values // 3 * 2
        of_one = n_values * self.allocated / 8
        if math.ceil(frames * of_one) > room:
            lies = frames > 1 and self.claimed <= self.room
            raise bad("bad_frames" if lies else "truncated")

    def samples(self) -> int | None:
        """Values of a pixel."""
        return self.whole("SamplesPerPixel") if self.has("SamplesPerPixel") else 1

    def frames(self) -> int | None:
        """How many frames; None where that makes no sense."""
        if not self.has("NumberOfFrames"):
            return 1
        n = self.whole("NumberOfFrames")
        return None if n is None or n < 0 else max(1, n)

    # --- the row ---

    def row(self, n_bytes: int, identifying: bool) -> dict:
        """Everything about the file; ids as they stand in it."""
        samples, photometric = self.samples(), self.text("PhotometricInterpretation")
        spacing = self.vector("PixelSpacing", 2) or self.vector("ImagerPixelSpacing", 2) or [None, None]
        orientation = self.vector("ImageOrientationPatient", 6)
        row = {name: self.identifier(keyword) for name, keyword in IDS.items()}
        row |= {name: self.text(keyword) for name, keyword in CODES.items()}
        row |= {name: self.number(keyword) for name, keyword in NUMBERS.items()}
        row |= {
            "laterality": self.text("ImageLaterality") or self.text("FrameLaterality") or self.text("Laterality"),
            "plane": plane(orientation),
            "frames": self.frames(),
            "height": self.whole("Rows"),
            "width": self.whole("Columns"),
            "samples": samples,
            "photometric": photometric,
            "bits": _FLOATS.get(self.pixels) or self.whole("BitsStored") or self.allocated,
            "spacing_y": spacing[0],
            "spacing_x": spacing[1],
            "thickness": self.number("SliceThickness"),
            "window_center": self.number("WindowCenter"),
            "window_width": self.number("WindowWidth"),
            "slope": self.number("RescaleSlope"),
            "intercept": self.number("RescaleIntercept"),
            "syntax": self.syntax,
            "position": self.vector("ImagePositionPatient", 3),
            "orientation": orientation,
            "kind": self.kind,
            "image_type": self.texts("ImageType"),
            "lossy": self.text("LossyImageCompression") == "01" or self.syntax in _LOSSY,
            "color": samples == 3 or photometric == "PALETTE COLOR",
            "n_bytes": n_bytes,
        }
        if identifying:
            row |= {name: self.identifier(keyword) for name, keyword in PERSONAL.items()}
        return row


def plane(orientation: Sequence[float] | None) -> str:
    """'axial', 'sagittal', 'coronal', or 'oblique' more than 30 degrees off all three; '' where it is not known."""
    if orientation is None:
        return ""
    a, b, c, d, e, f = orientation
    normal = abs(b * f - c * e), abs(c * d - a * f), abs(a * e - b * d)
    length = math.sqrt(sum(n * n for n in normal))
    if not 0.5 < length < 2:  # of two unit vectors at right angles it is 1
        return ""
    most = max(normal)
    return ("sagittal", "coronal", "axial")[normal.index(most)] if most >= _WITHIN * length else "oblique"
