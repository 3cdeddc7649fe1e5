"""What a frozen encoder knows of a folder of classes, beside a net of the same kind that has learned nothing.

layers.csv     a linear classifier on each layer
neighbors.csv  the vote of the nearest images, in the space of the last features
probe.png      both
left_out.csv   files that could not be read, and why
settings.json  what was run, with which encoder
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torchvision.models
from fastai.data.core import DataLoaders
from matplotlib import pyplot as plt

from selfsup_fastai import __version__
from selfsup_fastai.data.files import listed_in, result_folder
from selfsup_fastai.data.images import auto_workers
from selfsup_fastai.data.labeled import labeled_files, labeled_loaders
from selfsup_fastai.downstream.probes import knn_probe, linear_probe
from selfsup_fastai.encoders.encoder import Encoder, create_encoder
from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.messages import say
from selfsup_fastai.pictures import save_picture
from selfsup_fastai.plots import ShownFrame, wilson
from selfsup_fastai.runs.folder import LEFT_OUT, check_out, untested, write_left_out
from selfsup_fastai.runs.inputs import check_layer, saved, side_of
from selfsup_fastai.seeding import preserved_rng
from selfsup_fastai.writing import whole_file, write_csv

UNTRAINED = "untrained"
MAX_DIM = 1024  # Numbers kept of each layer: a fit takes seconds, not minutes


class Probes(NamedTuple):
    """Scores of the encoder and of an untrained net."""

    layers: ShownFrame  # start, layer, dim, C, score, metric, n_test
    neighbors: ShownFrame  # start, k, score, metric, n_test


def probe_folder(
    labeled: str | os.PathLike,  # A folder of images for each class; or train/ and valid/ with such folders
    out: str | os.PathLike,  # Folder for the tables and the picture, made if missing
    encoder: str | os.PathLike,  # A saved encoder or model
    layer: str | None = None,  # None: all layers
    valid_pct: float = 0.2,  # Share to test on, where there is no valid/
    split_by: str | None = None,  # 'patient' or 'random', as in `labeled_files`
    size: int | None = None,  # Side of the images in pixels; None: as the encoder was trained
    bs: int = 64,
    num_workers: int | None = None,
    cache: bool | str = True,
    max_gb: float = 20.0,
    paths: bool = False,  # Write names of DICOM files, too: they may identify patients
    seed: int = 42,  # Of the split, the folds and the untrained net
) -> Probes:
    """Probes an encoder on labeled images; nothing of it is trained."""
    _check_out(out, labeled)
    net, origin, _ = saved(encoder)
    check_layer(net, layer)
    side = side_of(net, size)
    with listed_in(str(Path(out) / LEFT_OUT)):
        table, report = labeled_files(labeled, valid_pct, seed, side, cache, max_gb, split_by)
    n_test = int(table["is_valid"].sum())
    counts = f"{len(table) - n_test:,} to fit, {n_test:,} to test on"
    say(f"{len(table):,} images of {table['label'].nunique()} classes ({counts}).")
    workers = auto_workers(len(table), table["pixels"].mean()) if num_workers is None else num_workers
    dls = labeled_loaders(table, net.image_channels, side, bs, workers, cache, max_gb)
    starts = {_name(origin["rounds"]): net, UNTRAINED: untrained(net, seed)}
    found = probed(starts, dls, layer, seed)
    found.layers.attrs["untested"] = untested(table)
    out = result_folder(out)
    write_left_out(report, [labeled], out, paths)
    settings = {"encoder": origin, "size": side, "layer": layer, "valid_pct": valid_pct, "seed": seed}
    settings |= {"selfsup_fastai": __version__, "classes": len(dls.vocab)}
    (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_csv(found.layers, out / "layers.csv")
    write_csv(found.neighbors, out / "neighbors.csv")
    _draw(found)
    with whole_file(out / "probe.png") as file:
        save_picture(file)
    return found


def probed(
    starts: dict[str, Encoder],
    dls: DataLoaders,  # Labeled: fitted on `dls.train`, tested on `dls.valid`
    layer: str | None = None,
    seed: int = 42,
) -> Probes:
    """Both probes of each encoder, one below the other."""
    layers = {name: linear_probe(net, dls, layer or "all", max_dim=MAX_DIM, seed=seed) for name, net in starts.items()}
    neighbors = {name: knn_probe(net, dls, seed=seed) for name, net in starts.items()}
    return Probes(_stacked(layers), _stacked(neighbors))


def _stacked(tables: dict[str, ShownFrame]) -> ShownFrame:
    for name, table in tables.items():
        table.insert(0, "start", name)
    whole = pd.concat(list(tables.values()), ignore_index=True)
    whole.attrs = {**next(iter(tables.values())).attrs, "baseline": UNTRAINED}
    return whole


def untrained(encoder: Encoder, seed: int) -> Encoder:
    """A net of the same kind with random weights, fed with the same images."""
    kwargs = {k: v for k, v in encoder.kwargs.items() if k not in ("num_classes", "in_chans")}
    source = encoder.source.removeprefix("split ")
    if source == "module":
        raise TaskError("A network of your own is not made anew here. In Python: linear_probe(YourNet(), dls).")
    arch = encoder.arch if source == "timm" else torchvision.models.get_model_builder(encoder.arch)
    n_in = None if encoder.split else encoder.in_chans
    with preserved_rng():
        torch.manual_seed(seed)
        net = create_encoder(arch, n_in, size=encoder.size, split=encoder.split, **kwargs)
    net.input, net.mean, net.std = encoder.input, encoder.mean, encoder.std
    return net


def _name(rounds: list[str]) -> str:
    """Of the encoder, by how it was trained."""
    name = " + ".join(map(str, rounds)) or "encoder"
    return f"{name} (given)" if name == UNTRAINED else name


def _check_out(out: str | os.PathLike, labeled: str | os.PathLike) -> None:
    """Raises `DataError` where a run's folder would get mixed up, or the picture be taken for an image."""
    check_out(out, labeled)
    if Path(out).is_dir() and (Path(out) / "metrics.csv").exists():
        raise DataError(f"{str(out)!r} is the folder of a training run. Choose another.")


