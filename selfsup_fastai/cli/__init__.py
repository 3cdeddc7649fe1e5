"""The command `selfsup`. Heavy imports happen inside the commands, so that `--help` answers at once.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 an error (one line; `--debug` shows where),
2 wrong usage, 3 some inputs could not be read, 130 stopped by Ctrl-C, 143 by a termination signal.
"""

import signal
import warnings
from typing import Annotated

import typer

from selfsup_fastai import __version__
from selfsup_fastai.cli.judging import compare, probe
from selfsup_fastai.cli.kept import cache_ls, cache_rm
from selfsup_fastai.cli.looking import demo, scan, tasks
from selfsup_fastai.cli.reporting import reported, terminate
from selfsup_fastai.cli.sharding import shards
from selfsup_fastai.cli.training import finetune, pretrain
from selfsup_fastai.cli.using import embed, export, neighbors, predict

COMMANDS = (tasks, scan, pretrain, finetune, predict, embed, neighbors, probe, compare, export, shards, demo)
"""In the order in which `--help` lists them."""

app = typer.Typer(
    name="selfsup",
    help="Self-supervised pretraining on a folder of unlabeled images, and fine-tuning on few labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache = typer.Typer(no_args_is_help=True, help="See and remove decoded pixels that are kept from run to run.")
for command in COMMANDS:
    app.command()(reported(command))
for name, command in (("ls", cache_ls), ("rm", cache_rm)):
    cache.command(name)(reported(command))
app.add_typer(cache, name="cache")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"selfsup_fastai {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error arose, not only what it is.")] = False,
) -> None: ...


def main() -> None:
    """The entry point."""
    signal.signal(signal.SIGTERM, terminate)
    warnings.filterwarnings(
        "ignore", "`torch.jit.script` is deprecated", FutureWarning
    )  # fastai's, while it is imported
    app()
