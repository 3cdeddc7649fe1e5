"""Files of tensors with a JSON card in the header: written whole, never unpickled, and damage is noticed.

What is in the card is the business of others: `checkpoint` keeps encoders, `downstream.saving` whole models. A sum over
card and tensors (`digest`) tells a damaged file from a whole one.
"""

import hashlib
import json
import os
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from selfsup_fastai.encoders.card import damaged
from selfsup_fastai.errors import EncoderFileError
from selfsup_fastai.writing import write_whole

SUFFIX = ".safetensors"


def write_tensors(
    file: str | os.PathLike,  # Where; '.safetensors' is added if missing, folders are made
    tensors: dict[str, Tensor],
    card: dict,  # In JSON's types; it is given the digest
    key: str,  # Where the card stands in the metadata
    what: str = "encoder",  # What is kept, for people
) -> Path:
    """Write them and return the path. The old file stays whole until the new one is complete."""
    path = with_suffix(file, what)
    card = {**card, "digest": digest(card, tensors)}
    header = {key: json.dumps(card, sort_keys=True, allow_nan=False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_bytes(tensors, header))
    return path


def with_suffix(file: str | os.PathLike, what: str = "encoder") -> Path:
    """Where `file` is written to."""
    path = Path(file)
    if not path.name:
        raise EncoderFileError(f"{str(file)!r} names no file to save the {what} in.")
    return path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module by name, each in memory of its own: what can be written."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state_of(module)}


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    with opened(path) as saved:
        return {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, from the header alone."""
    with opened(path) as saved:
        return {key: tuple(saved.get_slice(key).get_shape()) for key in saved.keys()}  # noqa: SIM118


def check_finite(body: nn.Module, tensors: dict[str, Tensor], what: str = "encoder") -> None:
    """Raise for NaN anywhere and for infinite weights or running statistics; a mask may be infinite on purpose."""
    learned = {name for name, _ in body.named_parameters(remove_duplicate=False)}
    learned |= {name for name in tensors if name.rpartition(".")[2].startswith("running_")}
    if any(value.isnan().any() or (key in learned and value.isinf().any()) for key, value in tensors.items()):
        raise EncoderFileError(
            f"The {what} cannot be saved, because the weights are not finite: the run diverged; lower the learning "
            "rate."
        )


def state_of(body: nn.Module) -> list[tuple[str, Tensor]]:
    """Names and tensors of its state; what else a network keeps there is left out."""
    return [(key, value) for key, value in body.state_dict().items() if isinstance(value, Tensor)]


def digest(card: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the card and every tensor's name, type, shape and bytes."""
    card = {key: value for key, value in card.items() if key != "digest"}
    sha = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def found(file: str | os.PathLike, what: str = "encoder") -> Path:
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
        command = "finetune" if what == "model" else "pretrain"
        made = f" Check the spelling; `selfsup {command}` writes such files, in Python `learn.save_{what}(name)`."
        hint = f" Did you mean {near[0]!r}?" if near else made
        raise EncoderFileError(f"There is no saved {what} {str(path)!r}.{hint}")
    return path


def opened(path: Path) -> safe_open:
    """The file, open to read; `EncoderFileError` for one that is no safetensors."""
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


def check_shapes(body: nn.Module, saved: dict[str, tuple[int, ...]], path: Path) -> None:
    """Whether the tensors of a file are those of the network."""
    wanted = {key: tuple(value.shape) for key, value in state_of(body)}
    missing, unexpected = wanted.keys() - saved.keys(), saved.keys() - wanted.keys()
    other = [key for key in wanted.keys() & saved.keys() if wanted[key] != saved[key]]
    if missing or unexpected or other:
        example = min([*missing, *unexpected, *other])
        raise EncoderFileError(
            f"The tensors of {path.name} do not fit the network: {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(other)} of another shape (e.g. {example}). Give the network it was saved from, or save it again."
        )
