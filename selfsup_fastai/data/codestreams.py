"""What compressed bytes are, by their own head: JPEG of a kind, JPEG-LS or JPEG 2000, and how large."""

from typing import NamedTuple

__all__ = ["Codestream", "codestream"]

_UID = "1.2.840.10008.1.2.4."
_FAMILIES = {  # endings of the transfer syntaxes that may hold the kind; the first is decoded as
    "jpeg": ("50", "51"),
    "extended": ("51", "50"),
    "lossless": ("70", "57"),
    "jpeg-ls": ("80", "81"),
    "jpeg 2000": ("91", "90", "92", "93", "201", "202", "203"),
}
_FRAMES = {0xC0: "jpeg", 0xC1: "extended", 0xC2: "jpeg", 0xC3: "lossless", 0xF7: "jpeg-ls"}  # by JPEG's SOF marker


class Codestream(NamedTuple):
    """A compressed image's own account of itself."""

    kind: str
    height: int
    width: int
    adobe: int | None  # Color transform that Adobe's marker states: 0 none, 1 YCbCr; None without the marker

    def fits(self, syntax: str) -> bool:
        """Whether a transfer syntax is one for such bytes."""
        return syntax in [_UID + end for end in _FAMILIES[self.kind]]

    def is_of(self, height: int, width: int) -> bool:
        """Whether it has this size; the height may be left to the end of a JPEG, where nobody looks."""
        return self.width == width and self.height in (height, 0)

    @property
    def syntax(self) -> str:
        """The transfer syntax to decode such bytes with."""
        return _UID + _FAMILIES[self.kind][0]


def codestream(data: bytes) -> Codestream | None:
    """None for what is none of these, or is broken before its size is stated."""
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg(data)
    if data[:4] == b"\xff\x4f\xff\x51":
        return _jpeg_2000(data, 0)
    if data[4:8] == b"jP  ":  # within boxes, as in .jp2 files
        start = data.find(b"\xff\x4f\xff\x51", 0, 1 << 16)
        return _jpeg_2000(data, start) if start > 0 else None
    return None


def _jpeg(data: bytes) -> Codestream | None:
    at, adobe = 2, None
    while at + 9 < len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD8:  # fill bytes, and markers without contents
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAMES:
            height, width = (int.from_bytes(data[i : i + 2], "big") for i in (at + 5, at + 7))
            return Codestream(_FRAMES[marker], height, width, adobe)
        if marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and at + 15 < len(data):
            adobe = data[at + 15]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _jpeg_2000(data: bytes, start: int) -> Codestream | None:
    size = data[start + 8 : start + 24]
    if len(size) < 16:
        return None
    right, bottom, left, top = (int.from_bytes(size[i : i + 4], "big") for i in (0, 4, 8, 12))
    return Codestream("jpeg 2000", max(bottom - top, 0), max(right - left, 0), None)
