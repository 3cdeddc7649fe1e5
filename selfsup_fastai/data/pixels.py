"""The values of an image or array: any mode, depth and number of channels to mode L, RGB or F on the 0..255 scale.

Light on purpose, as `opening` is: NumPy and PIL, no torch, no fastai.
"""

from functools import cache
from hashlib import blake2b

import numpy as np
from PIL import Image, ImageCms

from selfsup_fastai.data.reasons import bad

__all__ = ["DEEP", "LUMA", "depth", "from_array", "is_grey", "pixel_hash", "to_pixels"]

LUMA = (0.299, 0.587, 0.114)
"""Red, green and blue in a grey pixel (ITU-R BT.601), as in Pillow's mode L."""

_GREY = {"1", "L", "LA", "La"}
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
DEEP = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
"""PIL's modes of more than 8 bits: all grey."""


def to_pixels(image: Image.Image, n_in: int | None) -> Image.Image:
    """A loaded image of any mode as a new one of mode L, RGB or F that carries no metadata."""
    if image.mode in DEEP:
        scaled = _deep_to_255(image)
        return Image.fromarray(_to_uint8(scaled)).convert("RGB") if n_in == 3 else Image.fromarray(scaled)
    grey = image.mode in _GREY
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if not grey:
        image = _to_rgb(image)
    wanted = n_in or (1 if grey else 3)
    image = image.convert("L" if wanted == 1 else "RGB")
    image.info = {}  # EXIF in it would turn the image a second time, and may name a person
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _lab_to_srgb())
    try:
        return image.convert("RGB")
    except ValueError:
        mode = image.mode
    raise bad("unsupported", f"(mode {mode})")


@cache
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _deep_to_255(image: Image.Image) -> np.ndarray:
    """(H, W) float32 on the 0..255 scale from a grey image of more than 8 bits."""
    values = np.asarray(image)
    if image.mode == "F":
        return _floats_to_255(values)
    if image.mode == "I" and not _fits_16_bits(values):
        return _stretched(values)
    return values.astype(np.float32) / np.float32(257)  # 65535 / 255


def _fits_16_bits(values: np.ndarray) -> bool:
    return values.min() >= 0 and values.max() <= 65535


def _floats_to_255(values: np.ndarray) -> np.ndarray:
    """float32 on the 0..255 scale, by the range of all values together (see `open_image`)."""
    values = _all_finite(np.asarray(values, dtype=np.float32))
    if values.min() < 0 or values.max() > 65535:
        return _stretched(values)
    if values.max() <= 1:
        return values * np.float32(255)
    return values if values.max() <= 255 else values / np.float32(257)


def _all_finite(values: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    if finite.all():
        return values
    known = values[finite] if finite.any() else np.zeros(1, values.dtype)
    return np.nan_to_num(values, nan=known.min(), neginf=known.min(), posinf=known.max())


def _stretched(values: np.ndarray) -> np.ndarray:
    """float32 with the minimum at 0 and the maximum at 255; all 0 where there is one value only."""
    low, high = float(values.min()), float(values.max())
    scaled = np.subtract(values, low, dtype=np.float64)  # float32 cannot tell large integers apart
    scaled *= 255 / (high - low) if high > low else 0.0
    return scaled.astype(np.float32)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def from_array(array: np.ndarray) -> Image.Image:
    """The PIL image that holds an array's own values; deep color arrays as 8-bit RGB: PIL has no deeper one."""
    shape, kind = array.shape, array.dtype
    if array.ndim == 3 and shape[2] == 1:
        array = array[..., 0]
    color = array.ndim == 3 and array.shape[2] in (3, 4)
    if not (array.ndim == 2 or color) or array.size == 0 or kind.kind not in "buif":
        expected = "Expected numbers of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
        raise bad("unsupported", f"{expected}, not empty; got {kind} of shape {shape}.")
    if color:
        array = array[..., :3]
    if kind.kind == "b":
        array = array.astype(np.uint8) * 255
    elif kind.kind == "u" and kind.itemsize == 2:
        array = _to_uint8(array / np.float32(257)) if color else array.astype(np.uint16)
    elif kind != np.uint8:
        array = _to_uint8(_floats_to_255(array)) if color else array.astype(np.float32)
    return Image.fromarray(np.ascontiguousarray(array))


def is_grey(image: Image.Image) -> bool:
    """Whether red, green and blue are equal everywhere."""
    if image.mode != "RGB":
        return True
    values = np.asarray(image)
    # A few rows first: they settle it for nearly every color image.
    return all(bool((part[..., :2] == part[..., 1:]).all()) for part in (values[::16], values))


def depth(image: Image.Image) -> tuple[int, int | float | None]:
    """Bits a channel, and the largest finite value where there are more than 8."""
    if image.mode not in DEEP:
        return 8, None
    values = np.asarray(image)
    if image.mode == "F":
        return 32, float(_all_finite(values).max())
    return (16 if _fits_16_bits(values) else 32), int(values.max())


def pixel_hash(
    array: np.ndarray,  # Decoded pixels of one image, of any shape
) -> str:
    """32 hex digits that two arrays share if shape, dtype and values are the same; '' where all pixels are alike.

    Byte order in memory does not count. An empty picture (slices above the head are) tells of no patient, so it ties
    none to another.
    """
    pixels = array.reshape(-1, 3) if array.ndim == 3 and array.shape[-1] == 3 else array.reshape(-1, 1)
    if array.size == 0 or (pixels == pixels[0]).all():
        return ""
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    digest = blake2b(f"{plain.shape} {plain.dtype.str}".encode(), digest_size=16)
    digest.update(plain.view(np.uint8).data)
    return digest.hexdigest()
