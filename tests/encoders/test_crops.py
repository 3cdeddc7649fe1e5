"""Small crops: at which side, at what cost, and that a vision transformer's positions are interpolated for them."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.crops import crop_cost, crop_features, crop_side, nearest_side
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext.learner import pretext_learner

SHARE = 96 / 224


@pytest.mark.parametrize("whole, side", [(224, 96), (128, 56), (96, 40), (64, 24), (48, 24), (40, 16), (20, 16)])
def test_sides_are_the_papers_share_in_steps_of_8(whole, side):
    assert nearest_side(SHARE * whole) == side
    assert crop_side(create_encoder("resnet10t", size=whole), SHARE) == side


def test_never_more_than_the_images():
    assert crop_side(create_encoder("resnet10t", size=16), SHARE) == 16
    assert crop_side(create_encoder("resnet10t", size=12), SHARE) == 12


@pytest.mark.parametrize("size, patch, side", [(224, 16, 96), (64, 8, 24), (40, 4, 16), (48, 16, 32), (56, 14, 28)])
def test_a_vision_transformer_gets_whole_patches_two_at_least(size, patch, side):
    encoder = create_encoder("test_vit", size=size, patch_size=patch)
    assert crop_side(encoder, SHARE) == side
    assert crop_cost(encoder, side) == pytest.approx((side / size) ** 2)


def test_what_fails_on_small_images_gets_larger_ones():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *(nn.MaxPool2d(3, 2) for _ in range(5)))
    encoder = create_encoder(net, size=128)  # its pooling leaves nothing of less than 63 pixels
    assert crop_side(encoder, SHARE) == 64
    assert crop_features(encoder, torch.rand(2, 3, 64, 64)).shape == (2, encoder.num_features)


@pytest.mark.parametrize(
    "name, kwargs",  # one that timm makes for any size, as the others are not; two prefix tokens
    [
        ("test_vit", {}),
        ("test_vit3", {}),
        ("deit3_small_patch16_224", {"depth": 2}),
        ("deit_tiny_distilled_patch16_224", {"depth": 2}),
    ],
)
def test_features_of_small_crops_are_those_of_timms_network_of_any_size(name, kwargs):
    torch.manual_seed(0)
    encoder = create_encoder(name, size=64, patch_size=8, **kwargs).eval()
    dynamic = encoder.body.dynamic_img_size
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.1) if p.ndim > 1 else nn.init.constant_(p, 0.5)
    other = timm.create_model(name, num_classes=0, img_size=64, patch_size=8, dynamic_img_size=True, **kwargs).eval()
    other.load_state_dict(encoder.body.state_dict())
    x = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(crop_features(encoder, x), other(x))
        assert (crop_features(encoder, x) - encoder(x)).abs().max() > 1e-3  # which would enlarge them
        whole = torch.rand(2, 3, 64, 64)
        torch.testing.assert_close(crop_features(encoder, whole), encoder(whole))
    assert encoder.body.dynamic_img_size == dynamic
    crop_features(encoder, x).sum().backward()
    assert encoder.body.pos_embed.grad.abs().sum() > 0


def test_other_networks_of_one_size_are_given_them_enlarged():
    encoder = create_encoder("swin_tiny_patch4_window7_224", size=64, depths=(1, 1, 1, 1), embed_dim=24).eval()
    side = crop_side(encoder, SHARE)
    assert crop_cost(encoder, side) == 1
    x = torch.rand(1, 3, side, side)
    with torch.no_grad():
        assert torch.equal(crop_features(encoder, x), encoder(x))


def test_a_network_of_any_size_takes_them_as_they_are():
    encoder = create_encoder("resnet10t", size=64).eval()
    x = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(crop_features(encoder, x), encoder(x))
    assert crop_cost(encoder, 24) == (24 / 64) ** 2


@pytest.mark.parametrize(
    "task, side, parts, enough",
    [("jigsaw", 96, 24, 132), ("pirl", 96, 24, 132), ("relative_position", 100, 22, 150), ("counting", 48, 24, 66)],
)
def test_parts_that_are_too_small_for_a_network_are_refused_before_training_with_a_size_that_does(
    task, side, parts, enough
):
    """ConvNeXt halves the side five times, and of less than 32 pixels nothing is left."""
    images = [np.random.default_rng(0).integers(0, 256, (8, s, s, 3), dtype=np.uint8) for s in (side, enough)]
    small, large = (UnlabeledDataLoaders.from_array(x, size=None, bs=2, valid_pct=0.25) for x in images)
    said = f"{task} shows the network parts of {parts} pixels a side, and convnext_atto takes no less than 32. Take "
    with pytest.raises(TaskError, match=f"{said}images of {enough} pixels"):
        pretext_learner(small, task, "convnext_atto")
    learn = pretext_learner(large, task, "convnext_atto")
    n = learn.dls.n_inp
    learn.model(*learn.dls.train.one_batch()[:n])
