"""One pretraining or fine-tuning run and the folder it leaves: settings, metrics, pictures, encoder.

    settings.json        what was run, with which versions
    metrics.csv          a row an epoch, written as it ends
    batch.png            what the network was asked, or the labeled images it saw
    history.png          losses and the first metric over the epochs
    encoder.safetensors  the encoder and its card

Stopped by Ctrl-C or a termination signal, a run still saves its encoder and pictures, then passes the signal on.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from matplotlib import pyplot as plt

from selfsup_fastai import __version__
from selfsup_fastai.callbacks.log import EpochLines, MetricsFile
from selfsup_fastai.compare import is_fresh, labeled_loaders
from selfsup_fastai.data.files import find_files
from selfsup_fastai.data.images import UnlabeledDataLoaders, auto_workers, split, usable_files
from selfsup_fastai.downstream.interpret import nearest_neighbors
from selfsup_fastai.downstream.learner import DownstreamLearner, downstream_learner
from selfsup_fastai.encoders.checkpoint import get_encoder
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say
from selfsup_fastai.pictures import draw, grid_axes, plot_history, save_picture
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner

VALID_NAMES = ("valid", "val", "validation", "test")


def pretrain(
    folder: str | Path,  # Of images, at any depth
    out: str | Path,  # The run's folder; made if missing
    task: str = "rotation",
    epochs: int = 20,
    lr: float = 3e-3,
    arch: str = "resnet18",
    encoder: str | Path | None = None,  # Go on from a saved encoder
    pretrained: bool = False,
    seed: int = 42,
    settings: dict | None = None,  # Of the task
    **data,  # Arguments of `UnlabeledDataLoaders.from_folder`
) -> PretextLearner:
    """Pretrains an encoder on a folder of images and leaves a run folder; returns the learner."""
    out = _run_folder(out)
    set_seed(seed, reproducible=True)
    dls = UnlabeledDataLoaders.from_folder(folder, seed=seed, **data)
    dls.report.to_csv(out / "left_out.csv", index=False)
    learn = pretext_learner(dls, task, arch, encoder=encoder, pretrained=pretrained, **(settings or {}))
    _write_settings(
        out, task=repr(learn.task), epochs=epochs, lr=lr, arch=arch, seed=seed, pretrained=pretrained, **data
    )
    learn.show_batch()
    save_picture(out / "batch.png")
    with _finished(learn, out, learn.task.chance()):
        learn.fit_one_cycle(epochs, lr, cbs=MetricsFile(out / "metrics.csv"))
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
) -> DownstreamLearner:
    """Fine-tunes an encoder on a folder of classes and leaves a run folder; returns the learner."""
    out = _run_folder(out)
    table, report = labeled_files(folder, valid_pct, seed)
    report.to_csv(out / "left_out.csv", index=False)
    fresh = is_fresh(encoder)
    source = encoder if fresh else get_encoder(encoder)
    n_in, side = (int(table["channels"].max()), 128) if fresh else (source.in_chans, source.size or 128)
    set_seed(seed, reproducible=True)
    workers = auto_workers(len(table), table["pixels"].mean()) if num_workers is None else num_workers
    dls = labeled_loaders(table, n_in, size or side, bs, workers)
    learn = downstream_learner(dls, source, metrics=accuracy, path=out)
    _write_settings(out, encoder=learn.model.encoder.arch, epochs=epochs, lr=lr, gradual=gradual, seed=seed)
    _show_labeled(learn)
    save_picture(out / "batch.png")
    with _finished(learn, out, 1 / len(dls.vocab)):
        _fit(learn, epochs, lr, gradual, fresh, MetricsFile(out / "metrics.csv"))
    _write_predictions(learn, table, out)
    return learn


def _fit(learn: DownstreamLearner, epochs: int, lr: float, gradual: bool, fresh: bool, log: MetricsFile) -> None:
    if fresh:
        say("From scratch there is nothing to keep: all layers train from the start, at one rate.")
        learn.fit_one_cycle(epochs + 1, lr, cbs=log)
    else:
        learn.fine_tune(epochs, lr, gradual=gradual, cbs=log)


def labeled_files(folder: str | Path, valid_pct: float = 0.2, seed: int = 42) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table (file, label, is_valid, channels, pixels) of a folder of classes, and the report on unreadable files.

    The label is the name of the folder an image lies in. Folders train/ beside valid/ (or val/, test/) are the split;
    otherwise `valid_pct` of each class is drawn by `seed`, at least one.
    """
    folder = Path(folder)
    ok, report = usable_files(find_files(folder))
    table = pd.DataFrame({"file": ok["file"], "label": [f.parent.name for f in ok["file"]]})
    table = table.assign(channels=ok["channels"], pixels=ok["width"] * ok["height"])
    within = [f.relative_to(folder).parts for f in ok["file"]]
    parts = pd.Series([p[0] if len(p) > 2 else "" for p in within], dtype=str)
    if (parts == "train").any() and parts.isin(VALID_NAMES).any():
        valid_name = next(name for name in VALID_NAMES if (parts == name).any())
        table["is_valid"] = parts == valid_name
        table = table[parts.isin(("train", valid_name))].reset_index(drop=True)
    else:
        table["is_valid"] = False
        for _, rows in table.groupby("label"):
            if len(rows) > 1:
                table.loc[rows.index[split(len(rows), valid_pct, seed)[1]], "is_valid"] = True
    _check_classes(table, folder)
    return table, report


