"""Encoders: what they compute against the bare network, how they are made, and the mistakes people make."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from selfsup_fastai.encoders import bodies
from selfsup_fastai.encoders.checkpoint import get_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.heads import linear_head, mlp
from selfsup_fastai.errors import SelfsupError, TaskError

NETS = [
    ("resnet18", 64),
    ("resnet10t", 64),
    ("efficientnet_b0", 64),
    ("convnext_atto", 64),
    ("vit_tiny_patch16_224", 64),
    ("swin_tiny_patch4_window7_224", 64),
]


def images(n=2, channels=3, height=64, width=64, seed=0):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed))


def tiny_net(n_in=3):
    """A network of one's own, with a head that has one of the usual names."""
    net = nn.Sequential()
    for name, part in [
        ("stem", nn.Conv2d(n_in, 4, 3, padding=1)),
        ("norm", nn.BatchNorm2d(4)),
        ("act", nn.ReLU()),
        ("deep", nn.Conv2d(4, 16, 3, stride=2, padding=1)),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flat", nn.Flatten()),
        ("fc", nn.Linear(16, 5)),
    ]:
        net.add_module(name, part)
    return net


@pytest.mark.parametrize("n_in", [1, 3])
@pytest.mark.parametrize("arch, size", NETS)
def test_timm_networks(arch, size, n_in):
    torch.manual_seed(0)
    encoder = create_encoder(arch, n_in, size=size).eval()
    x = images(channels=n_in, height=size, width=size)
    with torch.no_grad():
        features, last, maps = encoder(x), encoder.feature_map(x), encoder.feature_maps(x)
        reference = timm.create_model(arch, **encoder.kwargs).eval()
        reference.load_state_dict(encoder.body.state_dict(), strict=True)
        assert torch.equal(features, reference(x))
        expected = reference.forward_intermediates(x, intermediates_only=True)
    assert features.shape == (2, encoder.num_features)
    assert list(maps) == encoder.layer_names and len(maps) == len(expected)
    for got, want in zip(maps.values(), expected):
        assert torch.equal(got, want)
    assert last.ndim == 4 and last.shape[-2:] == maps[encoder.layer_names[-1]].shape[-2:]
    assert encoder.input == {1: "grey", 3: "rgb"}[n_in]
    assert encoder.fixed_size == (size if "vit" in arch or "swin" in arch else None)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_other_sizes_are_resized_for_networks_of_one_size(arch):
    encoder = create_encoder(arch, size=64).eval()
    x = images(height=47, width=91)
    resized = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert torch.equal(encoder(x), encoder.body(resized))
        assert torch.equal(encoder.feature_map(x), encoder.feature_map(resized))


def test_half_precision_images_are_resized_too():
    encoder = create_encoder("vit_tiny_patch16_224", size=64, depth=2).eval().bfloat16()
    with torch.no_grad():
        assert encoder(images(height=50).bfloat16()).dtype == torch.bfloat16


def test_other_networks_see_images_at_their_own_size():
    encoder = create_encoder("resnet10t", size=64).eval()
    with torch.no_grad():
        assert encoder.feature_map(images(height=128, width=64)).shape[-2:] == (4, 2)


def test_a_size_a_network_cannot_be_built_for_becomes_the_next_one():
    encoder = create_encoder("twins_svt_small", size=100)
    assert encoder.size == 100 and encoder.fixed_size == encoder.kwargs["img_size"] > 100
    with torch.no_grad():
        assert encoder.eval()(images(height=100, width=100)).shape == (2, encoder.num_features)


def test_the_side_is_that_of_the_images_before_that_of_the_network():
    assert create_encoder("resnet10t").side == 224 and create_encoder("resnet10t", size=64).side == 64
    fixed = create_encoder("test_vit")
    assert fixed.side == fixed.fixed_size == 160
    fixed.size = 64  # as a learner says whose images are resized to the one size of the network
    assert fixed.side == 64


def test_networks_without_img_size_keep_their_own():
    encoder = create_encoder("crossvit_9_240", size=64)
    assert encoder.fixed_size == 240 and "img_size" not in encoder.kwargs


