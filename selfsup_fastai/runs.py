"""One pretraining or fine-tuning run and the folder it leaves: settings, metrics, pictures, encoder.

    settings.json        what was run, with which versions
    metrics.csv          a row an epoch, written as it ends
    left_out.csv         files that could not be read, and why
    batch.png            what the network was asked, or the labeled images it saw
    history.png          losses and the first metric over the epochs; of several tasks, the first of each
    encoder.safetensors  the encoder and its card
    results.png neighbors.png, or predictions.csv confusion.png learner.pkl
    resume/              while a pretraining run is under way: its state, from which a killed run goes on

Stopped by Ctrl-C or a termination signal after its first epoch, a run still saves what it has trained, then passes the
signal on. A folder that holds an encoder or a stopped run is not written to, unless asked for.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastai
import pandas as pd
import timm
import torch
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from matplotlib import pyplot as plt

from selfsup_fastai import __version__
from selfsup_fastai.callbacks.log import EpochLines, MetricsFile
from selfsup_fastai.callbacks.resume import Resume
from selfsup_fastai.callbacks.state import StateFolder
from selfsup_fastai.data.files import result_folder
from selfsup_fastai.data.images import UnlabeledDataLoaders, auto_workers
from selfsup_fastai.data.labeled import labeled_files, labeled_loaders
from selfsup_fastai.downstream.interpret import nearest_neighbors
from selfsup_fastai.downstream.learner import DownstreamLearner, downstream_learner
from selfsup_fastai.downstream.schedule import check_count, check_positive
from selfsup_fastai.encoders.checkpoint import get_encoder, is_fresh
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say
from selfsup_fastai.pictures import draw, grid_axes, plot_history, save_picture
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner
from selfsup_fastai.pretext.multi import SeveralTasks

RESUMES = " The same command with --resume goes on."
ENCODER, STATE = "encoder.safetensors", "resume"


def pretrain(
    folder: str | Path,  # Of images, at any depth
    out: str | Path,  # The run's folder; made if missing
    task: str = "rotation",
    epochs: int = 20,
    lr: float = 3e-3,
    arch: str | None = None,  # None: the task's
    encoder: str | Path | None = None,  # Go on from a saved encoder
    pretrained: bool = False,
    seed: int = 42,
    settings: dict | None = None,  # Of the task
    overwrite: bool = False,  # Replace what an earlier run left in `out`
    resume: bool = False,  # Go on with the run of these arguments that was stopped or killed in `out`
    paths: bool = False,  # Write names of DICOM files, too: they may identify patients
    **data,  # Arguments of `UnlabeledDataLoaders.from_folder`
) -> PretextLearner:
    """Pretrains an encoder on a folder of images and leaves a run folder; returns the learner.

    While it trains its state is kept (`callbacks.resume`). With `resume` and no state it begins at the beginning.
    """
    check_count("epochs", epochs, 1)
    check_positive("lr", lr)
    goes_on = resume and is_unfinished(out)
    check_out(out, folder, overwrite or goes_on)
    task = get_task(task, **(settings or {}))  # names and settings first: checking the images may take minutes
    run = dict(task=task.name, settings=task.settings(), epochs=epochs, lr=lr, arch=arch, pretrained=pretrained)
    run |= {name: value for name, value in data.items() if name not in ("num_workers", "cache", "max_gb")}
    state = Resume(Path(out) / STATE, about={**run, "seed": seed})
    if goes_on:
        state.check_about()
    source = get_encoder(encoder or arch or task.arch)  # a new net is made again later, to suit the images
    set_seed(seed, reproducible=True)
    dls = UnlabeledDataLoaders.from_folder(folder, seed=seed, **data)
    given = {} if encoder is None else {"encoder": source}
    learn = pretext_learner(dls, task, arch, pretrained=pretrained, **given)
    args = dict(task=learn.task.name, settings=learn.task.settings(), epochs=epochs, lr=lr, pretrained=pretrained)
    if not goes_on:
        state.clear()
    out = _run_folder(out, learn, dls.report, {**args, "seed": seed, **data}, paths)
    learn.show_batch()
    save_picture(out / "batch.png")
    chance = learn.task.levels() if isinstance(learn.task, SeveralTasks) else learn.task.chance()
    with _finished(learn, out, chance):
        learn.fit_one_cycle(epochs, lr, cbs=[MetricsFile(out / "metrics.csv"), state])
    state.clear()
    with learn.no_bar(), learn.no_logging():
        learn.show_results()
    save_picture(out / "results.png")
    nearest_neighbors(learn.encoder, dls.valid)
    save_picture(out / "neighbors.png")
    return learn


def finetune(
    folder: str | Path,  # A folder of images for each class; or train/ and valid/ with such folders
    out: str | Path,
    encoder: Any = "resnet18",  # A saved encoder; or an architecture, from scratch
    epochs: int = 10,
    lr: float = 2e-3,
    gradual: bool = True,
    valid_pct: float = 0.2,
    size: int | None = None,  # Pixels; None: the encoder's, or 128
    bs: int = 32,
    seed: int = 42,
    num_workers: int | None = None,
    overwrite: bool = False,  # Replace what an earlier run left in `out`
    cache: bool | str = True,  # Where decoded pixels are kept, as in `UnlabeledDataLoaders`
    max_gb: float = 20.0,
    paths: bool = False,  # Write names of DICOM files, too: they may identify patients
    split_by: str | None = None,  # 'patient' or 'random', as in `labeled_files`
) -> DownstreamLearner:
    """Fine-tunes an encoder on a folder of classes and leaves a run folder; returns the learner."""
    check_count("epochs", epochs, 1)
    check_positive("lr", lr)
    check_out(out, folder, overwrite)
    fresh = is_fresh(encoder)
    source = encoder if fresh else get_encoder(encoder)
    side = size or (128 if fresh else source.size) or 128
    table, report = labeled_files(folder, valid_pct, seed, side, cache, max_gb, split_by)
    n_valid = table["is_valid"].sum()
    counts = f"{len(table) - n_valid:,} to train, {n_valid:,} to validate"
    say(f"{len(table):,} images of {table['label'].nunique()} classes ({counts}).")
    n_in = int(table["channels"].max()) if fresh else source.image_channels
    set_seed(seed, reproducible=True)
    workers = auto_workers(len(table), table["pixels"].mean()) if num_workers is None else num_workers
    dls = labeled_loaders(table, n_in, side, bs, workers, cache, max_gb)
    learn = downstream_learner(dls, source, metrics=accuracy, path=out)
    args = dict(epochs=epochs, lr=lr, from_scratch=fresh, gradual=gradual, valid_pct=valid_pct, bs=bs, seed=seed)
    out = _run_folder(out, learn, report, {**args, "size": side, "classes": len(dls.vocab)}, paths)
    _show_labeled(learn)
    save_picture(out / "batch.png")
    with _finished(learn, out, 1 / len(dls.vocab)):
        _fit(learn, epochs, lr, gradual, fresh, MetricsFile(out / "metrics.csv"))
    _write_predictions(learn, table, out, paths)
    learn.export("learner.pkl")
    return learn


def _fit(learn: DownstreamLearner, epochs: int, lr: float, gradual: bool, fresh: bool, log: MetricsFile) -> None:
    if fresh:
        say("From scratch there is nothing to keep: all layers train from the start, at one rate.")
        learn.fit_one_cycle(epochs + 1, lr, cbs=log)
    else:
        learn.fine_tune(epochs, lr, schedule="gradual" if gradual else "two_stage", cbs=log)


def is_unfinished(out: str | Path) -> bool:
    """Whether a pretraining run was stopped in this folder and can go on."""
    return StateFolder(Path(out) / STATE).is_there


def check_out(out: str | Path, folder: str | Path, overwrite: bool = False) -> None:
    """Raises `DataError` unless a run over `folder` may write to `out`."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{str(out)!r} is a file; the run needs a folder to write to.")
    if is_unfinished(out) and not overwrite:
        raise DataError(
            f"{str(out)!r} holds a run that was stopped. Go on with it (resume), choose another folder, or have it "
            "overwritten."
        )
    if (out / ENCODER).exists() and not overwrite:
        raise DataError(
            f"{str(out)!r} holds an encoder of an earlier run. Choose another folder, or have it overwritten."
        )
    if Path(folder).resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(
            f"{str(out)!r} lies in the folder of images: the pictures of the run would be taken for images."
        )


