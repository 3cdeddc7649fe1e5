"""Turned and sheared crops against a transcription in numpy, against torchvision, and against exact quarter turns."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from selfsup_fastai.data.draws import Views, draw_views
from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.data.sampling import outlines
from selfsup_fastai.data.views import apply_views

PLAIN = Recipe(flip=0.0, jitter_p=0.0, grey_p=0.0)
TURNED = replace(PLAIN, flip=0.5, vertical_flip=0.5, turn=180.0, shear=30.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(b: int, c: int, h: int, w: int) -> Tensor:
    """A few bumps in each image, so that interpolating twice changes little."""
    coarse = torch.rand(b, c, 4, 4, generator=seeded(1))
    return torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic", align_corners=True).clamp(0, 1)


def transcribed(image: np.ndarray, view: Views) -> np.ndarray:
    """One view pixel by pixel: (C, H, W) -> (C, size, size)."""
    top, left, height, width = view.boxes[0].tolist()
    turn, shear = math.radians(view.turn.item()), math.radians(view.shear.item())
    # what happens to the content: x moves by -tan(shear) * y, then a turn; y points down, so this is clockwise
    content = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    content = content @ np.array([[1, -math.tan(shear)], [0, 1]])
    out = np.empty((len(image), view.size, view.size))
    for i in range(view.size):
        for j in range(view.size):
            at_j = view.size - 1 - j if view.flip.item() else j
            at_i = view.size - 1 - i if view.vertical_flip.item() else i
            seen = [((at_j + 0.5) / view.size - 0.5) * width, ((at_i + 0.5) / view.size - 0.5) * height]
            x, y = np.linalg.solve(content, seen) + np.array([left + width / 2 - 0.5, top + height / 2 - 0.5])
            out[:, i, j] = bilinear(image, x, y)
    return out


def bilinear(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """The value between four pixels; beyond the border the image is mirrored at its edge."""
    row, col = math.floor(y), math.floor(x)
    total = np.zeros(len(image))
    for r, share_r in ((row, row + 1 - y), (row + 1, y - row)):
        for c, share_c in ((col, col + 1 - x), (col + 1, x - col)):
            total += share_r * share_c * image[:, mirrored(r, image.shape[1]), mirrored(c, image.shape[2])]
    return total


def mirrored(at: int, side: int) -> int:
    at %= 2 * side
    return at if at < side else 2 * side - 1 - at


@pytest.mark.parametrize("channels, h, w, size", [(3, 31, 22, 17), (1, 20, 37, 24)])
def test_turned_and_sheared_crops_are_what_the_definition_says(channels, h, w, size):
    x = torch.rand(12, channels, h, w, generator=seeded(2))
    views = draw_views(TURNED, x.shape, seeded(3), size)
    expected = np.stack([transcribed(image.double().numpy(), views[i]) for i, image in enumerate(x)])
    np.testing.assert_allclose(apply_views(x, views).numpy(), expected, atol=5e-5)
    exact = apply_views(x.double(), views).numpy()
    np.testing.assert_allclose(exact, expected, atol=1e-9)


def test_a_quarter_turn_of_a_square_crop_moves_whole_pixels():
    x = torch.rand(4, 3, 40, 44, generator=seeded(4))
    views = draw_views(replace(PLAIN, scale=(0.2, 0.5), ratio=(1.0, 1.0)), x.shape, seeded(5), 16)
    views = replace(views, boxes=torch.tensor([[5, 9, 16, 16]] * 4), turn=torch.tensor([90.0, -90.0, 180.0, 0.0]))
    cut = x[:, :, 5:21, 9:25]
    for out, image, quarters_left in zip(apply_views(x, views), cut, (-1, 1, 2, 0)):
        torch.testing.assert_close(out, torch.rot90(image, quarters_left, (1, 2)), atol=1e-4, rtol=0)


def test_turn_and_shear_are_torchvisions_about_the_crops_center():
    x = smooth(64, 3, 120, 120)
    drawn = draw_views(replace(PLAIN, flip=0.5, scale=(0.05, 0.12), turn=45.0, shear=15.0), x.shape, seeded(6), 32)
    inner = (drawn.boxes[:, :2] > 25).all(1) & (drawn.boxes[:, :2] + drawn.boxes[:, 2:] < 95).all(1)
    x, drawn = x[inner], drawn[inner]
    assert len(x) >= 5  # whose corners stay inside of the image
    for image, out, i in zip(x, apply_views(x, drawn), range(len(x))):
        top, left, height, width = drawn.boxes[i].tolist()
        center, angles = [left + width / 2, top + height / 2], (drawn.turn[i].item(), [drawn.shear[i].item(), 0.0])
        turned = tv.affine(image, angles[0], [0, 0], 1.0, angles[1], InterpolationMode.BILINEAR, center=center)
        expected = tv.resized_crop(turned, top, left, height, width, [32, 32], antialias=False)
        expected = tv.horizontal_flip(expected) if drawn.flip[i] else expected
        inside = (slice(None), slice(2, -2), slice(2, -2))  # cut out first, the outermost pixels are repeated there
        torch.testing.assert_close(out[inside], expected[inside], atol=0.01, rtol=0)


def test_what_is_not_turned_reads_nothing_outside_of_its_crop_also_beside_turned_images():
    x = torch.rand(8, 3, 30, 30, generator=seeded(7))
    views = draw_views(replace(TURNED, scale=(0.1, 0.4)), x.shape, seeded(8), 24)
    straight = replace(views, turn=torch.zeros(8), shear=torch.zeros(8))
    some = replace(views, turn=views.turn * torch.tensor([0, 1.0] * 4), shear=views.shear * torch.tensor([0, 1.0] * 4))
    outside = x.clone()
    for i, (top, left, height, width) in enumerate(views.boxes.tolist()):
        outside[i] = 0
        outside[i, :, top : top + height, left : left + width] = x[i, :, top : top + height, left : left + width]
    out, alone, cut = apply_views(x, some), apply_views(x, straight), apply_views(outside, some)
    torch.testing.assert_close(out[::2], alone[::2], atol=1e-5, rtol=0)
    torch.testing.assert_close(cut[::2], out[::2], atol=1e-4, rtol=0)  # a rounding step off a pixel's center
    assert (out - alone)[1::2].abs().amax((1, 2, 3)).min() > 0.1
    assert (cut - out)[1::2].abs().amax((1, 2, 3)).max() > 0.1


def test_outlines_are_where_the_pixels_come_from():
    h, w, size = 80, 100, 20
    x = torch.zeros(6, 3, h, w, dtype=torch.double)
    x[:, 0] = (torch.arange(w).double() + 0.5) / w
    x[:, 1] = ((torch.arange(h).double() + 0.5) / h)[:, None]
    views = draw_views(replace(PLAIN, turn=180.0, shear=20.0), x.shape, seeded(9), size)
    views = replace(views, boxes=torch.tensor([[30, 35, 20, 30]] * 6))
    share = ((torch.arange(size, dtype=torch.double) + 0.5) / size)[:, None]
    for out, (a, b, c, d) in zip(apply_views(x, views), outlines(views)):
        upper, lower = a + share * (b - a), d + share * (c - d)  # (size, 2) along the top and the bottom side
        expected = upper[None] + share[:, None] * (lower - upper)[None]
        torch.testing.assert_close(out[0] * w, expected[..., 0], atol=1e-6, rtol=0)
        torch.testing.assert_close(out[1] * h, expected[..., 1], atol=1e-6, rtol=0)
    plain = outlines(replace(views[:1], turn=torch.zeros(1), shear=torch.zeros(1)))
    assert plain.tolist() == [[[35, 30], [65, 30], [65, 50], [35, 50]]]
