"""Joint-embedding tasks on pairs that cost nothing to draw, for tests of what a method learns and where it collapses.

An image is a coarse pattern of its own under a far stronger tint of the view: a fresh network tells pairs by tint.
"""

import torch
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.pretext.base import PretextLoss, PretextTask


def pairs(n: int, seed: int = 0) -> Tensor:
    """(n, 2, 3, 8, 8), two views of each of n images."""
    generator = torch.Generator().manual_seed(seed)
    own = F.interpolate(torch.randn(n, 3, 4, 4, generator=generator), (8, 8)).unsqueeze(1)
    tint = torch.randn(n, 2, 3, 1, 1, generator=generator)
    return own + 3 * tint + 0.3 * torch.randn(n, 2, 3, 8, 8, generator=generator)


def net() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU())


def learner(task: PretextTask, n: int = 256, bs: int = 32, cbs=(), seed: int = 0) -> Learner:
    """A learner of the task on `pairs`, with its own model, loss and callbacks, without its views."""
    set_seed(seed)
    data, few = (TensorDataset(pairs(k), torch.arange(k)) for k in (n, bs))
    dls = DataLoaders(DataLoader(data, bs, shuffle=True, drop_last=True), DataLoader(few, bs))
    model = task.model(create_encoder(net()))
    learn = Learner(dls, model, loss_func=PretextLoss(task), cbs=[*task.callbacks(), *cbs])
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def measured(learn: Learner, *metrics, n: int = 64) -> list[float]:
    """Metrics on new pairs."""
    with torch.no_grad():
        pred = learn.model.eval()(pairs(n, seed=1))
    return [metric(pred, torch.arange(n)).item() for metric in metrics]
