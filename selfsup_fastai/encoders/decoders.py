"""Networks that turn an encoder's map back into an image: thrown away after pretraining."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.maps import undisturbed

LAST = 32  # channels from which pixels are made
LAID_OUT = 8  # places a side in the first of two steps, at least


class LayOut(nn.Module):
    """Each place of a map laid out as a square of places, every one with weights of its own: (B, C, h, w) -> larger.

    A map of 2 x 2 places knows in its channels where in a place something is; bilinear doublings would have to find
    that out from the distance to the neighbors, and hardly learn to. (Sub-pixel convolution: Shi et al. 2016.)
    """

    def __init__(self, n_in: int, n_out: int, times: int):
        super().__init__()
        places = nn.Conv2d(n_in, n_out * times**2, 1), nn.PixelShuffle(times)
        self.layers = nn.Sequential(*places, group_norm(n_out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MapDecoder(nn.Module):
    """An encoder's last map (B, C, h, w) to numbers for each pixel, (B, n_out, *size), raw.

    Laid out in one or two steps, mixed by a 3x3 convolution, and resampled where that is not the exact size. Small on
    purpose: what it cannot do the encoder has to, and a large one would take its training for itself.
    """

    def __init__(
        self,
        channels: int,  # C of the map
        sides: tuple[int, int],  # Its h and w
        n_out: int,  # Numbers for each pixel
        size: tuple[int, int],  # Height and width of what comes out
        width: int = 64,  # Channels between the two steps
        last: int = LAST,  # Channels after them
    ):
        super().__init__()
        self.size = tuple(size)
        first, second = _steps(sides, size)
        steps = [LayOut(channels, width, first), LayOut(width, last, second)]
        self.steps = nn.Sequential(*steps) if second > 1 else LayOut(channels, last, first)
        self.mix = nn.Sequential(nn.Conv2d(last, last, 3, padding=1), nn.ReLU())
        self.out = nn.Conv2d(last, n_out, 1)

    def forward(
        self,
        x: Tensor,  # (B, C, h, w)
        size: tuple[int, int] | None = None,  # Height and width of what comes out; None: as it was made for
    ) -> Tensor:
        x, size = self.out(self.mix(self.steps(x))), tuple(size or self.size)
        return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _steps(sides: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """How many times as large each of two steps makes a map of `sides`, to reach `size` or a little more."""
    times = max(size[0] / sides[0], size[1] / sides[1], 1)
    second = 2 ** max(0, math.floor(math.log2(min(times, max(1, min(size) / LAID_OUT)))))
    return math.ceil(times / second - 1e-9), second


def group_norm(channels: int) -> nn.GroupNorm:
    """In groups of about 8 channels. Not a batch norm: after some dozen steps validation would still run on outdated
    averages, and paint far worse than training does."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels)


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
    ):
        super().__init__()
        image = (encoder.side, encoder.side)
        self.encoder, self.first = encoder, first_map(encoder, encoder.side) if skip else None
        if self.first is None:
            self.decoder = map_decoder(encoder, n_out, image)
        else:
            self.decoder = map_decoder(encoder, LAST, image)
            self.mix = nn.Sequential(nn.Conv2d(LAST + self.first[1], LAST, 3, padding=1), nn.ReLU())
            self.out = nn.Conv2d(LAST, n_out, 1)

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
