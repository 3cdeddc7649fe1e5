"""The image side of a fastai `DataBlock`: any image file or array to a PIL image, then to a tensor."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from fastai.data.block import TransformBlock
from fastai.data.transforms import IntToFloatTensor, ToTensor
from fastai.torch_core import TensorImage
from fastai.vision.core import PILBase, PILImage, image2tensor
from fasttransform import Transform
from PIL import Image

from selfsup_fastai.data.opening import open_image
from selfsup_fastai.data.reasons import BadImage


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
        image = open_image(source() if callable(source) else source, n_in=self.n_in, min_side=self.min_side)
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
        grey = Image.new("L", self.blank, 128)
        return PILImage(grey.convert("RGB")) if self.n_in == 3 else PILGrey(grey)


def UnlabeledBlock(n_in: int = 3) -> TransformBlock:
    """The image side of a `DataBlock`, for unlabeled data (`blocks=UnlabeledBlock`) or beside a target block.

    `n_in` is 1 (grey) or 3 (color). A file that cannot be opened raises: `UnlabeledDataLoaders` sorts such out before.
    """
    return TransformBlock(type_tfms=OpenImage(n_in), batch_tfms=IntToFloatTensor)
