"""How long a race takes, and what is granted so that it fits: from a few timed steps, before anything long is begun."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from fastai.data.core import DataLoaders
from tqdm.auto import tqdm

from selfsup_fastai.callbacks.precision import fastest, ways
from selfsup_fastai.compare.pretraining import Entrant, reason_for, speed_of
from selfsup_fastai.compare.starts import Start
from selfsup_fastai.compare.trial import BATCH, Budget, budget_for, fine_tuned, labeled_with, predicted
from selfsup_fastai.messages import say

LUNCH = 45 * 60
"""Seconds that a race may take where nothing is said."""

FOR_PRETRAINING, SHOWN = 0.6, 40
"""Its share for pretraining; and times that all images are shown to the encoder, at most."""

LONG = 60 * 60
"""Seconds from which on it is said what would make a race shorter."""

SEEDS, LEAST_SEEDS = 5, 3
"""Times that everything is repeated where nothing is said: as many of them as there is time for."""


class Rung(NamedTuple):
    """A part of the race: each task that is left is pretrained with a budget."""

    tasks: int  # How many are left
    share: float  # Of the whole budget
    seeds: int


def rungs_for(
    n_tasks: int,
    seeds: int,  # Of the last rung
    finalists: int,  # At most so many tasks are compared by label curves
    choose: bool = True,  # False: nothing is known that could choose
) -> list[Rung]:
    """Half of the tasks fall out at each rung, while the budget doubles; a rung is a run of its own, with new weights
    and a one-cycle of its own: a schedule that has come to its end cannot be gone on with.
    """
    rungs = [Rung(n_tasks if not choose else min(n_tasks, finalists), 1.0, seeds)]
    left = rungs[0].tasks
    while left < n_tasks:
        left = min(n_tasks, 2 * left)
        rungs.insert(0, Rung(left, rungs[0].share / 2, 1))
    rungs[0] = rungs[0]._replace(tasks=n_tasks)
    return rungs


def how_to(
    dls: DataLoaders,
    entrants: list[Entrant],
    arch: Any,
    precision: str | None,  # 'auto': by timed steps, once for all runs
) -> dict:
    """`precision` and `channels_last` of all learners; none where it is plain fp32."""
    if precision != "auto":
        return {} if precision in (None, "fp32") else {"precision": precision}
    for entrant in entrants:
        try:
            learn = entrant.learner(dls, arch, 0)
        except Exception:  # it is told why where its speed is measured
            continue
        way = fastest(learn, torch.device(learn.dls.device or "cpu").type, ways(learn))
        how = {} if way.kind == "fp32" else {"precision": way.kind}
        return how | ({"channels_last": True} if way.channels_last else {})
    return {}


def add_speeds(
    plan: dict,  # Is given `speeds`, images a second by task, and `failed`, why a task cannot take part
    dls: DataLoaders,
    entrants: list[Entrant],
    arch: Any,
    keep: Callable[[], None],  # Called after each task
) -> None:
    """A few steps of each task that is not in the plan. One that fails is found here, before hours are spent."""
    speeds, failed = plan.setdefault("speeds", {}), plan.setdefault("failed", {})
    left = [entrant for entrant in entrants if entrant.name not in speeds | failed]
    with tqdm(left, disable=None, leave=False) as bar:
        for entrant in bar:
            bar.set_description(f"timing {entrant.name}")
            try:
                speeds[entrant.name] = speed_of(dls, entrant, arch)
            except Exception as error:  # whatever a task or network raises, the others go on
                failed[entrant.name] = reason_for(error)
                say(f"{entrant.name} does not take part: {failed[entrant.name]}")
            keep()


def pretraining_seconds(rungs: list[Rung], speeds: dict[str, float]) -> float:
    """What the rungs take together for each image of the whole budget, if the slowest tasks are those that are left."""
    slow = sorted((1 / speed for speed in speeds.values()), reverse=True)
    return sum(rung.share * rung.seeds * sum(slow[: rung.tasks]) for rung in rungs)


def trial_seconds(
    dls: DataLoaders,  # Labeled
    start: Start,
    kind: str,
    amounts: list[int],  # Numbers of labeled images
    steps: int | None,
    epochs: int | None,
    **how,  # `precision` and `channels_last`
) -> float:
    """What one start takes for all numbers of labels, with one seed: by a short run and a longer one."""
    n = len(dls.train_ds)
    budgets = [(count, budget_for(count, dls.train.bs, steps, epochs)) for count in amounts]
    count = min(n, 4 * BATCH)
    places, seconds = np.random.default_rng(0).permutation(n)[:count], []
    for times in (1, 1, 4):  # the first one warms up
        few = Budget(max(1, min(BATCH, count // 2)), times, 1)
        began = time.perf_counter()
        learn = fine_tuned(labeled_with(dls, places, few), start, 0, few, **how)
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    predicted(learn, kind)
    tested = time.perf_counter() - began
    trained_on = len(learn.dls.train) * learn.dls.train.bs
    an_image = max(0.0, seconds[2] - seconds[1]) / (3 * trained_on)
    once = max(0.0, seconds[1] - trained_on * an_image) + tested
    return len(amounts) * once + an_image * sum(budget.epochs * budget.repeats * count for count, budget in budgets)


def seeds_for(
    asked: int | None,
    a_seed: float,  # Seconds of the label curves
    hurried: bool,  # Whether all is to fit a lunch break
) -> int:
    """As asked; else as many as the break has time for beside the pretraining, from three to five."""
    if asked is not None:
        return asked
    fitting = int((1 - FOR_PRETRAINING) * LUNCH / max(a_seed, 1e-9))
    return min(SEEDS, max(LEAST_SEEDS, fitting)) if hurried else SEEDS


def lunch_budget(
    n: int,  # Images to pretrain on
    a_second: float,  # Seconds that the race takes for each image of the budget
    other: float,  # Seconds that go to label curves
) -> int:
    """Images through the encoder for each task, such that the whole takes no longer than a lunch break."""
    left = max(FOR_PRETRAINING * LUNCH, LUNCH - other)
    images = min(left / a_second, SHOWN * n)
    digits = 10 ** max(0, len(str(int(images))) - 2)
    return max(n, int(images // digits * digits))


def to_shorten(
    pretraining: float,  # Seconds
    curves: float,
    granted_by: str,  # 'budget' or 'seconds'
    length: str,  # 'steps' or 'epochs'
    n_tasks: int,
    seeds: int,
) -> str:
    """Of a long race, what to turn down; the words are arguments in Python and options in the shell."""
    if pretraining + curves <= LONG:
        return ""
    less = f"fewer `seeds` ({seeds} now), fewer or smaller `labels`, fewer `{length}`"
    if pretraining > curves:
        fewer = f"fewer `tasks` ({n_tasks} now), " if n_tasks > 1 else ""
        less = f"{fewer}a smaller `{granted_by}`, fewer `seeds` ({seeds} now)"
    most = "pretraining" if pretraining > curves else "fine-tuning"
    return f" Most of it is {most}. Shorter with {less}, or a smaller `size` of the images."


def in_words(seconds: float) -> str:
    """'about 40 minutes'."""
    if seconds < 90:
        return f"about {max(1, round(seconds)):,} seconds"
    minutes = seconds / 60
    return f"about {round(minutes):,} minutes" if minutes < 120 else f"about {minutes / 60:.1f} hours"
