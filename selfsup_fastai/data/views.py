"""Random views of images on the device: the draw apart from its application.

`draw_views` draws every number that a batch of views needs, `apply_views` does nothing random: the same `Views` give
the same pixels, so views can be stored, shown, indexed and fixed by hand in a test.

    views = draw_views(SIMCLR, x.shape, generator, size=128)
    a = apply_views(x, views)                # (B, C, 128, 128) in [0, 1]

The order is crop, flip, color (brightness, contrast, saturation, hue in an order drawn per image), grey, blur,
solarize. Every step does what the torchvision function of the same name does.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_fastai.errors import TaskError

_LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue in a grey image
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation and hue that leave an image as it is
_TRIES = 10


@dataclass(frozen=True)
class Recipe:
    """The numbers that rule random views; `dataclasses.replace(recipe, blur_p=0.0)` gives a variation.

    A strength s draws a factor from [max(0, 1 - s), 1 + s] for brightness, contrast and saturation, and a turn of the
    color wheel from [-s, s] for hue. Fields that end in `_p`, and `flip`, are probabilities per image.
    """

    scale: tuple[float, float] = (0.08, 1.0)  # Share of the image's area in the crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # Width by height of the crop
    flip: float = 0.5  # Mirrored left to right
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # At most 0.5
    jitter_p: float = 0.8  # The four color operations together
    grey_p: float = 0.2
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # In pixels of the view
    solarize_p: float = 0.0
    solarize_threshold: float = 0.5  # Pixels from here up are inverted

    def __post_init__(self):
        for name in ("flip", "jitter_p", "grey_p", "blur_p", "solarize_p"):
            _in_range(name, (getattr(self, name),), 0, 1, "a probability in [0, 1]")
        for name in ("brightness", "contrast", "saturation"):
            _in_range(name, (getattr(self, name),), 0, math.inf, "a strength of 0 or more")
        _in_range("hue", (self.hue,), 0, 0.5, "a strength in [0, 0.5]")
        _in_range("scale", self.scale, 1e-9, 1, "two rising shares of the area in (0, 1]")
        _in_range("ratio", self.ratio, 1e-9, math.inf, "two rising ratios of width to height")
        _in_range("blur_sigma", self.blur_sigma, 1e-9, math.inf, "two rising widths in pixels above 0")


def _in_range(name: str, values: tuple[float, ...], low: float, high: float, wanted: str) -> None:
    if list(values) != sorted(values) or not all(low <= v <= high for v in values):
        arrived = values[0] if len(values) == 1 else values
        raise TaskError(f"The recipe's {name} is {arrived}; it must be {wanted}.")


def simclr_recipe(
    strength: float = 1.0,  # Multiplies the color strengths; 0.5 for images as small as CIFAR's
    blur: bool = True,  # The paper leaves blur out on CIFAR
) -> Recipe:
    """The views of SimCLR (Chen et al. 2020)."""
    s = strength
    return Recipe(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s, blur_p=0.5 if blur else 0.0)


def _byol_recipe(blur_p: float, solarize_p: float) -> Recipe:
    return Recipe(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur_p=blur_p, solarize_p=solarize_p)


SIMCLR = simclr_recipe()
# MoCo v2 (Chen et al. 2020) and SimSiam (Chen & He 2021)
MOCO = Recipe(scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur_p=0.5)
# BYOL (Grill et al. 2020), Barlow Twins, VICReg, MoCo v3: one recipe for each of the two views
BYOL_1 = _byol_recipe(blur_p=1.0, solarize_p=0.0)
BYOL_2 = _byol_recipe(blur_p=0.1, solarize_p=0.2)


@dataclass(frozen=True)
class Views:
    """What was drawn for B images, one row an image; `views[2:5]`, `views[mask]` and `views[3]` pick rows."""

    boxes: Tensor  # (B, 4) int64: top, left, height, width of the crop in pixels
    flip: Tensor  # (B,) bool
    jitter: Tensor  # (B, 4) float: factors of brightness, contrast, saturation; hue shift in turns. (1, 1, 1, 0): none
    order: Tensor  # (B, 4) int64: the four color operations in the order they come
    grey: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float, pixels of the view; 0: no blur
    solarize: Tensor  # (B,) bool
    threshold: float
    size: int  # Side of the view in pixels

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, rows) -> "Views":
        rows = [rows] if isinstance(rows, int) else rows  # one row is still a batch
        return self._each(lambda t: t[rows])

    def to(self, device: torch.device | str) -> "Views":
        return self._each(lambda t: t.to(device))

    def _each(self, change) -> "Views":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Views(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def draw_views(
    recipe: Recipe,
    shape: tuple[int, int, int, int],  # (B, C, H, W) of the images
    generator: torch.Generator,  # Everything is drawn from it, on its device
    size: int | None = None,  # Side of the views; None: the shorter side of the images
) -> Views:
    """Draw one view for each of B images. How many numbers are drawn depends on `shape` alone."""
    b, channels, h, w = shape
    if channels not in (1, 3):
        raise TaskError(
            f"Views are for images of 1 or 3 channels; these have {channels}. Make loaders with n_in=1 or 3."
        )
    size = min(h, w) if size is None else size
    if size < 1:
        raise TaskError(f"The size of a view is {size}; it must be a number of pixels, 1 or more.")
    draw = _Draw(generator)
    return Views(
        boxes=_draw_boxes(recipe, b, h, w, draw),
        flip=draw.chance(b, recipe.flip),
        jitter=_draw_jitter(recipe, b, draw),
        order=draw.uniform((b, 4)).argsort(dim=1),
        grey=draw.chance(b, recipe.grey_p),
        sigma=draw.uniform(b, *recipe.blur_sigma) * draw.chance(b, recipe.blur_p),
        solarize=draw.chance(b, recipe.solarize_p),
        threshold=recipe.solarize_threshold,
        size=size,
    )


class _Draw:
    """Random tensors from one generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def uniform(self, shape, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device) * (high - low) + low

    def chance(self, shape, p: float) -> Tensor:
        return self.uniform(shape) < p

    def below(self, n: Tensor) -> Tensor:
        """A whole number in 0 .. n - 1 for each number of `n`."""
        return (self.uniform(n.shape) * n).long().minimum(n - 1)  # the product may round up to n


