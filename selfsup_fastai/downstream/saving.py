"""A trained model in one file: `learn.save_model(file)` writes it, `load_trained(file)` gives a `TrainedModel`.

For those who build on it:

    model = load_trained("cells.safetensors")       # a TrainedModel in evaluation mode; nothing is unpickled
    model.kind, model.vocab, model.size             # 'mask', ('background', 'nucleus'), (128, 128)
    x = torch.stack([model.open(file) for file in files])      # (B, C, h, w) in [0, 1], cut as validation cut them
    preds = model.predict_batch(x)                  # see below; a GPU is used where the model is on one
    labels = model.decode(preds)                    # a list, one entry an image

| kind | `predict_batch` | `decode` |
|---|---|---|
| category | probabilities (B, classes) | the name of the class |
| multicategory | probabilities (B, classes) | a list of the names above `threshold` |
| regression | values (B, n) | a list of numbers |
| points | (B, n, 2): x and y in pixels of `x` | a list of [x, y] |
| mask | probabilities (B, classes, H, W), of the size of `x` | (H, W) uint8 or int64, numbers of classes |

The file is safetensors: tensors `encoder.*` (timm's keys behind the dot) and `head.*`, and a card (JSON) in the header
with the encoder's own card, the kind, the names of the classes, the size. No file names, no paths.
"""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from selfsup_fastai.downstream.models import DownstreamModel, head_maker
from selfsup_fastai.downstream.targets import KINDS
from selfsup_fastai.downstream.trained import ACTIVATIONS, RESIZES, Facts, TrainedModel
from selfsup_fastai.encoders.card import MAX_NUMBER, MAX_SIZE, damaged, make_card, parse_card
from selfsup_fastai.encoders.checkpoint import KEY, MODEL_KEY, SUM, check_body, encoder_of
from selfsup_fastai.encoders.tensor_files import (
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
from selfsup_fastai.errors import EncoderFileError, SelfsupError

FORMAT = 1  # Raised when an older `load_trained` could no longer read what is written
PARTS = ("encoder", "head")


def save_model(
    model: TrainedModel,  # What is kept
    file: str | os.PathLike,  # Where; '.safetensors' is added if missing, folders are made
    **card_fields,  # Of this round, as in `save_encoder`
) -> Path:
    """Write the model and its cards; returns the path. The old file stays whole until the new one is complete.

    Raises `EncoderFileError` for weights that are not finite.
    """
    parts = {"encoder": model.encoder.body, "head": model.model.head}
    tensors = {part: plain_tensors(module) for part, module in parts.items()}
    for part, module in parts.items():
        check_finite(module, tensors[part], "model")
    facts = {**asdict(model.facts), "vocab": _plain(model.vocab), "layers": getattr(model.model.head, "layers", None)}
    card = {"format": FORMAT, "encoder": make_card(model.encoder, card_fields), "model": facts}
    named = {f"{part}.{name}": value for part in PARTS for name, value in tensors[part].items()}
    return write_tensors(file, named, card, MODEL_KEY, "model")


def load_trained(
    file: str | os.PathLike,  # A file that `learn.save_model` wrote; '.safetensors' may be left out
    module: nn.Module | None = None,  # The network, for encoders made from a module of your own (it is copied)
) -> TrainedModel:
    """The saved model in evaluation mode, on the CPU. Never unpickles. Raises `EncoderFileError`."""
    path = found(file, "model")
    card = _parsed(_card_text(path), path)
    shapes = _by_part(shapes_of(path), path)
    check_body(card["encoder"], shapes["encoder"], path, module)
    tensors = tensors_of(path)
    if card.get("digest") != digest(card, tensors):
        raise damaged(path, SUM, "model")
    tensors, facts = _by_part(tensors, path), _facts(card["model"])
    encoder = encoder_of(card["encoder"], tensors["encoder"], path, module)
    try:
        make_head = head_maker(facts, encoder, layers=card["model"]["layers"])
    except SelfsupError as error:
        raise damaged(path, "its head does not go with its encoder", "model") from error
    with torch.device("meta"):  # Shapes only: a card that asks for an enormous head costs nothing
        check_shapes(make_head(), shapes["head"], path)
    model = DownstreamModel(encoder, make_head())
    model.head.load_state_dict(tensors["head"], strict=True)
    return TrainedModel(model, facts)


def _card_text(path: Path) -> str:
    with opened(path) as saved:
        metadata = saved.metadata() or {}
    if MODEL_KEY in metadata:
        return metadata[MODEL_KEY]
    if KEY in metadata:
        fix = "load_encoder(file) loads it; `learn.save_model(name)` writes a model."
        raise EncoderFileError(f"{path.name} holds an encoder without a head. {fix}")
    raise EncoderFileError(f"{path.name} is a safetensors file without our card. `learn.save_model(name)` writes one.")


def _by_part(named: dict, path: Path) -> dict[str, dict]:
    """What belongs to the encoder and to the head, by the names they have there."""
    parts: dict[str, dict] = {part: {} for part in PARTS}
    for name, value in named.items():
        part, _, inner = name.partition(".")
        if part not in parts:
            raise damaged(path, "it holds tensors of neither encoder nor head", "model")
        parts[part][inner] = value
    return parts


def _parsed(text: str, path: Path) -> dict:
    """The card of a model, every field of the type and in the range that a reader may rely on."""
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "its card is not JSON", "model") from error
    if not isinstance(card, dict) or not _whole(card.get("format"), MAX_NUMBER):
        raise damaged(path, "its card names no format", "model")
    if card["format"] > FORMAT:
        raise EncoderFileError(
            f"{path.name} was written by a newer selfsup_fastai (model format {card['format']}; this one reads "
            f"{FORMAT}). Upgrade selfsup_fastai."
        )
    model = card.get("model")
    checks = _checks(model) if isinstance(model, dict) else {"model": False}
    wrong = [name for name, good in checks.items() if not good]
    if wrong:
        raise damaged(path, f"its card has an unusable {', '.join(wrong)}", "model")
    parse_card(json.dumps(card.get("encoder")), path)
    return card


