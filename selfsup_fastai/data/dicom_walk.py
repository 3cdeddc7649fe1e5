"""The few elements of a DICOM header that a scan needs, found without parsing the others.

pydicom makes objects of all elements before it leaves most of them out; here they are stepped over. Only what is plain
is read: where anything is odd (another byte order, nested headers, compressed headers, unknown VRs), `walk` returns
None, and pydicom reads the file.
"""

import re
from struct import Struct
from typing import NamedTuple

__all__ = ["FUNCTIONAL_GROUPS", "PIXEL_TAGS", "Elements", "walk"]

PIXEL_TAGS = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
FUNCTIONAL_GROUPS = (0x52009229, 0x52009230)
"""Shared and per frame: where Enhanced objects keep their spacing, orientation, ..."""

SYNTAX = 0x00020010
_IMPLICIT = "1.2.840.10008.1.2"
_OTHERS = {"1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"}  # big endian, deflated
_SHORT = {vr.encode(): vr for vr in re.findall("..", "AEASATCSDADSDTFDFLISLOLTPNSHSLSSSTTMUIULUS")}
_LONG = {vr.encode(): vr for vr in re.findall("..", "OBODOFOLOVOWSQSVUCUNURUTUV")}
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF

_explicit_head = Struct("<HH2sH").unpack_from
_implicit_head = Struct("<HHL").unpack_from
_length = Struct("<L").unpack_from


class _Odd(Exception):
    """Something that pydicom should look at."""


class Elements(NamedTuple):
    """What was found of a header."""

    values: dict[int, tuple[str | None, bytes]]  # Of each tag its VR (None: the file does not say) and value
    little: bool = True  # Byte order
    pixels: str = ""  # Keyword of the pixel data, '' where there is none
    claimed: int = 0  # Bytes of the pixel data as its element says; 0xFFFFFFFF: in fragments
    room: int = 0  # Bytes from its first to the end of the file


def walk(
    head: bytes,  # The first bytes of a file
    n_bytes: int,  # Of the whole file
    wanted: frozenset[int],  # Tags
) -> Elements | None:
    """The wanted elements of a plain file, if all of its header is in `head`; else None."""
    if head[128:132] != b"DICM":
        return None
    try:
        return _walked(head, n_bytes, wanted)
    except (_Odd, RecursionError):
        return None


def _walked(head: bytes, n_bytes: int, wanted: frozenset[int]) -> Elements:
    values: dict[int, tuple[str | None, bytes]] = {}
    start, tag, _, _ = _steps(head, 132, n_bytes, wanted, values, explicit=True, meta=True)
    syntax = values.get(SYNTAX, (None, b""))[1].decode("latin-1").strip("\0 ")
    if not syntax or syntax in _OTHERS or tag is None or tag < 0x00080000:
        raise _Odd
    explicit = syntax != _IMPLICIT
    if not explicit and head[start + 4 : start + 6] in _SHORT:  # it may be explicit all the same
        raise _Odd
    _, tag, at, claimed = _steps(head, start, n_bytes, wanted, values, explicit)
    if tag not in PIXEL_TAGS:
        return Elements(values)
    return Elements(values, True, PIXEL_TAGS[tag], claimed, n_bytes - at)


def _steps(head, at, n_bytes, wanted, values, explicit, meta=False):
    """From element to element, up to the pixel data, the end of the file, or that of group 2 (`meta`).

    Returns where the last element begins, its tag (None at the end of the file), where its value does, and its length.
    """
    n = len(head)
    while at + 12 <= n:
        start = at
        if explicit:
            group, number, code, length = _explicit_head(head, at)
            vr = _SHORT.get(code)
            if vr:
                at += 8
            else:
                vr, (length,) = _LONG.get(code), _length(head, at + 8)
                at += 12
        else:
            group, number, length = _implicit_head(head, at)
            vr = None
            at += 8
        if meta and group != 2:
            return start, group << 16 | number, at, length
        if explicit and vr is None:
            raise _Odd
        tag = group << 16 | number
        if tag >= 0x7FE00008:
            return start, tag, at, length
        if length == _UNDEFINED:
            if tag in wanted or vr not in ("SQ", None):
                raise _Odd
            at = _after_sequence(head, at, explicit)
        else:
            if tag in wanted:
                if tag in FUNCTIONAL_GROUPS or at + length > n:
                    raise _Odd
                values[tag] = vr, head[at : at + length]
            at += length
    if at < n_bytes:
        raise _Odd
    return at, None, at, 0


def _after_sequence(head: bytes, at: int, explicit: bool) -> int:
    """Where a sequence of undefined length ends."""
    while at + 8 <= len(head):
        group, number, length = _implicit_head(head, at)
        tag, at = group << 16 | number, at + 8
        if tag == _SEQUENCE_END:
            return at
        if tag != _ITEM:
            raise _Odd
        at = _after_item(head, at, explicit) if length == _UNDEFINED else at + length
    raise _Odd


def _after_item(head: bytes, at: int, explicit: bool) -> int:
    while at + 12 <= len(head):
        group, number, length = _implicit_head(head, at)
        tag = group << 16 | number
        if tag == _ITEM_END:
            return at + 8
        vr = None
        if not explicit:
            at += 8
        elif head[at + 4 : at + 6] in _SHORT:
            at, length = at + 8, length >> 16
        else:
            vr = _LONG.get(head[at + 4 : at + 6])
            if vr is None:
                raise _Odd
            (length,) = _length(head, at + 8)
            at += 12
        if length != _UNDEFINED:
            at += length
        elif vr in ("SQ", None):
            at = _after_sequence(head, at, explicit)
        else:
            raise _Odd
    raise _Odd
