"""Parts of bench/train.py: one process and two, by the command; and a figure of a peer's on a GPU."""

import argparse
import time
from functools import partial
from pathlib import Path

import pandas as pd
from fastai.torch_core import default_device
from measure import Absent, markdown, output, spread, tell, timed
from steps import Bare, half_epoch, loaders, photographs

from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext.learner import pretext_learner

COMMAND = "-c", "import sys; from selfsup_fastai.cli import main; sys.argv[0] = 'selfsup'; main()"
KINDS = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
VALID = 2  # Images to validate with: one for each process
EPOCHS = 1, 3  # of a short run and of a long one: what a start costs is in both
PUBLISHED = 341.6, 870.9  # stable-pretraining's images/s on an H200 (benchmarks/imagenet10/RESULTS.md): on CPU, on GPU


def processes(work: Path, args: argparse.Namespace) -> str:
    """Images a second of whole runs, from how much longer a longer run takes. Raises `Absent`."""
    if "--nproc" not in output(*COMMAND, "pretrain", "--help", COLUMNS="200"):
        raise Absent("`selfsup pretrain` has no --nproc here, so there is one process only.")
    folder, rows = photographs(work, args.images + VALID, args.folder), []
    for i in range(args.rounds + 1):
        tell(f"processes, round {i} of {args.rounds}")
        rows.append({name: seconds_an_image(folder, work, args, *kind) for name, kind in KINDS.items()})
    seconds = pd.DataFrame(rows[1:])
    medians, table = seconds.median(), spread(1 / seconds, "{:,.1f}")
    table["speed-up"] = [f"{medians.iloc[0] / median:.2f}" for median in medians]
    short, long = EPOCHS
    about = f"`selfsup pretrain --task simclr --nproc N`, {args.arch}, {args.images:,} photographs at {args.size} px,"
    about += f" {args.bs} images in all processes' batches together; images a second of the epochs that a run of {long}"
    return f"{about} has more than one of {short}.\n\n{markdown(table, 'run')}"


def seconds_an_image(folder: Path, work: Path, args: argparse.Namespace, n_processes: int, threads: int) -> float:
    """By the difference of two runs."""
    short, long = (run(folder, work, args, n_processes, threads, epochs) for epochs in EPOCHS)
    return (long - short) / ((EPOCHS[1] - EPOCHS[0]) * (args.images // args.bs * args.bs))


def run(folder: Path, work: Path, args: argparse.Namespace, n_processes: int, threads: int, epochs: int) -> float:
    """Seconds of one."""
    settings = {
        "task": "simclr",
        "arch": args.arch,
        "size": args.size,
        "valid-pct": (VALID + 0.5) / (args.images + VALID),
        "epochs": epochs,
    }
    settings |= {"bs": args.bs // n_processes, "out": work / "run", "nproc": n_processes}  # it is of each process
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    began = time.perf_counter()
    output(*COMMAND, "pretrain", folder, *options, "--overwrite", OMP_NUM_THREADS=str(threads))
    return time.perf_counter() - began


def gpu(work: Path, args: argparse.Namespace) -> str:
    """Barlow Twins as in the one figure that a peer has published for an H200. Raises `Absent` without a GPU."""
    if default_device().type != "cuda":
        raise Absent("There is no GPU here.")
    arch, size, bs = "vit_small_patch16_224", 224, 256
    with quiet():
        dls = loaders(photographs(work, max(args.images, 16 * bs) + 1, args.folder), size, bs)
        learn = pretext_learner(dls, "barlow_twins", arch)
        bare = Bare.of(learn, half=True)
        cases = {"ours": partial(half_epoch, learn), "bare step": partial(bare.steps, len(learn.dls.train))}
        seconds = timed(cases, args.rounds)
    medians = seconds.median()
    slow, fast = PUBLISHED
    about = (
        f"Barlow Twins, {arch}, batches of {bs} at {size} px, bf16, pixels on the GPU. stable-pretraining gives {slow}"
    )
    about += f" images/s for an H200 with views on the CPU, {fast} with kornia on the GPU."
    share = f"ours has {medians['bare step'] / medians['ours']:.2f} of the speed of the bare step"
    return f"{about}\n\n{markdown(spread(1 / seconds, '{:,.1f}'), 'images a second')}\n\n{share}."