def _check_classes(table: pd.DataFrame, folder: Path) -> None:
    wanted = f"Expected a folder of images for each class in {str(folder)!r}, or train/ and valid/ with such folders"
    classes = sorted(table["label"].unique())
    if len(classes) < 2:
        raise DataError(f"{wanted}; found {len(table)} images in {len(classes)} folder(s).")
    missing = sorted(set(classes) - set(table["label"][~table["is_valid"]]))
    if missing or not table["is_valid"].any():
        raise DataError(
            f"{wanted}; there is no training image of {', '.join(missing) or 'some class'}, or none to validate with."
        )


def _run_folder(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise DataError(f"{str(out)!r} is a file; the run needs a folder to write to.")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _write_settings(out: Path, **settings) -> None:
    settings["versions"] = {"selfsup_fastai": __version__}
    (out / "settings.json").write_text(json.dumps(settings, indent=2, default=str) + "\n")


@contextmanager
def _finished(learn: Learner, out: Path, chance: float | None) -> Iterator[None]:
    """Lines instead of bars while the learner is fitted; whatever ends it, the encoder and the curves are saved."""
    learn.add_cb(lines := EpochLines())
    try:
        with learn.no_bar():
            yield
    except KeyboardInterrupt:
        say("Stopped; the encoder is saved as it is.")
        raise
    finally:
        learn.remove_cb(lines)
        learn.save_encoder(out / "encoder.safetensors")
        if (out / "metrics.csv").exists():
            plot_history(pd.read_csv(out / "metrics.csv"), chance)
            save_picture(out / "history.png")


def _show_labeled(learn: DownstreamLearner) -> None:
    b = learn.dls.train.one_batch()
    decoded = learn.dls.train.after_batch.decode(b[:1])[0].float() / 255
    for ax, image, label in zip(grid_axes(min(9, len(decoded))), decoded, b[1]):
        draw(ax, image, str(learn.dls.vocab[int(label)]))


def _write_predictions(learn: DownstreamLearner, table: pd.DataFrame, out: Path) -> None:
    """predictions.csv and confusion.png of the validation images."""
    with learn.no_bar():
        probabilities, truth = learn.get_preds()
    named = probabilities.argmax(1)
    vocab = list(learn.dls.vocab)
    rows = table[table["is_valid"]].reset_index(drop=True)
    rows = rows.assign(predicted=[vocab[i] for i in named], probability=probabilities.max(1).values.numpy())
    rows.drop(columns=["is_valid", "channels", "pixels"]).to_csv(out / "predictions.csv", index=False)
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
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


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
