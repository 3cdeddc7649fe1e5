"""How far the training of a model has come."""

import torch
from torch import Tensor, nn


class Clock(nn.Module):
    """For parts of a model that change while it is trained; `callbacks.clock` sets every clock in a model.

    It stands still outside of training, and is saved with the model.
    """

    def __init__(self):
        super().__init__()
        self.epochs = 0  # Whole ones, in all fits
        self.batches = 0  # In all fits
        self.planned = 0  # Batches, when the present fit is over

    @property
    def share(self) -> float:
        """Of the planned training that is over, 0..1."""
        return self.batches / max(1, self.planned)

    def past(
        self,
        epochs: int,
        share: float,  # Of the planned training
    ) -> bool:
        """Whether so many epochs are over, or, where the training is short for them, so large a share of it."""
        return self.epochs >= epochs or self.batches >= int(share * self.planned)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.epochs, self.batches, self.planned])

    def set_extra_state(self, state: Tensor) -> None:
        self.epochs, self.batches, self.planned = state.tolist()
