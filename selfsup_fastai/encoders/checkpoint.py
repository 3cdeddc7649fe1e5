"""The file an encoder is kept in: safetensors with timm's own keys, and a model card (JSON) in the header.

Nothing is ever unpickled. The card holds no file names and no paths. A sum over card and tensors (`digest`) tells a
damaged file from a whole one; only `load_encoder` checks it, `read_card` reads the header alone.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
import torchvision.models
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from selfsup_fastai.encoders.bodies import bare_module, is_timm_name, torchvision_names
from selfsup_fastai.encoders.card import damaged, make_card, parse_card
from selfsup_fastai.encoders.encoder import Encoder, create_encoder
from selfsup_fastai.encoders.split import CHANNELS as HALVES
from selfsup_fastai.encoders.split import SplitBody
from selfsup_fastai.errors import EncoderFileError, SelfsupError, TaskError, UnknownNameError
from selfsup_fastai.writing import write_whole

KEY = "selfsup_fastai"  # Where the card stands in the safetensors metadata
SUFFIX = ".safetensors"


def save_encoder(
    encoder: Encoder,  # What is kept
    file: str | os.PathLike,  # Where; '.safetensors' is added if missing, folders are made
    **card_fields,  # Of this round: task, settings, epochs, images (through the encoder), data, metrics
) -> Path:
    """Write the encoder and its card; returns the path. The old file stays whole until the new one is complete.

    With `task` given, this round is added to the lineage in the card. Its numbers that are not finite become null.
    Raises `EncoderFileError` for weights that are not finite, and for fields that are no JSON or that have the name of
    one of the card's own.
    """
    path = Path(file)
    if not path.name:
        raise EncoderFileError(f"{str(file)!r} names no file to save the encoder in.")
    path = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in _state(encoder.body)}
    _check_finite(encoder.body, tensors)
    card = make_card(encoder, card_fields)
    card["digest"] = _digest(card, tensors)
    header = {KEY: json.dumps(card, sort_keys=True, allow_nan=False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_bytes(tensors, header))
    return path


def read_card(file: str | os.PathLike) -> dict:
    """The model card of a saved encoder; the weights are not read. Raises `EncoderFileError`."""
    path = _found(file)
    with _opened(path) as saved:
        metadata = saved.metadata() or {}
    if KEY not in metadata:
        raise EncoderFileError(
            f"{path.name} is a safetensors file without our card. Load its tensors into a network yourself "
            "(net.load_state_dict(safetensors.torch.load_file(file))), then pass the network: create_encoder(net)."
        )
    return parse_card(metadata[KEY], path)


def load_encoder(
    file: str | os.PathLike,  # A file that `save_encoder` wrote; '.safetensors' may be left out
    module: nn.Module | None = None,  # The network, for encoders made from a module of your own (it is copied)
) -> Encoder:
    """The saved encoder, rebuilt and with its weights. Never unpickles. Raises `EncoderFileError`."""
    path = _found(file)
    card = read_card(path)
    with _opened(path) as saved:
        shapes = {key: tuple(saved.get_slice(key).get_shape()) for key in saved.keys()}  # noqa: SIM118
        with torch.device("meta"):  # Shapes only: a card that asks for an enormous network costs nothing
            _check_shapes(_body(card, module, path), shapes, path)
        tensors = {key: saved.get_tensor(key) for key in shapes}
    if card.get("digest") != _digest(card, tensors):
        raise damaged(path, "its contents do not add up to its checksum")
    body = _body(card, module, path)
    body.load_state_dict(tensors, strict=True)
    with _as_card_says(card, path):
        encoder = Encoder(body, card["arch"], card["source"], card["kwargs"], card["in_chans"], card["size"])
    encoder.input, encoder.lineage = card["input"], card["lineage"]
    encoder.mean, encoder.std = (None if card[k] is None else tuple(map(float, card[k])) for k in ("mean", "std"))
    return encoder


def get_encoder(
    source: object,  # An Encoder, a learner, a saved file, an nn.Module, a constructor, or a timm name
    n_in: int | None = None,  # Channels of a fresh network; a saved or given encoder keeps its own
    size: int | None = None,  # Training image size of a fresh network, in pixels
    pretrained: bool = False,  # Published weights for a fresh network
    split: bool = False,  # A fresh network in two halves, as `create_encoder` makes it
    **kwargs,  # For the constructor of a fresh network
) -> Encoder:
    """An encoder from whatever stands for one. Encoders and learners give their own, not a copy."""
    own = _own_encoder(source)
    if own is not None:
        return own
    if not is_fresh(source) and _means_file(source):
        if kwargs:
            raise SelfsupError(f"A saved encoder comes as it is; {', '.join(kwargs)} would need a fresh network.")
        return load_encoder(source)
    if _is_learner(source) or not (isinstance(source, str | nn.Module) or callable(source)):
        raise SelfsupError(
            f"An encoder is given as a saved file, a learner, an Encoder, an nn.Module or a timm name; got "
            f"{type(source).__name__}" + (" whose model has no encoder." if _is_learner(source) else ".")
        )
    try:
        return create_encoder(source, n_in, pretrained, size, split, **kwargs)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error} And there is no saved encoder {source!r} here.") from None


def copied_encoder(
    source: object,  # An Encoder, a learner, a saved file or an nn.Module
    n_in: int | None = None,  # As the caller was asked for; an encoder that exists has its own
    pretrained: bool = False,  # Likewise
) -> Encoder:
    """A copy of an encoder that exists, all of it to be trained; the given one stays as it is.

    One from a learner remembers that learner's round, as one from a file would. Raises `TaskError` where the arguments
    ask for another network.
    """
    encoder = copy.deepcopy(get_encoder(source, n_in=n_in))
    if pretrained:
        raise TaskError("pretrained=True goes with the name of a net; this encoder has weights of its own.")
    if n_in not in (None, encoder.in_chans):
        fix = "Leave n_in out: the images are opened as the encoder needs them."
        raise TaskError(f"n_in is {n_in}, but the encoder takes {encoder.in_chans} channels. {fix}")
    if _is_learner(source):
        encoder.requires_grad_(True)  # its training may have left layers frozen
    this_round = source.this_round() if hasattr(source, "this_round") else None
    if this_round and this_round["images"]:
        encoder.lineage = [*encoder.lineage, this_round]
    return encoder


def is_fresh(
    source: object,  # Whatever `get_encoder` takes
) -> bool:
    """Whether this makes a new network, with random or published weights: a timm name or a constructor.

    The others exist: an Encoder, a learner, an nn.Module, a saved file. Raises `SelfsupError` for a timm name that is
    also a file in the current folder: taking either for the other would go unnoticed.
    """
    if not isinstance(source, str):
        return callable(source) and not isinstance(source, nn.Module) and not _is_learner(source)
    if source.endswith(SUFFIX) or not is_timm_name(source):
        return False
    file = _beside(source)
    if file is not None:
        raise SelfsupError(
            f"{source!r} is a timm network and a file here. Write './{file}' for the saved encoder; for a new network "
            f"rename the file, or give the constructor timm.models.{source.partition('.')[0]}."
        )
    return True


def _means_file(source: object) -> bool:
    if isinstance(source, os.PathLike):
        return True
    if not isinstance(source, str):
        return False
    return source.endswith(SUFFIX) or "/" in source or os.sep in source or _beside(source) is not None


def _beside(name: str) -> str | None:
    """The file that this name can mean, its suffix left out or not."""
    return next((file for file in (name, name + SUFFIX) if Path(file).is_file()), None)


def _is_learner(source: object) -> bool:
    return hasattr(source, "model") and not isinstance(source, nn.Module | type)


def _own_encoder(source: object) -> Encoder | None:
    """The encoder that an Encoder is or a learner has: of a task's, the one that it keeps."""
    kept = getattr(source, "encoder", None) if _is_learner(source) else None
    found = (source, kept, getattr(getattr(source, "model", None), "encoder", None))
    return next((e for e in found if isinstance(e, Encoder)), None)


