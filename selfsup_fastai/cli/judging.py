"""Commands that say whether pretraining helps: `selfsup probe` and `compare`."""

from pathlib import Path
from typing import Annotated

import typer

from selfsup_fastai.cli.options import (
    BatchOption,
    Cache,
    CacheOption,
    EncoderOption,
    MaxGbOption,
    PathsOption,
    SizeOption,
    SplitOption,
    WorkersOption,
)
from selfsup_fastai.cli.tables import text


def probe(
    labeled: Annotated[
        Path,
        typer.Argument(
            help="A folder of images for each class; or train/ and valid/ with such folders.", show_default=False
        ),
    ],
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
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 42,
) -> None:
    """Ask what an encoder knows already: is the class of an image told by its features alone?

    The encoder stays as it is. A linear classifier is fitted on each of its layers, and the nearest images vote; beside
    it stands the same network with random weights. What is no better than that has not helped. Quick, and a first
    look only: `selfsup compare` trains and repeats, and says which differences are more than chance.

    \b
    selfsup probe labeled --encoder runs/rotation/encoder.safetensors --out probe
    """
    from selfsup_fastai.runs.probing import caution, probe_folder, summary

    data = dict(size=size, bs=bs, num_workers=workers, cache=cache.argument, max_gb=max_gb, paths=paths, seed=seed)
    found = probe_folder(labeled, out, encoder, layer, valid_pct, split_by, **data)
    first = found.layers.iloc[0]
    typer.echo(f"{first['metric']} on {first['n_test']:,} test images\n\n{text(summary(found))}\n\n{caution(found)}")
    typer.echo(out / "probe.png")
