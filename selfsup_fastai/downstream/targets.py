"""What the labels of loaders ask of a network: their kind, and the outputs, loss and activation that follow from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import get_c
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.torch_core import TensorCategory, TensorMask, TensorMultiCategory
from fastai.vision.core import AddMaskCodes, PILMask, PointScaler, TensorBBox, TensorPoint
from fastcore.foundation import L
from torch import Tensor

from selfsup_fastai.data.loader import image_sizes, nothing_resizes, spread
from selfsup_fastai.downstream.schedule import check_count
from selfsup_fastai.errors import DataError, TaskError

LOOKED_AT = 200  # Labels of each loader that are looked at before training, at most


class Kind(NamedTuple):
    """What follows from a kind of label."""

    loss: Callable  # Makes the default loss
    activation: str  # Outputs to predictions: 'softmax', 'sigmoid' or 'none'
    score: str  # What test images are scored by, higher is better


KINDS = {
    "category": Kind(CrossEntropyLossFlat, "softmax", "accuracy"),
    "multicategory": Kind(BCEWithLogitsLossFlat, "sigmoid", "mAP"),
    "regression": Kind(MSELossFlat, "none", "R2"),
    "points": Kind(MSELossFlat, "none", "R2"),
    "mask": Kind(partial(CrossEntropyLossFlat, axis=1), "softmax", "dice"),
}
"""Of one class an image, several or none, one or several numbers, a fixed number of points, a class for each pixel."""


@dataclass(frozen=True)
class Target:
    """What is to be predicted."""

    kind: str  # One of `KINDS`
    n_out: int  # Outputs of the network; for points x and y of each, for masks channels
    vocab: tuple | None = None  # Names of the classes, as they are numbered


def kind_of(
    dls: DataLoaders,  # Labeled images
) -> str:
    """'category', 'multicategory', 'regression', 'points' or 'mask': what the labels are, by the first one.

    Raises `DataError` for data without labels, `TaskError` for labels that nothing here predicts.
    """
    targets = _targets(dls)
    if not targets:
        fix = "Fine-tuning needs labels; without labels, pretext_learner learns from the images alone."
        raise DataError(f"These DataLoaders give images without labels. {fix}")
    if any(isinstance(target, TensorBBox) for target in targets):
        fix = "Put detection_backbone(encoder) into one of torchvision's detectors, such as FasterRCNN, to find boxes."
        raise TaskError(f"The labels are boxes, which downstream_learner does not predict. {fix}")
    if len(targets) > 1:
        raise TaskError(f"Each image has {len(targets)} labels; one is expected (a category, several, numbers, ...).")
    kind = _kind(targets[0])
    if kind is None:
        known = "categories, multi-categories, numbers, points and masks are predicted."
        raise TaskError(f"The labels are of the kind {type(targets[0]).__name__}; {known}")
    return kind


def target_of(
    dls: DataLoaders,  # Labeled images
    n_out: int | None = None,  # Outputs of the network; None: what the labels need
    ignored: int | None = None,  # A value in masks that the loss leaves out
) -> Target:
    """What the labels ask for, some of them looked at. Raises `DataError` and `TaskError` for what cannot be learned.

    Masks may hold the numbers of their codes alone, points must be as many in each image.
    """
    kind = kind_of(dls)
    vocab = _codes(dls) if kind == "mask" else _vocab(dls) if "category" in kind else None
    if n_out is not None:
        check_count("n_out", n_out, 1)
    if kind == "mask":
        needed = _check_masks(dls, n_out or (len(vocab) if vocab else None), ignored)
    elif kind == "points":
        needed = 2 * _check_points(dls)
        if n_out not in (None, needed):
            raise TaskError(f"n_out is {n_out}, but {needed // 2} points have {needed} coordinates. Leave n_out out.")
    else:
        needed = get_c(dls)
    n_out = n_out or needed
    if not n_out:
        raise TaskError("The number of outputs cannot be told from the labels: pass n_out, such as n_out=10.")
    return Target(kind, int(n_out), vocab)


def in_words(
    label: Any,  # A decoded label: several names, a number, or several
) -> str:
    """A label as a title above a picture."""
    parts = list(label) if isinstance(label, list | tuple | L) else [label]
    return "; ".join(f"{part:.3g}" if isinstance(part, float) else str(part) for part in parts) or "-"


def ignored_value(loss_func: object) -> int | None:
    """The value of labels that a loss leaves out, where it has one."""
    value = getattr(getattr(loss_func, "func", loss_func), "ignore_index", None)
    return value if isinstance(value, int) and value >= 0 else None


def _targets(dls: object) -> list:
    """The labels of the first training image, without opening the image where that can be helped."""
    if not isinstance(dls, DataLoaders):
        fix = "Make labeled loaders first, such as ImageDataLoaders.from_folder(path, valid_pct=0.2)."
        raise DataError(f"Expected labeled DataLoaders, got {type(dls).__name__}. {fix}")
    if not len(dls.loaders) or not len(dls.train_ds):
        raise DataError("The DataLoaders hold no training images.")
    return _labels_of(dls.train_ds, 0)


def _labels_of(dataset: Any, i: int) -> list:
    if isinstance(dataset, Datasets):
        return [tl[i] for tl in dataset.tls[dataset.n_inp :]]
    item = dataset[i]
    return list(item[1:]) if isinstance(item, tuple | list) else []


def _kind(target: object) -> str | None:
    if isinstance(target, PILMask | TensorMask):
        return "mask"
    if isinstance(target, TensorPoint):
        return "points"
    if isinstance(target, TensorMultiCategory):
        return "multicategory"
    if isinstance(target, TensorCategory):
        return "category"
    if isinstance(target, Tensor | np.ndarray | np.generic | int | float | list | tuple):
        return _kind_of_numbers(target)
    return None


def _kind_of_numbers(target: Any) -> str | None:
    """Of labels without a type of fastai's: whole numbers are classes, others are values, a plane of them a mask."""
    try:
        values = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not (values.is_floating_point() or values.is_complex())
    if values.ndim == 0:
        return "category" if whole else "regression"
    if values.ndim == 1:
        return None if whole else "regression"
    return "mask" if whole and values.ndim == 2 else None


