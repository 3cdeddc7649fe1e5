"""The image side of a fastai `DataBlock`: any image file or array to a PIL image, then to a tensor."""

import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fastai.data.block import TransformBlock
from fastai.data.transforms import IntToFloatTensor, ToTensor
from fastai.torch_core import TensorImage
from fastai.vision.augment import RandTransform
from fastai.vision.core import PILBase, PILImage, PILMask, TensorPoint, image2tensor
from fasttransform import Transform
from PIL import Image

from selfsup_fastai.data.covering import cover, covered_part, covering_size, from_stored
from selfsup_fastai.data.opening import decode, open_image
from selfsup_fastai.data.reasons import BadImage

BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


class TensorGrey(TensorImage):
    """A one-channel image, (1, H, W) or (B, 1, H, W); shown black to white."""

    _show_args = {"cmap": "gray"}  # noqa: RUF012  (fastai's own class attribute)


class PILGrey(PILBase):
    """A grey PIL image: mode 'L' (8 bit) or 'F' (more bits, float32 on the 0..255 scale)."""

    _show_args = {"cmap": "gray"}  # noqa: RUF012
    _open_args = {"mode": "L"}  # noqa: RUF012
    _tensor_cls = TensorGrey


@ToTensor
def encodes(self, o: PILGrey):
    """Floats, always: a batch may mix depths, and a worker process stacks only tensors of one type."""
    return TensorGrey(image2tensor(o).float())


class OpenImage(Transform):
    """A path, array, bytes or PIL image -> `PILImage` (RGB) or `PILGrey`, with the right pixels (see `open_image`).

    Differs from fastai's `PILImage.create` where that is wrong: 16-bit files are not clipped to white, EXIF orientation
    is applied, grey stays grey. A function is called for what is to be opened.
    """

    are_scans = False  # Whether the images are scans, whose channels are no colors even where there are three
    seen: str | None = None  # In which windows scans are seen, in words
    input_types = (os.PathLike, str, bytes, np.ndarray, Image.Image, Callable)  # what `dls.test_dl` may be given

    def __init__(
        self,
        n_in: int | None = None,  # Channels: 1, 3, or None for the image's own
        min_side: int | None = None,  # Side that is needed later: large JPEGs are decoded at a reduced scale above it
    ):
        super().__init__()
        self.n_in, self.min_side = n_in, min_side

    def __repr__(self) -> str:
        return f"OpenImage(n_in={self.n_in})"

    def encodes(self, source: Any):
        return self._typed(self.opened(source() if callable(source) else source))

    def opened(self, source: Any) -> Image.Image:
        """The pixels."""
        return open_image(source, n_in=self.n_in, min_side=self.min_side)

    def _typed(self, image: Image.Image) -> PILBase:
        return PILImage(image) if image.mode == "RGB" else PILGrey(image)


class OpenChecked(OpenImage):
    """`OpenImage` for files that were readable when the loaders were made.

    A file that has vanished or broken since becomes a mid-grey image with a warning: it costs one picture, not the run.
    """

    def __init__(
        self,
        n_in: int | None = None,  # As in `OpenImage`
        min_side: int | None = None,  # As in `OpenImage`
        blank: tuple[int, int] = (64, 64),  # Width and height of the grey image, before the item transforms
    ):
        super().__init__(n_in, min_side)
        self.blank = blank

    def encodes(self, source: Any):
        try:
            return super().encodes(source)
        except BadImage as error:
            warnings.warn(
                f"an image that was readable before cannot be read now ({error.code}); a grey one stands in for it. "
                "Make the loaders anew to have it listed in `dls.report`.",
                stacklevel=2,
            )
        return self._typed(Image.new("L", self.blank, 128).convert("RGB" if self.n_in == 3 else "L"))


class OpenCovered(OpenChecked):
    """`OpenChecked` that resizes at once, so that an image just covers the windows that `Cover` cuts from it.

    What the pixel cache keeps is made by the same function: with and without it, pixels are the same.
    """

    def __init__(
        self,
        n_in: int,  # Channels: 1 or 3
        size: tuple[int, int],  # Height and width of the windows
    ):
        super().__init__(n_in, blank=size[::-1])
        self.size = size

    def opened(self, source):
        return from_stored(decode(source, self.size, 1 if self.n_in == 1 else None)[1], self.n_in)


class Cover(RandTransform):
    """The largest part of an image that has the shape of `size`, resized to it: at a random place in training, else the
    center. Of an image more than four times as long (or as high) as that shape it is from the middle. Masks and points
    come along.
    """

    split_idx, order = None, 1

    def __init__(
        self,
        size: tuple[int, int],  # Height and width
        still: bool = False,  # The center in training, too
    ):
        super().__init__()
        self.size, self.still = size, still

    def before_call(self, b, split_idx):
        """One window for an image and what is labeled on it."""
        first = b[0] if isinstance(b, tuple) else b
        if isinstance(first, Image.Image):
            width, height = covering_size(*first.size, self.size)
            left_over = height - self.size[0], width - self.size[1]
            drawn = any(left_over) and not (split_idx or self.still)
            self.corner = draw_corner(left_over) if drawn else center_corner(left_over)

    def encodes(self, image: PILBase):
        nearest = isinstance(image, PILMask)
        image = type(image)(cover(image, self.size, NEAREST if nearest else BILINEAR))
        if image.size == self.size[::-1]:
            return image
        top, left = self.corner
        return type(image)(image.crop((left, top, left + self.size[1], top + self.size[0])))

    def encodes(self, points: TensorPoint):  # noqa: F811  (fastai chooses by type)
        """Points in [-1, 1], as fastai's blocks scale them before; boxes are pairs of them."""
        width, height = points.img_size
        left, top, wide, high = covered_part(width, height, self.size)
        now = torch.tensor(covering_size(width, height, self.size)) / torch.tensor([wide, high])
        xy = (points.as_subclass(torch.Tensor).view(-1, 2) + 1) / 2 * torch.tensor([width, height])
        xy = (xy - torch.tensor([left, top])) * now - torch.tensor(self.corner[::-1])
        xy = xy / torch.tensor(self.size[::-1]) * 2 - 1
        return type(points)(xy.view(points.shape), img_size=self.size[::-1])

    def __repr__(self) -> str:
        return f"Cover(size={self.size})"


def draw_corner(
    left_over: tuple[int, int],  # Rows and columns that an image has more than the window
    rng=random,  # What it is drawn from: Python's `random`, or a generator of its kind
) -> tuple[int, int]:  # Top and left of the window
    """A random place for a window."""
    return int(rng.random() * (left_over[0] + 1)), int(rng.random() * (left_over[1] + 1))


def center_corner(left_over: tuple[int, int]) -> tuple[int, int]:
    """The place of a window in the middle."""
    return left_over[0] // 2, left_over[1] // 2


def UnlabeledBlock(n_in: int = 3) -> TransformBlock:
    """The image side of a `DataBlock`, for unlabeled data (`blocks=UnlabeledBlock`) or beside a target block.

    `n_in` is 1 (grey) or 3 (color). A file that cannot be opened raises: `UnlabeledDataLoaders` sorts such out before.
    """
    return TransformBlock(type_tfms=OpenImage(n_in), batch_tfms=IntToFloatTensor)
