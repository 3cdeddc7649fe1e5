"""`selfsup export`: where the result may go; the conversions have tests of their own (`tests/encoders`)."""

import pytest
import timm
import torch

from selfsup_fastai.errors import DataError, UnknownNameError
from selfsup_fastai.runs.exporting import export
from tests.runs.small import saved_encoder


def test_the_lines_that_are_said_load_it(tmp_path):
    net = saved_encoder(tmp_path / "e.safetensors")
    lines = export(tmp_path / "e.safetensors", "timm", tmp_path / "there")
    assert "timm" in lines
    found = timm.create_model(f"local-dir:{tmp_path / 'there'}", pretrained=True, num_classes=0).eval()
    x = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(found(net.prepare(x)), net(net.prepare(x)))


@pytest.mark.parametrize(
    ("to", "out", "error", "said"),
    [
        ("timm", "net.safetensors", DataError, "timm loads a folder"),
        ("torchvision", "net.pth", DataError, "ends in .safetensors"),
        ("onnx", "net", DataError, "ends in .onnx"),
        ("keras", "net", UnknownNameError, "program to export to"),
    ],
)
def test_where_it_may_not_go(tmp_path, to, out, error, said):
    saved_encoder(tmp_path / "e.safetensors")
    with pytest.raises(error, match=said):
        export(tmp_path / "e.safetensors", to, tmp_path / out)
    assert [f.name for f in tmp_path.iterdir()] == ["e.safetensors"]
