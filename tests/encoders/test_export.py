"""Export: what other libraries load answers as the encoder does; what does not is not written."""

import json

import numpy as np
import pytest
import timm
import torch
import torchvision.models
from torch import nn

from selfsup_fastai.encoders import export
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.export import ImagesIn, to_onnx, to_timm, to_torchvision
from selfsup_fastai.encoders.split import pooled
from selfsup_fastai.errors import DataError, EncoderFileError, TaskError
from tests.runs.small import an_encoder


def run(lines: str) -> nn.Module:
    """What the returned lines of Python make."""
    names: dict = {}
    exec(lines, names)
    return names["net"]


@pytest.mark.parametrize(
    ("arch", "channels", "size"),
    [("resnet10t", 1, 24), ("resnet18.a1_in1k", 3, 32), ("vit_tiny_patch16_224", 3, 48), ("convnext_atto", 3, 32)],
)
def test_timm_loads_its_folder(tmp_path, arch, channels, size):
    encoder = an_encoder(channels, arch, size)
    net = run(to_timm(encoder, tmp_path / "out"))
    x = torch.rand(3, channels, size, size)
    with torch.no_grad():
        assert torch.allclose(pooled(net((x - 0.4) / 0.3)), encoder(encoder.prepare(x)), rtol=1e-4, atol=1e-5)
    assert not net.training and net.num_classes == 0
    assert net.pretrained_cfg["mean"] == [0.4] * channels and net.pretrained_cfg["input_size"][-1] == size
    fresh = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5)  # a head of one's own
    assert fresh.get_classifier().out_features == 5
    known = fresh.state_dict()
    assert all(torch.equal(known[name], value) for name, value in encoder.body.state_dict().items())


@pytest.mark.parametrize("source", ["resnet18", torchvision.models.resnet18, torchvision.models.mobilenet_v3_small])
@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_loads_its_file(tmp_path, source, channels):
    encoder = an_encoder(channels, source, 32)
    net = run(to_torchvision(encoder, tmp_path / "out.safetensors"))
    x = torch.rand(2, channels, 32, 32)
    with torch.no_grad():
        assert torch.allclose(pooled(net((x - 0.4) / 0.3)), encoder(encoder.prepare(x)), rtol=1e-4, atol=1e-5)


def test_what_other_libraries_do_not_have_is_refused(tmp_path):
    with pytest.raises(TaskError, match="torchvision has no network resnet10t"):
        to_torchvision(an_encoder(), tmp_path / "out.safetensors")
    with pytest.raises(TaskError, match="torchvision builds efficientnet_b0 otherwise"):
        to_torchvision(an_encoder(arch="efficientnet_b0", size=32), tmp_path / "out.safetensors")
    with pytest.raises(TaskError, match="no network of timm's"):
        to_timm(an_encoder(arch=torchvision.models.resnet18, size=32), tmp_path / "out")
    lightness = create_encoder("resnet10t", n_in=1, size=24)
    lightness.eat("L")
    with pytest.raises(TaskError, match="fed with L, not with the image itself"):
        to_timm(lightness, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(DataError, match="is there already"):
        to_timm(an_encoder(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_where_answers_differ_nothing_is_written(tmp_path, monkeypatch):
    """timm is made to load other weights than were written."""
    encoder = an_encoder()
    whole = export._tensors

    def other(body):
        return {name: value * 1.01 if value.is_floating_point() else value for name, value in whole(body).items()}

    monkeypatch.setattr(export, "_tensors", other)
    with pytest.raises(EncoderFileError, match="answers otherwise"):
        to_timm(encoder, tmp_path / "timm")
    with pytest.raises(EncoderFileError, match="answers otherwise"):
        to_torchvision(an_encoder(arch="resnet18", size=32), tmp_path / "tv.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["rgb", "grey", "lab", "sobel"])
def test_onnx_takes_pixels_whatever_the_network_eats(tmp_path, kind):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    channels = {"rgb": 3, "grey": 1, "lab": 3, "sobel": 2}[kind]
    encoder = create_encoder("resnet10t", n_in=channels, size=32).eval()
    if kind in ("lab", "sobel"):
        encoder.eat(kind)
    else:
        encoder.mean, encoder.std = (0.4,) * channels, (0.3,) * channels
    to_onnx(ImagesIn(encoder), tmp_path / "net.onnx", (encoder.image_channels, 32, 32), about={"made_by": "a test"})
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    assert session.get_modelmeta().custom_metadata_map["made_by"] == "a test"
    for n in (1, 7):
        x = torch.rand(n, encoder.image_channels, 32, 32)
        with torch.no_grad():
            expected = encoder(encoder.prepare(x)).numpy()
        got = session.run(["features"], {"images": x.numpy()})[0]
        assert np.allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]  # the weights are in it


def test_onnx_without_its_packages_and_for_what_it_cannot_tell(tmp_path, monkeypatch):
    class Odd(nn.Module):
        def forward(self, images):
            return images.flatten(1) if images.sum().item() > 0 else images[:, 0]  # depends on values

    pytest.importorskip("onnxscript")
    with pytest.raises(TaskError, match="cannot be told in ONNX"):
        to_onnx(Odd(), tmp_path / "net.onnx", (3, 8, 8))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(DataError, match=r'pip install "selfsup_fastai\[export\]"'):
        to_onnx(ImagesIn(an_encoder()), tmp_path / "net.onnx", (3, 24, 24))
    assert list(tmp_path.iterdir()) == []


def test_the_config_is_plain(tmp_path):
    to_timm(an_encoder(), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "resnet10t" and config["num_classes"] == 0
    assert not {"url", "hf_hub_id", "file", "source"} & set(config["pretrained_cfg"])  # nothing is fetched
