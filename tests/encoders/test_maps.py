"""Feature maps, and how a network is measured for them."""

import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from selfsup_fastai.encoders.encoder import Encoder, create_encoder
from selfsup_fastai.errors import TaskError, UnknownNameError


def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", ["resnet18", "efficientnet_b0", "swin_tiny_patch4_window7_224"])
def test_the_pooled_map_is_what_forward_gives(arch):
    encoder = create_encoder(arch, size=64).eval()
    with torch.no_grad():
        assert torch.allclose(encoder.feature_map(images()).mean((2, 3)), encoder(images()), atol=1e-5)


def test_a_vits_map_is_its_normed_patch_tokens_row_by_row():
    encoder = create_encoder("vit_tiny_patch16_224", size=64).eval()
    with torch.no_grad():
        tokens = encoder.body.forward_features(images())[:, 1:]  # (B, 16, C), class token off
        assert torch.equal(encoder.feature_map(images()).flatten(2).transpose(1, 2), tokens)


def test_networks_that_norm_after_pooling_give_maps_without_norm():
    encoder = create_encoder("hiera_tiny_224", size=64).eval()
    with torch.no_grad():
        tokens = encoder.body.forward_features(images())
        tokens = tokens.flatten(1, -2) if tokens.ndim > 3 else tokens
        assert torch.allclose(encoder.feature_map(images()).mean((2, 3)), tokens.mean(1), atol=1e-5)


def test_swins_maps_are_channels_second_and_upright():
    encoder = create_encoder("swin_tiny_patch4_window7_224", size=64).eval()
    with torch.no_grad():
        nhwc = encoder.body.forward_features(images())
        assert torch.equal(encoder.feature_map(images()), nhwc.permute(0, 3, 1, 2))


def test_some_layers_come_in_order_and_unknown_ones_are_named():
    encoder = create_encoder("resnet18").eval()
    with torch.no_grad():
        every = encoder.feature_maps(images())
        some = encoder.feature_maps(images(), ["layer4", "layer2"])
    assert list(some) == ["layer2", "layer4"]
    assert torch.equal(some["layer2"], every["layer2"]) and some["layer4"].shape == (2, 512, 2, 2)
    with pytest.raises(UnknownNameError, match=r"layer of resnet18.*'layer5'.*layer4"):
        encoder.feature_maps(images(), ["layer5"])


def test_a_patch_embedding_is_not_passed_off_as_the_last_map():
    encoder = create_encoder(torchvision.models.vit_b_32, image_size=64)
    assert encoder.fixed_size == 64 and encoder.layer_names == []
    with pytest.raises(TaskError, match=r"vit_b_32 gives no feature maps"):
        encoder.feature_map(images())


@pytest.mark.parametrize("net", ["resnet10t", "dropping"])
def test_measuring_leaves_statistics_modes_and_randomness_alone(net):
    body = timm.create_model("resnet10t", num_classes=0) if net == "resnet10t" else AlwaysDropping()
    next(body.children()).eval()
    modes = [m.training for m in body.modules()]
    before = {k: v.clone() for k, v in body.state_dict().items()}
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    Encoder(body)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert (np.random.get_state()[1] == state[2]).all()
    assert [m.training for m in body.modules()] == modes and any(modes) and not all(modes)
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())


class AlwaysDropping(nn.Module):
    """Draws random numbers even in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.dropout(self.norm(self.conv(x)), 0.5, training=True)
