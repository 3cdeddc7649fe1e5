"""What runs that train nothing have in common: images in, one file out, and a list of what could not be read."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from selfsup_fastai.data.files import listed_in, result_folder
from selfsup_fastai.data.unsplit import WHOSE, Unsplit, named_files, unsplit_images
from selfsup_fastai.downstream.saving import load_trained
from selfsup_fastai.downstream.trained import TrainedModel
from selfsup_fastai.encoders.checkpoint import MODEL_KEY, load_encoder, read_card
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.tensor_files import found, opened
from selfsup_fastai.errors import DataError, unknown
from selfsup_fastai.writing import write_csv

Inputs = Sequence[str | os.PathLike]  # Folders and files


class Saved(NamedTuple):
    """What is in a file of ours."""

    encoder: Encoder
    about: dict  # Which one it is: digest, arch, rounds of training
    model: TrainedModel | None  # With a head, where there is one


def saved(file: str | os.PathLike) -> Saved:
    """An encoder, alone or in a fine-tuned model, from a file that is never unpickled. Raises `EncoderFileError`."""
    path = found(file)
    with opened(path) as tensors:
        text = (tensors.metadata() or {}).get(MODEL_KEY)
    model = load_trained(path) if text else None
    encoder = load_encoder(path) if model is None else model.encoder
    digest = (json.loads(text) if text else read_card(path))["digest"]
    rounds = [entry.get("task") for entry in encoder.lineage]
    return Saved(encoder, {"digest": digest, "arch": encoder.arch, "rounds": rounds}, model)


def check_file_out(
    out: str | os.PathLike,
    inputs: Inputs,
    suffixes: Iterable[str],  # That the file may have
) -> Path:
    """The file that is to be written, its folder made. Raises `DataError` where it cannot be, before any work."""
    out, suffixes = Path(out), list(suffixes)
    if out.suffix.lower() not in suffixes:
        raise DataError(f"The result is a file that ends in {' or '.join(suffixes)}; got {str(out)!r}.")
    if out.is_dir():
        raise DataError(f"{str(out)!r} is a folder; the result is one file.")
    for folder in (Path(one).resolve() for one in inputs if Path(one).is_dir()):
        if folder in out.resolve().parents:
            raise DataError(f"{str(out)!r} lies in the folder of images: it would be taken for one. Choose another.")
    result_folder(out.parent)
    return out


def left_out_file(out: Path) -> Path:
    """Where the list of files that could not be read goes: beside the result, named after it."""
    return out.with_name(f"{out.stem}.left_out.csv")


def find_images(
    inputs: Inputs,
    out: Path,  # The result; the list of what cannot be read goes beside it, if there is any
    n_in: int,
    size: int | tuple[int, int],
    paths: bool,  # Write names of DICOM files, too
    **data,  # For `unsplit_images`
) -> Unsplit:
    """All images that can be read. An earlier list is removed."""
    files, listed = named_files(inputs), left_out_file(out)
    with listed_in(str(listed)):
        images = unsplit_images(files, n_in, size, **data)
    listed.unlink(missing_ok=True)
    if len(images.report):
        reasons = images.report[["code", "message"]]
        write_csv(which(images.report, images.private and not paths).join(reasons), listed)
    return images


def find_some(inputs: Inputs, out: Path, *args, **kwargs) -> Unsplit:
    """`find_images`; raises `DataError` where none can be read."""
    images = find_images(inputs, out, *args, **kwargs)
    if images.dl is None:
        n = len(images.report)
        raise DataError(f"None of the {n:,} files can be read as an image; {left_out_file(out).name} says why.")
    return images


def which(
    table: pd.DataFrame,  # `info` or `report` of `Unsplit`
    private: bool,  # Leave out names of files: they may name patients
) -> pd.DataFrame:
    """Which image each row is about: place (of its file among all), file, and what DICOM files tell, as pseudonyms."""
    known = {"place": table["nth"]} | ({} if private else {"file": table["name"]})
    whose = pd.DataFrame(known | {name: table[name] for name in WHOSE if name in table})
    if "frame" in whose:
        whose["frame"] = whose["frame"].fillna(0).astype(int)  # a photograph has one, too
    return whose


def side_of(encoder: Encoder, size: int | None) -> int:
    """Of the images, in pixels: as asked for, or as the encoder was trained."""
    return size or encoder.size or encoder.fixed_size or 128


def seen_by(encoder: Encoder) -> str | None:
    """In which windows the encoder saw scans when it was trained last; None where that is not known."""
    known = [(card.get("data") or {}).get("scans") for card in encoder.lineage if isinstance(card.get("data"), dict)]
    return next((seen for seen in reversed(known) if isinstance(seen, str)), None)


def check_layer(encoder: Encoder, layer: str | None) -> None:
    """Raises `UnknownNameError` for a layer that the encoder does not have."""
    if layer is not None and layer not in encoder.layer_names:
        raise unknown(f"layer of {encoder.arch}", layer, encoder.layer_names)
