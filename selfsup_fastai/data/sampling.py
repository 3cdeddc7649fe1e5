"""Crop, mirror, turn, shear and resize in one bilinear sampling."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_fastai.data.draws import Views
from selfsup_fastai.transfer import constant


class Straight(NamedTuple):
    """Where the pixels of views that are not turned lie: columns and rows, as `grid_sample` counts them."""

    columns: Tensor  # (B, 1, 2 * size): a place across in -1..1, then 0, for each pixel of a row
    rows: Tensor  # (B, size, 1): a place down in -1..1


def straight(views: Views, x: Tensor) -> Straight:
    """Kept within the crop as if it had been cut out first: nothing outside of it is read."""
    top, left, height, width = views.boxes.to(x.dtype)[:, :, None].unbind(dim=1)
    across, down = _steps(views, x)
    columns = (across * width).clamp(min=0.5 - width / 2).minimum(width / 2 - 0.5) + (left + width / 2)
    rows = (down * height).clamp(min=0.5 - height / 2).minimum(height / 2 - 0.5) + (top + height / 2)
    columns, rows = columns * (2 / x.shape[3]) - 1, rows * (2 / x.shape[2]) - 1
    return Straight(torch.stack([columns, torch.zeros_like(columns)], -1).flatten(1)[:, None], rows[:, :, None])


def sample_straight(
    x: Tensor,  # (B, C, H, W) float
    places: Straight,
) -> Tensor:  # (B, C, size, size)
    """The view of each image before its colors are changed, where no view is turned or sheared."""
    size = places.rows.shape[1]
    every_second = constant((0.0, 1.0), x.dtype, x.device).repeat(size)
    grid = torch.addcmul(places.columns, places.rows, every_second).view(len(x), size, size, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def sample_shrunk(
    x: Tensor,  # (B, C, H, W) float
    views: Views,  # None of them turned or sheared
) -> Tensor:  # (B, C, size, size)
    """The same where the crops are larger than the views: pixels are averaged, as torchvision's antialiasing does."""
    out = x.new_empty(*x.shape[:2], views.size, views.size)
    mirrored = zip(views.flip.tolist(), views.vertical_flip.tolist())
    for i, ((top, left, height, width), (flip, vertical)) in enumerate(zip(views.boxes.tolist(), mirrored)):
        crop = x[i : i + 1, :, top : top + height, left : left + width]
        view = F.interpolate(crop, out.shape[2:], mode="bilinear", align_corners=False, antialias=True)
        out[i] = view[0].flip([dim for dim, yes in ((1, vertical), (2, flip)) if yes])
    return out


def sample_turned(
    x: Tensor,  # (B, C, H, W) float
    views: Views,  # On the device of x
) -> Tensor:  # (B, C, size, size)
    """The same where some views are. A turned crop reads what lies around it, and beyond the border its reflection.

    Without antialiasing: a turned crop should not be much larger than its view.
    """
    return F.grid_sample(x, _turned(views, x), mode="bilinear", padding_mode="reflection", align_corners=False)


def _turned(views: Views, x: Tensor) -> Tensor:
    """(B, size, size, 2): where the pixels lie, x then y in -1..1, each crop turned and sheared about its center."""
    top, left, height, width = views.boxes.to(x.dtype)[:, :, None, None].unbind(dim=1)
    across, down = _steps(views, x)
    u, v = across[:, None, :] * width, down[:, :, None] * height
    (xx, xy), (yx, yy) = _matrix(views, x.dtype)
    straight = ((views.turn == 0) & (views.shear == 0))[:, None, None]
    columns = _inside(xx * u + xy * v, width, straight) + (left + width / 2)
    rows = _inside(yx * u + yy * v, height, straight) + (top + height / 2)
    return torch.stack([columns * (2 / x.shape[3]) - 1, rows * (2 / x.shape[2]) - 1], dim=-1)


def _steps(views: Views, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centers of the views across and down in shares of the crop, -0.5..0.5: two tensors (B, size)."""
    steps = (torch.arange(views.size, device=x.device, dtype=x.dtype) + 0.5) / views.size - 0.5
    across, down = (1 - 2 * mirrored[:, None].to(x.dtype) for mirrored in (views.flip, views.vertical_flip))
    return across * steps, down * steps


def _matrix(views: Views, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """From a place in the view, in pixels of the image from the crop's center, to the place in the image.

    The inverse of torchvision's affine(angle=turn, shear=[shear, 0]); each entry (B, 1, 1).
    """
    turn, shear = (angle.to(dtype)[:, None, None] * (math.pi / 180) for angle in (views.turn, views.shear))
    cos, sin, tan = turn.cos(), turn.sin(), shear.tan()
    return (cos - sin * tan, sin + cos * tan), (-sin, cos)


def _inside(at: Tensor, length: Tensor, straight: Tensor) -> Tensor:
    """Where `straight`, kept between the centers of the crop's first and last pixel, `at` measured from its center."""
    limit = torch.where(straight, length / 2 - 0.5, math.inf)
    return at.maximum(-limit).minimum(limit)


def sample_squares(
    x: Tensor,  # (B, C, H, W) float
    centers: Tensor,  # (B, 2): row and column in pixels; 0, 0 is the corner of the first pixel
    sides: Tensor,  # (B,) pixels
    turns: Tensor,  # (B,) degrees clockwise, by which the content turns
    size: int,  # Side of what comes out
) -> Tensor:  # (B, C, size, size)
    """One square of each image, at any place, of any size and turned about its center; beyond the border reflected.

    Without antialiasing: a square should not be much larger than `size`.
    """
    steps = ((torch.arange(size, device=x.device) + 0.5) / size - 0.5) * sides[:, None]
    down, across = steps[:, :, None], steps[:, None, :]
    angle = torch.deg2rad(turns)[:, None, None]
    rows = centers[:, 0, None, None] + angle.cos() * down - angle.sin() * across
    columns = centers[:, 1, None, None] + angle.sin() * down + angle.cos() * across
    grid = torch.stack([columns * (2 / x.shape[3]) - 1, rows * (2 / x.shape[2]) - 1], -1).to(x.dtype)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def outlines(views: Views) -> Tensor:  # (B, 4, 2) float64 on the CPU: x then y
    """Corners of the crops in pixels of the images (0, 0 is the corner of the first), clockwise while not mirrored."""
    views = views.to("cpu")  # some accelerators know no float64
    top, left, height, width = views.boxes.double()[:, :, None].unbind(dim=1)
    u = torch.tensor([-0.5, 0.5, 0.5, -0.5], dtype=torch.double) * width
    v = torch.tensor([-0.5, -0.5, 0.5, 0.5], dtype=torch.double) * height
    (xx, xy), (yx, yy) = ((entry[:, 0] for entry in row) for row in _matrix(views, torch.double))
    return torch.stack([xx * u + xy * v + left + width / 2, yx * u + yy * v + top + height / 2], dim=-1)
