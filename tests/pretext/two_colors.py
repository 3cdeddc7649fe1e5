"""Images whose color is told by their lightness: what is dark is blue, what is light is orange."""

import numpy as np
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from torch import nn

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner


def pictures(n: int = 40) -> np.ndarray:
    """(n, 32, 32, 3) of uint8: squares of 8 pixels, each dark or light and a little different."""
    rng = np.random.default_rng(0)
    light = rng.integers(0, 2, (n, 4, 4, 1))
    squares = np.where(light, (240, 180, 90), (30, 40, 130)) + rng.integers(-15, 16, (n, 4, 4, 1))
    return np.kron(squares, np.ones((1, 8, 8, 1))).astype(np.uint8)


def net() -> nn.Module:
    """Of three layers, an eighth of the side remains."""
    steps = [(3, 16), (16, 32), (32, 64)]
    return nn.Sequential(
        *(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in steps),
    )


def learner_of_two_colors(task: str, **settings) -> PretextLearner:
    """A quarter of the images are for validation; without a progress bar."""
    set_seed(0)
    dls = UnlabeledDataLoaders.from_array(pictures(), size=None, bs=6, valid_pct=0.25, num_workers=0)
    learn = pretext_learner(dls, task, net, **settings)
    learn.remove_cb(ProgressCallback)
    return learn
