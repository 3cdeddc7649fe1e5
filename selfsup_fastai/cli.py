"""The command `selfsup`. Heavy imports happen inside the commands, so that `--help` answers at once.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 an error (one line; `--debug` shows where),
2 wrong usage, 130 stopped by Ctrl-C, 143 by a termination signal.
"""

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer

from selfsup_fastai import __version__
from selfsup_fastai.errors import SelfsupError, unknown
from selfsup_fastai.pretext import TASKS

app = typer.Typer(
    name="selfsup",
    help="Self-supervised pretraining on a folder of unlabeled images, and fine-tuning on few labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Cache(str, Enum):
    """Words for `UnlabeledDataLoaders`' argument `cache`."""

    disk = "disk"
    ram = "ram"
    device = "device"
    none = "none"

    @property
    def argument(self) -> bool | str:
        return {"disk": True, "none": False}.get(self.value, self.value)


CacheOption = Annotated[
    Cache, typer.Option(help="Where decoded pixels are kept: on disk for later runs, in memory, on the GPU, nowhere.")
]
MaxGbOption = Annotated[float, typer.Option(min=0.001, help="Size of all pixels that are kept on disk.")]
SplitOption = Annotated[
    str | None,
    typer.Option(
        help="patient: all images of one on one side; random: image by image.",
        show_default="patient where files are DICOM",
    ),
]
PathsOption = Annotated[
    bool, typer.Option("--paths", help="Write names of DICOM files into tables, too: they may identify patients.")
]
WorkersOption = Annotated[
    int | None, typer.Option(help="Processes that open images where no pixels are kept.", show_default="by the work")
]


class Terminated(KeyboardInterrupt):
    """SIGTERM, so that what Ctrl-C saves is saved then, too."""


def reported(command: Callable) -> Callable:
    """Turns what can end a command into one line and an exit code."""

    @wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            line, code = "stopped", 143 if isinstance(stop, Terminated) else 130
        except (typer.Exit, typer.BadParameter, BrokenPipeError):
            raise  # typer's own affair; where nobody reads on it ends quietly
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            expected = isinstance(error, SelfsupError | OSError)
            said = str(error).rpartition(":\n\t")[2]  # without fastai's line about the callback that it came through
            line = said if expected else f"{type(error).__name__}: {said} (selfsup --debug shows where)"
            code = 1
        typer.echo(f"selfsup: {line}", err=True)
        raise typer.Exit(code)

    return run


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


@app.command()
@reported
def tasks() -> None:
    """List the pretext tasks."""
    from selfsup_fastai.pretext import list_tasks

    table = list_tasks().reset_index()[["task", "images", "paper", "what is asked"]]
    widths = [max(map(len, [name, *table[name]])) for name in table.columns]
    for row in (table.columns, *table.itertuples(index=False)):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


@app.command()
@reported
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


@app.command()
@reported
def pretrain(
    folder: Annotated[
        Path, typer.Argument(help="Folder of images, at any depth; labels are not needed.", show_default=False)
    ],
    task: Annotated[
        str, typer.Option(help=f"What the network is asked: {', '.join(TASKS)}; several: rotation+jigsaw.")
    ] = "rotation",
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/TASK")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 20,
    size: Annotated[int, typer.Option(min=8, help="Side of the training images in pixels.")] = 128,
    arch: Annotated[
        str | None, typer.Option(help="Any timm architecture.", show_default="resnet18, or what suits the task")
    ] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="Go on from a saved encoder instead.", show_default=False)
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from timm's weights (downloads them).")
    ] = False,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the one-cycle schedule.")] = 3e-3,
    bs: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 64,
    valid_pct: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the images to validate with.")] = 0.1,
    n_in: Annotated[int | None, typer.Option(help="Channels: 1 or 3.", show_default="1 if all images are grey")] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Of scans: lung, brain, bone, ..., file, full, or WIDTH,CENTER.", show_default="by modality"),
    ] = None,
    split_by: SplitOption = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of the task: --set turns=one; of several: rotation.turns=one.", show_default=False
        ),
    ] = None,
    cache: CacheOption = Cache.disk,
    max_gb: MaxGbOption = 20,
    workers: WorkersOption = None,
    paths: PathsOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in --out.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the same command's run that was stopped or killed, if any.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 42,
) -> None:
    """Pretrain an encoder on a folder of unlabeled images."""
    for name in task.split("+"):  # before the seconds that the imports take
        if name not in TASKS:
            raise unknown("pretext task", name, TASKS)
    settings = _settings(set_ or [])
    from selfsup_fastai import runs

    out = out or (resume and _unfinished(Path("runs"), task)) or _free(Path("runs") / task)
    data = dict(size=size, bs=bs, valid_pct=valid_pct, n_in=n_in, num_workers=workers, overwrite=overwrite)
    data |= dict(cache=cache.argument, max_gb=max_gb, resume=resume, paths=paths)
    data |= dict(window=_window(window), split_by=split_by)
    runs.pretrain(folder, out, task, epochs, lr, arch, encoder, pretrained, seed, settings, **data)
    typer.echo(out / "encoder.safetensors")