def _draw_boxes(recipe: Recipe, b: int, h: int, w: int, draw: _Draw) -> Tensor:
    """RandomResizedCrop's rule: uniform in area and in log(ratio), ten tries, then the largest allowed center crop."""
    area = draw.uniform((b, _TRIES), *recipe.scale) * (h * w)
    ratio = draw.uniform((b, _TRIES), *map(math.log, recipe.ratio)).exp()
    widths, heights = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (widths > 0) & (widths <= w) & (heights > 0) & (heights <= h)
    first = (fits * torch.arange(_TRIES, 0, -1, device=fits.device)).argmax(dim=1, keepdim=True)
    center_h, center_w = _center_box(recipe.ratio, h, w)
    found = fits.any(dim=1)
    height = torch.where(found, heights.gather(1, first)[:, 0], center_h)
    width = torch.where(found, widths.gather(1, first)[:, 0], center_w)
    top = torch.where(found, draw.below(h - height + 1), (h - height) // 2)
    left = torch.where(found, draw.below(w - width + 1), (w - width) // 2)
    return torch.stack([top, left, height, width], dim=1)


def _center_box(ratio: tuple[float, float], h: int, w: int) -> tuple[int, int]:
    """Height and width of the largest crop whose ratio is allowed."""
    if w / h < ratio[0]:
        return round(w / ratio[0]), w
    if w / h > ratio[1]:
        return h, round(h * ratio[1])
    return h, w


def _draw_jitter(recipe: Recipe, b: int, draw: _Draw) -> Tensor:
    factors = [draw.uniform(b, max(0.0, 1 - s), 1 + s) for s in (recipe.brightness, recipe.contrast, recipe.saturation)]
    jitter = torch.stack([*factors, draw.uniform(b, -recipe.hue, recipe.hue)], dim=1)
    return torch.where(draw.chance((b, 1), recipe.jitter_p), jitter, jitter.new_tensor(_NEUTRAL))


def apply_views(
    x: Tensor,  # (B, C, H, W) float in [0, 1], C = 1 or 3
    views: Views,  # Drawn for B images of this H and W
) -> Tensor:  # (B, C, size, size) in [0, 1], of the type of x
    """Cut, flip, color and blur each image as it was drawn. On 1 channel saturation, hue and grey change nothing."""
    _check_images(x, views)
    views = views.to(x.device)
    out = _crop(x.to(torch.promote_types(x.dtype, torch.float32)), views)
    out = _jitter(out, views)
    if x.shape[1] == 3:
        out = _where_drawn(out, views.grey, lambda part: _grey(part).expand_as(part))
    out = _where_drawn(out, views.sigma > 0, _blur, views.sigma)
    out = torch.where(_column(views.solarize) & (out >= views.threshold), 1 - out, out)
    return out.clamp(0, 1).to(x.dtype)


def random_view(
    x: Tensor,  # (B, C, H, W) float in [0, 1], C = 1 or 3
    recipe: Recipe,
    generator: torch.Generator,
    size: int | None = None,  # Side of the view; None: the shorter side of the images
) -> Tensor:  # (B, C, size, size) in [0, 1]
    """Draw a view of each image and apply it."""
    _check_images(x)
    return apply_views(x, draw_views(recipe, tuple(x.shape), generator, size))


def _check_images(x: Tensor, views: Views | None = None) -> None:
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.is_floating_point():
        raise TaskError(
            f"Views are for float images (B, C, H, W) in [0, 1] with 1 or 3 channels; "
            f"these are {tuple(x.shape)} of {x.dtype}. IntToFloatTensor makes floats of bytes."
        )
    if views is not None and len(views) != len(x):
        raise TaskError(f"{len(views)} views were drawn for a batch of {len(x)} images. Draw them for x.shape.")


def _column(v: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to be combined with images."""
    return v[:, None, None, None]


def _where_drawn(x: Tensor, drawn: Tensor, change, *values: Tensor) -> Tensor:
    """`change(images, *values)` on the images where `drawn` (B,) is true, the others as they are."""
    rows = drawn.nonzero()[:, 0]
    if len(rows) == 0:
        return x
    return x.index_copy(0, rows, change(x[rows], *(v[rows] for v in values)))


def _crop(x: Tensor, views: Views) -> Tensor:
    """Crop, resize and flip in one bilinear sampling. As if cut out first: nothing outside of the crop is read."""
    top, left, height, width = views.boxes.to(x.dtype).unbind(dim=1)
    rows = _grid(top, height, x.shape[2], views.size)  # (B, size)
    columns = _grid(left, width, x.shape[3], views.size)
    columns = torch.where(views.flip[:, None], columns.flip(1), columns)
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)  # (B, size, size, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _grid(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """Where along one axis the pixels of the view lie, in grid_sample's -1..1: (B,), (B,) -> (B, size)."""
    centers = (torch.arange(size, device=start.device, dtype=start.dtype) + 0.5) / size
    inside = (centers * length[:, None] - 0.5).clamp(min=0).minimum(length[:, None] - 1)
    return (inside + start[:, None] + 0.5) * (2 / side) - 1


def _jitter(x: Tensor, views: Views) -> Tensor:
    """The four color operations, each image's in its own order."""
    drawn = views.jitter != views.jitter.new_tensor(_NEUTRAL)
    operations = (_brightness, _contrast, _saturation, _hue)[: 2 if x.shape[1] == 1 else 4]
    for place in range(4):
        for k, operation in enumerate(operations):
            x = _where_drawn(x, drawn[:, k] & (views.order[:, place] == k), operation, views.jitter[:, k])
    return x


def _grey(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)"""
    return (x * x.new_tensor(_LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(x), x, _column(factor).to(x.dtype)).clamp(0, 1)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * _column(factor)).clamp(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(x) if x.shape[1] == 3 else x
    return _blend(x, grey.mean(dim=(1, 2, 3), keepdim=True), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _grey(x), factor)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the color wheel by `shift` turns, with HSV's value and saturation kept."""
    low, high = x.aminmax(dim=1, keepdim=True)
    span = high - low
    h6 = torch.remainder(_hue_of(x, high, span) + 6 * _column(shift), 6)
    # channel n of HSV -> RGB is high - span * max(0, min(k, 4 - k, 1)) with k = (n + h6) mod 6, n = 5, 3, 1
    k = torch.remainder(h6 + x.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1), 6)
    return high - span * torch.minimum(k, 4 - k).clamp(0, 1)


def _hue_of(x: Tensor, high: Tensor, span: Tensor) -> Tensor:
    """Hue in sixths of a turn; 0 for grey pixels."""
    r, g, b = x.split(1, dim=1)
    per = 1 / torch.where(span == 0, 1, span)
    return torch.where(high == r, (g - b) * per, torch.where(high == g, (b - r) * per + 2, (r - g) * per + 4))


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur, reflected at the borders; the kernel's side is a tenth of the image's, made odd (SimCLR)."""
    radius = x.shape[-1] // 10 // 2
    steps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-0.5 * (steps / sigma[:, None].to(x.dtype)) ** 2, dim=1)  # (B, k)
    b, c, h, w = x.shape
    kernel = kernel.repeat_interleave(c, dim=0)[:, None, None]  # (B·C, 1, 1, k): every image has its own
    x = F.pad(x.view(1, b * c, h, w), (radius,) * 4, mode="reflect")
    x = F.conv2d(x, kernel, groups=b * c)
    return F.conv2d(x, kernel.transpose(2, 3), groups=b * c).view(b, c, h, w)


def random_shift_flip(
    x: Tensor,  # (B, C, H, W)
    generator: torch.Generator,
    pad: int = 4,  # Largest shift in pixels, in each direction
    flip: float = 0.5,  # Probability of a left-right mirror image
) -> Tensor:  # (B, C, H, W)
    """Shift each image by whole pixels, reflected at the borders, and mirror some: no pixel value changes.

    The "pad, crop, flip" of CIFAR training and RotNet (Gidaris et al. 2018).
    """
    return apply_shifts(x, *draw_shifts(tuple(x.shape), generator, pad, flip))


def draw_shifts(
    shape: tuple[int, ...],  # (B, C, H, W) of the images
    generator: torch.Generator,
    pad: int = 4,  # Largest shift in pixels
    flip: float = 0.5,  # Probability of a mirror image
) -> tuple[Tensor, Tensor]:  # shifts (B, 2) int64 in -pad..pad (down, right as the window moves), mirrored (B,) bool
    """The random part of `random_shift_flip`."""
    b, side = shape[0], min(shape[-2:])
    if not 0 <= pad < side:
        raise TaskError(f"A shift of up to {pad} pixels does not suit images of side {side}: choose 0..{side - 1}.")
    draw = _Draw(generator)
    span = torch.full((b, 2), 2 * pad + 1, device=generator.device)
    return draw.below(span) - pad, draw.chance(b, flip)


def apply_shifts(
    x: Tensor,  # (B, C, H, W)
    shifts: Tensor,  # (B, 2) whole pixels by which the window moves down and right
    mirrored: Tensor,  # (B,) bool
) -> Tensor:  # (B, C, H, W)
    """out[r, c] = x[r + down, c + right], reflected at the borders; then mirrored where drawn."""
    b, c, h, w = x.shape
    rows, columns = (_reflected(shifts[:, i].to(x.device), side) for i, side in enumerate((h, w)))
    columns = torch.where(mirrored.to(x.device)[:, None], columns.flip(1), columns)
    images = torch.arange(b, device=x.device).view(-1, 1, 1, 1)
    channels = torch.arange(c, device=x.device).view(1, -1, 1, 1)
    return x[images, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _reflected(shift: Tensor, side: int) -> Tensor:
    """(B,) -> (B, side): positions of a window moved by `shift`, mirrored at the first and the last pixel."""
    at = (torch.arange(side, device=shift.device) + shift[:, None]).abs()
    return (side - 1) - ((side - 1) - at).abs()


def center_square(
    x: Tensor,  # (..., H, W)
) -> Tensor:  # (..., S, S) with S = min(H, W)
    """The square in the middle, cut out without interpolation; a view into x."""
    h, w = x.shape[-2:]
    s = min(h, w)
    top, left = (h - s) // 2, (w - s) // 2
    return x[..., top : top + s, left : left + s]
