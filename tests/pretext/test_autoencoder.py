"""Which pixels go black, what is to be painted, and that losses and metric are what their formulas say."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup_fastai.encoders.decoders import PerPixel
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(b: int = 4, c: int = 3, h: int = 20, w: int = 20) -> Tensor:
    """Nothing in them is black."""
    return 0.1 + 0.9 * torch.rand(b, c, h, w, generator=seeded(1))


def question(x: Tensor, seed: int = 0, **settings) -> tuple[Tensor, Tensor]:
    (noisy,), (target,) = get_task("autoencoder", **settings).make_batch(x, generator=seeded(seed), train=True)
    return noisy, target


def logits(x: Tensor) -> Tensor:
    return torch.logit(x.clamp(1e-6, 1 - 1e-6))


@pytest.mark.parametrize("channels, h, w", [(3, 20, 20), (1, 47, 61)])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_exactly_the_share_of_pixels_goes_black_in_all_channels_and_nothing_else_changes(channels, h, w, share):
    x = images(4, channels, h, w)
    noisy, target = question(x, denoise=share)
    black = (noisy == 0).all(1)
    assert black.sum((1, 2)).tolist() == [round(share * h * w)] * 4
    assert torch.equal(noisy[~black[:, None].expand_as(x)], x[~black[:, None].expand_as(x)])
    assert torch.equal(target, x)
    assert not torch.equal(black[0], black[1])  # each image has noise of its own


def test_every_pixel_goes_black_equally_often():
    x = torch.ones(2000, 1, 8, 8)
    often = (question(x)[0] == 0).float().mean((0, 1))
    deviation = math.sqrt(0.25 * 0.75 / 2000)
    assert (often - 0.25).abs().max() < 5 * deviation


def test_without_noise_the_question_is_the_image():
    noisy, target = question(images(), denoise=0)
    assert torch.equal(noisy, images()) and torch.equal(target, images())


def test_losses_are_their_formulas():
    x, z = images(3, 3, 5, 7), torch.randn(3, 3, 5, 7, generator=seeded(2))
    y, p = x.double().numpy(), 1 / (1 + np.exp(-z.double().numpy()))
    entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean((1, 2, 3))
    squared = ((y - p) ** 2).mean((1, 2, 3))
    for error, expected in [("cross_entropy", entropy), ("squared", squared)]:
        task = get_task("autoencoder", error=error)
        np.testing.assert_allclose(task.loss(z, x, reduction="none").numpy(), expected, rtol=1e-5)
        assert task.loss(z, x).item() == pytest.approx(expected.mean(), rel=1e-5)


def test_a_perfect_answer_has_the_least_loss():
    x = images()
    assert get_task("autoencoder", error="squared").loss(logits(x), x).item() == pytest.approx(0, abs=1e-9)
    task, y = get_task("autoencoder"), x.clamp(1e-6, 1 - 1e-6).double()
    entropy = -(y * y.log() + (1 - y) * (1 - y).log()).mean().item()
    assert task.loss(logits(x), x).item() == pytest.approx(entropy, abs=1e-5)
    assert task.loss(logits(x) + 0.1, x) > task.loss(logits(x), x) < task.loss(logits(x) - 0.1, x)


def test_metric_is_zero_for_the_mean_color_and_one_for_the_truth():
    x, task = images(), get_task("autoencoder")
    (metric,), plain = task.metrics, x.mean((0, 2, 3), keepdim=True).expand_as(x)
    assert metric(logits(plain), x).item() == pytest.approx(task.chance(), abs=1e-5)
    assert metric(logits(x), x).item() == pytest.approx(1, abs=1e-5)
    assert metric(logits((x + plain) / 2), x).item() == pytest.approx(0.75, abs=1e-5)
    assert metric(logits(1 - x), x) < 0


@pytest.mark.parametrize("arch", ["resnet10t", "vit_tiny_patch16_224"])
def test_one_model_paints_images_of_any_size(arch):
    model = PerPixel(create_encoder(arch, size=48), 3).eval()
    with torch.no_grad():
        for shape in [(48, 48), (47, 61), (64, 64)]:
            assert model(torch.rand(1, 3, *shape)).shape == (1, 3, *shape)


def test_an_answer_about_a_picture_is_said_in_a_line():
    from tests.test_contract import learner, pictures

    answer = learner("autoencoder").predict(pictures(1)[0])
    assert "asked an array of shape (1, 3, 40, 40)" in repr(answer) and len(repr(answer)) < 200


def test_settings_out_of_range():
    for share in (-0.1, 1):
        with pytest.raises(TaskError, match=f"denoise is a number, at least 0 and below 1; got {share}"):
            get_task("autoencoder", denoise=share)
    with pytest.raises(TaskError, match=r"got 'square'\. Did you mean 'squared'"):
        get_task("autoencoder", error="square")
