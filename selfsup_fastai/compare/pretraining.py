"""One pretraining run of a race: as many images through the encoder as were granted, in whole batches."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import fastai.callback.progress  # noqa: F401  (brings no_bar to Learner)
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from torch import nn
from tqdm.auto import tqdm

from selfsup_fastai.callbacks.log import SkipValidation
from selfsup_fastai.errors import SelfsupError, TaskError
from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner
from selfsup_fastai.writing import write_whole

RATE, RATE_WITHOUT_BATCH_NORM = 3e-3, 1e-3
TIMED_STEPS = 3


@dataclass(frozen=True)
class Entrant:
    """A task that takes part, with its settings."""

    name: str  # What it is called in tables
    task: Any  # What `get_task` takes
    settings: dict = field(default_factory=dict)
    how: dict = field(default_factory=dict)  # `precision` and `channels_last` of its learners

    def about(self) -> dict:
        """What tells it from other tasks."""
        task = get_task(self.task, **dict(self.settings))
        return {"name": task.name, "settings": task.settings(), **self.how}

    def learner(self, dls: DataLoaders, arch: Any, seed: int) -> PretextLearner:
        """A new one. Raises what `pretext_learner` does."""
        set_seed(seed, reproducible=True)
        with quiet():
            return pretext_learner(dls, self.task, arch, **self.how, **self.settings)


def entrants(
    tasks: list,  # Names ('rotation', 'rotation+simclr'), (name, settings) pairs, or tasks
) -> list[Entrant]:
    """The tasks by name; two of one name are numbered. Raises `UnknownNameError`, and `TaskError` for settings."""
    found: list[Entrant] = []
    for given in tasks:
        task, settings = given if isinstance(given, tuple) and isinstance(given[-1], dict) else (given, {})
        name = get_task(task, **dict(settings)).name
        same = sum(e.name == name or e.name.startswith(f"{name} (") for e in found)
        found.append(Entrant(f"{name} ({same + 1})" if same else name, task, dict(settings)))
    if not found:
        raise TaskError("tasks is empty: name some, such as ['rotation', 'simclr'].")
    return found


def pretrained(
    dls: DataLoaders,
    entrant: Entrant,
    arch: Any,
    images: int,  # Through the encoder: an image counts as often as the task shows it
    seed: int,
    file: Path,  # For the encoder; its facts go beside it
    bar: tqdm | None = None,  # Of images
) -> dict:
    """Trains and saves, or finds what was saved: facts of the run (images, seconds, valid_loss)."""
    facts = file.with_suffix(".json")
    if not (facts.exists() and file.exists()):
        return _trained(dls, entrant, arch, images, seed, file, facts, bar)
    done = json.loads(facts.read_text("utf-8"))
    if bar is not None:
        bar.update(done["images"])
    return done


def _trained(dls, entrant, arch, images, seed, file, facts, bar) -> dict:
    learn, began = entrant.learner(dls, arch, seed), time.perf_counter()
    with quiet(), learn.no_bar(), learn.no_logging():
        epochs = _granted(learn, images)
        learn.fit_one_cycle(epochs, _rate(learn.model), cbs=[SkipValidation(), *([_Bar(bar)] if bar else [])])
        seconds = time.perf_counter() - began
        loss = float(learn.validate()[0]) if len(learn.dls.valid_ds) else math.nan
    learn.save_encoder(file)
    done = {"images": round(learn.images_seen), "seconds": round(seconds, 1), "epochs": epochs}
    done["valid_loss"] = loss if math.isfinite(loss) else None
    write_whole(facts, json.dumps(done).encode())
    return done


def _granted(learn: PretextLearner, images: int) -> int:
    """Epochs; where that many whole ones would be too many images, each takes only some, drawn anew each time."""
    dl = learn.dls.train
    steps = max(1, round(images / (dl.bs * learn.task.passes)))
    fewest = -(-steps // len(dl))
    epochs = min(range(fewest, 2 * fewest + 1), key=lambda e: abs(e * max(1, round(steps / e)) - steps))
    _shorten(dl, max(1, round(steps / epochs)))
    return epochs


def _shorten(dl: Any, steps: int) -> None:
    """An epoch of so many steps, over images drawn anew each time; loaders made of this one take all images."""
    if steps >= len(dl):
        return
    total, dl.n = dl.n, steps * dl.bs
    dl.get_idxs = MethodType(lambda self: self.rng.sample(range(total), self.n), dl)  # fastai's `new` keeps no methods


def _rate(model: nn.Module) -> float:
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.encoder.modules())
    return RATE if batch_norm else RATE_WITHOUT_BATCH_NORM


def speed_of(dls: DataLoaders, entrant: Entrant, arch: Any) -> float:
    """Images through the encoder in a second, from a few steps of a learner that is thrown away."""
    learn = entrant.learner(dls, arch, 0)
    with quiet(), learn.no_bar(), learn.no_logging():
        _shorten(learn.dls.train, 1)
        learn.fit(1, 1e-4, cbs=SkipValidation())  # the first step is slower than the others
        began, seen = time.perf_counter(), learn.images_seen
        learn.fit(TIMED_STEPS, 1e-4, cbs=SkipValidation())
    return (learn.images_seen - seen) / (time.perf_counter() - began)


def reason_for(error: Exception) -> str:
    """Why a task could not take part: our own errors in full; of others, which may name a file, the kind alone."""
    if isinstance(error, SelfsupError):
        return str(error)
    return f"failed with {type(error).__name__}; pretraining by it alone would show where"


class _Bar(Callback):
    """Moves the bar of the whole race."""

    run_valid = False

    def __init__(self, bar: tqdm):
        self.bar = bar

    def after_batch(self):
        self.bar.update(round(len(self.xb[0]) * self.learn.task.passes))
