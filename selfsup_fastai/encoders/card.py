"""The model card in a saved encoder's file: what stands in it, and what is refused when one is read.

A card may come from anybody, so every field is checked before anything is built from it.
"""

import json
import math
from pathlib import Path

import fastai
import numpy as np
import timm
import torch
from torch import Tensor

from selfsup_fastai import __version__
from selfsup_fastai.encoders.bodies import ABOUT_WEIGHTS
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.inputs import CHANNELS
from selfsup_fastai.errors import EncoderFileError

FORMAT = 1  # Raised when an older `load_encoder` could no longer read what is written
FIELDS = ("arch", "source", "kwargs", "in_chans", "input", "mean", "std", "size", "num_features")  # Of the encoder
ROUND = ("task", "settings", "epochs", "images", "data")  # What a lineage tells of a round
SOURCES = ("timm", "torchvision", "module", "split timm", "split torchvision", "split module")
INPUTS = ("rgb", "grey", "other", *CHANNELS)  # What an encoder may eat
MAX_CHANNELS, MAX_SIZE, MAX_NUMBER = 1024, 16384, 65536  # Beyond these a card is damaged or hostile


def make_card(
    encoder: Encoder,  # What the card is about
    fields: dict,  # What else it says; with `task` this is a round of training, which joins the lineage
) -> dict:
    """The card of an encoder, in JSON's types only. Raises `EncoderFileError`."""
    own = {"format": FORMAT, **{name: getattr(encoder, name) for name in FIELDS}, "versions": _versions()}
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


def parse_card(text: str, path: Path) -> dict:
    """A card from its JSON, every field of the type and in the range that a reader may rely on."""
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, "its card is not JSON") from error
    if not isinstance(card, dict) or not _whole(card.get("format"), MAX_NUMBER):
        raise damaged(path, "its card names no format")
    if card["format"] > FORMAT:
        raise EncoderFileError(
            f"{path.name} was written by a newer selfsup_fastai (format {card['format']}; this one reads {FORMAT}). "
            "Upgrade selfsup_fastai."
        )
    if _unusable(card):
        raise damaged(path, f"its card has an unusable {', '.join(_unusable(card))}")
    return card


def damaged(path: Path, why: str, what: str = "encoder") -> EncoderFileError:
    """The error for a file that cannot be used."""
    return EncoderFileError(f"{path.name} is damaged or no {what} of ours ({why}). Copy or save it again.")


def _versions() -> dict[str, str]:
    packages = {"torch": torch, "timm": timm, "fastai": fastai}
    return {"selfsup_fastai": __version__, **{name: package.__version__ for name, package in packages.items()}}


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


def _unusable(card: dict) -> list[str]:
    absent = [field for field in (*FIELDS, "versions", "lineage") if field not in card]
    return absent or [field for field, good in _checks(card).items() if not good]


def _checks(card: dict) -> dict[str, bool]:
    channels, kwargs, lineage = card["in_chans"], card["kwargs"], card["lineage"]
    return {
        "source": card["source"] in SOURCES,
        "arch": isinstance(card["arch"], str),
        "kwargs": isinstance(kwargs, dict) and not kwargs.keys() & ABOUT_WEIGHTS and _modest(kwargs),
        "in_chans": _whole(channels, MAX_CHANNELS) and (channels == 3 or not str(card["source"]).startswith("split ")),
        "input": card["input"] in INPUTS and CHANNELS.get(card["input"], channels) == channels,
        "mean": _statistics(card["mean"], channels, -math.inf),
        "std": _statistics(card["std"], channels, 0),
        "size": card["size"] is None or _whole(card["size"], MAX_SIZE),
        "num_features": _whole(card["num_features"], 2**31),
        "versions": isinstance(card["versions"], dict),
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


def _modest(value: object) -> bool:
    """Whether these are arguments of a network: short lists, and no number beyond what networks have."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return len(value) <= 64 and all(_modest(item) for item in value)
    if isinstance(value, int | float):
        return abs(value) < MAX_NUMBER
    return value is None or isinstance(value, str)
