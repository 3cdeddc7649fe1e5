"""Elements of untrusted DICOM datasets, read so that an error names the element and never its value."""

import math

from selfsup_fastai.data.reasons import bad

__all__ = ["check_object", "code", "codes", "element", "first_item", "number", "numbers", "whole_number"]

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


def whole_number(dataset, keyword: str, least: int, most: int) -> int:
    """A number that must be there. Raises `BadImage`: 'missing_tag', or 'bad_tag' outside of `least`..`most`."""
    value = element(dataset, keyword)
    if value is None:
        raise bad("missing_tag", f"({keyword})")
    if not isinstance(value, int) or not least <= value <= most:
        raise bad("bad_tag", f"({keyword})")
    return int(value)


def numbers(dataset, keyword: str) -> list[float]:
    """The finite numbers of an element; none where it is absent, empty or cannot be read."""
    try:
        value = element(dataset, keyword)
        values = [] if value is None else [value] if isinstance(value, (str, int, float)) else list(value)
        found = [float(v) for v in values if v is not None and v != ""]
    except (ValueError, TypeError, OverflowError):
        return []
    return found if all(map(math.isfinite, found)) else []


def number(dataset, keyword: str) -> float | None:
    """The first number of an element."""
    return next(iter(numbers(dataset, keyword)), None)


def codes(dataset, keyword: str) -> list[str]:
    """Code strings in upper case; none where there are none. They may hold anything: compare them, do not show them."""
    try:
        value = element(dataset, keyword)
    except ValueError:
        return []
    values = [] if value is None else [value] if isinstance(value, str) else list(value)
    return [str(v).strip().upper() for v in values]


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

    kind = UID(str(element(dataset, "SOPClassUID") or "")).keyword
    if any(word in kind for word in _NO_IMAGE) and "ImageStorage" not in kind:  # RT images are X-rays
        raise bad("excluded")
    if code(dataset, "Modality") in _MODALITIES:
        raise bad("excluded")
