"""`selfsup cache ls` and `rm`: decoded pixels that are kept from run to run."""

from typing import Annotated

import typer

from selfsup_fastai.cli.tables import text


def cache_ls() -> None:
    """List what is kept: a row for each time that images were decoded."""
    with _pixel_cache() as pixels:
        table = pixels.table()
        typer.echo(text(table.set_index("build")) if len(table) else "nothing is kept")
        typer.echo(f"{table['GB'].sum():.2f} GB in {pixels.folder}", err=True)


def cache_rm(
    builds: Annotated[list[str] | None, typer.Argument(help="Builds, as `ls` names them.", show_default=False)] = None,
    all_: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
) -> None:
    """Remove what is kept. Runs that use it go on."""
    if bool(builds) == all_:
        raise typer.BadParameter("name builds, or say --all.")
    with _pixel_cache() as pixels:
        freed = pixels.clear(builds or None)
    typer.echo(f"{freed / 1e9:.2f} GB removed")


def _pixel_cache():
    from selfsup_fastai.data.cache import PixelCache

    return PixelCache()
