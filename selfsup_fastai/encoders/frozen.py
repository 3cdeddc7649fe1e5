"""A module used as it stands, and a part of a model that stays as it is once it was trained."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call


def as_it_stands(
    module: nn.Module,
    *args,
    **kwargs,
):
    """`module(*args)`, its weights held constant and its buffers left alone; gradients reach the arguments alone.

    With a judge D of what G makes, `d_loss(D(fake.detach()))` trains D, `g_loss(as_it_stands(D, fake))` trains G, and
    their sum does both in one backward pass: to Adam, which treats every weight by itself, that is two optimizers.
    """
    weights = {name: p.detach() for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    return functional_call(module, {**weights, **buffers}, args, kwargs)


class TrainedFirst(nn.Module, ABC):
    """A part of a model that is trained before the rest (`callbacks.train_first`) and frozen from then on.

    Frozen: no gradient, and evaluation mode whatever mode the model is put in. Call `freeze()` when the layers are
    made. The buffer `is_trained` is saved with the weights, so a loaded part is not trained again.
    """

    what: str  # As people call it: 'autoencoder'

    def __init__(self):
        super().__init__()
        self.register_buffer("is_trained", torch.tensor(False))

    @abstractmethod
    def own_loss(self, *inputs: Tensor) -> Tensor:
        """What it is trained by; `inputs` are those of the model."""

    def freeze(self) -> None:
        """As it stands for good: but for `learning`."""
        self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True):
        return super().train(False)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, it can be trained; whoever leaves without an error has done so."""
        super().train(True)
        self.requires_grad_(True)
        try:
            yield
            self.is_trained.fill_(True)
        finally:
            self.zero_grad()
            self.freeze()
