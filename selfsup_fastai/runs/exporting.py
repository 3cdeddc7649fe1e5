"""A saved encoder or model for other programs."""

import json
import os
from pathlib import Path

from torch import Tensor, nn

from selfsup_fastai import __version__
from selfsup_fastai.data.files import result_folder
from selfsup_fastai.downstream.trained import ACTIVATIONS, TrainedModel
from selfsup_fastai.encoders.export import ImagesIn, to_onnx, to_timm, to_torchvision
from selfsup_fastai.errors import DataError, unknown
from selfsup_fastai.messages import say
from selfsup_fastai.runs.inputs import Saved, saved

OUTPUTS = {"category": "probabilities", "multicategory": "probabilities", "regression": "values"}
"""What the outputs of a model are called; masks: probabilities of each pixel, points: -1 to 1 in x and y."""


class Answering(nn.Module):
    """A model from images in [0, 1] to what it predicts, as `TrainedModel.predict_batch` puts it (points: unscaled)."""

    def __init__(self, model: TrainedModel):
        super().__init__()
        self.model, self.activation = model, model.facts.activation

    def forward(self, images: Tensor) -> Tensor:
        """Images to probabilities or values."""
        return ACTIVATIONS[self.activation](self.model(images))


def export(
    file: str | os.PathLike,  # A saved encoder, or a fine-tuned model
    to: str,  # 'timm', 'torchvision' or 'onnx'
    out: str | os.PathLike,  # timm: a folder; torchvision: .safetensors; onnx: .onnx
) -> str:
    """Writes it for another program and returns the lines of Python that load it there. Outputs are compared first."""
    ways = {"timm": _to_timm, "torchvision": _to_torchvision, "onnx": _to_onnx}
    if to not in ways:
        raise unknown("program to export to", to, ways)
    return ways[to](saved(file), Path(out))


def _to_timm(found: Saved, out: Path) -> str:
    _say_headless(found)
    if out.suffix in (".safetensors", ".pth", ".bin"):
        raise DataError(f"timm loads a folder (weights and config.json); got {str(out)!r}. Leave the suffix out.")
    return to_timm(found.encoder, out)


def _to_torchvision(found: Saved, out: Path) -> str:
    _say_headless(found)
    return to_torchvision(found.encoder, _ending(out, ".safetensors"))


def _say_headless(found: Saved) -> None:
    if found.model:
        say("The head stays behind: only ONNX takes it, too.")


def _to_onnx(found: Saved, out: Path) -> str:
    out, encoder, model = _ending(out, ".onnx"), found.encoder, found.model
    side = (encoder.side, encoder.side)
    height, width = (model.size or side) if model else side
    net = Answering(model) if model else ImagesIn(encoder)
    output = OUTPUTS.get(model.kind, model.kind) if model else "features"
    about = {"made_by": f"selfsup_fastai {__version__}", "encoder": json.dumps(found.about)}
    about["images"] = f"float32 (N, {encoder.image_channels}, {height}, {width}), 0 to 1; normalized inside"
    if model and model.vocab:
        about["classes"] = json.dumps([str(name) for name in model.vocab])
    to_onnx(net, out, (encoder.image_channels, height, width), output, about)
    return "\n".join(
        [
            "import onnxruntime",
            "",
            f"net = onnxruntime.InferenceSession({str(out)!r})",
            f'{output} = net.run(None, {{"images": images}})[0]',
            f"# images: {about['images']}",
        ]
    )


def _ending(out: Path, suffix: str) -> Path:
    if out.suffix.lower() != suffix:
        raise DataError(f"The result is a file that ends in {suffix}; got {str(out)!r}.")
    if out.is_dir():
        raise DataError(f"{str(out)!r} is a folder; the result is one file.")
    result_folder(out.parent)
    return out
