"""Halving against torch's and Pillow's resampling, away from the borders, where conventions differ."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from selfsup_fastai.data.halving import KERNELS, halved

X = torch.rand(5, 3, 32, 28, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3  # nothing overshoots
INNER = (..., slice(3, -3), slice(3, -3))


def only(name: str, x=X):
    return halved(x, torch.full((len(x),), list(KERNELS).index(name)))


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_keep_the_mean_and_flat_images(name):
    assert sum(KERNELS[name]) == pytest.approx(1)
    flat = only(name, torch.full((2, 1, 6, 4), 0.3))
    assert flat.shape == (2, 1, 3, 2)
    torch.testing.assert_close(flat, torch.full((2, 1, 3, 2), 0.3))


@pytest.mark.parametrize("name", ["nearest", "area"])
def test_nearest_and_area_are_torchs_to_the_border(name):
    torch.testing.assert_close(only(name), F.interpolate(X, scale_factor=0.5, mode=name))


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_bilinear_and_bicubic_are_torchs_antialiased(name):
    expected = F.interpolate(X, (16, 14), mode=name, antialias=True, align_corners=False)
    torch.testing.assert_close(only(name)[INNER], expected[INNER], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
def test_they_are_pillows(name):
    for channel, ours in zip(X.flatten(0, 1), only(name).flatten(0, 1)):
        expected = Image.fromarray(channel.numpy()).resize((14, 16), Image.Resampling[name.upper()])
        np.testing.assert_allclose(ours[INNER], np.asarray(expected)[INNER[1:]], atol=1e-5)


def test_each_image_has_its_own_kernel_and_stays_in_range():
    kernels = torch.tensor([4, 0, 3, 1, 2])
    mixed = halved(X, kernels)
    for row, k in enumerate(kernels.tolist()):
        torch.testing.assert_close(mixed[row], only(list(KERNELS)[k])[row])
    assert len({tuple(only(name)[0, 0, 5].tolist()) for name in KERNELS}) == 5
    steps = (torch.arange(32).view(-1, 1) % 16 >= 8).float().expand(1, 1, 32, 32)
    for name in KERNELS:
        assert only(name, steps).min() >= 0 and only(name, steps).max() <= 1
