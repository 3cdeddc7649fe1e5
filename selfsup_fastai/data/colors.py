"""Color operations on batches of images in which every image has its own numbers.

Those whose name ends in an underscore change their input. All are plain arithmetic on whole planes: no `where`, no
remainder, no matrix product (which autocast and TF32 would round).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_fastai.data.draws import NEUTRAL, OPERATIONS, Views
from selfsup_fastai.transfer import constant, sent

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue in a grey image
FRINGES = ("drop", "project", "keep")  # What `without_fringes` can do
_NOT_JITTERED, _NO_HUE = -1, 4
_CONTRAST, _SATURATION, _HUE = (OPERATIONS.index(name) for name in ("contrast", "saturation", "hue"))


class Jitter(NamedTuple):
    """Views' color operations as they are computed: three blends an image in its order, hue before one or after all."""

    place: Tensor  # (B,) int64: hue comes before blend 0, 1 or 2, or after them (3); 4: no hue; -1: no operation at all
    blends: Tensor  # (3, 3, B, 1, 1, 1): for each blend its scale, to_grey and to_mean (see `blend_`)
    shift: Tensor  # (B, 1, 1, 1): of the hue, in sixths of a turn

    def pick(self, rows) -> "Jitter":
        return Jitter(self.place[rows], self.blends[:, :, rows], self.shift[rows])

    def to(self, device: torch.device) -> "Jitter":
        """The same on another device."""
        return Jitter(*(sent(t, device) for t in self))


def jitter_of(
    views: Views,
    channels: int,  # Of the images; with 1, saturation and hue change nothing
    dtype: torch.dtype,  # Of the factors
) -> Jitter:
    """What `jitter_` needs to know."""
    jittered = views.jitter != constant(NEUTRAL, views.jitter.dtype, views.jitter.device)
    drawn = jittered[:, : 4 if channels == 3 else 2].any(1)
    is_hue = views.order == _HUE
    blends = views.order.gather(1, is_hue.long().argsort(dim=1, stable=True)[:, :3])  # the others in their order
    scale = views.jitter.gather(1, blends).to(dtype)
    if channels == 1:
        scale = torch.where(blends == _SATURATION, 1, scale)
    shift = views.jitter[:, _HUE].to(dtype)
    turned = (shift != 0) & (channels == 3)
    place = torch.where(turned, is_hue.long().argmax(1), torch.where(drawn, _NO_HUE, _NOT_JITTERED))
    parts = torch.stack([scale, (1 - scale) * (blends == _SATURATION), (1 - scale) * (blends == _CONTRAST)])
    return Jitter(place, parts.permute(2, 0, 1)[..., None, None, None].contiguous(), column(6 * shift))


def jitter_(
    x: Tensor,  # (B, C, H, W) in [0, 1]
    jitter: Jitter,  # Sorted by place
    places: list[int],  # The same as jitter.place, known without waiting for the device
) -> None:
    """The four color operations, each image's in its own order."""
    start = places.count(_NOT_JITTERED)
    if start == len(places):
        return
    for k in range(4):
        first = start + sum(_NOT_JITTERED < place < k for place in places)
        rows = slice(first, first + places.count(k))
        if rows.stop > rows.start:
            turn_hue_(x[rows], jitter.shift[rows])
        if k < 3:
            blend_(x[start:], *jitter.blends[k, :, start:])


def blend_(
    x: Tensor,  # (B, C, H, W)
    scale: Tensor,  # (B, 1, 1, 1), as the next two
    to_grey: Tensor,
    to_mean: Tensor,
) -> None:
    """Brightness, contrast or saturation: scale * x + to_grey * grey(x) + to_mean * mean(grey(x)), cut to [0, 1]."""
    if x.shape[1] == 1:
        mean = x.mean((2, 3), keepdim=True)
        x.mul_(scale).add_(mean * to_mean).clamp_(0, 1)
        return
    rest = grey(x)
    mean = rest.mean((2, 3), keepdim=True)
    torch.addcmul(mean * to_mean, rest, to_grey, out=rest)
    torch.addcmul(rest, x, scale, out=x).clamp_(0, 1)