def _draw(found: Probes) -> None:
    _, axes = plt.subplots(1, 2, figsize=(11, 4))
    for ax, table, title in zip(axes, found, ("linear classifier on each layer", "vote of the nearest images")):
        table.show(ax)
        ax.set_title(title)
    plt.tight_layout()


def caution(found: Probes) -> str:
    """What scores are to be held against: guessing, and chance in few test images."""
    table = found.layers
    best, n = table["score"].max(), int(table["n_test"].iloc[0])
    low, high = wilson(best, n)
    return (
        f"guessing: {table.attrs['chance']:.3f}. With {n:,} test images the best, {best:.3f}, may stand for anything "
        f"from {low:.2f} to {high:.2f}.{table.attrs.get('untested', '')}{_no_better(found)}"
    )


def _no_better(found: Probes) -> str:
    """Says where random weights do as well as the encoder."""
    lost = []
    for what, table in (("a linear classifier", found.layers), ("the vote of the nearest images", found.neighbors)):
        new = table["start"] == UNTRAINED
        random, own = table["score"][new].max(), table["score"][~new].max()
        lost += [f"{what} ({random:.3f}, the encoder {own:.3f})"] if random >= own else []
    if not lost:
        return ""
    return f" The untrained net is at least as good by {' and '.join(lost)}: there the encoder has not shown to help."


def summary(found: Probes) -> pd.DataFrame:
    """For the screen: a row a layer or number of neighbors, a column a start."""
    starts = list(dict.fromkeys(found.layers["start"]))
    wide = [
        pd.DataFrame(table).pivot(index=index, columns="start", values="score")[starts].rename(index=title.format)
        for table, index, title in ((found.layers, "layer", "{}"), (found.neighbors, "k", "{} nearest"))
    ]
    order = list(dict.fromkeys(found.layers["layer"]))
    return pd.concat([wide[0].loc[order], wide[1]]).rename_axis(index=None, columns=None)
