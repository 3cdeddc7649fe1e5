"""Networks that turn an encoder's map back into an image: thrown away after pretraining."""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_fastai.encoders.encoder import Encoder


class Up(nn.Module):
    """A map at twice its size: bilinear, so that no checkerboard is learned, then two 3x3 convolutions.

    Group norms, not batch norms: after some dozen steps validation would still run on outdated averages, and paint far
    worse than training does.
    """

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        layers, groups = [], math.gcd(n_out, max(1, n_out // 8))
        for width in (n_in, n_out):
            layers += [nn.Conv2d(width, n_out, 3, padding=1, bias=False), nn.GroupNorm(groups, n_out), nn.ReLU()]
        self.convs = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


class MapDecoder(nn.Module):
    """An encoder's last map (B, C, h, w) to numbers for each pixel, (B, n_out, *size), raw.

    Doubled until it is large enough, halving its channels each time, then cut to the exact size by resampling.
    """

    def __init__(
        self,
        channels: int,  # C of the map
        sides: tuple[int, int],  # Its h and w
        n_out: int,  # Numbers for each pixel
        size: tuple[int, int],  # Height and width of what comes out
        width: int = 256,  # Channels before the first doubling, at most
        least: int = 32,  # Channels after the last, at least
    ):
        super().__init__()
        self.size = tuple(size)
        doublings = max(0, math.ceil(math.log2(max(size[0] / sides[0], size[1] / sides[1])) - 1e-9))
        widths = [max(least, min(width, channels) >> i) for i in range(doublings + 1)]
        self.entry = nn.Conv2d(channels, widths[0], 1)
        self.ups = nn.Sequential(*(Up(*pair) for pair in pairwise(widths)))
        self.out = nn.Conv2d(widths[-1], n_out, 1)

    def forward(
        self,
        x: Tensor,  # (B, C, h, w)
        size: tuple[int, int] | None = None,  # Height and width of what comes out; None: as it was made for
    ) -> Tensor:
        x, size = self.out(self.ups(self.entry(x))), tuple(size or self.size)
        return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def map_decoder(
    encoder: Encoder,  # With feature maps
    n_out: int,  # Numbers for each pixel
    image: tuple[int, int],  # Height and width of the images that the encoder is given
    size: tuple[int, int] | None = None,  # Of what comes out; None: the same
    **kwargs,  # Of `MapDecoder`
) -> MapDecoder:
    """A decoder for the last map of this encoder, whose shape is measured. Raises `TaskError` where it has none."""
    channels, *sides = encoder.map_shape(image)
    return MapDecoder(channels, tuple(sides), n_out, size or image, **kwargs)


class PerPixel(nn.Module):
    """An encoder and a decoder of its last map: images (B, C, H, W) of any size to (B, n_out, H, W), raw."""

    def __init__(
        self,
        encoder: Encoder,  # With feature maps
        n_out: int,  # Numbers for each pixel
    ):
        super().__init__()
        side = encoder.fixed_size or encoder.size or 64
        self.encoder, self.decoder = encoder, map_decoder(encoder, n_out, (side, side))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder.feature_map(x), x.shape[-2:])
