"""Commands to look around with: `selfsup tasks`, `scan` and `demo`."""

from pathlib import Path
from typing import Annotated

import typer

from selfsup_fastai.cli.options import SeedOption
from selfsup_fastai.cli.tables import text


def tasks() -> None:
    """List the pretext tasks."""
    from selfsup_fastai.pretext import list_tasks

    table = list_tasks().reset_index()[["task", "images", "paper", "what is asked"]]
    widths = [max(map(len, [name, *table[name]])) for name in table.columns]
    for row in (table.columns, *table.itertuples(index=False)):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def scan(
    folder: Annotated[Path, typer.Argument(help="Folder of DICOM files, or of other images.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for scan.csv, problems.csv and contact_sheet.png, on which burned-in text can be read.",
            show_default="nothing is written",
        ),
    ] = None,
    paths: Annotated[
        bool, typer.Option("--paths", help="Write paths into the tables: they and file names may identify patients.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read files.", show_default="by the number of files")
    ] = None,
) -> None:
    """Tell what is in a folder: modalities, sizes, patients, files that cannot be used, what to look at twice."""
    from selfsup_fastai import scan as scanning

    if out:
        scanning.check_out(out, folder)
    found = scanning.scan_folder(folder, n_workers=workers)
    typer.echo(found)
    if out:
        scanning.write_scan(found, out, paths)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo"),
    seed: SeedOption = 42,
) -> None:
    """Pretrain on handwritten digits and fine-tune on 50 labels: a table and pictures in a few minutes."""
    from selfsup_fastai.demo import lesson, run_demo

    table, layers = run_demo(out, seed=seed)
    typer.echo(f"\nLinear classifier on each frozen layer, one draw of 5 labels a class:\n\n{text(layers)}")
    typer.echo(f"\nAccuracy on 500 test images with 5 labels a class:\n\n{text(table)}")
    typer.echo(lesson(table))
    typer.echo(
        f"\nPictures, curves and encoders: {out}/rotation, {out}/simclr. Tables: {out}/table.csv, {out}/layers.csv"
    )
