"""The file an encoder is kept in: safetensors with timm's own keys, and a model card (JSON) in the header.

Nothing is ever unpickled. The card holds no file names and no paths. Only `load_encoder` checks the sum over card and
tensors, `read_card` reads the header alone.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import torchvision.models
from torch import Tensor, nn

from selfsup_fastai.encoders.bodies import bare_module, is_timm_name, torchvision_names
from selfsup_fastai.encoders.card import damaged, make_card, parse_card
from selfsup_fastai.encoders.encoder import Encoder, create_encoder
from selfsup_fastai.encoders.split import CHANNELS as HALVES
from selfsup_fastai.encoders.split import SplitBody
from selfsup_fastai.encoders.tensor_files import (
    SUFFIX,
    check_finite,
    check_shapes,
    digest,
    found,
    opened,
    plain_tensors,
    shapes_of,
    tensors_of,
    write_tensors,
)
from selfsup_fastai.errors import EncoderFileError, SelfsupError, TaskError, UnknownNameError

KEY = "selfsup_fastai"  # Where the card stands in the safetensors metadata
MODEL_KEY = "selfsup_fastai_model"  # Where that of a whole model stands (`downstream.saving`)
SUM = "its contents do not add up to its checksum"


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
    tensors = plain_tensors(encoder.body)
    check_finite(encoder.body, tensors)
    return write_tensors(file, tensors, make_card(encoder, card_fields), KEY)


def read_card(file: str | os.PathLike) -> dict:
    """The model card of a saved encoder; the weights are not read. Raises `EncoderFileError`."""
    path = found(file)
    with opened(path) as saved:
        metadata = saved.metadata() or {}
    if MODEL_KEY in metadata:
        raise EncoderFileError(
            f"{path.name} holds a whole model, an encoder with a head. load_trained(file) loads it; its `.encoder` goes"
            " wherever an encoder is wanted."
        )
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
    path = found(file)
    card = read_card(path)
    check_body(card, shapes_of(path), path, module)
    tensors = tensors_of(path)
    if card.get("digest") != digest(card, tensors):
        raise damaged(path, SUM)
    return encoder_of(card, tensors, path, module)


def check_body(
    card: dict,  # Of an encoder, as `parse_card` gives it
    shapes: dict[str, tuple[int, ...]],  # Of the tensors that a file has for it
    path: Path,  # The file, for people
    module: nn.Module | None = None,  # As in `load_encoder`
) -> None:
    """Raise unless these are the tensors of the network of this card. An enormous network costs nothing: no number of
    it is made."""
    with torch.device("meta"):
        check_shapes(_body(card, module, path), shapes, path)


def encoder_of(
    card: dict,  # As in `check_body`, which was called before
    tensors: dict[str, Tensor],
    path: Path,
    module: nn.Module | None = None,
) -> Encoder:
    """The encoder of a card and its tensors."""
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
