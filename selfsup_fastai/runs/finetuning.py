"""A fine-tuning run, from a folder of classes to a run folder (`runs.folder`)."""

from pathlib import Path
from typing import Any

import pandas as pd
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from matplotlib import pyplot as plt

from selfsup_fastai.callbacks.consistency_loss import ConsistencyLoss
from selfsup_fastai.callbacks.log import MetricsFile
from selfsup_fastai.data.files import listed_in
from selfsup_fastai.data.images import UnlabeledDataLoaders, auto_workers
from selfsup_fastai.data.labeled import labeled_files, labeled_loaders
from selfsup_fastai.downstream.learner import DownstreamLearner, downstream_learner
from selfsup_fastai.downstream.schedule import SCHEDULES, check_count, check_positive
from selfsup_fastai.encoders.checkpoint import get_encoder, is_fresh
from selfsup_fastai.errors import unknown
from selfsup_fastai.messages import say
from selfsup_fastai.pictures import draw, grid_axes, save_picture
from selfsup_fastai.plots import wilson
from selfsup_fastai.processes import check_single
from selfsup_fastai.runs.folder import LEFT_OUT, check_out, finished, joined, run_folder, untested, write_table


def finetune(
    folder: str | Path,  # A folder of images for each class; or train/ and valid/ with such folders
    out: str | Path,
    encoder: Any = "resnet18",  # A saved encoder; or an architecture, from scratch
    epochs: int = 10,
    lr: float = 2e-3,
    schedule: str = "gradual",  # As in `DownstreamLearner.fine_tune`; from scratch there is one rate for all
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
    consistency: str | Path | None = None,  # A folder of images without labels, for `ConsistencyLoss`
    consistency_kind: str = "fixmatch",
    precision: str | None = None,  # As in `downstream_learner`; settings.json says what was chosen
) -> DownstreamLearner:
    """Fine-tunes an encoder on a folder of classes and leaves a run folder; returns the learner."""
    check_single("Fine-tuning")
    check_count("epochs", epochs, 1)
    check_positive("lr", lr)
    if schedule not in SCHEDULES:
        raise unknown("schedule of fine-tuning", schedule, SCHEDULES)
    folders = [folder] if consistency is None else [folder, consistency]
    for images in folders:
        check_out(out, images, overwrite)
    fresh = is_fresh(encoder)
    source = encoder if fresh else get_encoder(encoder)
    side = size or (128 if fresh else source.size) or 128
    listed = str(Path(out) / LEFT_OUT)
    with listed_in(listed):
        table, report = labeled_files(folder, valid_pct, seed, side, cache, max_gb, split_by)
    n_valid = table["is_valid"].sum()
    counts = f"{len(table) - n_valid:,} to train, {n_valid:,} to validate"
    say(f"{len(table):,} images of {table['label'].nunique()} classes ({counts}).")
    n_in = int(table["channels"].max()) if fresh else source.image_channels
    set_seed(seed, reproducible=True)
    workers = auto_workers(len(table), table["pixels"].mean()) if num_workers is None else num_workers
    dls = labeled_loaders(table, n_in, side, bs, workers, cache, max_gb)
    learn = downstream_learner(dls, source, metrics=accuracy, path=out, precision=precision)
    cbs = []
    if consistency is not None:
        with listed_in(listed):
            data = dict(size=side, bs=bs, valid_pct=0, seed=seed, num_workers=num_workers, cache=cache, max_gb=max_gb)
            unlabeled = UnlabeledDataLoaders.from_folder(consistency, **data)
        report = joined(report, unlabeled.report)
        cbs = [ConsistencyLoss(unlabeled, consistency_kind)]
    args = dict(epochs=epochs, lr=lr, from_scratch=fresh, schedule=schedule, valid_pct=valid_pct, bs=bs, seed=seed)
    args |= {"size": side, "classes": len(dls.vocab), "consistency": consistency_kind if cbs else None}
    out = run_folder(out, folders, learn, report, args, paths)
    _show_labeled(learn)
    save_picture(out / "batch.png")
    with finished(learn, out, 1 / len(dls.vocab)):
        _fit(learn, epochs, lr, schedule, fresh, [MetricsFile(out / "metrics.csv"), *cbs])
    _write_predictions(learn, table, out, paths)
    return learn


def _fit(learn: DownstreamLearner, epochs: int, lr: float, schedule: str, fresh: bool, cbs: list[Callback]) -> None:
    if fresh:
        say("From scratch there is nothing to keep: all layers train from the start, at one rate.")
        learn.fit_one_cycle(epochs + 1, lr, cbs=cbs)
    else:
        learn.fine_tune(epochs, lr, schedule=schedule, cbs=cbs)


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
    write_table(rows[kept], out / "predictions.csv", paths)
    counts = pd.crosstab(rows["label"], rows["predicted"]).reindex(index=vocab, columns=vocab, fill_value=0)
    _plot_confusion(counts)
    save_picture(out / "confusion.png")
    right = int((named == truth).sum())
    low, high = wilson(right / len(truth), len(truth))
    share = f"{right / len(truth):.1%} (95 % interval {low:.1%} to {high:.1%})"
    say(f"{right} of {len(truth)} validation images right: {share}.{untested(table)}")


def _plot_confusion(counts: pd.DataFrame) -> None:
    side = 1.6 + 0.45 * len(counts)
    _, ax = plt.subplots(figsize=(side, side))
    ax.imshow(counts, cmap="Blues")
    ax.set(xticks=range(len(counts)), yticks=range(len(counts)), xlabel="predicted", ylabel="true")
    ax.set_xticklabels(counts.columns, rotation=90)
    ax.set_yticklabels(counts.index)
    for i, row in enumerate(counts.to_numpy()):
        for j, n in enumerate(row):
            color = "white" if n > counts.to_numpy().max() / 2 else "black" if n else "#6B6B6B"
            ax.text(j, i, n, ha="center", va="center", color=color, fontsize=8)
