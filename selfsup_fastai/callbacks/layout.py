"""Weights of convolutions with their channels last in memory."""

import torch
from fastai.learner import Learner
from torch import Tensor, nn

CONVOLUTIONS = nn.Conv2d, nn.ConvTranspose2d


def has_convolutions(model: nn.Module) -> bool:
    """Whether more of a net than its first layer is convolutions: of a ViT it is not."""
    return sum(isinstance(layer, CONVOLUTIONS) for layer in model.modules()) > 1


@torch.no_grad()
def lay_out(model: nn.Module, channels_last: bool) -> None:
    """Puts the weights of convolutions, and their gradients, in that order in memory; their values and shapes stay.

    Images and maps follow: a convolution whose weights have the channels last gives maps that have.
    """
    for layer in model.modules():
        if isinstance(layer, CONVOLUTIONS):
            weight = layer.weight
            grad = None if weight.grad is None else _ordered(weight.grad, channels_last)
            weight.data, weight.grad = _ordered(weight.data, channels_last), None
            weight.grad = grad


def lay_out_learner(learn: Learner, channels_last: bool) -> None:
    """The weights, and what the optimizer remembers of each."""
    lay_out(learn.model, channels_last)
    for p, _, state, _ in learn.opt.all_params() if learn.opt else ():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == p.shape and value.ndim == 4:
                state[name] = torch.empty_like(p).copy_(value)


def _ordered(value: Tensor, channels_last: bool) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
