"""The form in which a decoded image is kept: just large enough to cut windows of the training size from.

Light on purpose, as `opening` is: NumPy and PIL, no torch, no fastai.
"""

import numpy as np
from PIL import Image

__all__ = ["MAX_ASPECT", "cover", "covered_part", "covering_size", "from_stored", "to_channels", "to_stored"]

MAX_ASPECT = 4
"""How much longer than the window an image is kept, at most: of a longer strip it is the middle."""

Size = tuple[int, int]  # height and width


def covering_size(
    width: int,
    height: int,
    size: Size,  # Height and width of the windows
) -> tuple[int, int]:
    """Width and height of the smallest image of this aspect from which a window of `size` can be cut."""
    wide, high = _middle(width, height, size)
    scale = max(size[1] / wide, size[0] / high)
    return max(size[1], round(wide * scale)), max(size[0], round(high * scale))


def _middle(width: int, height: int, size: Size) -> tuple[int, int]:
    """Width and height of the part that is kept."""
    most_wide, most_high = MAX_ASPECT * height * size[1] // size[0], MAX_ASPECT * width * size[0] // size[1]
    return max(1, min(width, most_wide)), max(1, min(height, most_high))


def cover(
    image: Image.Image,  # Of mode L, RGB or F
    size: Size,  # Height and width of the windows
    resample: Image.Resampling = Image.Resampling.BILINEAR,  # Of masks: NEAREST, as there is nothing between classes
) -> Image.Image:
    """The image resized (bilinear, antialiased) to `covering_size`; itself where it has that size."""
    wanted = covering_size(*image.size, size)
    if image.size == wanted:
        return image
    left, top, wide, high = covered_part(*image.size, size)
    return image.resize(wanted, resample, box=(left, top, left + wide, top + high))


def covered_part(
    width: int,
    height: int,
    size: Size,  # Height and width of the windows
) -> tuple[int, int, int, int]:  # Left, top, width, height
    """The part of an image that `cover` keeps."""
    wide, high = _middle(width, height, size)
    return (width - wide) // 2, (height - high) // 2, wide, high


def to_stored(
    image: Image.Image,  # Of mode L, RGB, or F on the 0..255 scale
) -> np.ndarray:  # (C, H, W) uint8, or uint16 on the 0..65535 scale
    """The bytes that are kept of an image: 16 bits a pixel where it has more than 8."""
    values = np.asarray(image)
    if image.mode == "F":
        return np.rint(values * np.float32(257)).clip(0, 65535).astype(np.uint16)[None]
    return values[None] if image.mode == "L" else np.ascontiguousarray(values.transpose(2, 0, 1))


def from_stored(
    array: np.ndarray,  # (C, H, W) uint8 or uint16, as `to_stored` makes it
    n_in: int,  # Channels wanted: as many as there are, or three of one
) -> Image.Image:
    """The image of mode L, RGB or F. Deep grey ones as RGB are rounded to 8 bits."""
    if array.dtype == np.uint16 and n_in == 1:
        return Image.fromarray(array[0].astype(np.float32) / np.float32(257))
    array = to_channels(array, n_in)
    return Image.fromarray(array[0] if n_in == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def to_channels(
    array: np.ndarray,  # (C, H, W) uint8 or uint16
    n_in: int,
) -> np.ndarray:  # (n_in, H, W), of 8 bits if n_in is 3
    """Grey to three equal channels; deep values to 8 bits where there are three."""
    if n_in == 1:
        return array
    if array.dtype == np.uint16:
        array = np.rint(array / np.float32(257)).astype(np.uint8)
    return np.broadcast_to(array, (n_in, *array.shape[1:]))