def _run_folder(out: str | Path, learn: Learner, report: pd.DataFrame, settings: dict, paths: bool) -> Path:
    """The folder, made if missing, without the files of an earlier run, with this run's settings and report."""
    out = result_folder(out)
    names = ("metrics.csv", "history.png", "results.png", "neighbors.png", "predictions.csv", "confusion.png")
    for name in (ENCODER, *names, "learner.pkl"):
        (out / name).unlink(missing_ok=True)
    encoder = learn.model.encoder
    settings |= {"arch": encoder.arch, "channels": encoder.in_chans}
    settings["earlier rounds"] = [card.get("task") for card in encoder.lineage]
    packages = {"fastai": fastai, "timm": timm, "torch": torch}
    settings["versions"] = {"selfsup_fastai": __version__, **{n: str(p.__version__) for n, p in packages.items()}}
    (out / "settings.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")
    _write_table(report, out / "left_out.csv", paths)
    return out


def _write_table(table: pd.DataFrame, file: Path, paths: bool) -> None:
    """As CSV. Names of files stay out where some are DICOM, unless they are asked for: they may name patients."""
    if table.attrs.get("private") and not paths:
        table = table.drop(columns="file")
    table.to_csv(file, index=False, errors="surrogateescape")  # file names may be no text


@contextmanager
def _finished(learn: Learner, out: Path, chance: float | dict | None) -> Iterator[None]:
    """Lines instead of bars while the learner is fitted; at the end, or stopped, what was trained is saved.

    After any other error nothing is saved: the weights may be anything.
    """
    learn.add_cb(lines := EpochLines())
    try:
        with learn.no_bar():
            yield
    except KeyboardInterrupt:
        if (out / "metrics.csv").exists():
            _save(learn, out, chance)
            say("Stopped; the encoder is saved as it is." + RESUMES * is_unfinished(out))
        raise
    finally:
        learn.remove_cb(lines)
    _save(learn, out, chance)


