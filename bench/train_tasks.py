"""A part of bench/train.py: every pretext task, end to end, beside its own bare step."""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.torch_core import set_seed
from measure import markdown, tell, timed
from steps import Bare, epoch, photographs, skip_first_stage, where_kept

from selfsup_fastai.data.files import find_files
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner

AIM = 0.8  # of the speed of the bare step: what is below is to be explained


def tasks(work: Path, args: argparse.Namespace) -> str:
    """A row a task."""
    folder = photographs(work, args.task_steps * args.task_bs + 1, args.folder)  # one is kept to validate with
    rows = {}
    for task in args.tasks:
        tell(task)
        with quiet():
            learn = learner(task, folder, args)
            seconds = timed(cases(learn, args.task_steps), args.rounds)
        rows[task] = row(learn, seconds)
    table = pd.DataFrame(rows).T
    low = [task for task in rows if float(table.loc[task, "share"]) < AIM]
    slow = ", ".join(f"{task} ({table.loc[task, 'share']})" for task in low) or "none"
    return f"{described(args)}\n\n{markdown(table, 'task')}\n\nBelow {AIM}: {slow}."


def learner(task: str, folder: Path, args: argparse.Namespace) -> PretextLearner:
    """Of a task with its own net and settings; what is trained first counts as trained."""
    set_seed(0, reproducible=True)
    files = find_files(folder)
    settings = {"size": args.task_size, "bs": args.task_bs, "valid_pct": 0.0, "split_by": "random"}
    table = facts(len(files)).assign(file=files)
    dls = UnlabeledDataLoaders.from_df(table, fn_col="file", cache=where_kept(), **settings)
    learn = pretext_learner(dls, task)
    skip_first_stage(learn)
    return learn


def facts(n: int) -> pd.DataFrame:
    """Of n images, made up for tasks that ask for such: four of a patient, volumes of eight slices, tags."""
    at = np.arange(n)
    owner = at // 4
    tags = {"modality": np.array(["CT", "MR"])[owner % 2], "view": np.array(["PA", "LL"])[owner // 2 % 2]}
    return pd.DataFrame({"patient": owner.astype(str), "volume": at // 8, "place": at % 8, **tags})


def cases(learn: PretextLearner, steps: int) -> dict[str, Callable[[], int]]:
    """An epoch, as many bare steps, and as many batches that are only made."""

    def batches() -> int:
        return learn.dls.train.bs * sum(1 for _ in islice(learn.dls.train, steps))

    return {"ours": partial(epoch, learn), "bare": partial(Bare.of(learn).steps, steps), "batches": batches}


def row(learn: PretextLearner, seconds: pd.DataFrame) -> dict[str, str]:
    """A line of the table, by medians."""
    ours, bare, batches = seconds.median()
    return {
        "net": learn.encoder.arch,
        "images/s": f"{1 / ours:,.1f}",
        "bare step": f"{1 / bare:,.1f}",
        "share": f"{bare / ours:.2f}",
        "batches": f"{batches / ours:.2f}",
        "the rest": f"{1 - (bare + batches) / ours:+.2f}",
    }


def described(args: argparse.Namespace) -> str:
    """What all rows have in common."""
    return "\n".join(
        [
            f"{args.task_steps} batches of {args.task_bs} photographs at {args.task_size} px, each task with its own",
            f"net and settings; whole epochs without validation, medians of {args.rounds} rounds. Images in a second",
            "of training and of bare steps (forward, loss, backward, torch's fused AdamW, on one batch made before).",
            "Then shares of the time of training: the bare steps, batches that are only made, questions and all, and",
            "what is left to fastai's loop, the callbacks, and an optimizer other than that.",
        ]
    )
