"""The folder that a pretraining or fine-tuning run leaves: settings, metrics, pictures, encoder.

    settings.json        what was run, with which versions
    metrics.csv          a row an epoch, written as it ends
    left_out.csv         files that could not be read, and why
    batch.png            what the network was asked, or the labeled images it saw
    history.png          losses and the first metric over the epochs; of several tasks, the first of each
    encoder.safetensors  the encoder and its card
    model.safetensors    after fine-tuning: the encoder with its head, for `selfsup predict`
    results.png neighbors.png, or predictions.csv confusion.png
    resume/              while a pretraining run is under way: its state, from which a killed run goes on

Stopped by Ctrl-C or a termination signal after its first epoch, a run still saves what it has trained, then passes the
signal on. A folder that holds an encoder or a stopped run is not written to, unless asked for.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import fastai
import pandas as pd
import timm
import torch
from fastai.learner import Learner

from selfsup_fastai import __version__
from selfsup_fastai.callbacks.log import EpochLines
from selfsup_fastai.callbacks.precision import AutoPrecision
from selfsup_fastai.callbacks.state import StateFolder
from selfsup_fastai.data.files import find_files, result_folder
from selfsup_fastai.downstream.learner import DownstreamLearner
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say
from selfsup_fastai.pictures import plot_history, save_picture
from selfsup_fastai.processes import is_first
from selfsup_fastai.writing import write_csv

RESUMES = " The same command with --resume goes on."
ENCODER, MODEL, STATE, LEFT_OUT = "encoder.safetensors", "model.safetensors", "resume", "left_out.csv"
SETTINGS = "settings.json"


def is_unfinished(out: str | Path) -> bool:
    """Whether a pretraining run was stopped in this folder and can go on."""
    return StateFolder(Path(out) / STATE).is_there


def check_out(
    out: str | Path,
    folder: str | Path,  # Of images
    overwrite: bool | None = None,  # Replace what an earlier run left; None: that cannot be asked for
    resume: bool = False,  # Whether a run was to be gone on with
) -> None:
    """Raises `DataError` unless a run over `folder` may write to `out`."""
    replace = "" if overwrite is None else ", or have it overwritten (--overwrite, in Python overwrite=True)"
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{str(out)!r} is a file; the run needs a folder to write to.")
    if is_unfinished(out) and not overwrite:
        raise DataError(
            f"{str(out)!r} holds a run that was stopped. Go on with it (`selfsup pretrain` with --resume, in Python "
            f"resume=True), choose another folder{replace}."
        )
    if (out / ENCODER).exists() and not overwrite:
        said = ", which is finished: nothing is left to train" if resume else ""
        raise DataError(f"{str(out)!r} holds an encoder of an earlier run{said}. Choose another folder{replace}.")
    if Path(folder).resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(
            f"{str(out)!r} lies in the folder of images: the pictures of the run would be taken for images."
        )


def run_folder(
    out: str | Path,
    folders: Sequence[str | Path],  # Of images
    learn: Learner,
    report: pd.DataFrame,  # What was left out
    settings: dict,
    paths: bool,
) -> Path:
    """The folder, made if missing, without the files of an earlier run, with this run's settings and report."""
    out = result_folder(out)
    names = ("metrics.csv", "history.png", "results.png", "neighbors.png", "predictions.csv", "confusion.png")
    for name in (ENCODER, MODEL, *names, "learner.pkl"):
        (out / name).unlink(missing_ok=True)
    encoder = learn.model.encoder
    settings |= {"arch": encoder.arch, "channels": encoder.in_chans}
    settings["earlier rounds"] = [card.get("task") for card in encoder.lineage]
    packages = {"fastai": fastai, "timm": timm, "torch": torch}
    settings["versions"] = {"selfsup_fastai": __version__, **{n: str(p.__version__) for n, p in packages.items()}}
    settings["precision"] = _way(learn)
    _write_settings(out, settings)
    write_left_out(report, folders, out, paths)
    return out


def _write_settings(out: Path, settings: dict) -> None:
    (out / SETTINGS).write_text(json.dumps(settings, indent=2, default=str) + "\n")


def _way(learn: Learner) -> str | None:
    """How its steps are computed; None while `AutoPrecision` has not chosen."""
    found = [cb.way for cb in learn.cbs if isinstance(cb, AutoPrecision)]
    return found[0] if found else "fp32"


def untested(
    table: pd.DataFrame,  # Columns label and is_valid
) -> str:
    """Of classes without an image to test on: a sentence that figures are about the others; else nothing."""
    every = table["label"].nunique()
    n = every - table["label"][table["is_valid"].astype(bool)].nunique()
    if not n:
        return ""
    have, them = ("have", "them") if n > 1 else ("has", "it")
    return f" {n} of {every} classes {have} no image to test on: all this says nothing of {them}."


def joined(*reports: pd.DataFrame) -> pd.DataFrame:
    """Reports on several folders as one."""
    whole = pd.concat(reports, ignore_index=True)
    whole.attrs["private"] = any(report.attrs.get("private") for report in reports)
    return whole


def write_left_out(report: pd.DataFrame, folders: Sequence[str | Path], out: Path, paths: bool) -> None:
    """left_out.csv, with the place of each file among all, sorted by path, as `selfsup scan` counts them; a second
    folder's come after the first one's."""
    files = [file for folder in folders for file in find_files(folder)] if len(report) else []
    places = {file: i for i, file in enumerate(files)}
    numbered = report.copy()
    numbered.insert(0, "place", report["file"].map(places).astype("Int64"))
    write_table(numbered, out / LEFT_OUT, paths)


def write_table(table: pd.DataFrame, file: Path, paths: bool) -> None:
    """As CSV. Names of files stay out where some are DICOM, unless they are asked for: they may name patients."""
    write_csv(table.drop(columns="file") if table.attrs.get("private") and not paths else table, file)


@contextmanager
def finished(learn: Learner, out: Path, chance: float | dict | None) -> Iterator[None]:
    """Lines instead of bars while the learner is fitted; at the end, or stopped, what was trained is saved.

    After any other error nothing is saved: the weights may be anything. Of several processes the first one saves, and
    asks no other one for anything: those may be gone.
    """
    learn.add_cb(lines := EpochLines())
    try:
        with learn.no_bar():
            yield
    except KeyboardInterrupt:
        if is_first() and (out / "metrics.csv").exists():
            _save(learn, out, chance)
            say("Stopped; the encoder is saved as it is." + RESUMES * is_unfinished(out))
        else:
            say("Stopped before the first epoch was done: no encoder is saved." + RESUMES * is_unfinished(out))
        raise
    finally:
        learn.remove_cb(lines)
    if is_first():
        _save(learn, out, chance)


def _save(learn: Learner, out: Path, chance: float | dict | None) -> None:
    _write_settings(out, json.loads((out / SETTINGS).read_text()) | {"precision": _way(learn)})
    learn.save_encoder(out / ENCODER)
    if isinstance(learn, DownstreamLearner):
        learn.save_model(out / MODEL)
    plot_history(pd.read_csv(out / "metrics.csv"), chance)
    save_picture(out / "history.png")
