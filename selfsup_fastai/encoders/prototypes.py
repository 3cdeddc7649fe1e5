"""Learned directions with which embeddings are compared."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_fastai.encoders.clock import Clock

SHORT = 0.1  # Of a run so short that the first epochs are more than this share


class Prototypes(nn.Linear):
    """Embeddings of length 1, (..., dim), to their cosines with `n` learned directions, (..., n).

    `callbacks.prototypes` drops their gradient in the first `frozen` epochs, so that embeddings spread before
    directions follow them; of a short run in the first tenth.
    """

    def __init__(
        self,
        dim: int,  # Of embeddings
        n: int,
        frozen: int,  # Epochs
        unit: bool,  # Brought back to length 1 after each step (SwAV); False: their length does not count (DINO)
    ):
        super().__init__(dim, n, bias=False)
        self.frozen, self.unit, self.clock = frozen, unit, Clock()
        self.shorten()

    @property
    def is_frozen(self) -> bool:
        """Whether the next step is to leave them as they are."""
        return not self.clock.past(self.frozen, SHORT)

    @torch.no_grad()
    def shorten(self) -> None:
        """Back to length 1 where that is asked for."""
        if self.unit:
            self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight if self.unit else F.normalize(self.weight, dim=1))
