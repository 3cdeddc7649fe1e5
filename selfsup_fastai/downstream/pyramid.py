"""The maps of an encoder as a pyramid, fine to coarse, whatever the network: what decoders and detectors look at."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_fastai.encoders.decoders import LayOut
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.maps import undisturbed
from selfsup_fastai.errors import TaskError, unknown

FLAT = (8, 4, 2, 1)  # How many times finer the levels are made of maps that are all of one scale


class Level(NamedTuple):
    """One level of a pyramid."""

    layer: str  # Of the encoder
    channels: int  # Of its map
    stride: int  # Pixels of the image from one place of the level to the next
    times: int = 1  # So many times finer than the layer's map


def levels_of(
    encoder: Encoder,  # With layers that give maps
    layers: Sequence[str] | None = None,  # Some of `encoder.layer_names`; None: the deepest of each scale
    finest: int = 1,  # Stride of the finest level, at least
) -> list[Level]:
    """The levels, fine to coarse, each of another scale. Where all maps have one scale (ViT), four layers, evenly
    spread, are laid out to finer scales, the shallower the finer.

    Raises `TaskError` for encoders that give no maps, `UnknownNameError` for layers that do not exist.
    """
    if not encoder.layer_names:
        fix = "Take one of timm's, e.g. 'resnet18' or 'vit_tiny_patch16_224'."
        raise TaskError(f"{encoder.arch} gives no feature maps (B, C, h, w). {fix}")
    for name in layers or ():
        if name not in encoder.layer_names:
            raise unknown(f"layer of {encoder.arch}", name, encoder.layer_names)
    found = [level for level in _measured(encoder, layers) if level.stride >= finest]
    deepest = {level.stride: level for level in found}  # later layers take the place of earlier ones
    levels = [deepest[stride] for stride in sorted(deepest)]
    return levels if len(levels) > 1 else _laid_out(found, finest)


def _measured(encoder: Encoder, layers: Sequence[str] | None) -> list[Level]:
    """Each layer as a level of its own, from an empty image."""
    like, side = next(encoder.parameters()), encoder.fixed_size or -(-max(encoder.side, 64) // 32) * 32  # strides fit
    x = torch.zeros(1, encoder.in_chans, side, side, dtype=like.dtype, device=like.device)
    with undisturbed(encoder.body):
        maps = encoder.feature_maps(x, None if layers is None else list(layers))
    return [Level(name, m.shape[1], round(side / m.shape[2])) for name, m in maps.items()]


def _laid_out(found: list[Level], finest: int) -> list[Level]:
    """Levels made of layers of one scale."""
    times = [t for t in FLAT if found[0].stride / t >= finest] if found else []
    n, last = len(times), len(found)
    chosen = [found[max(0, (i + 1) * last // n - 1)] for i in range(n)]
    return [Level(level.layer, level.channels, round(level.stride / t), t) for level, t in zip(chosen, times)]


class Pyramid(nn.Module):
    """Maps by layer, as `Encoder.feature_maps` gives them, to a list of maps (B, width, h, w), fine to coarse."""

    def __init__(
        self,
        levels: Sequence[Level],  # Of the encoder
        widths: Sequence[int],  # Channels of each level
    ):
        super().__init__()
        self.levels, self.layers = list(levels), list(dict.fromkeys(level.layer for level in levels))
        self.steps = nn.ModuleList(LayOut(level.channels, w, level.times) for level, w in zip(levels, widths))

    def forward(self, maps: dict[str, Tensor]) -> list[Tensor]:
        return [step(maps[level.layer]) for step, level in zip(self.steps, self.levels)]


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map (B, C, h, w) resampled (bilinear) to another height and width."""
    size = tuple(size)
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
