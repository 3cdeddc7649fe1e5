"""Networks that turn an encoder's map back into an image: thrown away after pretraining."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.maps import undisturbed


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
        skip: bool = False,  # Let the decoder see the encoder's first map too, if that is finer than the last
        least: int = 32,  # Channels of the decoder before the last layer, at least
    ):
        super().__init__()
        side = encoder.fixed_size or encoder.size or 64
        self.encoder, self.first = encoder, first_map(encoder, side) if skip else None
        if self.first is None:
            self.decoder = map_decoder(encoder, n_out, (side, side), least=least)
        else:
            self.decoder = map_decoder(encoder, least, (side, side), least=least)
            self.mix = nn.Sequential(nn.Conv2d(least + self.first[1], least, 3, padding=1), nn.ReLU())
            self.out = nn.Conv2d(least, n_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            return self.decoder(self.encoder.feature_map(x), x.shape[-2:])
        last, fine = with_map_of(self.encoder, x, self.first[0])
        coarse = self.decoder(last, x.shape[-2:])
        fine = F.interpolate(fine, x.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(self.mix(torch.cat([coarse, fine], 1)))


def first_map(encoder: Encoder, side: int) -> tuple[str, int] | None:
    """Name and channels of the first layer whose map is finer than the last; None where there is no such module."""
    _, height, width = encoder.map_shape((side, side))
    like = next(encoder.parameters())
    x = torch.zeros(1, encoder.in_chans, side, side, dtype=like.dtype, device=like.device)
    modules = dict(encoder.body.named_modules())
    name = next((name for name in encoder.layer_names if name in modules), None)
    if name is None:
        return None
    with undisturbed(encoder.body):
        shape = tuple(encoder.feature_maps(x, [name])[name].shape)
        seen = with_map_of(encoder, x, name)[1]
    is_map = isinstance(seen, Tensor) and tuple(seen.shape) == shape  # not tokens, not channels last
    return (name, shape[1]) if is_map and shape[2] > height and shape[3] > width else None


def with_map_of(encoder: Encoder, x: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """The last map, and what a module of the body gave on the way to it: one pass through the network."""
    seen = []
    hook = encoder.body.get_submodule(layer).register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    try:
        return encoder.feature_map(x), seen[0]
    finally:
        hook.remove()
