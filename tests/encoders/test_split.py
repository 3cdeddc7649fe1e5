"""encoders/split.py: two halves that never mix, as an encoder like any other: layers, groups, files, fine-tuning."""

import json
import struct

import numpy as np
import pytest
import torch
import torchvision
from fastai.torch_core import set_seed
from fastai.vision.data import ImageDataLoaders
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.encoders.checkpoint import load_encoder, read_card, save_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.split import SplitBody
from selfsup_fastai.errors import EncoderFileError, SelfsupError

ARCHS = ["resnet10t", "test_resnet", "convnext_atto", "vit_tiny_patch16_224"]


def own() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 3, 2))


def made(arch, size: int = 48, **kwargs):
    set_seed(0)
    encoder = create_encoder(arch, size=size, split=True, **kwargs).eval()
    encoder.eat("lab")
    return encoder


def images(n: int = 2, side: int = 48) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arch", ARCHS)
def test_halves_of_timm_networks_are_as_wide_as_the_whole_together(arch):
    encoder, whole = made(arch), create_encoder(arch, size=48)
    assert encoder.split and not whole.split
    assert encoder.num_features == whole.num_features and encoder.layer_names == whole.layer_names
    assert encoder.fixed_size == whole.fixed_size
    with torch.no_grad():
        ours, theirs = encoder.feature_maps(images()), whole.eval().feature_maps(images())
        later = list(ours)[1:]  # the first convolution of a plain ResNet cannot be told a width
        assert [ours[k].shape for k in later] == [theirs[k].shape for k in later]
        assert encoder.map_shape((48, 48)) == tuple(encoder.feature_map(images()).shape[1:])
    assert sum(p.numel() for p in encoder.parameters()) < 0.65 * sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("arch", [*ARCHS, "mobilenetv3_small_050", own])
def test_lightness_and_color_never_mix(arch):
    encoder, x = made(arch), images()
    other_color, other_lightness = x.clone(), x.clone()
    other_color[:, 1:], other_lightness[:, :1] = 1 - x[:, 1:], 1 - x[:, :1]
    with torch.no_grad():
        everything = [
            {"features": encoder(i), "last": encoder.feature_map(i), **encoder.feature_maps(i)}
            for i in (x, other_color, other_lightness)
        ]
    assert len(everything[0]) > 3
    for name in everything[0]:
        (seen, seen_color), (l_1, c_1), (l_2, c_2) = (out[name].chunk(2, 1) for out in everything)
        assert torch.equal(seen, l_1) and torch.equal(seen_color, c_2), name
        assert not torch.allclose(seen, l_2) and not torch.allclose(seen_color, c_1), name


def test_where_no_width_can_be_told_each_half_is_whole_and_that_is_said(capsys):
    encoder = made("mobilenetv3_small_050")
    assert encoder.num_features == 2 * create_encoder("mobilenetv3_small_050").num_features
    assert "mobilenetv3_small_050 cannot be built at half its width" in capsys.readouterr().err
    made("resnet10t")
    assert "half" not in capsys.readouterr().err


@pytest.mark.parametrize("arch", ARCHS)
def test_each_parameter_is_in_one_group_with_its_twin(arch):
    encoder = made(arch)
    groups, names = encoder.param_groups(), encoder.group_names()
    assert len(groups) == len(names) > 2 and "lightness" not in "".join(names)
    assert names == made_half(encoder).group_names()
    ids = [id(p) for group in groups for p in group]
    assert sorted(ids) == sorted(id(p) for p in encoder.parameters())
    name_of = {id(p): name for name, p in encoder.named_parameters()}
    for group in groups:
        inside = {name_of[id(p)] for p in group}
        assert {n.replace("lightness", "color") for n in inside} == {n for n in inside if ".color." in n}


def made_half(encoder):
    return create_encoder(encoder.body.lightness)


def test_what_needs_no_weight_decay_is_found_in_both_halves():
    free = made("vit_tiny_patch16_224").no_weight_decay()
    assert free == {f"body.{half}.{name}" for half in ("lightness", "color") for name in ("cls_token", "pos_embed")}
    assert made("resnet10t").no_weight_decay() == set()


@pytest.mark.parametrize("arch", [*ARCHS, torchvision.models.shufflenet_v2_x0_5, own])
def test_saved_and_loaded_it_is_the_same(arch, tmp_path):
    encoder = made(arch)
    file = save_encoder(encoder, tmp_path / "split", task="split_brain")
    again = load_encoder(file, module=own() if arch is own else None).eval()
    assert again.split and again.source == encoder.source == read_card(file)["source"]
    assert again.source.startswith("split ") and again.kwargs == encoder.kwargs and again.input == "lab"
    x = images()
    with torch.no_grad():
        assert torch.equal(again(x), encoder(x))
        assert torch.equal(again(again.prepare(x)), encoder(encoder.prepare(x)))


@pytest.mark.parametrize("change", [{"in_chans": 1, "mean": None, "std": None, "input": "L"}, {"source": "split"}])
def test_a_card_that_makes_no_sense_is_refused(change, tmp_path):
    file = save_encoder(made("test_resnet"), tmp_path / "split")
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    card = {**json.loads(header["__metadata__"]["selfsup_fastai"]), **change}
    header["__metadata__"]["selfsup_fastai"] = json.dumps(card)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])
    with pytest.raises(EncoderFileError, match=f"unusable {'in_chans' if 'in_chans' in change else 'source'}"):
        load_encoder(file)


def test_weights_of_one_network_do_not_pass_for_two(tmp_path):
    split, whole = (made("test_resnet"), create_encoder("test_resnet", size=48))
    files = [save_encoder(split, tmp_path / "split"), save_encoder(whole, tmp_path / "whole")]
    assert isinstance(load_encoder(files[0]).body, SplitBody)
    tensors = [load_file(file) for file in files]
    for file, others in zip(files, reversed(tensors)):
        with safe_open(file, "pt") as saved:
            card = saved.metadata()
        save_file(others, file, card)
        with pytest.raises(EncoderFileError, match="do not fit the network"):
            load_encoder(file)


def test_wrong_channels_and_published_weights_are_refused():
    with pytest.raises(SelfsupError, match=r"takes 3 channels and starts with fresh weights; n_in=1 cannot be had"):
        create_encoder("resnet10t", n_in=1, split=True)
    with pytest.raises(SelfsupError, match="published weights cannot be had"):
        create_encoder("resnet10t", pretrained=True, split=True)
    with pytest.raises(SelfsupError, match="resnet10x"):
        create_encoder("resnet10x", split=True)


def test_it_is_fine_tuned_stage_by_stage(color_folder, tmp_path):
    file = save_encoder(made("test_resnet", 32), tmp_path / "split")
    files = sorted(color_folder.iterdir())[:24]
    dls = ImageDataLoaders.from_name_func(
        color_folder, files, lambda f: str(int(f[:4]) % 2), valid_pct=0.3, seed=0, bs=8, num_workers=0
    )
    learn = downstream_learner(dls, str(file))
    before = {name: p.detach().clone() for name, p in learn.model.encoder.named_parameters()}
    x, _ = learn.dls.one_batch()
    assert x.shape[1] == 3 and np.isfinite(x.numpy()).all() and learn.model.encoder.input == "lab"
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(4, 1e-2)
    assert all(not torch.equal(p, before[name]) for name, p in learn.model.encoder.named_parameters())
    assert load_encoder(learn.save_encoder(tmp_path / "tuned")).split
