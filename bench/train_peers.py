"""A part of bench/train.py: SimCLR, BYOL and rotation from a folder of photographs, ours beside others'."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from fastai.torch_core import default_device, set_seed
from measure import against_best, empty_cache, finish, markdown, ratios, spread, tell, timed
from methods import SHARED
from peers import (
    LIGHTLY,
    WORKERS,
    fastai_learner,
    fastai_loaders,
    lightly_batches,
    lightly_default_views,
    lightly_steps,
)
from steps import Bare, epoch, half_epoch, loaders, photographs

from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner

OURS, HALF, COLD = "ours", "ours, bf16, channels last", "ours, first epoch: cache empty"
BARE, BARE_HALF = "bare step", "bare step, bf16, channels last"


def peers(work: Path, args: argparse.Namespace) -> str:
    """All methods that are asked for, a table each."""
    folder = photographs(work, args.images + 1, args.folder)  # one is kept to validate with
    texts = [described(args)]
    for method in args.methods:
        tell(method)
        with quiet():
            seconds = timed(cases(method, folder, work, args), args.rounds)
        texts.append(text(method, seconds))
    if args.trace:
        with quiet():
            trace(learner(args.methods[0], folder, args), args.trace)
    return "\n\n".join(texts)


def cases(method: str, folder: Path, work: Path, args: argparse.Namespace) -> dict[str, Callable[[], int]]:
    """Whole epochs, each giving the number of its images; as many bare steps."""
    set_seed(0, reproducible=True)
    learn = learner(method, folder, args)
    steps = len(learn.dls.train)
    files = list(learn.dls.train_ds.items)

    def first_epoch() -> int:
        with empty_cache(work):
            return epoch(learner(method, folder, args))

    found = {
        OURS: partial(epoch, learn),
        HALF: partial(half_epoch, learn),
        COLD: first_epoch,
        BARE: partial(Bare.of(learn).steps, steps),
        BARE_HALF: partial(Bare.of(learn, half=True).steps, steps),
    }
    for workers in WORKERS:
        if method in LIGHTLY:
            found[f"lightly, {workers} workers"] = lightly_epoch(method, files, args, workers)
        found[f"fastai and a callback, {workers} workers"] = fastai_epoch(method, files, args, workers)
    return found


def learner(method: str, folder: Path, args: argparse.Namespace) -> PretextLearner:
    """Ours, as anybody makes it."""
    return pretext_learner(loaders(folder, args.size, args.bs), method, args.arch)


def net(args: argparse.Namespace) -> tuple[torch.nn.Module, int]:
    """The net of the others, and the number of its features."""
    encoder = create_encoder(args.arch, size=args.size)
    return encoder.body, encoder.num_features


def settings(method: str, steps: int) -> dict:
    """Of lightly's parts; BYOL's plans its momentum."""
    return {**SHARED[method], **({"steps": steps} if method == "byol" else {})} if method in SHARED else {}


def lightly_epoch(method: str, files: list[Path], args: argparse.Namespace, workers: int) -> Callable[[], int]:
    """lightly in the loop of its documentation: its transform in workers, its loss, SGD at a rate of .06."""
    batches = lightly_batches(lightly_default_views(method, args.size), files, args.bs, workers)
    make, _ = LIGHTLY[method]
    model = make(*net(args), **settings(method, len(batches) * (args.rounds + 1))).to(default_device())
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.06)
    return lambda: args.bs * sum(1 for _ in lightly_steps(model, opt, batches))


def fastai_epoch(method: str, files: list[Path], args: argparse.Namespace, workers: int) -> Callable[[], int]:
    """Plain fastai: its loaders, its learner, a callback that makes the question on the device."""
    dls = fastai_loaders(files, args.size, args.bs, workers)
    planned = settings(method, len(dls.train) * (args.rounds + 1))
    return partial(epoch, fastai_learner(method, *net(args), dls, **planned))


def text(method: str, seconds: pd.DataFrame) -> str:
    """A method's table, and what counts in it."""
    medians = seconds.median()
    table = spread(1 / seconds, "{:,.1f}").assign(ratio=ratios(seconds, OURS, "{:.2f}"))
    others = [name for name in seconds if name.startswith(("lightly", "fastai"))]
    shares = {OURS: BARE, HALF: BARE_HALF}
    said = [
        f"{name} has {medians[bare] / medians[name]:.2f} of the speed of its {bare}" for name, bare in shares.items()
    ]
    best = [
        against_best(seconds, name, [n for n in others if n.startswith(kind)])
        for name in (OURS, HALF)
        for kind in ("lightly", "fastai")
        if any(n.startswith(kind) for n in others)
    ]
    return f"{markdown(table, f'{method}, images a second')}\n\n{'; '.join(said)}. {'; '.join(best)}."


def described(args: argparse.Namespace) -> str:
    """What all tables have in common."""
    return "\n".join(
        [
            f"{args.images:,} photographs at {args.size} px in batches of {args.bs}, {args.arch}; whole epochs without",
            f"validation, median, least and most of {args.rounds} rounds; ratio: how many times as long an image takes",
            "as with ours. Ours: `UnlabeledDataLoaders.from_folder`, `pretext_learner`, all defaults, reading pixels",
            "that an earlier epoch kept; its first epoch includes making loaders and learner with nothing kept.",
            "lightly: the loop of its documentation, its transforms with all defaults, SGD. fastai: ImageDataLoaders,",
            "a callback that makes the views (kornia's) or the turns on the device, lightly's heads and losses, Adam.",
        ]
    )


def trace(learn: PretextLearner, file: Path) -> None:
    """A trace of an epoch by torch's profiler, after one that does not count."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if default_device().type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    epoch(learn)
    with torch.profiler.profile(activities=kinds) as profile:
        epoch(learn)
        finish()
    profile.export_chrome_trace(str(file))
