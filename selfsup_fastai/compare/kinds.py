"""What the labels of loaders are."""

import torch
from fastai.data.core import DataLoaders
from fastai.torch_core import TensorMask, TensorMultiCategory
from fastai.vision.core import PILMask, TensorPoint


def kind_of(dls: DataLoaders) -> str:
    """'category', 'multicategory', 'regression', 'points' or 'mask'."""
    label = dls.train_ds[0][-1]
    for kind, types in {
        "mask": PILMask | TensorMask,
        "points": TensorPoint,
        "multicategory": TensorMultiCategory,
    }.items():
        if isinstance(label, types):
            return kind
    return "regression" if torch.as_tensor(label).is_floating_point() else "category"