def test_torchvision_networks_lose_their_head_and_take_gray_images():
    torch.manual_seed(0)
    encoder = create_encoder(torchvision.models.resnet18, 1).eval()
    x = images(channels=1)
    with torch.no_grad():
        b = encoder.body
        stem = b.maxpool(b.relu(b.bn1(b.conv1(x))))
        last = b.layer4(b.layer3(b.layer2(b.layer1(stem))))
        assert torch.equal(encoder.feature_map(x), last)
        assert torch.allclose(encoder(x), last.mean((2, 3)), atol=1e-6)
    assert (encoder.arch, encoder.source, encoder.num_features) == ("resnet18", "torchvision", 512)
    assert isinstance(b.fc, nn.Identity) and b.conv1.weight.shape == (64, 1, 7, 7)
    assert {"layer1", "layer2", "layer3", "layer4"} < set(encoder.layer_names) and "avgpool" not in encoder.layer_names


@pytest.mark.parametrize("name, width", [("mobilenet_v3_small", 576), ("squeezenet1_1", 512)])
def test_torchvision_heads_that_pool_leave_a_pooling(name, width):
    encoder = create_encoder(getattr(torchvision.models, name)).eval()
    with torch.no_grad():
        for side in (64, 96):
            x = images(height=side, width=side)
            assert encoder(x).shape == (2, width) == (2, encoder.num_features)
            assert torch.allclose(encoder.feature_map(x).mean((2, 3)), encoder(x), atol=1e-5)


def test_a_module_is_copied_and_its_head_left_out():
    net = tiny_net()
    encoder = create_encoder(net).eval()
    assert isinstance(net.fc, nn.Linear) and isinstance(encoder.body.fc, nn.Identity)
    trunk = net[:4].eval()
    with torch.no_grad():
        assert torch.equal(encoder.feature_map(images()), trunk(images()))
        assert torch.allclose(encoder(images()), trunk(images()).mean((2, 3)))
    assert encoder.layer_names == ["stem", "norm", "act", "deep"] and encoder.num_features == 16
    assert (encoder.arch, encoder.source) == ("Sequential", "module")


def test_a_module_keeps_its_own_channels_unless_told_otherwise():
    assert create_encoder(tiny_net(1)).in_chans == 1
    assert create_encoder(tiny_net(1), n_in=3).in_chans == 3


def test_trained_weights_answer_gray_images_as_before():
    net = tiny_net().eval()
    gray = create_encoder(net, n_in=1).eval()
    x = images(channels=1)
    with torch.no_grad():
        assert torch.allclose(gray.feature_map(x), net[:4](x.expand(-1, 3, -1, -1)), atol=1e-6)
        five = create_encoder(net, n_in=5).eval()
        assert torch.allclose(five.feature_map(x.expand(-1, 5, -1, -1)), gray.feature_map(x), atol=1e-6)


def test_a_timm_module_loses_only_its_classifier():
    net = timm.create_model("convnext_atto", num_classes=7).eval()
    encoder = create_encoder(net).eval()
    with torch.no_grad():
        assert torch.equal(encoder(images()), net.forward_head(net.forward_features(images()), pre_logits=True))


def test_a_module_that_gives_maps_is_pooled():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3))
    encoder = create_encoder(net)
    assert torch.equal(encoder(images()), net(images()).mean((2, 3)))
    assert torch.equal(encoder.feature_map(images()), net(images()))


def test_constructors_of_any_kind():
    assert create_encoder(tiny_net).num_features == 16
    assert create_encoder(timm.models.resnet10t).source == "timm"
    with pytest.raises(SelfsupError, match=r"gave dict, expected an nn.Module"):
        create_encoder(dict)


