"""`SplitBody`: two bare networks side by side that never see each other's channels (Zhang, Isola & Efros 2017)."""

import torch
from torch import Tensor, nn

from selfsup_fastai.errors import TaskError

CHANNELS = (1, 2)
"""Channels of each half: lightness; green to red and blue to yellow."""


class SplitBody(nn.Module):
    """Two networks of one make: the first is given channel 0, the second channels 1 and 2.

    Nothing mixes them: features and the maps of each layer are those of the first, then those of the second.
    """

    def __init__(
        self,
        lightness: nn.Module,  # Takes 1 channel
        color: nn.Module,  # Takes 2 channels
    ):
        super().__init__()
        self.lightness, self.color = lightness, color

    def shares(self, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
        """Each half with the channels (B, 1 or 2, H, W) of `x` (B, 3, H, W) that are its own."""
        return list(zip((self.lightness, self.color), x.split(CHANNELS, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> features (B, C + C)."""
        return torch.cat([pooled(half(part)) for half, part in self.shares(x)], 1)

    def no_weight_decay(self) -> set[str]:
        """What the halves want free of weight decay, by their names here."""
        asked = getattr(self.lightness, "no_weight_decay", set)()
        return {f"{half}.{name}" for half in ("lightness", "color") for name in asked}


def pooled(out: object) -> Tensor:
    """What a body gave as `(B, C)`: maps are averaged over their places."""
    if isinstance(out, Tensor) and out.ndim == 2:
        return out
    if isinstance(out, Tensor) and out.ndim == 4:
        return out.mean((2, 3))
    got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"{type(out).__name__}"
    raise TaskError(f"An encoder must give features (B, C) or maps (B, C, h, w); this network gave {got}.")
