"""Parameter groups: every parameter in one, none tiny, names that a person can read."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from selfsup_fastai.encoders.encoder import create_encoder

ARCHS = [
    "resnet18",
    "resnet10t",
    "efficientnet_b0",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_is_in_one_group_and_no_group_is_tiny(arch):
    encoder = create_encoder(arch, 1, size=64)
    groups = encoder.param_groups()
    assert sorted(id(p) for group in groups for p in group) == sorted(id(p) for p in encoder.parameters())
    total = sum(p.numel() for p in encoder.parameters())
    assert all(sum(p.numel() for p in group) >= 0.01 * total for group in groups)
    assert len(encoder.group_names()) == len(groups) == len(set(encoder.group_names())) > 2
    first, last = next(iter(encoder.parameters())), list(encoder.parameters())[-1]
    assert any(p is first for p in groups[0]) and any(p is last for p in groups[-1])


def test_what_the_groups_are():
    resnet = create_encoder("resnet18")
    assert resnet.group_names() == ["conv1–layer1", "layer2", "layer3", "layer4"]
    names = {id(p): name for name, p in resnet.body.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in resnet.param_groups()[0]} == {"conv1", "bn1", "layer1"}
    convnext = create_encoder("convnext_atto")  # Its last group would be a lone norm of 640 parameters
    assert convnext.group_names() == ["stem–stages.1", "stages.2", "stages.3–head"]
    assert create_encoder("efficientnet_b0").group_names()[:2] == ["conv_stem–blocks.2", "blocks.3"]


def test_groups_of_a_torchvision_network_descend_into_its_only_part():
    encoder = create_encoder(torchvision.models.mobilenet_v3_small)
    assert len(encoder.group_names()) > 5 and encoder.group_names()[-1] == "features.12"
    assert create_encoder(torchvision.models.resnet18).group_names()[0] == "conv1–layer1"


def test_one_part_that_holds_nearly_everything_is_opened():
    wrapped = nn.Sequential(timm.create_model("resnet10t", num_classes=0), nn.Linear(512, 32))
    names = create_encoder(wrapped).group_names()
    assert names[0].startswith("0.conv1") and names[-2:] == ["0.layer3", "0.layer4–1"]
    assert len(create_encoder("caformer_s18").group_names()) >= 3  # timm groups it in name only


def test_parameters_outside_all_parts_go_with_the_stem():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.scale = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x):
            return self.b(self.a(x) * self.scale)

    encoder = create_encoder(Own)
    assert [len(group) for group in encoder.param_groups()] == [3, 2]
    assert any(p is encoder.body.scale for p in encoder.param_groups()[0])


def test_tied_parameters_are_grouped_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 8, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    encoder = create_encoder(Tied)
    assert sum(len(group) for group in encoder.param_groups()) == len(list(encoder.parameters())) == 5


def test_no_weight_decay_names_exist():
    encoder = create_encoder("vit_tiny_patch16_224", size=64)
    assert encoder.no_weight_decay() == {"body.cls_token", "body.pos_embed"}
    swin = create_encoder("swin_tiny_patch4_window7_224", size=64)
    assert len(swin.no_weight_decay()) == 12 and swin.no_weight_decay() < dict(swin.named_parameters()).keys()
    assert create_encoder("resnet10t").no_weight_decay() == set()