def test_prepare_matches_channels_and_takes_the_statistics_out():
    color, gray = create_encoder("resnet10t", 3), create_encoder("resnet10t", 1)
    rgb, one = images(channels=3), images(channels=1)
    assert torch.equal(color.prepare(rgb), rgb)
    color.mean, color.std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    got = color.prepare(one)
    assert torch.allclose(got[:, 1], (one[:, 0] - 0.2) / 0.25) and torch.allclose(got[:, 2], (one[:, 0] - 0.3) / 0.125)
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    assert torch.allclose(gray.prepare(red), torch.full((1, 1, 4, 4), 0.299))
    assert torch.allclose(gray.prepare(torch.ones(1, 3, 4, 4)), torch.ones(1, 1, 4, 4))


def test_prepare_refuses_what_it_cannot_turn_into_an_input():
    with pytest.raises(TaskError, match=r"of 2 channels.*the 3 that this encoder"):
        create_encoder("resnet10t").prepare(images(channels=2))
    with pytest.raises(TaskError, match=r"uint8"):
        create_encoder("resnet10t").prepare(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_pretrained_networks_bring_their_statistics(monkeypatch):
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained, **kwargs: make(*args, **kwargs))
    color = create_encoder("resnet10t", pretrained=True)
    assert color.mean == (0.485, 0.456, 0.406) and color.std == (0.229, 0.224, 0.225)
    gray = create_encoder("resnet10t", 1, pretrained=True)
    assert gray.mean == pytest.approx((0.449,)) and len(gray.std) == 1
    assert create_encoder("resnet10t", 4, pretrained=True).mean == (0.485, 0.456, 0.406, 0.485)
    assert color.lineage == [{"task": "published weights"}] and create_encoder("resnet10t").lineage == []


def test_torchvision_weights_of_ones_choice_bring_their_statistics(monkeypatch):
    make, offered = torchvision.models.squeezenet1_1, torchvision.models.SqueezeNet1_1_Weights
    state = make().state_dict()
    monkeypatch.setattr(offered, "get_state_dict", lambda *_, **__: state)
    for weights in ("IMAGENET1K_V1", "DEFAULT", offered.IMAGENET1K_V1):
        encoder = create_encoder(make, weights=weights)
        assert torch.equal(encoder.body.features[0].weight, state["features.0.weight"])
        assert encoder.mean == (0.485, 0.456, 0.406) and encoder.std == (0.229, 0.224, 0.225)
        assert encoder.kwargs == {}
    assert create_encoder(make, weights=None).mean is None
    with pytest.raises(SelfsupError, match=r"no set of weights of squeezenet1_1 called 'IMAGENET1K_V7'.*IMAGENET1K_V1"):
        create_encoder(make, weights="IMAGENET1K_V7")
    with pytest.raises(SelfsupError, match=r"no set of weights of squeezenet1_1 called ResNet18_Weights"):
        create_encoder(make, weights=torchvision.models.ResNet18_Weights.DEFAULT)


def test_the_statistics_are_those_of_the_weights_and_not_the_usual_ones():
    assert bodies._chosen_weights("efficientnet_v2_l", "DEFAULT").transforms().mean == [0.5, 0.5, 0.5]


def test_a_name_of_torchvisions_is_told_from_timms():
    with pytest.raises(SelfsupError, match=r"Give torchvision\.models\.shufflenet_v2_x0_5 instead of a name"):
        create_encoder("shufflenet_v2_x0_5")


def test_weights_that_cannot_be_downloaded_are_one_clear_error(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(SelfsupError, match=r"weights of resnet10t could not be had.*no route to host.*internet"):
        create_encoder("resnet10t", pretrained=True)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: create_encoder("resnt18"), "no architecture called 'resnt18'.*'resnet18'"),
        (lambda: create_encoder("resnet18.a9"), "no architecture called 'resnet18.a9'.*resnet18.a1_in1k"),
        (lambda: create_encoder("hf-hub:timm/resnet18"), "no architecture called"),
        (lambda: create_encoder("resnet18", foo=1), "resnet18 cannot be built.*foo"),
        (lambda: create_encoder("resnet18", num_classes=3), "num_classes: set by the encoder"),
        (lambda: create_encoder("resnet18", n_in=0), "n_in is a whole number above 0.*0"),
        (lambda: create_encoder("resnet18", size=64.5), "size is a whole number above 0.*64.5"),
        (lambda: create_encoder(None), "Expected the name of a timm network.*NoneType"),
        (lambda: create_encoder(tiny_net(), pretrained=True), "takes no further arguments"),
        (lambda: create_encoder(tiny_net, pretrained=True), "No published weights are known for tiny_net"),
        (lambda: create_encoder(nn.LSTM, input_size=3, hidden_size=3), "could not be run on an empty image"),
        (lambda: create_encoder(nn.Flatten(2)), r"must give features \(B, C\).*shape"),
        (lambda: create_encoder("vit_tiny_patch16_224", img_size=(64, 32)), "one number or a square"),
        (lambda: create_encoder("inception_v3", size=32), "inception_v3 could not be run.*32 pixels"),
    ],
)
def test_mistakes_are_named(call, said):
    with pytest.raises(SelfsupError, match=said):
        call()