def _vocab(dls: DataLoaders) -> tuple | None:
    vocab = getattr(dls, "vocab", None)
    return tuple(vocab) if vocab is not None and len(vocab) else None


def _codes(dls: DataLoaders) -> tuple | None:
    """The names that `MaskBlock` was given."""
    found = [t.codes for t in dls.train.after_item.fs if isinstance(t, AddMaskCodes) and t.codes is not None]
    return tuple(found[0]) if found and len(found[0]) else _vocab(dls)


def _looked_at(dls: DataLoaders, n: int = LOOKED_AT) -> Iterator[tuple[Any, list[int], list]]:
    """Of each loader: itself, places evenly spread over its images, and their labels."""
    for dl in dls.loaders:
        places = spread(len(dl.dataset), n) if len(dl.dataset) else []
        yield dl, places, [_labels_of(dl.dataset, i)[0] for i in places]


def _check_points(dls: DataLoaders) -> int:
    """How many points each image has."""
    if not any(isinstance(t, PointScaler) and t.do_scale for t in dls.train.after_item.fs):
        raise TaskError("Points must come scaled to [-1, 1], as fastai's PointBlock does it. Use that block.")
    points = [target for _, _, targets in _looked_at(dls) for target in targets]
    counts = sorted({target.numel() // 2 for target in points})
    if len(counts) > 1 or not counts[0]:
        got = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else "none"
        raise TaskError(f"Each image must have as many points, in the same order; there are {got} of them.")
    if not all(torch.isfinite(torch.as_tensor(target).as_subclass(Tensor)).all() for target in points):
        raise DataError("Some points are not finite numbers. Leave images with missing points out.")
    return counts[0]


def _check_masks(dls: DataLoaders, n_codes: int | None, ignored: int | None) -> int:
    """How many classes the masks have; whether they hold those alone, and lie on their images."""
    values = set()
    for dl, places, masks in _looked_at(dls):
        _check_sizes(dl, places, masks)
        for mask in masks:
            values |= set(np.unique(np.asarray(mask)).tolist())
    values = sorted(values - {ignored})
    allowed = range(n_codes or len(values))
    if set(values) <= set(allowed) and len(allowed) > 1:
        return len(allowed)
    raise DataError(_foreign_values(values, n_codes))


def _foreign_values(values: Sequence[int], n_codes: int | None) -> str:
    """What to say of masks whose values are not the numbers of codes."""
    shown = ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
    expected = f"0 to {n_codes - 1} ({n_codes} codes)" if n_codes else "the numbers of codes: 0, 1, ... without a gap"
    fix = "A JPEG or a mask that was resized may be to blame: write masks as PNG, one number a class."
    if len(values) <= (n_codes or 32):
        numbered = f"np.searchsorted({list(values)}, np.asarray(PILMask.create(mask_of(file)))).astype('uint8')"
        fix = f"Number them, such as get_y=lambda file: PILMask.create({numbered}). "
        fix += "loss_func=CrossEntropyLossFlat(axis=1, ignore_index=255) leaves a value out of the loss."
    return f"Masks hold the values {shown}; expected {expected}. {fix}"


def _check_sizes(dl: Any, places: list[int], masks: list) -> None:
    """Masks of another shape than their images would be laid on them askew, and nothing would say so."""
    sizes = image_sizes(dl.dataset, places)
    if sizes is None or not all(isinstance(mask, PILMask) for mask in masks):
        return
    exact = nothing_resizes(dl)
    for (width, height), mask in zip(sizes, masks):
        wide, high = mask.size
        slack = 0 if exact else max(width, height, wide, high)
        if abs(width * high - height * wide) > slack or (exact and (width, height) != (wide, high)):
            fix = "Check that image and mask belong together, and that neither was turned or cut alone."
            raise DataError(f"An image of {width} x {height} pixels has a mask of {wide} x {high}. {fix}")
