"""A race before it starts: what is granted, and how long it will take; said, and kept for the case of a stop."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fastai.data.core import DataLoaders
from tqdm.auto import tqdm

from selfsup_fastai.compare.choosing import LEAST, training_score
from selfsup_fastai.compare.draws import draw_labels
from selfsup_fastai.compare.facts import Labeled
from selfsup_fastai.compare.halving import Race
from selfsup_fastai.compare.keeping import data_print, key_of
from selfsup_fastai.compare.planning import (
    Rung,
    add_speeds,
    how_to,
    in_words,
    lunch_budget,
    pretraining_seconds,
    rungs_for,
    seeds_for,
    to_shorten,
    trial_seconds,
)
from selfsup_fastai.compare.pretraining import Entrant
from selfsup_fastai.compare.scores import score_for
from selfsup_fastai.compare.starts import Start, content_of
from selfsup_fastai.messages import say
from selfsup_fastai.writing import write_whole

PLAN = "plan.json"


class Asked(NamedTuple):
    """What `compare_pretexts` was asked for."""

    arch: Any
    seeds: int | None
    finalists: int
    budget: int | None  # Images
    seconds: float | None  # Instead
    precision: str | None

    @property
    def hurried(self) -> bool:
        """Whether all is to fit a lunch break."""
        return self.budget is None and self.seconds is None


def planned(
    dls: DataLoaders,
    racing: list[Entrant],
    asked: Asked,
    known: Labeled | None,
    starts: list[Start],  # The baselines
    folder: Path,
    print_: str,  # Of the images
) -> Race:
    """Speeds and grants are measured now or, after a stop, were measured then: so that the same comes out."""
    plan = _plan(dls, racing, asked, known, starts, folder / PLAN, print_)
    chooses = known is not None and known.kind != "mask" and len(known.dls.train_ds) >= LEAST
    rungs = rungs_for(max(1, len(plan["speeds"])), plan["seeds"], asked.finalists, chooses)
    if "grants" not in plan:
        plan["grants"] = _grants(plan, rungs, asked, len(dls.train_ds))
        _keep(plan, folder / PLAN)
    _say_plan(plan, rungs, asked.seconds, "epochs" if known and known.curve["epochs"] else "steps")
    race = Race(dls, asked.arch, folder / "encoders", rungs, plan["grants"], print_, plan["how"])
    if chooses:
        score = score_for(known.kind, known.metric)
        race.judge = lambda file: training_score(file, known.dls, known.kind, score, known.groups)
        race.judged_by = key_of(metric=score.name, data=data_print(known.dls, *_known_numbers(known)))
    for name, reason in plan["failed"].items():
        race.drop(name, reason)
    return race


def _known_numbers(known: Labeled) -> list:
    return [values for values in (known.classes, known.groups) if values is not None]


def _names(starts: list[Start]) -> list[str]:
    return [start.name for start in starts]


def _sizes(known: Labeled) -> list[int]:
    """How many labeled images there are to train and to test with."""
    return [len(known.dls.train_ds), len(known.dls.valid_ds)]


def _plan(dls, racing, asked: Asked, known, starts, file: Path, print_: str) -> dict:
    """The plan of a race that was stopped, gone on with where it is not whole, or a new one."""
    about = {"tasks": [e.about() for e in racing], "arch": content_of(asked.arch), "data": print_}
    about |= {"seeds": asked.seeds, "finalists": asked.finalists, "budget": asked.budget, "seconds": asked.seconds}
    about |= {"precision": asked.precision}
    key = key_of(**about)
    plan = _kept(file, key) or {"about": key}
    curves_of = known and key_of(amounts=repr(known.amounts), starts=_names(starts), n=_sizes(known), **known.curve)
    if {"speeds", "failed", "grants", "curves", "seeds", "how"} <= set(plan) and plan.get("curves of") == curves_of:
        return plan
    tasks = f"{len(racing)} task{'s' * (len(racing) != 1)}"
    say(f"Timing a few steps of {tasks}{' and of fine-tuning' if known else ''}, to plan how long it will take.")
    if "how" not in plan:
        plan["how"] = how_to(dls, racing, asked.arch, asked.precision or ("auto" if asked.hurried else None))
    timed = [replace(entrant, how=plan["how"]) for entrant in racing]
    add_speeds(plan, dls, timed, asked.arch, lambda: _keep(plan, file))
    a_seed = _curve_seconds(known, starts, min(asked.finalists, len(plan["speeds"])), plan["how"])
    seeds = seeds_for(asked.seeds, a_seed, asked.hurried)
    plan |= {"seeds": seeds, "curves": seeds * a_seed, "curves of": curves_of}
    if "grants" in plan:  # of a comparison with other labels
        _keep(plan, file)
    return plan


def _kept(file: Path, key: str) -> dict | None:
    """A plan for the same, whole or not."""
    try:
        plan = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and plan.get("about") == key else None


def _keep(plan: dict, file: Path) -> None:
    write_whole(file, (json.dumps(plan, indent=2) + "\n").encode())


def _grants(plan: dict, rungs: list[Rung], asked: Asked, n: int) -> dict[str, int]:
    """Images through the encoder, by task."""
    if asked.seconds is not None:
        return {name: max(1, round(asked.seconds * speed)) for name, speed in plan["speeds"].items()}
    if not plan["speeds"]:
        return {}
    images = asked.budget or lunch_budget(n, pretraining_seconds(rungs, plan["speeds"]), plan["curves"])
    return dict.fromkeys(plan["speeds"], images)


def _curve_seconds(known: Labeled | None, starts: list[Start], finalists: int, how: dict) -> float:
    """Of the label curves of all starts, with one seed; tasks take as long as scratch."""
    if known is None:
        return 0.0
    n = len(known.dls.train_ds)
    counts = [len(draw_labels(n, amount, 0, known.classes, known.groups)) for amount in known.amounts]
    length = known.curve["steps"], known.curve["epochs"]
    timed = tqdm(starts, "timing fine-tuning", disable=None, leave=False)
    own = [trial_seconds(known.dls, start, known.kind, counts, *length, **how) for start in timed]
    return sum(own) + finalists * own[0]


def _say_plan(plan: dict, rungs: list[Rung], seconds: float | None, length: str) -> None:
    if not plan["speeds"]:
        return
    slow = sorted((plan["grants"][name] / speed for name, speed in plan["speeds"].items()), reverse=True)
    pretraining = sum(rung.share * rung.seeds * sum(slow[: rung.tasks]) for rung in rungs)
    most = max(plan["grants"].values())
    granted = f"{most:,} images through the encoder" if seconds is None else f"{seconds:,.0f} seconds"
    whole = in_words(pretraining + plan["curves"])
    by, n_tasks = "budget" if seconds is None else "seconds", len(plan["speeds"])
    shorter = to_shorten(pretraining, plan["curves"], by, length, n_tasks, plan["seeds"])
    n_rungs, n_seeds = (f"{n} {word}{'s' * (n > 1)}" for n, word in ((len(rungs), "rung"), (plan["seeds"], "seed")))
    say(
        f"{n_tasks} task{'s' * (n_tasks > 1)}, {n_rungs}, {n_seeds}, up to {granted} a run. It will take {whole}: "
        f"{in_words(pretraining)} to pretrain, {in_words(plan['curves'])} to fine-tune and test.{shorter}"
    )
