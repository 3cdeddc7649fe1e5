"""A part of bench/train.py: what an image costs as work grows, and what a run costs before it trains."""

import argparse
import json
from functools import partial
from pathlib import Path

import pandas as pd
from measure import empty_cache, markdown, output, spread, tell, timed
from steps import epoch, loaders, photographs

from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext.learner import pretext_learner

TASK = "simclr"
STEPS = 2  # of the smallest epoch


def growth(work: Path, args: argparse.Namespace) -> str:
    """Three tables."""
    return "\n\n".join([by_work(work, args), by_files(work, args), before_training(work, args)])


def by_work(work: Path, args: argparse.Namespace) -> str:
    """Milliseconds an image of training: more images, larger ones, larger batches."""
    size, bs = args.task_size, args.task_bs
    n = 2 * bs * STEPS
    sizes = {
        f"{n:,} images, {size} px, batches of {bs}": (n, size, bs),
        "ten times the images": (10 * n, size, bs),
        "twice the side": (n, 2 * size, bs),
        "twice the batch": (n, size, 2 * bs),
    }
    cases = {}
    for name, (images, side, batch) in sizes.items():
        tell(name)
        with quiet():
            dls = loaders(photographs(work, images + 1, args.folder), side, batch)
            cases[name] = partial(epoch, pretext_learner(dls, TASK, args.arch))
    with quiet():
        seconds = timed(cases, args.rounds)
    medians, table = seconds.median(), spread(1e3 * seconds)
    table["ratio"] = [f"{median / medians.iloc[0]:.2f}" for median in medians]
    return f"{TASK}, {args.arch}; milliseconds an image, pixels kept.\n\n{markdown(table, 'epoch')}"


def by_files(work: Path, args: argparse.Namespace) -> str:
    """Milliseconds an image of making loaders, with nothing kept and with everything."""
    cases = {}
    for n in (args.images // 5, 2 * args.images):
        folder = photographs(work, n, args.folder)

        def full(folder: Path = folder, n: int = n) -> int:
            loaders(folder, args.size, args.bs)
            return n

        def empty(full=full) -> int:
            with empty_cache(work):
                return full()

        cases |= {f"{n:,} photographs, cache empty": empty, f"{n:,} photographs, cache full": full}
    with quiet():
        seconds = timed(cases, args.rounds)
    return f"Making loaders at {args.size} px; milliseconds an image.\n\n{markdown(spread(1e3 * seconds), 'loaders')}"


def before_training(work: Path, args: argparse.Namespace) -> str:
    """Seconds of a fresh process, stage by stage."""
    folder, script = photographs(work, args.images + 1, args.folder), Path(__file__).with_name("start.py")
    rows = []
    for i in range(args.rounds + 1):
        tell(f"start, round {i} of {args.rounds}")
        rows.append(json.loads(output(script, folder, args.size, args.bs, TASK, args.arch)))
    stages = pd.DataFrame(rows[1:])
    stages["all"] = stages.sum(axis=1)
    about = f"Seconds of a fresh process until it trains; {args.images:,} photographs, {args.size} px, pixels kept."
    return f"{about}\n\n{markdown(spread(stages), 'stage')}"
