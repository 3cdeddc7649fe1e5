"""Encoders for other libraries: timm, torchvision, ONNX. Each is loaded again and its outputs compared before it stays.

timm and torchvision get the bare network: images must come to it normalized, which `config.json` or the lines of Python
that are returned say. ONNX gets all of it, from pixels in [0, 1] on.
"""

import copy
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import torchvision.models
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from selfsup_fastai.encoders.bodies import HEADS, bare_module, torchvision_names
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.inputs import CHANNELS
from selfsup_fastai.encoders.split import pooled
from selfsup_fastai.errors import DataError, EncoderFileError, TaskError
from selfsup_fastai.writing import write_whole

TRIED = (1, 2, 5)  # Batches of so many random images are compared
NEAR = 1e-3  # How far outputs may lie apart, of the largest one: other programs add up in another order


class ImagesIn(nn.Module):
    """An encoder from images (B, C, H, W) in [0, 1] on: what `Encoder.prepare` does is part of it."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """Images to features."""
        return self.encoder(self.encoder.prepare(images))


def to_timm(
    encoder: Encoder,  # Of a timm network
    folder: str | os.PathLike,  # Made for it: model.safetensors and config.json
) -> str:
    """Write a folder that `timm.create_model` loads. Returns the lines of Python that do.

    Raises `TaskError` for a network that timm does not have, `DataError` for a folder that is not empty.
    """
    _check_plain(encoder)
    if encoder.source != "timm":
        raise TaskError(f"{encoder.arch} is no network of timm's. ONNX takes any.")
    folder, encoder = Path(folder), _resting(encoder)
    with _whole_folder(folder) as part:
        (part / "model.safetensors").write_bytes(to_bytes(_tensors(encoder.body), {"format": "pt"}))
        (part / "config.json").write_text(json.dumps(_config(encoder), indent=2) + "\n")
        loaded = timm.create_model(f"local-dir:{part}", pretrained=True).eval()
        _compare(lambda x: pooled(loaded(x)), encoder, _normalized(encoder))
    name = f"local-dir:{folder}"
    return f"import timm\n\nnet = timm.create_model({name!r}, pretrained=True).eval()\n{_about_images(encoder)}"


def to_torchvision(
    encoder: Encoder,  # Of a network that torchvision has, too, with weights of the same names
    file: str | os.PathLike,  # Ends in .safetensors
) -> str:
    """Write torchvision's weights, without those of the classifier. Returns the lines of Python that load them.

    Raises `TaskError` for a network that torchvision does not have or builds otherwise.
    """
    _check_plain(encoder)
    file, encoder, arch = Path(file), _resting(encoder), encoder.arch.partition(".")[0]
    tensors = _tensors(encoder.body)
    net, lines = _of_torchvision(arch, encoder, tensors)
    file.parent.mkdir(parents=True, exist_ok=True)
    net.load_state_dict(tensors)
    _compare(lambda x: pooled(net(x)), encoder, _normalized(encoder))
    write_whole(file, to_bytes(tensors))
    return "\n".join([*lines, f"net.load_state_dict(load_file({str(file)!r}))", "net.eval()", _about_images(encoder)])


def to_onnx(
    net: nn.Module,  # Images in [0, 1] to one tensor, such as `ImagesIn(encoder)`
    file: str | os.PathLike,  # Ends in .onnx
    image: tuple[int, int, int],  # Channels, height and width of the images
    output: str = "features",  # What the outputs are called
    about: dict[str, str] | None = None,  # Into the file's metadata
) -> None:
    """Write a network as ONNX: input `images` (any number, C, H, W), float in [0, 1].

    Raises `DataError` where the packages are not installed, `TaskError` for a network that ONNX cannot tell.
    """
    onnx, runtime = _onnx()
    file, net = Path(file), copy.deepcopy(net).cpu().eval()
    model = onnx.load_from_string(_traced(net, image, output))
    onnx.helper.set_model_props(model, about or {})
    data = model.SerializeToString()
    session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def theirs(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run([output], {"images": x.numpy()})[0])

    _compare(theirs, net, lambda n: torch.rand(n, *image, generator=torch.Generator().manual_seed(n)))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, data)


def _onnx():
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter wants it)
    except ImportError as error:
        fix = 'pip install "selfsup_fastai[export]", or pip install onnx onnxruntime onnxscript'
        raise DataError(f"ONNX needs a package that is not installed ({error.name}): {fix}.") from None
    return onnx, onnxruntime


def _traced(net: nn.Module, image: tuple[int, int, int], output: str) -> bytes:
    """The network in the bytes of an ONNX file, all weights in it."""
    with tempfile.TemporaryDirectory() as folder, _silent():
        try:
            torch.onnx.export(
                net,
                (torch.rand(2, *image),),
                os.path.join(folder, "net.onnx"),
                input_names=["images"],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # Whatever a network can make torch's exporter raise
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise TaskError(f"This network cannot be told in ONNX ({reason:.200}).") from error
        with open(os.path.join(folder, "net.onnx"), "rb") as file:
            return file.read()


def _check_plain(encoder: Encoder) -> None:
    """Raise for networks that other libraries would feed with something else."""
    if encoder.split or encoder.input in CHANNELS:
        what = "two networks in one" if encoder.split else f"fed with {encoder.input}, not with the image itself"
        raise TaskError(f"This encoder is {what}: timm and torchvision know no such thing. ONNX takes any.")


def _resting(encoder: Encoder) -> Encoder:
    """A copy that answers, and does not learn, on the CPU."""
    return copy.deepcopy(encoder).cpu().eval()


def _tensors(body: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone().contiguous() for key, value in body.state_dict().items()}


def _config(encoder: Encoder) -> dict:
    """What timm reads: how the network is built, and how its images are to come."""
    known = encoder.body.pretrained_cfg
    kept = {name: known[name] for name in ("first_conv", "classifier", "fixed_input_size") if name in known}
    mean, std = (encoder.mean, encoder.std) if encoder.mean else ((0.0,) * encoder.in_chans, (1.0,) * encoder.in_chans)
    side = [encoder.in_chans, encoder.side, encoder.side]
    images = {"input_size": side, "mean": list(mean), "std": list(std), "interpolation": "bilinear", "crop_pct": 1.0}
    return {
        "architecture": encoder.arch.partition(".")[0],
        "num_classes": 0,
        "num_features": encoder.num_features,
        "model_args": {name: value for name, value in encoder.kwargs.items() if name != "num_classes"},
        "pretrained_cfg": {**kept, **images, "num_classes": 0, "custom_load": False},
    }


def _of_torchvision(arch: str, encoder: Encoder, tensors: dict[str, Tensor]) -> tuple[nn.Module, list[str]]:
    """torchvision's network of this name without its classifier, and the lines of Python that make it."""
    own = encoder.source == "torchvision"
    if not own and (encoder.source != "timm" or arch not in torchvision_names()):
        raise TaskError(f"torchvision has no network {arch}. {_known()}")
    kwargs = encoder.kwargs if own else {}
    net, whole = (torchvision.models.get_model(arch, weights=None, **kwargs) for _ in range(2))
    bare_module(net, encoder.in_chans, trained=True, quiet=True)
    shapes = {key: value.shape for key, value in net.state_dict().items()}
    if shapes != {key: value.shape for key, value in tensors.items()}:
        raise TaskError(f"torchvision builds {arch} otherwise than {encoder.source} does. {_known()}")
    return net.eval(), _making(arch, kwargs, net, whole)