@pytest.mark.parametrize("method", ["forward", "feature_map", "feature_maps"])
def test_wrong_channels_name_both_numbers(method):
    encoder = create_encoder("resnet10t", 1)
    with pytest.raises(TaskError, match=r"takes images of 1 channels.*got 3 channels"):
        getattr(encoder, method)(images(channels=3))
    with pytest.raises(TaskError, match=r"shape \(3, 64, 64\)"):
        getattr(encoder, method)(images()[0])


def test_a_short_repr():
    assert repr(create_encoder("resnet18")) == "Encoder(resnet18, 3 channels, 512 features, 11.2 M parameters)"


def test_get_encoder_takes_what_stands_for_one():
    encoder = create_encoder("resnet10t", 1)
    learner = type("Learner", (), {"model": nn.Module()})()
    learner.model.encoder = encoder
    assert get_encoder(encoder, n_in=3) is encoder and get_encoder(learner) is encoder
    assert get_encoder("resnet10t", n_in=1).in_chans == 1 and get_encoder(tiny_net(1)).in_chans == 1
    assert get_encoder("vit_tiny_patch16_224", size=64, depth=2).fixed_size == 64


@pytest.mark.parametrize("source", [None, 7, 2.5, ["resnet18"]])
def test_get_encoder_names_the_wrong_type(source):
    with pytest.raises(SelfsupError, match=f"given as a saved file.*got {type(source).__name__}"):
        get_encoder(source)


def test_get_encoder_says_when_a_learner_has_none():
    learner = type("Learner", (), {"model": nn.Linear(2, 2), "__call__": lambda self: None})()
    with pytest.raises(SelfsupError, match=r"whose model has no encoder"):
        get_encoder(learner)


def test_heads():
    torch.manual_seed(0)
    head = linear_head(6, 3, dropout=0.5).eval()
    x = torch.rand(4, 6)
    assert torch.equal(head(x), x @ head[1].weight.T + head[1].bias)
    projector = mlp(6, 8, 2, batchnorm=True).eval()
    first, norm, _, last = projector
    assert first.bias is None
    assert torch.allclose(projector(x), last(F.relu(norm(x @ first.weight.T))))
    assert [m.out_features for m in mlp(6, 8, 2, n_layers=3) if isinstance(m, nn.Linear)] == [8, 8, 2]
    assert [m.out_features for m in mlp(6, 8, 2, n_layers=1)] == [2]


@pytest.mark.parametrize(
    "arch, behind",
    [
        ("resnet10t", []),
        ("vit_tiny_patch16_224", []),
        ("mobilenetv3_small_050", ["body.conv_head.weight", "body.conv_head.bias"]),
        ("convnext_atto", ["body.head.norm.weight", "body.head.norm.bias"]),
    ],
)
def test_what_lies_behind_the_last_map(arch, behind):
    encoder = create_encoder(arch, size=64)
    before, modes = encoder.state_dict(), {module: module.training for module in encoder.modules()}
    before = {name: value.clone() for name, value in before.items()}
    assert encoder.behind_map() == behind
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
    assert {module: module.training for module in encoder.modules()} == modes
    encoder.feature_map(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == behind
    encoder.requires_grad_(False)
    assert encoder.behind_map() == []
