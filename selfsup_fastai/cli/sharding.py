"""`selfsup shards`: many small files as few large ones."""

from pathlib import Path
from typing import Annotated

import typer

from selfsup_fastai.cli.options import SeedOption


def shards(
    folder: Annotated[Path, typer.Argument(help="Folder of images, at any depth.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the shards and their index.", show_default=False)],
    per_shard: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the shards that are there.")] = False,
    seed: SeedOption = 42,
) -> None:
    """Pack a folder of images into tar files that can be trained on, here or from far away.

    \b
    selfsup shards photos --out shards
    selfsup pretrain shards --task rotation
    """
    from selfsup_fastai.data.shard_writing import write_shards

    write_shards(folder, out, per_shard, seed, overwrite)
    typer.echo(out)