def _known() -> str:
    return "ResNets, ResNeXts, Wide ResNets and DenseNets are alike in both. ONNX takes any network."


def _making(arch: str, kwargs: dict, net: nn.Module, whole: nn.Module) -> list[str]:
    given = "".join(f", {name}={value!r}" for name, value in kwargs.items())
    lines = ["import torch, torchvision", "from safetensors.torch import load_file", ""]
    lines.append(f"net = torchvision.models.get_model({arch!r}, weights=None{given})")
    for head in HEADS:
        if type(getattr(net, head, None)) is not type(getattr(whole, head, None)):
            lines.append(f"net.{head} = torch.nn.{getattr(net, head)!r}")
    convs = [next(((n, m) for n, m in one.named_modules() if isinstance(m, nn.Conv2d)), None) for one in (net, whole)]
    if convs[0] and convs[0][1].in_channels != convs[1][1].in_channels:
        lines.append(f"net.set_submodule({convs[0][0]!r}, torch.nn.{convs[0][1]!r})")
    return lines


def _about_images(encoder: Encoder) -> str:
    """A comment on what the network must be given."""
    color = {1: "grey", 3: "color"}.get(encoder.in_chans, f"{encoder.in_chans} channels")
    way = ""
    if encoder.mean is not None:
        way = f", minus {_rounded(encoder.mean)}, divided by {_rounded(encoder.std)}"
    return f"# images: {color}, {encoder.side} px, values in 0..1{way}"


def _rounded(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.4f}' for value in values)})"


def _normalized(encoder: Encoder) -> Callable[[int], Tensor]:
    """Makes random images as the bare network wants them."""

    def images(n: int) -> Tensor:
        x = torch.rand(n, encoder.in_chans, encoder.side, encoder.side, generator=torch.Generator().manual_seed(n))
        return encoder.prepare(x)

    return images


@torch.no_grad()
def _compare(theirs: Callable[[Tensor], Tensor], ours: nn.Module, images: Callable[[int], Tensor]) -> None:
    """Raise `EncoderFileError` where the outputs for random images differ."""
    for n in TRIED:
        x = images(n)
        expected, got = ours(x), theirs(x)
        worst = (got - expected).abs().max() if got.shape == expected.shape else torch.tensor(torch.inf)
        if not worst <= NEAR * expected.abs().max():
            raise EncoderFileError(
                f"What was exported answers otherwise than the encoder does (by up to {worst:.2g} of "
                f"{expected.abs().max():.2g}), so nothing was written. Please tell us which network it was."
            )


@contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's remarks on its own working."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside, which gets the name once the block has ended without an error."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{str(folder)!r} is there already. Choose another name for the folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent.resolve()))
    try:
        yield part
        part.chmod(0o777 & ~_umask())
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