def _save(learn: Learner, out: Path, chance: float | dict | None) -> None:
    learn.save_encoder(out / ENCODER)
    plot_history(pd.read_csv(out / "metrics.csv"), chance)
    save_picture(out / "history.png")


def _show_labeled(learn: DownstreamLearner) -> None:
    b = learn.dls.train.one_batch()
    decoded = learn.dls.train.after_batch.decode(b[:1])[0].float() / 255
    for ax, image, label in zip(grid_axes(min(9, len(decoded))), decoded, b[1]):
        draw(ax, image, str(learn.dls.vocab[int(label)]))


def _write_predictions(learn: DownstreamLearner, table: pd.DataFrame, out: Path, paths: bool) -> None:
    """predictions.csv and confusion.png of the validation images."""
    with learn.no_bar():
        probabilities, truth = learn.get_preds()
    named = probabilities.argmax(1)
    vocab = list(learn.dls.vocab)
    rows = table[table["is_valid"]].reset_index(drop=True)
    rows = rows.assign(predicted=[vocab[i] for i in named], probability=probabilities.max(1).values.numpy())
    kept = [name for name in rows if name not in ("is_valid", "channels", "pixels", "source", "modality", "are_scans")]
    _write_table(rows[kept], out / "predictions.csv", paths)
    counts = pd.crosstab(rows["label"], rows["predicted"]).reindex(index=vocab, columns=vocab, fill_value=0)
    _plot_confusion(counts)
    save_picture(out / "confusion.png")
    right = int((named == truth).sum())
    low, high = wilson(right, len(truth))
    share = f"{right / len(truth):.1%} (95 % interval {low:.1%} to {high:.1%})"
    say(f"{right} of {len(truth)} validation images right: {share}.")


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share of `right` in `n` (95 % for z = 1.96): honest for small n and near 0 and 1."""
    share, spread = right / n, z * z / n
    middle, half = share + spread / 2, z * ((share * (1 - share) + spread / 4) / n) ** 0.5
    return max(0.0, (middle - half) / (1 + spread)), (middle + half) / (1 + spread)


def _plot_confusion(counts: pd.DataFrame) -> None:
    side = 1.6 + 0.45 * len(counts)
    _, ax = plt.subplots(figsize=(side, side))
    ax.imshow(counts, cmap="Blues")
    ax.set(xticks=range(len(counts)), yticks=range(len(counts)), xlabel="predicted", ylabel="true")
    ax.set_xticklabels(counts.columns, rotation=90)
    ax.set_yticklabels(counts.index)
    for i, row in enumerate(counts.to_numpy()):
        for j, n in enumerate(row):
            if n:
                ax.text(
                    j,
                    i,
                    n,
                    ha="center",
                    va="center",
                    color="white" if n > counts.to_numpy().max() / 2 else "black",
                    fontsize=8,
                )