def _checks(model: dict) -> dict[str, bool]:
    get = model.get
    absent = [name for name in ("vocab", "size", "resize", "layers") if name not in model]
    if absent:
        return dict.fromkeys(absent, False)
    layers, threshold = get("layers"), get("threshold")
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool) and math.isfinite(threshold)
    return {
        "kind": isinstance(get("kind"), str) and get("kind") in KINDS,
        "n_out": _whole(get("n_out"), MAX_NUMBER) and (get("kind") != "points" or get("n_out") % 2 == 0),
        "vocab": get("vocab") is None or _names(get("vocab")),
        "size": get("size") is None or _side_lengths(get("size")),
        "resize": get("resize") is None or (isinstance(get("resize"), str) and get("resize") in RESIZES),
        "activation": isinstance(get("activation"), str) and get("activation") in ACTIVATIONS,
        "threshold": is_number,
        "layers": layers is None or (isinstance(layers, list) and set(map(type, layers)) == {str}),
    }


def _facts(model: dict) -> Facts:
    vocab, size = (None if model[name] is None else tuple(model[name]) for name in ("vocab", "size"))
    kept = {name: model[name] for name in ("kind", "n_out", "resize", "activation", "threshold")}
    return Facts(**kept, vocab=vocab, size=size)


def _plain(vocab: tuple | None) -> list | None:
    """Names of classes in JSON's types: numbers stay numbers."""
    values = None if vocab is None else [v.item() if isinstance(v, np.generic | Tensor) else v for v in vocab]
    for value in values or []:
        if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
            raise EncoderFileError(f"Names of classes are text or numbers; there is a {type(value).__name__}.")
    return values


def _names(vocab: object) -> bool:
    return isinstance(vocab, list) and len(vocab) <= MAX_NUMBER and all(isinstance(v, str | int | float) for v in vocab)


def _side_lengths(size: object) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(_whole(side, MAX_SIZE) for side in size)


def _whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
