"""The file an encoder is kept in: safetensors with timm's own keys, and a model card (JSON) in the header.

Nothing is ever unpickled. The card holds no file names and no paths. A sum over card and tensors (`digest`) tells a
damaged file from a whole one; only `load_encoder` checks it, `read_card` reads the header alone.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision.models
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from selfsup_fastai import __version__
from selfsup_fastai.encoders.encoder import Encoder, bare_module, create_encoder, is_timm_name, torchvision_names
from selfsup_fastai.errors import EncoderFileError, SelfsupError, UnknownNameError

FORMAT = 1  # Raised when an older `load_encoder` could no longer read what is written
KEY = "selfsup_fastai"  # Where the card stands in the safetensors metadata
SUFFIX = ".safetensors"
ROUND = ("task", "epochs", "images", "data")  # What a lineage tells of a round
MAX_CHANNELS, MAX_SIZE, MAX_NUMBER = 1024, 16384, 65536  # Beyond these a card is damaged or hostile
UNSAFE = {"checkpoint_path", "cache_dir", "model_name", "name", "progress", "features_only", "feature_cls"}
UNSAFE |= {"out_indices", "pruned", "weights", "weights_backbone", "backbone", "device", "dtype"}


def save_encoder(
    encoder: Encoder,  # What is kept
    file: str | os.PathLike,  # Where; '.safetensors' is added if missing, folders are made
    **card_fields,  # Of this round: task, settings, epochs, images (through the encoder), data, metrics
) -> Path:
    """Write the encoder and its card; returns the path. The old file stays whole until the new one is complete.

    With `task` given, this round is added to the lineage in the card. Numbers that are not finite become null.
    Raises `EncoderFileError` for fields that are no JSON or that have the name of one of the card's own.
    """
    path = Path(file)
    if not path.name:
        raise EncoderFileError(f"{str(file)!r} names no file to save the encoder in.")
    path = path if path.suffix == SUFFIX else path.with_name(path.name + SUFFIX)
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in _state(encoder.body)}
    card = _make_card(encoder, card_fields)
    card["digest"] = _digest(card, tensors)
    header = {KEY: json.dumps(card, sort_keys=True, allow_nan=False)}
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, to_bytes(tensors, header))
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
    try:
        card = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its card is not JSON") from error
    _check_card(card, path)
    return card


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
        raise _damaged(path, "its contents do not add up to its checksum")
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
    **kwargs,  # For the constructor of a fresh network
) -> Encoder:
    """An encoder from whatever stands for one. Encoders and learners give their own, not a copy."""
    inside = getattr(getattr(source, "model", None), "encoder", None)
    if isinstance(source, Encoder) or isinstance(inside, Encoder):
        return source if isinstance(source, Encoder) else inside
    if _means_file(source):
        if kwargs:
            raise SelfsupError(f"A saved encoder comes as it is; {', '.join(kwargs)} would need a fresh network.")
        return load_encoder(source)
    a_learner = hasattr(source, "model") and not isinstance(source, nn.Module)  # Without an encoder, as found above
    if a_learner or not (isinstance(source, str | nn.Module) or callable(source)):
        raise SelfsupError(
            f"An encoder is given as a saved file, a learner, an Encoder, an nn.Module or a timm name; got "
            f"{type(source).__name__}" + (" whose model has no encoder." if a_learner else ".")
        )
    try:
        return create_encoder(source, n_in, pretrained, size, **kwargs)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error} And there is no saved encoder {source!r} here.") from None


def _means_file(source: object) -> bool:
    if isinstance(source, os.PathLike):
        return True
    if not isinstance(source, str):
        return False
    named = source.endswith(SUFFIX) or "/" in source or os.sep in source
    return named or Path(source).is_file() or (not is_timm_name(source) and Path(source + SUFFIX).is_file())


def _state(body: nn.Module) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in body.state_dict().items() if isinstance(value, Tensor)]


def _make_card(encoder: Encoder, fields: dict) -> dict:
    own = {
        "format": FORMAT,
        "arch": encoder.arch,
        "source": encoder.source,
        "kwargs": encoder.kwargs,
        "in_chans": encoder.in_chans,
        "input": encoder.input,
        "mean": encoder.mean,
        "std": encoder.std,
        "size": encoder.size,
        "num_features": encoder.num_features,
        "versions": _versions(),
    }
    taken = (own.keys() | {"lineage", "digest"}) & fields.keys()
    if taken:
        raise EncoderFileError(f"The card fills in {', '.join(sorted(taken))} itself; choose other names.")
    this_round = [{k: fields[k] for k in ROUND if k in fields}] if fields.get("task") else []
    card = _plain({**own, **fields, "lineage": [*encoder.lineage, *this_round]}, "card")
    if _unusable(card):
        raise EncoderFileError(
            f"The encoder cannot be saved, because nothing could load it again: unusable {', '.join(_unusable(card))}."
        )
    return card


def _versions() -> dict[str, str]:
    versions = {"selfsup_fastai": __version__}
    for package in ("torch", "timm", "fastai"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # Installed from source without metadata
            versions[package] = "unknown"
    return versions


def _plain(value: object, where: str) -> object:
    """The same in JSON's types; numpy and torch scalars become numbers, and what is not finite becomes null."""
    if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise EncoderFileError(
        f"The card takes numbers, strings, lists and dicts with string keys; {where} holds {type(value).__name__}."
    )


