"""encoders/inputs.py: Lab as an independent reader computes it, there and back, and through saved encoders."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup_fastai.encoders.checkpoint import load_encoder, save_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.inputs import (
    AB_REACH,
    CHANNELS,
    DEVIATIONS,
    from_input,
    lab_to_rgb,
    rgb_to_lab,
    sobel,
    to_input,
)
from selfsup_fastai.errors import TaskError


def colors(n: int = 17) -> Tensor:
    """A grid through the sRGB cube with all corners, (1, 3, n * n, n)."""
    side = torch.linspace(0, 1, n)
    return torch.stack(torch.meshgrid(side, side, side, indexing="ij")).reshape(1, 3, n * n, n)


def test_lab_is_that_of_opencv():
    x = colors()
    expected = cv2.cvtColor(np.ascontiguousarray(x[0].permute(1, 2, 0).numpy()), cv2.COLOR_RGB2LAB)
    torch.testing.assert_close(rgb_to_lab(x)[0].permute(1, 2, 0), torch.from_numpy(expected), atol=0.35, rtol=0)


def test_known_colors():
    """CIE Lab of sRGB's corners as color tables give them."""
    rgb = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]]).T[None]
    known = [[0, 0, 0], [100, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    torch.testing.assert_close(rgb_to_lab(rgb)[0].T, torch.tensor(known), atol=0.05, rtol=0)


def test_there_and_back():
    x = colors()
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(x)), x, atol=2e-5, rtol=0)


def test_colors_that_no_screen_shows_stay_finite():
    lab = torch.tensor([[50.0, 300.0, -300.0], [0.0, 100.0, 100.0], [100.0, -100.0, 100.0]]).T[None]
    rgb = lab_to_rgb(lab)
    assert torch.isfinite(rgb).all() and rgb.min() >= 0 and rgb.max() <= 1


def test_every_kind_is_an_image_between_0_and_1():
    x, lab = colors(), rgb_to_lab(colors())
    made = {kind: to_input(x, kind) for kind in CHANNELS}
    for kind, channels in CHANNELS.items():
        assert made[kind].shape[1] == channels and made[kind].min() >= -1e-6 and made[kind].max() <= 1 + 1e-6
    torch.testing.assert_close(made["L"] * 100, lab[:, :1])
    torch.testing.assert_close((made["ab"] - 0.5) * 2 * AB_REACH, lab[:, 1:], atol=1e-4, rtol=0)
    assert torch.equal(made["lab"], torch.cat([made["L"], made["ab"]], 1))
    torch.testing.assert_close(from_input(made["lab"], "lab"), x, atol=2e-5, rtol=0)
    assert from_input(made["ab"], "ab").shape == x.shape and from_input(made["L"], "L").shape[1] == 1


def test_grey_images_have_lightness_and_no_color():
    grey = torch.linspace(0, 1, 11).view(1, 1, 1, 11)
    lab = to_input(grey, "lab")
    torch.testing.assert_close(lab[:, 1:], torch.full((1, 2, 1, 11), 0.5), atol=1e-4, rtol=0)
    assert (lab[:, 0].diff() > 0).all()


@pytest.mark.parametrize("kind", CHANNELS)
def test_an_encoder_that_eats_it_is_saved_and_prepares_images_itself(kind, tmp_path):
    encoder = create_encoder("resnet10t", n_in=CHANNELS[kind]).eval()
    encoder.eat(kind)
    loaded = load_encoder(save_encoder(encoder, tmp_path / "encoder")).eval()
    assert loaded.input == kind and loaded.image_channels == 3
    x = torch.rand(2, 3, 64, 64)
    for images in (x, x[:, :1]):
        torch.testing.assert_close(loaded.prepare(images), (to_input(images, kind) - 0.5) / DEVIATIONS[kind])
    with torch.no_grad():
        torch.testing.assert_close(loaded(loaded.prepare(x)), encoder((to_input(x, kind) - 0.5) / DEVIATIONS[kind]))


def test_an_encoder_of_other_channels_is_not_fed_with_it():
    with pytest.raises(TaskError, match=r"3 channels cannot be fed with L\. Make it with n_in=1"):
        create_encoder("resnet10t").eat("L")


def test_edges_are_those_of_opencv():
    x = torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    grey = x.mean(1).numpy()
    kwargs = {"ddepth": cv2.CV_32F, "ksize": 3, "borderType": cv2.BORDER_REPLICATE}
    right, down = ([cv2.Sobel(g, dx=1 - i, dy=i, **kwargs) for g in grey] for i in range(2))
    torch.testing.assert_close(sobel(x), torch.from_numpy(np.stack([right, down], 1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(sobel(x.mean(1, keepdim=True)), sobel(x))  # grey images have the same


def test_edges_as_an_image():
    ramp = torch.linspace(0, 1, 11).expand(1, 1, 8, 11)
    fed = to_input(ramp, "sobel")
    torch.testing.assert_close(fed[0, 0, :, 1:-1], torch.full((8, 9), 0.5 + 0.8 / 8))  # two pixels, weights 1 2 1
    torch.testing.assert_close(fed[0, 1], torch.full((8, 11), 0.5))
    steps = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]])[None, None]
    assert to_input(steps, "sobel").max() == 1 and from_input(to_input(steps, "sobel"), "sobel").max() == 1
    assert from_input(to_input(steps * 0 + 0.7, "sobel"), "sobel").max() == 0
