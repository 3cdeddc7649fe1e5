"""`selfsup pretrain` and `selfsup finetune`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from selfsup_fastai.cli.options import (
    Cache,
    CacheOption,
    Consistency,
    LabeledArgument,
    MaxGbOption,
    PathsOption,
    Precision,
    PrecisionOption,
    Schedule,
    SeedOption,
    SplitOption,
    WorkersOption,
    first_free,
    parsed_settings,
    parsed_window,
)
from selfsup_fastai.cli.reporting import LAUNCHED, LOST
from selfsup_fastai.errors import unknown
from selfsup_fastai.pretext import TASKS


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
    precision: PrecisionOption = Precision.fp32,
    paths: PathsOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in --out.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the same command's run that was stopped or killed, if any.")
    ] = False,
    nproc: Annotated[
        int,
        typer.Option(min=1, help="Processes that train together, each on a GPU, or all on the CPU; --bs is of each."),
    ] = 1,
    seed: SeedOption = 42,
) -> None:
    """Pretrain an encoder on a folder of unlabeled images.

    \b
    selfsup pretrain photos --task rotation
    selfsup pretrain scans --task simclr --epochs 100 --size 224
    """
    for name in task.split("+"):  # before the seconds that the imports take
        if name not in TASKS:
            raise unknown("pretext task", name, TASKS)
    settings = parsed_settings(set_ or [])
    from selfsup_fastai.processes import is_first, is_started
    from selfsup_fastai.runs import pretraining
    from selfsup_fastai.runs.launching import end_with, launch

    out = out or (resume and _unfinished(Path("runs"), task)) or first_free(Path("runs") / task)
    if nproc > 1 and not is_started():
        pretraining.check_start(folder, out, overwrite, resume, _asked(precision))
        code = launch(nproc, out, LAUNCHED, LOST)
        if code:
            raise typer.Exit(code)
        return
    if LAUNCHED in os.environ:
        end_with(int(os.environ[LAUNCHED]), LOST)
    data = dict(size=size, bs=bs, valid_pct=valid_pct, n_in=n_in, num_workers=workers, overwrite=overwrite)
    data |= dict(cache=cache.argument, max_gb=max_gb, resume=resume, paths=paths)
    data |= dict(window=parsed_window(window), split_by=split_by, precision=_asked(precision))
    pretraining.pretrain(folder, out, task, epochs, lr, arch, encoder, pretrained, seed, settings, **data)
    if is_first():
        typer.echo(out / "encoder.safetensors")


def finetune(
    labeled: LabeledArgument,
    encoder: Annotated[
        str, typer.Option(help="A saved encoder; or an architecture, such as resnet18, to start from scratch.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/finetune")] = None,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the labeled images, after one with the encoder frozen.")
    ] = 10,
    lr: Annotated[float, typer.Option(help="Learning rate of the head; the encoder's are lower.")] = 2e-3,
    schedule: Annotated[
        Schedule,
        typer.Option(
            help="Which layers learn when: gradual: from the top down, stage by stage; two_stage: the new last layer, "
            "then all; all: everything at once; lp_ft: the last layer for half of the time, then all."
        ),
    ] = Schedule.gradual,
    consistency: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images without labels that are learned from, too: what is said of an image shall not "
            "change with small changes of it. Not your test images.",
            show_default="none",
        ),
    ] = None,
    consistency_kind: Annotated[
        Consistency, typer.Option(help="In which way that is asked for; each is named after its paper.")
    ] = Consistency.fixmatch,
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
    precision: PrecisionOption = Precision.fp32,
    paths: PathsOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in --out.")] = False,
    seed: SeedOption = 42,
) -> None:
    """Fine-tune an encoder on a folder of labeled images.

    \b
    selfsup finetune labeled --encoder runs/rotation/encoder.safetensors
    selfsup finetune labeled --encoder resnet18                (the same without pretraining, to compare)
    selfsup predict new_images --model runs/finetune/model.safetensors
    """
    from selfsup_fastai.runs import finetuning

    out = out or first_free(Path("runs/finetune"))
    data = dict(num_workers=workers, overwrite=overwrite, cache=cache.argument, max_gb=max_gb, paths=paths)
    data |= dict(split_by=split_by, consistency=consistency, consistency_kind=consistency_kind.value)
    data |= dict(precision=_asked(precision))
    finetuning.finetune(labeled, out, encoder, epochs, lr, schedule.value, valid_pct, size, bs, seed, **data)
    typer.echo(out)


def _asked(precision: Precision) -> str | None:
    """For learners: None is plain fp32."""
    return None if precision is Precision.fp32 else precision.value


def _unfinished(folder: Path, task: str) -> Path | None:
    """The last run of a task in this folder that was stopped, if there is one."""
    from selfsup_fastai.runs.folder import STATE

    states = [*folder.glob(f"{task}/{STATE}"), *folder.glob(f"{task}-[0-9]*/{STATE}")]
    return max(states, key=lambda state: state.stat().st_mtime).parent if states else None
