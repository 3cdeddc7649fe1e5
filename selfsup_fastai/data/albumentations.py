"""albumentations in a fastai pipeline. It is imported where it is needed, as that takes most of a second."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from fastai.vision.core import PILBase, PILMask, TensorPoint
from fastcore.foundation import L
from fasttransform import Transform
from PIL import Image

from selfsup_fastai.errors import DataError

if TYPE_CHECKING:
    import albumentations as A

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the internet for a newer version at import otherwise

_MODES = ("L", "RGB", "F")
_FASTAI_DOES = ("Normalize", "ToFloat", "FromFloat", "ToTensorV2", "ToTensor3D")


class AlbumentationsTransform(Transform):
    """An albumentations transform or `Compose` as an item transform, for training images only unless told otherwise.

    Images arrive in it as albumentations expects them: uint8 (H, W) or (H, W, 3), or float32 (H, W) in [0, 1] for grey
    images of more than 8 bits; they leave it as the PIL type and on the scale they came with. Each image gets a seed
    from Python's `random`, so `set_seed` and the seeding of items and workers rule what albumentations draws.
    It runs where it stands in `item_tfms` among `Resize` and the like (fastai's order 1).
    Raises `DataError` for anything that is no albumentations transform, for one that makes tensors or another value
    scale (`ToTensorV2`, `Normalize`: fastai does both later), and for one that moves pixels in an item with a mask or
    points, which would stay where they are.
    """

    order = 1

    def __init__(
        self,
        compose: A.BasicTransform | A.BaseCompose,  # `A.Compose([...])` or one transform
        split_idx: int | None = 0,  # 0: training items, 1: validation items, None: both
    ):
        super().__init__(split_idx=split_idx)
        _check(compose)
        from albumentations import DualTransform

        self.compose = compose
        self.moves_pixels = any(isinstance(t, DualTransform) for t in _leaves(compose))

    def encodes(self, x: Image.Image | TensorPoint):
        if isinstance(x, (PILMask, TensorPoint)):
            return self._left_behind(x)
        if x.mode not in _MODES:
            raise DataError(f"albumentations works on images of mode L, RGB or F; this one is {x.mode}: convert it.")
        before = np.array(x)  # a copy: Pillow's own buffer is read-only
        after = self._apply(before / np.float32(255) if x.mode == "F" else before)
        image = Image.fromarray(after * np.float32(255) if x.mode == "F" else after)
        return type(x)(image) if isinstance(x, PILBase) else image

    def _left_behind(self, x: PILMask | TensorPoint) -> PILMask | TensorPoint:
        if self.moves_pixels:
            raise DataError(
                f"This albumentations transform moves pixels, and the item's {type(x).__name__} would not move along. "
                "Use color transforms here, and fastai's batch transforms to turn, flip or crop."
            )
        return x

    def _apply(self, image: np.ndarray) -> np.ndarray:
        """uint8 or float32, (H, W) or (H, W, 3), in and out."""
        seed = random.getrandbits(32)
        # one pair of generators for all: set_random_seed would give each transform the same draws, so that two flips
        # with p=0.5 come both or not at all
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
        what = f"{image.dtype} pixels of shape {image.shape}"
        try:
            out = self.compose(image=image)["image"]
        except Exception as error:
            raise DataError(
                f"albumentations could not change {what}: {error}. "
                "Leave out the transform that cannot, or open the images with another number of channels (n_in)."
            ) from error
        if not isinstance(out, np.ndarray) or out.dtype != image.dtype:
            kind = getattr(out, "dtype", type(out).__name__)
            raise DataError(f"albumentations turned {what} into {kind}; they must stay what they are.")
        return np.ascontiguousarray(out[..., 0] if out.ndim == 3 and out.shape[2] == 1 else out)


def _check(compose: object) -> None:
    from albumentations import BaseCompose, BasicTransform

    if not isinstance(compose, (BasicTransform, BaseCompose)):
        arrived = f"the class {compose.__name__}" if isinstance(compose, type) else f"a {type(compose).__name__}"
        raise DataError(f"Expected an albumentations transform such as A.Compose([A.HorizontalFlip()]), got {arrived}.")
    for name in (type(t).__name__ for t in _leaves(compose)):
        if name in _FASTAI_DOES:
            raise DataError(f"Leave out {name}: images stay images here; fastai makes normalized tensors later.")


def _leaves(compose: A.BasicTransform | A.BaseCompose) -> Iterator[A.BasicTransform]:
    from albumentations import BaseCompose

    if isinstance(compose, BaseCompose):
        for inner in compose.transforms:
            yield from _leaves(inner)
    else:
        yield compose


def is_albumentations(tfm: object) -> bool:
    """An object of albumentations, or of a class derived from one of its own."""
    return any(c.__module__.split(".")[0] == "albumentations" for c in type(tfm).__mro__)


def wrap_albumentations(
    tfms: Any,  # What a user gives as item_tfms: None, one transform, or several
) -> Any:  # The same, each bare albumentations object in an `AlbumentationsTransform`
    """fastai would iterate over a bare `A.Compose` and fail on its parts."""
    if isinstance(tfms, (list, tuple, L)):
        return [wrap_albumentations(t) for t in tfms]
    return AlbumentationsTransform(tfms) if is_albumentations(tfms) else tfms
