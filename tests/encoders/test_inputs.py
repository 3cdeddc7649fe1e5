"""encoders/inputs.py: Lab as an independent reader computes it, there and back, and through saved encoders."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup_fastai.encoders.checkpoint import load_encoder, save_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.inputs import AB_REACH, CHANNELS, from_input, lab_to_rgb, rgb_to_lab, to_input
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
        torch.testing.assert_close(loaded.prepare(images), 2 * to_input(images, kind) - 1)
    with torch.no_grad():
        assert torch.equal(loaded(loaded.prepare(x)), encoder(2 * to_input(x, kind) - 1))


def test_an_encoder_of_other_channels_is_not_fed_with_it():
    with pytest.raises(TaskError, match=r"3 channels cannot be fed with L\. Make it with n_in=1"):
        create_encoder("resnet10t").eat("L")
