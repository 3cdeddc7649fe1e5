"""What an encoder eats where that is not the image itself: lightness, color without lightness, both as CIE Lab, edges.

Every kind is an image, too: channels in [0, 1], so that a task, `Normalize` and pictures treat it as any other.

| kind | channels | of which 0..1 stands for |
|---|---|---|
| `L` | 1 | lightness 0..100 |
| `ab` | 2 | green to red and blue to yellow, -110..110 (sRGB lies within -108..98) |
| `lab` | 3 | L, a, b |
| `sobel` | 2 | how much brighter the grey image (mean of the channels) gets to the right and down, -4..4 |
"""

import torch
from fastai.torch_core import TensorImage
from fasttransform import Transform
from torch import Tensor
from torch.nn import functional as F

from selfsup_fastai.transfer import constant

AB_REACH = 110.0
"""a and b lie within plus and minus this; the cells of Zhang et al. (2016) end here, too."""

CHANNELS = {"L": 1, "ab": 2, "lab": 3, "sobel": 2}
"""Channels of each kind."""

DEVIATIONS = {"L": 0.5, "ab": 0.5, "lab": 0.5, "sobel": 0.226 / 8}
"""What differences to 0.5 are divided by: to -1..1 (Zhang et al. 2016, 2017); of edges as if the image had been divided
by its deviation on ImageNet, as in DeepCluster's code."""

# sRGB's primaries and white (D65, 2 degrees) in CIE XYZ, IEC 61966-2-1
_RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.950456, 1.0, 1.088754)
_KNEE = 6 / 29  # below this the cube root is a line
_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))  # to the right; transposed: down
SOBEL_REACH = 4.0
"""What the filters make of images in [0, 1] lies within plus and minus this."""


def rgb_to_lab(
    x: Tensor,  # (B, 3, ...) sRGB in [0, 1]
) -> Tensor:  # (B, 3, ...): L in 0..100, a and b within -108..98
    """sRGB to CIE Lab (D65)."""
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055).clamp(min=0) ** 2.4)
    to_xyz, white = (constant(values, x.dtype, x.device) for values in (_RGB_TO_XYZ, _WHITE))
    xyz = _mixed(linear, to_xyz / white[:, None])
    f = torch.where(xyz > _KNEE**3, xyz.clamp(min=_KNEE**3) ** (1 / 3), xyz / (3 * _KNEE**2) + 4 / 29)
    fx, fy, fz = f.unbind(1)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], 1)


def lab_to_rgb(
    lab: Tensor,  # (B, 3, ...): L in 0..100, a and b
) -> Tensor:  # (B, 3, ...) sRGB, cut to [0, 1]
    """CIE Lab (D65) to sRGB; colors that no screen shows become the nearest per channel."""
    lightness, a, b = lab.unbind(1)
    fy = (lightness + 16) / 116
    f = torch.stack([fy + a / 500, fy, fy - b / 200], 1)
    xyz = torch.where(f > _KNEE, f**3, 3 * _KNEE**2 * (f - 4 / 29))
    inverse = torch.linalg.inv(torch.tensor(_RGB_TO_XYZ, dtype=torch.float64)) * torch.tensor(_WHITE)
    linear = _mixed(xyz, inverse.to(lab)).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)


def to_input(
    x: Tensor,  # (B, 3, H, W) sRGB, or (B, 1, H, W) grey, in [0, 1]
    kind: str,  # 'L', 'ab', 'lab' or 'sobel'
) -> Tensor:  # (B, 1, 2 or 3, H, W) in [0, 1]
    """Images as an encoder of this kind eats them. Grey images are colors without color."""
    if kind == "sobel":
        return sobel(x) / (2 * SOBEL_REACH) + 0.5
    lab = rgb_to_lab(x.expand(-1, 3, *x.shape[2:]))
    lightness, colors = lab[:, :1] / 100, lab[:, 1:] / (2 * AB_REACH) + 0.5
    return {"L": lightness, "ab": colors, "lab": torch.cat([lightness, colors], 1)}[kind]


def from_input(
    x: Tensor,  # (B, 1, 2 or 3, H, W) in [0, 1], as `to_input` makes it
    kind: str,
) -> Tensor:  # (B, 1 or 3, H, W) in [0, 1]
    """A picture for people: lightness in grey, colors at medium lightness, edges white from a quarter of the steepest
    on."""
    if kind == "L":
        return x
    if kind == "sobel":
        return (2 * SOBEL_REACH * (x - 0.5)).square().sum(1, keepdim=True).sqrt().clamp(max=1)
    lightness, colors = (x[:, :1], x[:, 1:]) if kind == "lab" else (torch.full_like(x[:, :1], 0.6), x)
    return lab_to_rgb(torch.cat([100 * lightness, (colors - 0.5) * 2 * AB_REACH], 1))


def sobel(
    x: Tensor,  # (B, C, H, W) in [0, 1]
) -> Tensor:  # (B, 2, H, W), -4..4
    """Sobel's filters on the mean of the channels: change to the right, change down. Beyond the border the image goes
    on as it ends (with black there, as zero padding has it, every border would be an edge).
    """
    right = constant(_SOBEL, x.dtype, x.device)
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(grey, torch.stack([right, right.T]).unsqueeze(1))


def standardized(x: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """Images (B, C, H, W) with mean and deviation of each channel taken out; as they are while these are not known."""
    if mean is None or std is None:
        return x
    return (x - _per_channel(mean, x)) / _per_channel(std, x)


def from_standardized(x: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """The other way around."""
    if mean is None or std is None:
        return x
    return x * _per_channel(std, x) + _per_channel(mean, x)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return constant(tuple(values), like.dtype, like.device).view(-1, 1, 1)


class ToInput(Transform):
    """A batch transform: images in [0, 1] to what an encoder of this kind eats, in [0, 1] again."""

    prepares = True  # what `Encoder.prepare` does, too: where that is asked for, this one is left out
    order = 45  # after augmentation (30-40), before the question (50) and Normalize (99)

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def encodes(self, x: TensorImage):
        return to_input(x.as_subclass(Tensor), self.kind).as_subclass(TensorImage)

    def decodes(self, x: TensorImage):
        return from_input(x.as_subclass(Tensor), self.kind).as_subclass(TensorImage)


def _mixed(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, 3, ...) -> (B, 3, ...): the same mix of the channels at every pixel, in full precision on every device."""
    first, second, third = x.unbind(1)
    return torch.stack([m[0] * first + m[1] * second + m[2] * third for m in matrix], 1)
