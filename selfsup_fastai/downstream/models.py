"""An encoder with the head that its labels ask for."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from selfsup_fastai.downstream.points import PointHead
from selfsup_fastai.downstream.pyramid import levels_of
from selfsup_fastai.downstream.segmentation import UNetDecoder
from selfsup_fastai.downstream.targets import Target
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.heads import linear_head


class DownstreamModel(nn.Module):
    """An encoder with a head: images (B, C, H, W) -> predictions (B, n_out), or (B, n_out, H, W) of a decoder."""

    def __init__(
        self,
        encoder: Encoder,  # Images to features, or to maps
        head: nn.Module,  # Features (B, features) to predictions; a `UNetDecoder` or `PointHead` looks at maps
    ):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.head, UNetDecoder):
            return self.head(x, self.encoder.feature_maps(x, self.head.layers))
        if isinstance(self.head, PointHead):
            return self.head(self.encoder.feature_map(x))
        return self.head(self.encoder(x))


def head_maker(
    target: Target,  # What is to be predicted
    encoder: Encoder,  # What it is predicted from
    dropout: float = 0.0,  # Before the last layer
    layers: Sequence[str] | None = None,  # Whose maps a decoder looks at; None: of each scale the deepest
) -> Callable[[], nn.Module]:
    """What makes a new head: a U-Net's decoder for masks, votes of places for points, else a linear layer.

    The encoder is measured here, so making it measures no more. Raises `TaskError` where it gives no maps but must.
    """
    if target.kind == "mask":
        return partial(UNetDecoder, levels_of(encoder, layers), encoder.in_chans, target.n_out, dropout)
    if target.kind == "points":
        channels = encoder.map_shape((encoder.side, encoder.side))[0]
        return partial(PointHead, channels, target.n_out // 2, dropout)
    return partial(linear_head, encoder.num_features, target.n_out, dropout)


def layer_groups(model: DownstreamModel) -> list[list[nn.Parameter]]:
    """The encoder's groups of parameters, stem first, and the head's as the last: the learner's splitter."""
    return [*model.encoder.param_groups(), list(model.head.parameters())]
