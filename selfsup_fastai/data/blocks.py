"""The image side of a fastai `DataBlock`: any image file or array to a PIL image, then to a tensor."""

import warnings
from typing import Any

from fastai.data.block import TransformBlock
from fastai.data.transforms import IntToFloatTensor
from fastai.torch_core import TensorImage
from fastai.vision.core import PILBase, PILImage
from fasttransform import Transform
from PIL import Image

from selfsup_fastai.data.opening import BadImage, open_image


class TensorGrey(TensorImage):
    """A one-channel image, (1, H, W) or (B, 1, H, W); shown black to white."""

    _show_args = {"cmap": "gray"}  # noqa: RUF012  (fastai's own class attribute)


class PILGrey(PILBase):
    """A grey PIL image: mode 'L' (8 bit) or 'F' (more bits, float32 on the 0..255 scale)."""

    _show_args = {"cmap": "gray"}  # noqa: RUF012
    _open_args = {"mode": "L"}  # noqa: RUF012
    _tensor_cls = TensorGrey


class OpenImage(Transform):
    """A path, array, bytes or PIL image -> `PILImage` (RGB) or `PILGrey`, with the right pixels (see `open_image`).

    Differs from fastai's `PILImage.create` where that is wrong: 16-bit files are not clipped to white, EXIF orientation
    is applied, grey stays grey.
    """

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

    A file that has vanished or broken since becomes a mid-grey square with a warning: it costs one picture, not the run.
    """

    def encodes(self, source: Any):
        try:
            return super().encodes(source)
        except BadImage as error:
            warnings.warn(
                f"an image that was readable before cannot be read now ({error.code}); a grey square stands in for it. "
                "Make the loaders anew to have it listed in `dls.report`.",
                stacklevel=2,
            )
            side = self.min_side or 64
            blank = Image.new("RGB" if self.n_in == 3 else "L", (side, side), (128,) * 3 if self.n_in == 3 else 128)
            return PILImage(blank) if self.n_in == 3 else PILGrey(blank)


def UnlabeledBlock(n_in: int = 3) -> TransformBlock:
    """The image side of a `DataBlock`, for unlabeled data (`blocks=UnlabeledBlock`) or beside a target block.

    `n_in` is 1 (grey) or 3 (color). Files that cannot be opened raise: `UnlabeledDataLoaders` sorts them out beforehand.
    """
    return TransformBlock(type_tfms=OpenImage(n_in), batch_tfms=IntToFloatTensor)
