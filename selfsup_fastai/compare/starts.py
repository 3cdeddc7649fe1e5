"""What runs start from: an encoder for each pretraining seed, or new weights; and how one is told from another."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor

from selfsup_fastai.encoders.checkpoint import get_encoder, is_fresh
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.errors import TaskError

SCRATCH = "scratch"
_OURS = ("num_classes", "in_chans")  # Arguments that `get_encoder` sets


@dataclass(frozen=True)
class Start:
    """Where runs begin."""

    name: str
    sources: tuple  # What `get_encoder` takes, one for each pretraining seed; new weights: a single one
    fresh: bool = False  # Whether the weights are new: then all layers are trained at one rate from the beginning
    cbs: Callable | None = None  # () -> callbacks for the fine-tuning
    about: str = ""  # What these callbacks are, in words: a run with other ones is another run

    def source(self, seed: int) -> Any:
        """The one for this seed."""
        return self.sources[seed % len(self.sources)]

    def pretrained(self, seed: int) -> int:
        """Which pretraining run is behind this seed; new weights are new for each."""
        return seed if self.fresh else seed % len(self.sources)


def starts_of(
    encoders: Mapping[str, Any],  # Name -> an encoder, several (one for each pretraining seed), a `Start`, an arch
) -> list[Start]:
    """The starts in order, 'scratch' first; it is added where it is not among them, as a net like the first encoder."""
    if not isinstance(encoders, Mapping) or not encoders:
        got = f"got {type(encoders).__name__}" if encoders else "got none"
        raise TaskError(f"encoders is a dict, name -> encoder, such as {{'simclr': 'simclr.safetensors'}}; {got}.")
    starts = [value if isinstance(value, Start) else _start(str(name), value) for name, value in encoders.items()]
    if SCRATCH in {start.name for start in starts}:
        return sorted(starts, key=lambda start: start.name != SCRATCH)
    return [Start(SCRATCH, (new_like(starts[0].sources[0]),), fresh=True), *starts]


def _start(name: str, value: Any) -> Start:
    sources = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not sources:
        raise TaskError(f"The start {name!r} is an empty list: give an encoder for each pretraining seed.")
    return Start(name, sources, fresh=is_fresh(sources[0]))


def new_like(source: Any) -> Any:
    """A net of the same architecture with new weights, made anew each time: something that `is_fresh`."""
    if is_fresh(source):
        return source
    encoder = get_encoder(source)
    own = {name: value for name, value in encoder.kwargs.items() if name not in _OURS}
    known = {"timm": encoder.arch, "torchvision": getattr(torchvision.models, str(encoder.arch), None)}
    arch = known.get(encoder.source.removeprefix("split "))
    if arch is None:
        raise TaskError(
            f"How {encoder.arch} is made anew is not known: add 'scratch' to encoders, with a function that makes it."
        )
    if not own:
        return arch
    args = encoder.image_channels, encoder.size
    return NewNet(partial(get_encoder, arch, *args, **own), f"{encoder.arch} {args} {own}")


class NewNet:
    """Makes an encoder with new weights whenever it is called."""

    def __init__(
        self,
        make: Callable[[], Encoder],
        about: str,  # Tells it from others
    ):
        self.make, self.about = make, about

    def __call__(self) -> Encoder:
        return self.make()


def made(source: Any) -> Any:
    """What `downstream_learner` is given for one run."""
    return source() if isinstance(source, NewNet) else source


def content_of(source: Any) -> str:
    """What tells one start from another: weights by what they are, not by their file's name."""
    if isinstance(source, NewNet):
        return f"new {source.about}"
    if is_fresh(source):
        name = source if isinstance(source, str) else f"{source.__module__}.{source.__qualname__}"
        return f"new {name}"
    if isinstance(source, str | os.PathLike):
        path = Path(source) if Path(source).is_file() else Path(f"{os.fspath(source)}.safetensors")
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else _weights(get_encoder(source))
    return _weights(get_encoder(source))


def _weights(encoder: Encoder) -> str:
    digest = hashlib.sha256(f"{encoder.arch} {encoder.input} {encoder.mean} {encoder.std}".encode())
    for name, value in encoder.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().numpy().tobytes())
    return digest.hexdigest()
