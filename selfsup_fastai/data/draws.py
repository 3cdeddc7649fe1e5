"""What a batch of random views needs to know, drawn at once and kept: nothing after `draw_views` is random."""

import math
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.errors import TaskError
from selfsup_fastai.seeding import host_of
from selfsup_fastai.transfer import constant, sent

NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation and hue that leave an image as it is
OPERATIONS = ("brightness", "contrast", "saturation", "hue")
_TRIES = 10


@dataclass(frozen=True)
class Views:
    """What was drawn for B images, one row an image; `views[2:5]`, `views[mask]` and `views[3]` pick rows."""

    boxes: Tensor  # (B, 4) int64: top, left, height, width of the crop in pixels
    flip: Tensor  # (B,) bool: left to right
    jitter: Tensor  # (B, 4) float: factors of brightness, contrast, saturation; hue shift in turns. (1, 1, 1, 0): none
    order: Tensor  # (B, 4) int64: the four color operations in the order they come
    grey: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float, pixels of the view; 0: no blur
    solarize: Tensor  # (B,) bool
    vertical_flip: Tensor  # (B,) bool
    turn: Tensor  # (B,) float, degrees clockwise
    shear: Tensor  # (B,) float, degrees
    window: Tensor  # (B, 2) float: the values that become black and white. (0, 1): none
    erase: Tensor  # (B, 4) int64: top, left, height, width of the rectangle in pixels of the view; height 0: none
    threshold: float
    size: int  # Side of the view in pixels

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, rows) -> "Views":
        rows = [int(rows)] if isinstance(rows, (int, np.integer)) else rows  # one row is still a batch
        return self._each(lambda t: t[rows])

    def to(self, device: torch.device | str) -> "Views":
        """The same draws on another device."""
        return self._each(lambda t: sent(t, device))

    def _each(self, change) -> "Views":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Views(**{k: change(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def describe(self) -> pd.DataFrame:
        """A row an image, a column a number drawn; `order` in words."""
        views = self.to("cpu")
        table = pd.DataFrame(views.boxes.numpy(), columns=["top", "left", "height", "width"])
        for name in ("flip", "vertical_flip", "turn", "shear"):
            table[name] = getattr(views, name).numpy()
        table[["black", "white"]] = views.window.numpy()
        table[list(OPERATIONS)] = views.jitter.numpy()
        table["order"] = [", ".join(OPERATIONS[k] for k in row) for row in views.order.tolist()]
        for name in ("grey", "sigma", "solarize"):
            table[name] = getattr(views, name).numpy()
        table[["erase_top", "erase_left", "erase_height", "erase_width"]] = views.erase.numpy()
        return table


def draw_views(
    recipe: Recipe,
    shape: tuple[int, int, int, int],  # (B, C, H, W) of the images
    generator: torch.Generator,  # Everything is drawn from its host (`seeding.Generator`), else from it, on its device
    size: int | None = None,  # Side of the views; None: the shorter side of the images
) -> Views:
    """Draw one view for each of B images. How many numbers are drawn depends on `shape` and `recipe` alone."""
    b, channels, h, w = shape
    if channels not in (1, 3):
        raise TaskError(
            f"Views are for images of 1 or 3 channels; these have {channels}. Make loaders with n_in=1 or 3."
        )
    size = min(h, w) if size is None else size
    if size < 1:
        raise TaskError(f"The size of a view is {size}; it must be a number of pixels, 1 or more.")
    draw = Draw(host_of(generator))
    return Views(
        boxes=_draw_boxes(recipe, b, h, w, draw),
        flip=draw.chance(b, recipe.flip),
        jitter=_draw_jitter(recipe, b, draw),
        order=draw.uniform((b, 4)).argsort(dim=1),
        grey=draw.chance(b, recipe.grey_p),
        sigma=draw.uniform(b, *recipe.blur_sigma) * draw.chance(b, recipe.blur_p),
        solarize=draw.chance(b, recipe.solarize_p),
        vertical_flip=draw.chance(b, recipe.vertical_flip) if recipe.vertical_flip else draw.zeros(b).bool(),
        turn=draw.around_zero(b, recipe.turn),
        shear=draw.around_zero(b, recipe.shear),
        window=_draw_window(recipe, b, draw),
        erase=_draw_erase(recipe, b, size, draw),
        threshold=recipe.solarize_threshold,
        size=size,
    )


class Draw:
    """Random tensors from one generator, on its device."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def zeros(self, shape) -> Tensor:
        return torch.zeros(shape, device=self.generator.device)

    def uniform(self, shape, low: float = 0.0, high: float = 1.0) -> Tensor:
        drawn = torch.rand(shape, generator=self.generator, device=self.generator.device)
        return drawn if (low, high) == (0, 1) else drawn * (high - low) + low

    def chance(self, shape, p: float) -> Tensor:
        return self.uniform(shape) < p

    def around_zero(self, shape, limit: float) -> Tensor:
        """In -limit..limit; where the limit is 0, nothing is drawn."""
        return self.uniform(shape, -limit, limit) if limit else self.zeros(shape)

    def below(self, n: Tensor) -> Tensor:
        """A whole number in 0 .. n - 1 for each number of `n`."""
        return (self.uniform(n.shape) * n).long().minimum(n - 1)  # the product may round up to n


def _sides(
    draw: Draw, b: int, area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Longer by `ratio` than the other side, and that one, of ten rectangles an image: uniform in area and log(ratio).

    Two tensors (B, 10) int64.
    """
    areas = draw.uniform((b, _TRIES), *scale) * area
    ratios = draw.uniform((b, _TRIES), *map(math.log, ratio)).exp()
    return (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()


def _first(fits: Tensor) -> Tensor:
    """The first true column of each row: (B, n) bool -> (B, 1) int64; 0 where there is none."""
    return (fits * torch.arange(fits.shape[1], 0, -1, device=fits.device)).argmax(dim=1, keepdim=True)


def _draw_boxes(recipe: Recipe, b: int, h: int, w: int, draw: Draw) -> Tensor:
    """RandomResizedCrop's rule: uniform in area and in log(ratio), ten tries, then the largest allowed center crop."""
    widths, heights = _sides(draw, b, h * w, recipe.scale, recipe.ratio)
    fits = (widths > 0) & (widths <= w) & (heights > 0) & (heights <= h)
    first, found = _first(fits), fits.any(dim=1)
    center_h, center_w = _center_box(recipe.ratio, h, w)
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


def _draw_jitter(recipe: Recipe, b: int, draw: Draw) -> Tensor:
    factors = [draw.uniform(b, max(0.0, 1 - s), 1 + s) for s in (recipe.brightness, recipe.contrast, recipe.saturation)]
    jitter = torch.stack([*factors, draw.uniform(b, -recipe.hue, recipe.hue)], dim=1)
    return torch.where(draw.chance((b, 1), recipe.jitter_p), jitter, constant(NEUTRAL, jitter.dtype, jitter.device))


def _draw_window(recipe: Recipe, b: int, draw: Draw) -> Tensor:
    whole = draw.zeros((b, 2))
    whole[:, 1] = 1.0
    if not recipe.window:
        return whole
    inward = draw.uniform((b, 2), 0, recipe.window / 2)
    return (whole - inward).abs()  # inward from 0 is upward, from 1 downward


def _draw_erase(recipe: Recipe, b: int, size: int, draw: Draw) -> Tensor:
    """RandomErasing's rule: uniform in area and in log(ratio), ten tries to be smaller than the view, else none."""
    if not recipe.erase_p:
        return draw.zeros((b, 4)).long()
    heights, widths = _sides(draw, b, size * size, recipe.erase_scale, recipe.erase_ratio)
    fits = (heights < size) & (widths < size)
    first = _first(fits)
    height, width = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    corner = [draw.below((size - side + 1).clamp(min=1)) for side in (height, width)]
    drawn = draw.chance(b, recipe.erase_p) & fits.any(dim=1)
    return torch.stack([*corner, height, width], dim=1) * drawn[:, None]
