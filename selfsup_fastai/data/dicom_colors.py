"""Color frames of DICOM files to RGB in [0, 1]: palettes, YCbCr, RGB of any depth."""

import numpy as np
from PIL import Image

from selfsup_fastai.data.dicom_elements import element, numbers
from selfsup_fastai.data.dicom_values import Table, as_table
from selfsup_fastai.data.reasons import bad

__all__ = ["is_color", "luma", "to_rgb"]

_PALETTE = "PALETTE COLOR"
_LUMA = np.float32([0.299, 0.587, 0.114])


def is_color(photometric: str) -> bool:
    """Whether pixels have three channels, or get them from a palette."""
    return not photometric.startswith("MONOCHROME")


def to_rgb(dataset, array: np.ndarray, photometric: str, bits: int) -> np.ndarray:
    """A decoded frame, (H, W, 3) or (H, W) of a palette's numbers, as float32 (H, W, 3) in [0, 1]."""
    if photometric == _PALETTE:
        return _through_palette(dataset, array)
    if photometric.startswith("YBR_FULL"):
        return _from_ybr(array, bits)
    if photometric != "RGB":  # transforms of JPEG 2000 without its decoder
        raise bad("bad_tag", "(PhotometricInterpretation)")
    return _scaled(array, bits)


def _scaled(array: np.ndarray, bits: int) -> np.ndarray:
    if array.dtype == np.float32 or array.dtype == np.float64:
        raise bad("bad_tag", "(PhotometricInterpretation)")
    out = np.empty(array.shape, np.float32)
    np.multiply(array, np.float32(1 / ((1 << bits) - 1)), out=out, dtype=np.float32)
    within = array.dtype.kind == "u" and 8 * array.dtype.itemsize == bits  # the largest becomes 1 exactly
    return out if within else np.clip(out, 0, 1, out=out)


def _from_ybr(array: np.ndarray, bits: int) -> np.ndarray:
    """PS3.3 C.7.6.3.1.2, which is JPEG's: of 8 bits rounded as JPEG decoders round."""
    if array.dtype == np.uint8 and bits == 8:
        return _scaled(np.asarray(Image.fromarray(np.ascontiguousarray(array), "YCbCr").convert("RGB")), 8)
    y, b, r = np.moveaxis(array.astype(np.float64) / ((1 << bits) - 1), -1, 0)
    b, r = b - 2 ** (bits - 1) / ((1 << bits) - 1), r - 2 ** (bits - 1) / ((1 << bits) - 1)
    rgb = [y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b]
    return np.stack(rgb, -1).clip(0, 1).astype(np.float32)


def _through_palette(dataset, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.dtype.itemsize > 2:
        raise bad("bad_tag", "(BitsAllocated)")
    channels = []
    for color in "Red", "Green", "Blue":
        described = numbers(dataset, f"{color}PaletteColorLookupTableDescriptor", "")
        if len(described) != 3:
            raise bad("missing_tag", f"({color}PaletteColorLookupTableDescriptor)")
        n, first, bits = (int(v) for v in described)
        found = _segmented(dataset, color, n, first, bits)
        if not found:
            raise bad("missing_tag", f"({color}PaletteColorLookupTableData)")
        channels.append(found)
    shift = 8 if all(c.bits > 8 and not (c.entries & 0xFF).any() for c in channels) else 0  # 8 bits, as 16
    low, high = int(array.min()), int(array.max())
    numbers_there = np.arange(low, high + 1)  # so that one look-up does for all three channels
    colors = np.stack([_unit(c, shift)(numbers_there) for c in channels], -1)
    index = np.subtract(array, low, dtype=np.intp) if low else array
    return np.take(colors, index, axis=0, mode="clip")  # of rows far faster than by an index in brackets


def _unit(channel: Table, shift: int) -> Table:
    """The same table with entries in [0, 1]."""
    bits = channel.bits - shift
    top = (1 << bits) - 1
    entries = np.minimum((channel.entries >> shift).astype(np.float32) / np.float32(top), 1)
    return Table(entries, channel.first, bits)


def _segmented(dataset, color: str, n: int, first: int, bits: int) -> Table | None:
    """A channel's table, written out from segments where it is stored so (PS3.3 C.7.9.2)."""
    plain = as_table(dataset, f"{color}PaletteColorLookupTableData", n, first, bits)
    data = element(dataset, f"Segmented{color}PaletteColorLookupTableData")
    if plain or data is None:
        return plain
    order = ">" if dataset.original_encoding[1] is False else "<"
    codes = np.frombuffer(data, f"{order}u{1 if bits == 8 else 2}") if isinstance(data, bytes) else np.asarray(data)
    entries = _written_out(codes.tolist(), (n & 0xFFFF) or 1 << 16)
    return Table(np.asarray(entries, np.uint16), first, bits) if entries else None


def _written_out(codes: list[int], n: int) -> list[int]:
    """Entries from segments: 0 and 1, the entries or the end of a line to it."""
    entries: list[int] = []
    at = 0
    while at < len(codes) and len(entries) < n:
        kind, length = codes[at], codes[at + 1] if at + 1 < len(codes) else 0
        if kind == 0:
            entries += codes[at + 2 : at + 2 + length]
            at += 2 + length
        elif kind == 1 and entries and at + 2 < len(codes):
            entries += np.rint(np.linspace(entries[-1], codes[at + 2], length + 1)[1:]).astype(int).tolist()
            at += 3
        else:
            return []
    return entries[:n] if len(entries) >= n else []


def luma(rgb: np.ndarray) -> np.ndarray:
    """Grey from color, (..., 3) to (...): BT.601."""
    return rgb @ _LUMA