@app.command()
@reported
def finetune(
    labeled: Annotated[
        Path,
        typer.Argument(
            help="A folder of images for each class; or train/ and valid/ with such folders.", show_default=False
        ),
    ],
    encoder: Annotated[
        str, typer.Option(help="A saved encoder; or an architecture, such as resnet18, to start from scratch.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/finetune")] = None,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the labeled images, after one with the encoder frozen.")
    ] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate of the head; the encoder's are lower.")] = 2e-3,
    gradual: Annotated[bool, typer.Option(help="Unfreeze the encoder stage by stage; else all at once.")] = True,
    valid_pct: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="Share of each class to validate with, where there is no valid/ folder."),
    ] = 0.2,
    split_by: SplitOption = None,
    size: Annotated[
        int | None, typer.Option(min=8, help="Side of the images in pixels.", show_default="the encoder's")
    ] = None,
    bs: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 32,
    cache: CacheOption = Cache.disk,
    max_gb: MaxGbOption = 20,
    workers: WorkersOption = None,
    paths: PathsOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 42,
) -> None:
    """Fine-tune an encoder on a folder of labeled images."""
    from selfsup_fastai import runs

    out = out or _free(Path("runs/finetune"))
    data = dict(num_workers=workers, overwrite=overwrite, cache=cache.argument, max_gb=max_gb, paths=paths)
    data |= dict(split_by=split_by)
    runs.finetune(labeled, out, encoder, epochs, lr, gradual, valid_pct, size, bs, seed, **data)
    typer.echo(out)


cache = typer.Typer(no_args_is_help=True, help="See and remove decoded pixels that are kept from run to run.")
app.add_typer(cache, name="cache")


@cache.command("ls")
@reported
def cache_ls() -> None:
    """List what is kept: a row for each time that images were decoded."""
    with _pixel_cache() as pixels:
        table = pixels.table()
        typer.echo(_text(table.set_index("build")) if len(table) else "nothing is kept")
        typer.echo(f"{table['GB'].sum():.2f} GB in {pixels.folder}", err=True)


@cache.command("rm")
@reported
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


@app.command()
@reported
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 42,
) -> None:
    """Pretrain on handwritten digits and fine-tune on 50 labels: a table and pictures in a few minutes."""
    from selfsup_fastai.demo import lesson, run_demo

    table, layers = run_demo(out, seed=seed)
    typer.echo(f"\nLinear classifier on each frozen layer, one draw of 5 labels a class:\n\n{_text(layers)}")
    typer.echo(f"\nAccuracy on 500 test images with 5 labels a class:\n\n{_text(table)}")
    typer.echo(lesson(table))
    typer.echo(
        f"\nPictures, curves and encoders: {out}/rotation, {out}/simclr. Tables: {out}/table.csv, {out}/layers.csv"
    )


def _text(table) -> str:
    return table.to_string(float_format="{:.3f}".format, na_rep="")


def _unfinished(folder: Path, task: str) -> Path | None:
    """The last run of a task in this folder that was stopped, if there is one."""
    from selfsup_fastai.runs import STATE

    states = [*folder.glob(f"{task}/{STATE}"), *folder.glob(f"{task}-[0-9]*/{STATE}")]
    return max(states, key=lambda state: state.stat().st_mtime).parent if states else None


def _free(folder: Path) -> Path:
    """`folder`, or folder-2, folder-3 and so on: the first that is not there yet."""
    free, n = folder, 1
    while free.exists():
        n += 1
        free = folder.with_name(f"{folder.name}-{n}")
    return free


def _settings(texts: list[str]) -> dict:
    """'turns=one' -> {'turns': 'one'}, 'rotation.turns=one' -> {'rotation': {'turns': 'one'}}, at any depth."""
    settings: dict = {}
    for name, value in map(_setting, texts):
        *above, name = name.split(".")
        place = settings
        for part in above:
            place = place.setdefault(part, {})
        place[name] = value
    return settings


def _window(text: str | None) -> str | list | None:
    """A name, or width and center: '1500,-600' -> [1500, -600]."""
    parts = [_number(part) for part in (text or "").split(",")]
    return text if any(isinstance(part, str) for part in parts) else parts


def _setting(text: str) -> tuple[str, object]:
    """'turns=one' -> ('turns', 'one'); numbers, true, false and none become values, '0.3,1' a pair of numbers."""
    name, eq, value = text.partition("=")
    if not eq:
        raise typer.BadParameter(f"--set takes NAME=VALUE, got {text!r}.")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    parts = [_number(part) for part in value.split(",")]
    if any(isinstance(part, str) for part in parts):
        return name, value
    return name, parts if len(parts) > 1 else parts[0]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _terminate(*_):
    if multiprocessing.parent_process():  # a worker that opens images inherits this handler; it has nothing to save
        os._exit(143)
    raise Terminated


def main() -> None:
    """The entry point."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.filterwarnings(
        "ignore", "`torch.jit.script` is deprecated", FutureWarning
    )  # fastai's, while it is imported
    app()


if __name__ == "__main__":
    main()
