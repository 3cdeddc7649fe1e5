"""Points: every place of an encoder's last map votes for where they are; and where that is in the original image."""

import torch
from fastai.data.core import TfmdDL
from fastai.vision.core import PILBase, PointScaler, TensorPoint
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


def in_original(
    points: Tensor,  # (n, 2), -1..1 in the image as the network saw it
    dl: TfmdDL,  # A loader whose first item that image is
) -> Tensor | None:  # (n, 2) in pixels of the image as it was opened; None where it was no PIL image
    """Points taken back through whatever resized, cut or padded the image: three corners are sent the same way."""
    item = dl.dataset[0]
    image = item[0] if isinstance(item, tuple) else item
    if not isinstance(image, PILBase):
        return None
    width, height = image.size
    corners = torch.tensor([[0.0, 0.0], [width, 0.0], [0.0, height]])
    if any(isinstance(t, PointScaler) and t.y_first for t in dl.after_item.fs):
        corners = corners.flip(1)
    image, sent = dl.after_item((image, TensorPoint(corners)))
    sent = dl.after_batch((image[None], sent[None]))[1][0].as_subclass(Tensor).cpu()
    right, down = sent[1] - sent[0], sent[2] - sent[0]
    share = torch.linalg.solve(torch.stack([right, down], 1), (points.cpu() - sent[0]).T).T
    return share * torch.tensor([width, height])
