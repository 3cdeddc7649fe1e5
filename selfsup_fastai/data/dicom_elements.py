"""Elements of untrusted DICOM datasets, read so that an error names the element and never its value."""

import math

from selfsup_fastai.data.reasons import bad

__all__ = ["check_object", "code", "codes", "element", "first_item", "is_there", "number", "numbers", "whole_number"]

_NO_IMAGE = ("Segmentation", "SR", "PresentationState", "Waveform", "Encapsulated", "ColorPalette", "RT", "Surface")
_NO_IMAGE += ("KeyObject", "Report", "Measurements", "Registration", "Fiducials", "HangingProtocol", "Template")
_NO_IMAGE += ("RealWorldValueMapping", "Tractography", "Spectroscopy", "RawData", "Annotation", "Stereometric")
_NO_IMAGE += ("Protocol", "Refraction", "Calculations", "ProcedureLog", "Inventory", "Radiation", "Instruction")
_MODALITIES = {"SEG", "SR", "PR", "KO", "AU", "ECG", "EPS", "HD", "RTDOSE", "RTPLAN", "RTRECORD", "RTSTRUCT", "ANN"}
_MODALITIES |= {"DOC", "PLAN", "REG", "FID", "RWV", "SMR", "STAIN", "M3D"}


def element(dataset, keyword: str):
    """The value of an element, None where it is absent or empty. Raises `BadImage` where it cannot be read."""
    if keyword not in dataset:
        return None
    try:
        value = dataset[keyword].value
        return None if value is None or (isinstance(value, (str, bytes)) and not value) else value
    except Exception:  # the value is parsed only now, and anything may be raised by it
        pass
    raise bad("bad_tag", f"({keyword})")


def is_there(dataset, keyword: str) -> bool:
    """Whether an element is there and not empty."""
    if keyword not in dataset:
        return False
    item = dataset.get_item(keyword)
    return bool(item.value) if item.is_raw else not item.is_empty


def whole_number(dataset, keyword: str, least: int, most: int) -> int:
    """A number that must be there. Raises `BadImage`: 'missing_tag', or 'bad_tag' outside of `least`..`most`."""
    raw = _unparsed(dataset, keyword, "US")
    if raw is not None and len(raw.value) == 2:
        value = int.from_bytes(raw.value, "little" if raw.is_little_endian else "big")
    else:
        value = element(dataset, keyword)
    if value is None:
        raise bad("missing_tag", f"({keyword})")
    if not isinstance(value, int) or not least <= value <= most:
        raise bad("bad_tag", f"({keyword})")
    return int(value)


def _unparsed(dataset, keyword: str, vr: str):  # `vr`: the form in which it can be read; "": none
    """An element as it stands in the file, if nobody has asked for its value yet: pydicom's parser takes its time."""
    if keyword not in dataset:
        return None
    item = dataset.get_item(keyword)
    return item if vr and item.is_raw and item.VR in (None, vr) and isinstance(item.value, bytes) else None


def _texts(dataset, keyword: str, vr: str) -> list | None:
    """The values of an element of text; None where it is absent, empty or cannot be read."""
    raw = _unparsed(dataset, keyword, vr)
    if raw is not None:
        text = raw.value.decode("latin-1").rstrip("\0 ")
        return text.split("\\") if text else None
    try:
        value = element(dataset, keyword)
    except ValueError:
        return None
    return None if value is None else [value] if isinstance(value, (str, int, float)) else list(value)


def numbers(dataset, keyword: str, vr: str = "DS") -> list[float]:
    """The finite numbers of an element; none where it is absent, empty or cannot be read."""
    try:
        found = [float(v) for v in _texts(dataset, keyword, vr) or () if v is not None and v != ""]
    except (ValueError, TypeError, OverflowError):
        return []
    return found if all(map(math.isfinite, found)) else []


def number(dataset, keyword: str) -> float | None:
    """The first number of an element of decimal text."""
    return next(iter(numbers(dataset, keyword)), None)


def codes(dataset, keyword: str, vr: str = "CS") -> list[str]:
    """Code strings in upper case; none where there are none. They may hold anything: compare them, do not show them."""
    return [str(v).strip(" \0").upper() for v in _texts(dataset, keyword, vr) or ()]


def code(dataset, keyword: str) -> str:
    """The first code string, or ''."""
    return next(iter(codes(dataset, keyword)), "")


def first_item(dataset, keyword: str):
    """The first item of a sequence, or None."""
    try:
        items = element(dataset, keyword)
        return items[0] if items else None
    except (ValueError, TypeError, IndexError, KeyError):
        return None


def check_object(dataset) -> None:
    """Raises `BadImage` 'excluded' for a DICOM object that is no image: a report, a plan, a mask, ..."""
    from pydicom.uid import UID

    kind = UID(next(iter(codes(dataset, "SOPClassUID", "UI")), "")).keyword
    if any(word in kind for word in _NO_IMAGE) and "ImageStorage" not in kind:  # RT images are X-rays
        raise bad("excluded")
    if code(dataset, "Modality") in _MODALITIES:
        raise bad("excluded")
