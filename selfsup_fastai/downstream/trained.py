"""A trained model as it is used: images in [0, 1] in, probabilities, values or names out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fastai.data.core import TfmdDL
from fastai.data.transforms import ToTensor
from fastai.vision.augment import CropPad, PadMode, RandomCrop, RandomResizedCrop, Resize, ResizeMethod
from fasttransform import Transform
from torch import Tensor, nn

from selfsup_fastai.data.blocks import Cover, OpenImage
from selfsup_fastai.downstream.models import DownstreamModel
from selfsup_fastai.downstream.targets import KINDS, Target
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.errors import EncoderFileError
from selfsup_fastai.messages import say

ACTIVATIONS = {"softmax": lambda x: x.softmax(1), "sigmoid": torch.sigmoid, "none": lambda x: x}
"""Outputs (B, n) or (B, n, H, W) to predictions."""
PADS = {f"pad {mode}": mode for mode in (PadMode.Zeros, PadMode.Border, PadMode.Reflection)}
RESIZES = ("cover", "crop", "squish", "random crop", *PADS)
"""How images came to their size: by our `Cover`, or by fastai's `Resize` or `RandomResizedCrop`."""
MARGIN = 0.14  # Of what `RandomResizedCrop` cuts off in validation: its default


@dataclass(frozen=True)
class Facts(Target):
    """What is known of a model's predictions: a target, and how images were and outputs are to be treated."""

    size: tuple[int, int] | None = None  # Height and width of the images that it was trained with
    resize: str | None = None  # One of `RESIZES`; None: the images had that size
    activation: str = "none"  # One of `ACTIVATIONS`
    threshold: float = 0.5  # Probability above which one of several labels counts as said

    def resizer(self) -> Transform:
        """What brings images to `size`: if nobody said how, all of one for masks and points, else its middle."""
        way = self.resize or ("squish" if self.kind in ("mask", "points") else "cover")
        if way == "cover":
            return Cover(self.size)
        if way == "random crop":
            return RandomResizedCrop(self.size, val_xtra=MARGIN)
        method = ResizeMethod.Pad if way in PADS else way
        return Resize(self.size, method, pad_mode=PADS.get(way, PadMode.Reflection))


class TrainedModel(nn.Module):
    """An encoder with its head, and what is known of its predictions; `downstream.saving` says how to use it."""

    def __init__(
        self,
        model: DownstreamModel,  # Standardized images to outputs
        facts: Facts,  # What the outputs are
    ):
        super().__init__()
        self.model, self.facts = model, facts
        self.eval()

    @property
    def encoder(self) -> Encoder:
        """The encoder, which goes wherever an encoder is wanted."""
        return self.model.encoder

    @property
    def kind(self) -> str:
        """'category', 'multicategory', 'regression', 'points' or 'mask'."""
        return self.facts.kind

    @property
    def vocab(self) -> tuple | None:
        """Names of the classes, as they are numbered; None for numbers and points, and where nobody named them."""
        return self.facts.vocab

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images that it was trained with; None where that is not known."""
        return self.facts.size

    @property
    def threshold(self) -> float:
        """Probability from which on one of several labels counts as said."""
        return self.facts.threshold

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [0, 1] to raw outputs."""
        return self.model(self.encoder.prepare(x))

    @torch.inference_mode()
    def predict_batch(
        self,
        x: Tensor,  # Images (B, 1 or 3, H, W), floats in [0, 1], of any size
    ) -> Tensor:
        """What the table in `downstream.saving` says, on the device of `x`."""
        like = next(self.parameters())
        out = ACTIVATIONS[self.facts.activation](self(x.to(like.device)).float())
        if self.kind == "points":
            height, width = x.shape[-2:]
            out = (out.view(len(x), -1, 2) + 1) / 2 * out.new_tensor([width, height])
        return out.to(x.device)

    def decode(
        self,
        preds: Tensor,  # What `predict_batch` gave
    ) -> list:
        """The prediction for each image in words or numbers, as the table in `downstream.saving` says."""
        if self.kind == "category":
            return [self._named(i) for i in preds.argmax(1).tolist()]
        if self.kind == "multicategory":
            return [[self._named(i) for i in row.nonzero().flatten().tolist()] for row in preds > self.threshold]
        if self.kind == "mask":
            return list(preds.argmax(1).to(torch.uint8 if preds.shape[1] <= 256 else torch.int64))
        return preds.tolist()

    def open(
        self,
        source: Any,  # A path, bytes, an array or a PIL image, as for `open_image`
    ) -> Tensor:  # (C, h, w) in [0, 1]
        """An image as validation saw its images: the encoder's channels, `size`, cut or squeezed to it."""
        image = OpenImage(self.encoder.image_channels)(source)
        if self.size and (image.size != self.size[::-1] or self.facts.resize == "random crop"):
            image = self.facts.resizer()(image, split_idx=1)
        return ToTensor()(image).as_subclass(Tensor).float() / 255

    def _named(self, i: int) -> Any:
        return self.vocab[i] if self.vocab and i < len(self.vocab) else i


def resize_of(dl: TfmdDL) -> str | None:
    """How images come to their size in a loader: the last of its transforms that is known to do it.

    Says so where that is one that a saved model does not know.
    """
    found = None
    for tfm in dl.after_item.fs:
        if isinstance(tfm, RandomResizedCrop) and tfm.val_xtra == MARGIN:
            found = "random crop"
        elif isinstance(tfm, (RandomResizedCrop, CropPad, RandomCrop)):
            found = None
            say(f"The model does not keep that images were cut by {type(tfm).__name__}: cut them so before `open`.")
        elif isinstance(tfm, Cover):
            found = "cover"
        elif isinstance(tfm, Resize):
            found = f"pad {tfm.pad_mode}" if tfm.method == ResizeMethod.Pad else str(tfm.method)
    return found if found in RESIZES else None


def activation_of(loss_func: Callable, kind: str) -> str:
    """Which of `ACTIVATIONS` a learner with this loss has for predictions, found by trying; a loss without: the kind's.

    Raises `EncoderFileError` for one that is none of them.
    """
    own = getattr(loss_func, "activation", None)
    if own is None:
        return KINDS[kind].activation
    x = torch.randn(2, 3, *[2] * (2 if kind == "mask" else 0), generator=torch.Generator().manual_seed(0))
    given = own(x)
    for name, known in ACTIVATIONS.items():
        if isinstance(given, Tensor) and given.shape == x.shape and torch.allclose(given, known(x), atol=1e-6):
            return name
    raise EncoderFileError(
        f"The activation of {type(loss_func).__name__} is none of {', '.join(ACTIVATIONS)}: what the saved model "
        "predicts would differ from what the learner does. Train with one of fastai's losses."
    )
