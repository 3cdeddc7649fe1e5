"""Runs of a few seconds that tasks which compare views are tested by: distinct pictures, a net of two layers."""

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from PIL import Image
from torch import Tensor, nn

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner

MILD = {"strength": 0.2, "scale": [0.7, 1.0]}  # Views that change little, for nets that learn little


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blots(n: int, side: int = 36, channels: int = 3, seed: int = 0) -> Tensor:
    """Smooth random pictures, no two alike, (n, C, side, side) in [0, 1]."""
    coarse = torch.rand(n, channels, 5, 5, generator=seeded(seed))
    return nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def pictures(n: int, side: int = 24, seed: int = 0) -> np.ndarray:
    """The same as bytes, (n, side, side, 3)."""
    rng = np.random.default_rng(seed)
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in range(n)]
    return np.stack([np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in coarse])


def small_net(width: int = 32) -> nn.Module:
    """Three convolutions, the features centered."""
    first = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Conv2d(32, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))


def learner(
    task: str, n: int = 64, bs: int = 16, side: int = 24, valid_pct: float = 0.25, **settings
) -> PretextLearner:
    set_seed(0)
    dls = UnlabeledDataLoaders.from_array(pictures(n, side), size=None, bs=bs, valid_pct=valid_pct, num_workers=0)
    learn = pretext_learner(dls, task, small_net, **settings)
    learn.remove_cb(ProgressCallback)
    return learn


def found_before_and_after(learn: PretextLearner, epochs: int, lr: float = 1e-2) -> tuple[float, float]:
    """Share of validation images whose partner is found, at first and after training."""
    before = learn.validate()[1]
    with learn.no_logging():
        learn.fit_one_cycle(epochs, lr)
    return before, learn.validate()[1]