def turn_hue_(
    x: Tensor,  # (B, 3, H, W) in [0, 1]
    shift: Tensor,  # (B, 1, 1, 1) sixths of a turn of the color wheel, -3..3
) -> None:
    """Turn the color wheel, with HSV's value and saturation kept.

    With the darkest channel taken off a pixel, the largest of the rest is its span, and the angle from red, in sixths
    of a turn, is (span + green + blue - red) / span towards green or, where blue is above green, towards blue.
    """
    low = x.amin(1, keepdim=True)
    x.sub_(low)
    span = x.amax(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    angle = (span + g).add_(b).sub_(r).div_(span.clamp(min=torch.finfo(x.dtype).tiny))  # 0 for grey
    angle.copysign_(g - b).add_(shift)
    angle.sub_((angle / 6).round_().mul_(6))  # in -3..3
    # The share of the span by which a channel is above the darkest: 1 up to a sixth of a turn from its own color, 0
    # from two sixths. With red at 0, green at 2 and blue at -2: 2 - |angle|, |angle + 1| - 1 and |angle - 1| - 1.
    offset, sign, base = _wheel(x.dtype, x.device)
    torch.add(angle, offset, out=x).abs_()
    torch.addcmul(base, x, sign, out=x).clamp_(0, 1)
    torch.addcmul(low, x, span, out=x)


def _wheel(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Constants of `turn_hue_`, (3, 1, 1) each."""
    values = (0.0, 1.0, -1.0), (-1.0, 1.0, 1.0), (2.0, -1.0, -1.0)
    return tuple(constant(v, dtype, device).view(3, 1, 1) for v in values)


def bend_saturation_value(
    x: Tensor,  # (B, C, H, W) in [0, 1], C = 1 or 3
    saturation: tuple[Tensor, Tensor, Tensor],  # (B,) each: power, factor, offset
    value: tuple[Tensor, Tensor, Tensor],  # The same
) -> Tensor:  # (B, C, H, W) in [0, 1]
    """HSV's saturation and value to a power, times a factor, plus an offset, cut to [0, 1]; the hue is kept.

    Pixels without a hue stay grey; one channel is a value.
    """
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    span = high - low
    hued = span > 1e-4  # what is less is rounding, which a power below 1 would make a color of
    above = torch.where(hued, (x - low) / span.clamp(min=1e-4), 1)  # 1: the largest channel
    saturation = _bent(span / high.clamp(min=torch.finfo(x.dtype).tiny), *saturation)
    return _bent(high, *value) * (1 - saturation * (1 - above))


def _bent(x: Tensor, power: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    return (x ** column(power) * column(factor) + column(offset)).clamp(0, 1)


def scale_components(
    x: Tensor,  # (B, C, h, w)
    factors: Tensor,  # (B, C): for each principal component, that of the smallest variance first
    of: Tensor,  # (B, C, H, W): the pixels of which these are the components
) -> Tensor:  # (B, C, h, w)
    """Pixels moved from the mean color, or towards it, along the principal components of an image's own colors."""
    of = of.to(torch.promote_types(of.dtype, torch.float32))  # of half precision no components can be had
    of = of.contiguous()  # the order of summation: where two components are nearly equal it shows
    mean = of.mean((2, 3), keepdim=True)
    rest = (of - mean).flatten(2)
    products = torch.stack([(rest * rest[:, k : k + 1]).sum(2) for k in range(rest.shape[1])], 1)  # (B, C, C)
    axes = torch.linalg.eigh(products)[1]
    change = (axes[:, :, None] * factors[:, None, None] * axes[:, None]).sum(3)[..., None, None]  # (B, C, C, 1, 1)
    return ((change * (x - mean)[:, None]).sum(2) + mean).to(x.dtype)


def some_grey(
    x: Tensor,  # (B, C, H, W)
    p: float,  # Probability of each image
    generator: torch.Generator,
) -> Tensor:  # (B, C, H, W)
    """Some of the color images made grey; of one channel all stay as they are, and nothing is drawn."""
    if x.shape[1] == 1 or not p:
        return x
    drawn = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < p
    return torch.where(drawn, grey(x).expand_as(x), x)


def without_fringes(
    patches: Tensor,  # (B, N, C, h, w)
    how: str,  # One of FRINGES
    generator: torch.Generator,
) -> Tensor:  # (B, N, C, h, w)
    """Patches of color images whose channels cannot be compared: chromatic aberration, by which a lens moves channels
    apart towards the borders of its image, tells where in the image a patch lay. One channel stays as it is.

    'drop': one random channel of each patch is kept, the others become noise of at most half a grey level of 255;
    'project': what lies between green and magenta is taken away, where lenses err most (Doersch et al. 2015, both).
    """
    if patches.shape[2] == 1 or how == "keep":
        return patches
    if how == "project":
        axis = constant((-1, 2, -1), patches.dtype, patches.device).view(3, 1, 1) / 6**0.5
        return patches - axis * (patches * axis).sum(2, keepdim=True)
    kept = torch.randint(3, patches.shape[:2], generator=generator, device=patches.device)
    noise = torch.rand(patches.shape, generator=generator, device=patches.device, dtype=patches.dtype)
    return torch.where(F.one_hot(kept, 3)[..., None, None].bool(), patches, (noise - 0.5) / 255)


def grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)"""
    r, g, b = x.split(1, dim=1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def stretch_(
    x: Tensor,  # (B, C, H, W) in [0, 1]
    window: Tensor,  # (B, 2): the values that become 0 and 1
) -> None:
    """An intensity window, the same for all channels: (x - black) / (white - black), cut to [0, 1]."""
    black, white = (column(side.to(x.dtype)) for side in window.unbind(1))
    x.sub_(black).div_(white - black).clamp_(0, 1)


def solarize(
    x: Tensor,  # (B, C, H, W) in [0, 1]
    threshold: float,
) -> Tensor:
    """Pixels from `threshold` up are inverted."""
    return torch.lerp(x, 1 - x, (x >= threshold).to(x.dtype))


def column(v: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to be combined with images."""
    return v[:, None, None, None]
