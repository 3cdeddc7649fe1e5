"""What a fine-tuned model says of images, as a table."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from fastai.torch_core import default_device
from torch import Tensor
from tqdm.auto import tqdm

from selfsup_fastai.data.loader import IndexedDL
from selfsup_fastai.data.unsplit import Unsplit
from selfsup_fastai.downstream.saving import load_trained
from selfsup_fastai.downstream.trained import TrainedModel
from selfsup_fastai.errors import TaskError
from selfsup_fastai.messages import say
from selfsup_fastai.runs.inputs import check_file_out, find_images, left_out_file, seen_by, side_of, which
from selfsup_fastai.seeding import preserved_rng
from selfsup_fastai.writing import write_csv

NO_IMAGES = ("dicomdir", "excluded")  # Read in full, and no image is missing: tables of contents, reports, plans
NOT_MEANT = ("Thumbs.db", "desktop.ini")  # What systems leave in folders; and whatever begins with a dot


class Predicted(NamedTuple):
    """What came of it."""

    out: Path  # The table
    n: int  # Images in it
    n_unreadable: int  # Files that should have been images and could not be read
    listed: Path  # Where these are listed, if there are any


def predict_images(
    inputs: Sequence[str | os.PathLike],  # Folders, at any depth, and files
    out: str | os.PathLike,  # A file that ends in .csv
    model: str | os.PathLike,  # A saved model: model.safetensors of a fine-tuning run
    paths: bool = False,  # Write names of DICOM files, too: they may identify patients
    **data,  # bs, num_workers, cache, max_gb
) -> Predicted:
    """Writes a row for each image that can be read, in the order of their paths.

    Columns: which image it is; `predicted`, and `p_` with the name of each class: its probability. Several labels an
    image: all those that are more probable than not, joined by ';'. Numbers: `value`, or `value_1`, `value_2`, ...
    """
    out, trained = check_file_out(out, inputs, (".csv",)), load_trained(model)
    if trained.kind in ("mask", "points"):
        raise TaskError(f"This model finds {trained.kind}s, which make no table. In Python: load_trained(file).")
    size = trained.size or side_of(trained.encoder, None)
    data |= {"seen": seen_by(trained.encoder), "resizer": trained.facts.resizer() if trained.size else None}
    found = find_images(inputs, out, trained.encoder.image_channels, size, paths, **data)
    table = _table(trained, found, paths)
    write_csv(table, out)
    say(f"{len(table):,} images predicted.")
    return Predicted(out, len(table), _n_unreadable(found.report), left_out_file(out))


def _table(trained: TrainedModel, found: Unsplit, paths: bool) -> pd.DataFrame:
    n_out = trained.facts.n_out
    answers = predictions(trained, found.dl) if found.dl else torch.empty(0, n_out)
    if not torch.isfinite(answers).all():
        raise TaskError("The model's answers are not finite numbers: it cannot be used.")
    rows = which(found.info, found.private and not paths)
    if trained.vocab is None and trained.kind == "regression":
        names = ["value"] if n_out == 1 else [f"value_{i + 1}" for i in range(n_out)]
    else:
        said = trained.decode(answers)
        rows["predicted"] = [";".join(map(str, one)) if isinstance(one, list) else one for one in said]
        names = [f"p_{name}" for name in trained.vocab or range(n_out)]
    return pd.concat([rows, pd.DataFrame(answers.numpy(), columns=names, index=rows.index)], axis=1)


def predictions(trained: TrainedModel, dl: IndexedDL) -> Tensor:  # (N, n_out)
    """What the model says of each image of a loader, in its order."""
    trained.to(default_device())
    with preserved_rng():
        batches = [trained.predict_batch(x).cpu() for (x,) in tqdm(dl, desc="predicting", delay=1, disable=None)]
    return torch.cat(batches)


def _n_unreadable(report: pd.DataFrame) -> int:
    """Files that hold no image on purpose, or that nobody meant, do not count."""
    names = report["name"].map(lambda name: Path(name).name)
    stray = (names.str.startswith(".") | names.isin(NOT_MEANT)) & report["code"].isin(["not_an_image", "not_dicom"])
    return int((~report["code"].isin(NO_IMAGES) & ~stray).sum())