def _check_finite(body: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise for NaN anywhere and for infinite weights or running statistics; a mask may be infinite on purpose."""
    learned = {name for name, _ in body.named_parameters(remove_duplicate=False)}
    learned |= {name for name in tensors if name.rpartition(".")[2].startswith("running_")}
    if any(value.isnan().any() or (key in learned and value.isinf().any()) for key, value in tensors.items()):
        raise EncoderFileError(
            "The encoder cannot be saved, because the weights are not finite: the run diverged; lower the learning "
            "rate."
        )


def _state(body: nn.Module) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in body.state_dict().items() if isinstance(value, Tensor)]


def _digest(card: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the card and every tensor's name, type, shape and bytes."""
    card = {key: value for key, value in card.items() if key != "digest"}
    sha = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _found(file: str | os.PathLike) -> Path:
    """The path of a file that exists, with or without its suffix."""
    path = Path(file)
    with_suffix = path.with_name(path.name + SUFFIX) if path.name else path
    if not path.is_file() and with_suffix.is_file():
        return with_suffix
    if path.is_dir():
        names = ", ".join(sorted(p.name for p in path.glob(f"*{SUFFIX}"))[:5])
        raise EncoderFileError(f"{path} is a folder; name a file in it" + (f": {names}." if names else "."))
    if not path.is_file():
        beside = [p.name for p in path.parent.glob(f"*{SUFFIX}")] if path.parent.is_dir() else []
        near = get_close_matches(path.name, beside, n=1, cutoff=0.3)
        hint = f" Did you mean {near[0]!r}?" if near else " `learn.save_encoder(name)` writes one."
        raise EncoderFileError(f"There is no saved encoder {str(path)!r}.{hint}")
    return path


def _opened(path: Path):
    try:
        return safe_open(path, "pt")
    except OSError as error:
        raise EncoderFileError(f"{path.name} cannot be read ({error.strerror or error}).") from error
    except SafetensorError as error:
        raise _not_safetensors(path) from error


def _not_safetensors(path: Path) -> EncoderFileError:
    """Why a file is none of ours, from its first bytes. They are looked at, never interpreted."""
    with open(path, "rb") as raw:
        start = raw.read(16)
    if not start:
        return EncoderFileError(f"{path.name} is empty: it was never written to the end. Save the encoder again.")
    headed = start[8:9] == b"{"  # By a safetensors header, whose length can look like the start of a pickle
    if not headed and (start.startswith(b"PK\x03\x04") or (start[0] == 0x80 and start[1:2] <= b"\x05")):
        return EncoderFileError(
            f"{path.name} is a pickle (.pth, .pt, .pkl) and was not opened, because loading a pickle can run code. If "
            "you trust it, load it into a network yourself and pass the network: create_encoder(net)."
        )
    return damaged(path, "it does not read as safetensors to the end")


def _body(card: dict, module: nn.Module | None, path: Path) -> nn.Module:
    """The bare network that a card describes, with fresh weights."""
    arch, n_in, source = card["arch"], card["in_chans"], card["source"].removeprefix("split ")
    if source == "module" and not isinstance(module, nn.Module):
        raise EncoderFileError(
            f"{path.name} holds a network of your own ({arch}). Give it: load_encoder(file, module={arch}(...))."
        )
    known = {"timm": is_timm_name(arch), "torchvision": arch in torchvision_names(), "module": True}
    if not known[source]:
        raise EncoderFileError(f"{path.name} holds {arch!r:.80}, unknown to the installed {source}. Upgrade {source}.")
    with _as_card_says(card, path):
        if source != card["source"]:
            own = [{"in_chans": n} if source == "timm" else {} for n in HALVES]
            return SplitBody(*(_net(arch, source, {**card["kwargs"], **k}, n, module) for n, k in zip(HALVES, own)))
        return _net(arch, source, card["kwargs"], n_in, module)


def _net(arch: str, source: str, kwargs: dict, n_in: int, module: nn.Module | None) -> nn.Module:
    if source == "timm":
        return timm.create_model(arch, **kwargs)
    make = torchvision.models.get_model
    body = copy.deepcopy(module) if source == "module" else make(arch, weights=None, **kwargs)
    bare_module(body, n_in, trained=True, quiet=True)
    return body


@contextmanager
def _as_card_says(card: dict, path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A card can hold any arguments, and a constructor can raise anything
        why = f"{card['arch']:.80} cannot be built as its card says: {type(error).__name__}"
        raise damaged(path, why) from error


def _check_shapes(body: nn.Module, saved: dict[str, tuple[int, ...]], path: Path) -> None:
    """Whether the tensors of a file are those of the network."""
    wanted = {key: tuple(value.shape) for key, value in _state(body)}
    missing, unexpected = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    other = [key for key in wanted.keys() & saved.keys() if wanted[key] != saved[key]]
    if missing or unexpected or other:
        example = min([*missing, *unexpected, *other])
        raise EncoderFileError(
            f"The tensors of {path.name} do not fit the network: {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(other)} of another shape (e.g. {example}). Give the network it was saved from, or save it again."
        )
