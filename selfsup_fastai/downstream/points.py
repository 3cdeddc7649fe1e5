"""Points: every place of an encoder's last map votes for where they are."""

import torch
from torch import Tensor, nn

from selfsup_fastai.encoders.decoders import group_norm


class PointHead(nn.Module):
    """A map (B, C, h, w) to points, (B, 2 n): x and y of each, -1 at the left and upper border, 1 at the others.

    A place votes for its own center plus what its features say; a softmax over all places weighs the votes (integral
    regression: Sun et al. 2018). Features that are pooled first know hardly where in the image something was.
    """

    def __init__(
        self,
        channels: int,  # C
        n: int,  # How many points
        dropout: float = 0.0,  # Share of the channels dropped in training
    ):
        super().__init__()
        self.n = n
        self.drop = nn.Sequential(group_norm(channels), nn.Dropout2d(dropout))
        self.weights, self.votes = nn.Conv2d(channels, n, 1), nn.Conv2d(channels, 2 * n, 1)

    def forward(self, features: Tensor) -> Tensor:
        features = self.drop(features)
        b, _, h, w = features.shape
        weights = self.weights(features).flatten(2).softmax(2)  # (B, n, h*w)
        votes = self.votes(features).view(b, self.n, 2, h * w) + centers(h, w).to(features).view(2, -1)
        return (weights.unsqueeze(2) * votes).sum(3).flatten(1)


def centers(h: int, w: int) -> Tensor:
    """x and y of the centers of h x w places, (2, h, w), in [-1, 1]."""
    y, x = ((2 * torch.arange(n) + 1) / n - 1 for n in (h, w))
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)])