def _digest(card: dict, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the card and every tensor's name, type, shape and bytes."""
    card = {key: value for key, value in card.items() if key != "digest"}
    sha = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        sha.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _write_whole(path: Path, data: bytes) -> None:
    """All of it or nothing: a neighbor is written, flushed to the disk and renamed."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
    if start[8:9] != b"{" and (start.startswith(b"PK\x03\x04") or (start[0] == 0x80 and start[1:2] <= b"\x05")):
        return EncoderFileError(
            f"{path.name} is a pickle (.pth, .pt, .pkl) and was not opened, because loading a pickle can run code. If "
            "you trust it, load it into a network yourself and pass the network: create_encoder(net)."
        )
    return _damaged(path, "it does not read as safetensors to the end")


def _damaged(path: Path, why: str) -> EncoderFileError:
    return EncoderFileError(f"{path.name} is damaged or no encoder of ours ({why}). Copy or save it again.")


def _check_card(card: object, path: Path) -> None:
    """Every field of the type and in the range that the code after this relies on."""
    if not isinstance(card, dict) or not _whole(card.get("format"), 10**6):
        raise _damaged(path, "its card names no format")
    if card["format"] > FORMAT:
        raise EncoderFileError(
            f"{path.name} was written by a newer selfsup_fastai (format {card['format']}; this one reads {FORMAT}). "
            "Upgrade selfsup_fastai."
        )
    wrong = _unusable(card)
    if wrong:
        raise _damaged(path, f"its card has an unusable {', '.join(wrong)}")


def _unusable(card: dict) -> list[str]:
    return [field for field, good in _card_checks(card).items() if not good]


def _card_checks(card: dict) -> dict[str, bool]:
    channels, kwargs, lineage = card.get("in_chans"), card.get("kwargs"), card.get("lineage")
    return {
        "source": card.get("source") in ("timm", "torchvision", "module"),
        "arch": isinstance(card.get("arch"), str),
        "kwargs": isinstance(kwargs, dict) and not _unsafe(kwargs),
        "in_chans": _whole(channels, MAX_CHANNELS),
        "input": isinstance(card.get("input"), str),
        "mean": "mean" in card and _statistics(card["mean"], channels, -math.inf),
        "std": "std" in card and _statistics(card["std"], channels, 0),
        "size": "size" in card and (card["size"] is None or _whole(card["size"], MAX_SIZE)),
        "num_features": _whole(card.get("num_features"), 2**31),
        "versions": isinstance(card.get("versions"), dict),
        "lineage": isinstance(lineage, list) and all(isinstance(entry, dict) for entry in lineage),
    }


def _whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _statistics(values: object, channels: object, above: float) -> bool:
    """One finite number above `above` for each channel, or None."""
    if values is None:
        return True
    if not isinstance(values, list) or len(values) != channels:
        return False
    return all(isinstance(v, int | float) and math.isfinite(v) and v > above for v in values)


def _unsafe(kwargs: dict) -> list[str]:
    """Arguments that could make timm or torchvision fetch or open something, and numbers no network has."""
    return [key for key, value in kwargs.items() if key in UNSAFE or key.startswith("pretrained") or not _modest(value)]


def _modest(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= 64 and all(_modest(item) for item in value)
    if isinstance(value, dict):
        return len(value) <= 64 and all(_modest(item) for item in value.values()) and not _unsafe(value)
    if isinstance(value, int | float):
        return abs(value) < MAX_NUMBER
    return value is None or isinstance(value, str)


def _body(card: dict, module: nn.Module | None, path: Path) -> nn.Module:
    """The bare network that a card describes, with fresh weights."""
    arch, source, kwargs, n_in = (card[k] for k in ("arch", "source", "kwargs", "in_chans"))
    if source == "module" and not isinstance(module, nn.Module):
        raise EncoderFileError(
            f"{path.name} holds a network of your own ({arch}). Give it: load_encoder(file, module={arch}(...))."
        )
    known = {"timm": is_timm_name(arch), "torchvision": arch in torchvision_names(), "module": True}
    if not known[source]:
        raise EncoderFileError(f"{path.name} holds {arch!r:.80}, unknown to the installed {source}. Upgrade {source}.")
    with _as_card_says(card, path):
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
        raise _damaged(path, why) from error


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
