"""Commands that say whether pretraining helps: `selfsup probe` and `compare`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from selfsup_fastai.cli.options import (
    BatchOption,
    Cache,
    CacheOption,
    EncoderOption,
    LabeledArgument,
    MaxGbOption,
    PathsOption,
    Precision,
    SeedOption,
    SizeOption,
    SplitOption,
    WorkersOption,
    parsed_amounts,
)
from selfsup_fastai.cli.tables import text
from selfsup_fastai.errors import unknown
from selfsup_fastai.pretext import TASKS


def probe(
    labeled: LabeledArgument,
    encoder: EncoderOption,
    out: Annotated[Path, typer.Option(help="Folder for tables and picture.")] = Path("runs/probe"),
    layer: Annotated[str | None, typer.Option(help="Look into this layer alone.", show_default="all")] = None,
    valid_pct: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of each class to test on, where there is no valid/ folder.")
    ] = 0.2,
    split_by: SplitOption = None,
    size: SizeOption = None,
    bs: BatchOption = 64,
    cache: CacheOption = Cache.disk,
    max_gb: MaxGbOption = 20,
    workers: WorkersOption = None,
    paths: PathsOption = False,
    seed: SeedOption = 42,
) -> None:
    """Ask what an encoder knows of your classes, untrained on them.

    Is the class of an image told by its features alone? The encoder stays as it is. A linear classifier is fitted on
    each of its layers, and the nearest images vote; beside it stands the same network with random weights. What is no
    better than that has not helped. Quick, and a first look only: `selfsup compare` trains and repeats, and says which
    differences are more than chance.

    \b
    selfsup probe labeled --encoder runs/rotation/encoder.safetensors --out probe
    """
    from selfsup_fastai.runs.probing import caution, probe_folder, summary

    data = dict(size=size, bs=bs, num_workers=workers, cache=cache.argument, max_gb=max_gb, paths=paths, seed=seed)
    found = probe_folder(labeled, out, encoder, layer, valid_pct, split_by, **data)
    first = found.layers.iloc[0]
    typer.echo(f"{first['metric']} on {first['n_test']:,} test images\n\n{text(summary(found))}\n\n{caution(found)}")
    typer.echo(out / "probe.png")


def compare(
    folder: Annotated[Path, typer.Argument(help="Folder of images without labels, at any depth.", show_default=False)],
    labeled: Annotated[
        Path | None,
        typer.Option(
            help="A folder of images for each class; or train/ and valid/ with such folders: valid/ is tested on.",
            show_default="none: only signs that need no labels",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("report"),
    tasks: Annotated[
        str | None, typer.Option(help="Tasks to compare: rotation,simclr,...", show_default="ten of all kinds")
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images that each task may look at in pretraining.", show_default="a lunch break's worth"
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Times that everything is repeated with other draws.", show_default="5, or what time allows"
        ),
    ] = None,
    labels: Annotated[
        str, typer.Option(help="How many labels to try: shares of the labeled images, 0.1,1.0, or 5,20 a class.")
    ] = "0.05,0.2,1.0",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of each fine-tuning run.", show_default="200, and 5 epochs at least"),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Instead of steps: passes over the labeled images.", show_default="by steps"),
    ] = None,
    valid_pct: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the labeled images to test on, where there is no valid/.")
    ] = 0.3,
    split_by: SplitOption = None,
    exclude_tested: Annotated[
        bool,
        typer.Option("--exclude-tested", help="Where FOLDER holds test images, too: do not pretrain on these."),
    ] = False,
    size: Annotated[int, typer.Option(min=8, help="Side of the images in pixels.")] = 128,
    arch: Annotated[str | None, typer.Option(help="Any timm architecture.", show_default="resnet10t")] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Compare with timm's weights, too, if need be by downloading them.")
    ] = False,
    bs: BatchOption = 64,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="auto: what a few timed steps prefer. fp16 needs a GPU.", show_default="fp32; without --budget auto"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the same command's comparison that was stopped.")
    ] = False,
    cache: CacheOption = Cache.disk,
    max_gb: MaxGbOption = 20,
    workers: WorkersOption = None,
    paths: PathsOption = False,
    seed: Annotated[int, typer.Option(help="Same seed, same split.")] = 42,
) -> None:
    """Find out whether pretraining helps on your images.

    Each task is pretrained for the same budget, then fine-tuned on few labels and on more, several times; so is the
    same network from scratch. What comes out is a sentence, a table and a page for the browser. "No task is
    distinguishable from scratch" is an answer. Without --budget it takes about a lunch break: try it first with two
    tasks and a small budget.

    \b
    selfsup compare photos --labeled labeled --out report
    selfsup compare photos --labeled labeled --tasks rotation,simclr --budget 20000
    """
    names = tasks.split(",") if tasks else None
    for name in (part for one in names or [] for part in one.split("+")):  # before the seconds that the imports take
        if name not in TASKS:
            raise unknown("pretext task", name, TASKS)
    amounts = parsed_amounts(labels)
    from selfsup_fastai.runs.comparing import compare_folders, summary

    asked = dict(tasks=names, budget=budget, seeds=seeds, labels=amounts, arch=arch, pretrained=pretrained or None)
    asked |= dict(precision=precision and precision.value, steps=steps, epochs=epochs)
    asked |= dict(leaks="exclude" if exclude_tested else "raise", command=shlex.join(["selfsup", *sys.argv[1:]]))
    data = dict(num_workers=workers, cache=cache.argument, max_gb=max_gb, paths=paths, seed=seed, resume=resume)
    found, page = compare_folders(folder, labeled, out, size, bs, valid_pct, split_by, **data, **asked)
    typer.echo(f"{found.verdict}\n\n{text(summary(found))}\n\n{page}")
