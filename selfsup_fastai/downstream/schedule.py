"""Schedules of fine-tuning: which groups of layers are trained when, at what rates, and what norm layers do meanwhile.

Groups run from the stem (0) to the head (last). `gradual` is ULMFiT's order (Howard & Ruder 2018, arXiv:1801.06146):
the head alone, then more groups from the top, at last everything. A net may have a dozen groups and a run few epochs,
so groups are unfrozen in chunks and there are five stages at most. `two_stage` is fastai's `fine_tune`: the head, then
everything. `lp_ft` trains the head for half of the run, so that what it asks of the features is right before these are
changed (linear probing, then fine-tuning: Kumar et al. 2022, arXiv:2202.10054). `all` trains everything from the start.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import pandas as pd
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.schedule import ParamScheduler, combined_cos
from fastcore.basics import even_mults
from torch import nn

from selfsup_fastai.errors import TaskError, unknown

SCHEDULES = ("gradual", "two_stage", "all", "lp_ft")
NORMS = ("eval", "train", "still")
HEAD_PCT = 0.99  # Part of the head's own stage in which its rate rises: fastai's


class Stage(NamedTuple):
    """A part of a fine-tuning run."""

    epochs: int  # How long it lasts
    first: int  # The first group that is trained; it and all later ones are
    head_only: bool = False  # Whether the encoder is still untouched


class Rates(NamedTuple):
    """How rates are spread over the groups."""

    base: float  # The head's rate while it is alone; half of it afterwards, as in fastai's `fine_tune`
    mult: float = 100  # The stem learns so many times slower than the head
    decay: float | None = None  # In place of `mult`: each group learns at so much of the rate of the group above


def stages(
    n_groups: int,  # Groups of the model, the head included
    epochs: int,  # Epochs after the head's own
    freeze_epochs: int = 1,  # Epochs of the head alone; 0 leaves that stage out
    schedule: str = "gradual",  # One of `SCHEDULES`
    max_stages: int = 5,  # gradual: at most so many stages, the head's included
    stage_epochs: int | None = None,  # gradual: of each stage between the head's and the last; None: a tenth
) -> list[Stage]:
    """The stages of a run; their epochs sum to `epochs + freeze_epochs`.

    gradual: first the head alone; then the encoder's groups in even chunks from the top (where they cannot be even,
    the lower chunks are the larger), `stage_epochs` each and no more than half of `epochs` together; the last stage
    trains everything for the rest. ULMFiT's stages are one epoch each; with few labels that is a handful of steps.
    lp_ft: the head for half of all epochs, at least `freeze_epochs`. Raises `TaskError` where an argument makes no
    sense, `UnknownNameError` for another schedule.
    """
    if schedule not in SCHEDULES:
        raise unknown("schedule of fine-tuning", schedule, SCHEDULES)
    check_count("epochs", epochs, 1)
    check_count("freeze_epochs", freeze_epochs, 0)
    check_count("n_groups", n_groups, 2)
    check_count("max_stages", max_stages, 2)
    total = epochs + freeze_epochs
    if schedule == "all":
        return [Stage(total, 0)]
    if schedule == "lp_ft":
        alone = min(total - 1, max(freeze_epochs, total // 2))
        return [*_head(alone, n_groups), Stage(total - alone, 0)]
    each = max(1, epochs // 10) if stage_epochs is None else stage_epochs
    check_count("stage_epochs", each, 1)
    n_chunks = min(max_stages - 1, epochs // (2 * each) + 1, n_groups - 1) if schedule == "gradual" else 1
    firsts = _chunk_starts(n_groups - 1, n_chunks)
    gradual = [Stage(each, first) for first in firsts[:-1]]
    return [*_head(freeze_epochs, n_groups), *gradual, Stage(epochs - each * len(gradual), 0)]


def _head(epochs: int, n_groups: int) -> list[Stage]:
    """The head alone, if for any time."""
    return [Stage(epochs, n_groups - 1, head_only=True)] if epochs else []


def _chunk_starts(n_groups: int, n_chunks: int) -> list[int]:
    """The first group of each chunk, from the top chunk down to group 0."""
    base, extra = divmod(n_groups, n_chunks)
    starts, top = [], n_groups
    for i in range(n_chunks):
        top -= base + (i >= n_chunks - extra)
        starts.append(top)
    return starts


def spread_rates(
    base_lr: float,  # The rate of the last group
    n_groups: int,  # How many groups there are
    lr_mult: float = 100,  # The first group learns at `base_lr / lr_mult`
) -> list[float]:
    """Geometric rates from `base_lr / lr_mult` to `base_lr`: fastai's `slice(base_lr / lr_mult, base_lr)`."""
    check_positive("base_lr", base_lr)
    check_positive("lr_mult", lr_mult)
    return [base_lr] if n_groups == 1 else even_mults(base_lr / lr_mult, base_lr, n_groups)


def stage_rates(
    stage: Stage,  # One of `stages`
    n_groups: int,  # Groups of the model, the head included
    rates: Rates,
) -> list[float]:
    """The peak rate of every group in one stage, frozen groups included (norm layers trained in them use it)."""
    check_positive("base_lr", rates.base)
    if stage.head_only:
        return [rates.base / 10] * (n_groups - 1) + [rates.base]
    if rates.decay is None:
        return spread_rates(rates.base / 2, n_groups, rates.mult)
    return decayed_rates(rates.base / 2, n_groups, rates.decay)


def decayed_rates(
    base_lr: float,  # The rate of the last group
    n_groups: int,  # How many groups there are
    decay: float,  # Each group learns at so much of the rate of the group above, 0..1
) -> list[float]:
    """Layer-wise decay, the habit with ViTs (BEiT, Bao et al. 2021; MAE, He et al. 2021: 0.65 to 0.75)."""
    check_positive("base_lr", base_lr)
    check_positive("layer_decay", decay)
    if decay > 1:
        raise TaskError(f"layer_decay is {decay!r}, but must be above 0 and at most 1, such as 0.75.")
    return [base_lr * decay ** (n_groups - 1 - i) for i in range(n_groups)]


def plan(
    run: Sequence[Stage],  # What `stages` returned
    names: Sequence[str],  # The groups' names, stem first, head last
    sizes: Sequence[int],  # The groups' numbers of parameters
    rates: Rates,
) -> pd.DataFrame:
    """One row a stage: `stage`, `epochs`, `trained` and `frozen` groups, `lr_min` and `lr_max` of the trained groups,
    `parameters` trained. Norm layers that `norms='train'` trains in frozen groups are not counted.
    """
    rows = []
    for i, stage in enumerate(run, start=1):
        peaks = stage_rates(stage, len(names), rates)[stage.first :]
        trained, frozen = _listed(names[stage.first :]), _listed(names[: stage.first])
        rows.append((i, stage.epochs, trained, frozen, min(peaks), max(peaks), sum(sizes[stage.first :])))
    return pd.DataFrame(rows, columns=["stage", "epochs", "trained", "frozen", "lr_min", "lr_max", "parameters"])


def planned_rates(
    run: Sequence[Stage],  # What `stages` returned
    names: Sequence[str],  # The groups' names, stem first, head last
    rates: Rates,
    shapes: Sequence[dict],  # Of each stage `pct_start`, `div` and `div_final`
    points: int = 50,  # An epoch
) -> pd.DataFrame:
    """The rate of each group over the run, a column a group, epochs as the index; NaN where a group is frozen.

    `attrs["stages"]` says when each stage begins.
    """
    parts, begun = [], 0
    for stage, shape in zip(run, shapes):
        peaks = np.array(stage_rates(stage, len(names), rates))
        one_cycle = combined_cos(shape["pct_start"], peaks / shape["div"], peaks, peaks / shape["div_final"])
        at = np.linspace(0, 1, stage.epochs * points, endpoint=False)
        table = pd.DataFrame([one_cycle(p) for p in at], columns=list(names), index=begun + at * stage.epochs)
        table.iloc[:, : stage.first] = np.nan
        parts.append(table)
        begun += stage.epochs
    whole = pd.concat(parts).rename_axis("epoch")
    whole.attrs["stages"] = [part.index[0] for part in parts]
    return whole


def _listed(names: Sequence[str]) -> str:
    """All names while they are few, else the first and the last."""
    if not names:
        return "-"
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]}"


def check_count(name: str, value: object, least: int) -> None:
    """Raise `TaskError` unless `value` is a whole number of at least `least`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise TaskError(f"{name} is {value!r}, but must be a whole number of at least {least}.")


def check_positive(name: str, value: object) -> None:
    """Raise `TaskError` unless `value` is a finite number above 0."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise TaskError(f"{name} is {value!r}, but must be a number above 0, such as 2e-3.")


class FrozenNorms(Callback):
    """Norm layers of frozen groups stay in eval mode during training, so that their running statistics hold still.

    fastai's `train_bn=False` stops only their weights: statistics follow every batch that passes in train mode.
    Frozen is what has no parameter that requires a gradient; a norm layer without parameters goes with its neighbor.
    With `everywhere` the statistics of all norm layers hold still; in groups that are trained their weights learn.
    """

    order = TrainEvalCallback.order + 1  # right after everything was put in train mode
    run_valid = False

    def __init__(
        self,
        everywhere: bool = False,  # Also in groups that are trained
    ):
        self.everywhere = everywhere

    def before_train(self):
        for norm in norms_with_statistics(self.model) if self.everywhere else frozen_norms(self.model):
            norm.eval()


def norms_with_statistics(model: nn.Module) -> list[nn.Module]:
    """Layers that keep running statistics."""
    return [m for m in model.modules() if _has_statistics(m)]


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Layers with running statistics whose weights (or, without weights, whose neighbor's weights) are frozen."""
    modules = dict(model.named_modules())
    norms = {name: m for name, m in modules.items() if _has_statistics(m)}
    return [m for name, m in norms.items() if not _is_trained(name, modules)]


def _has_statistics(module: nn.Module) -> bool:
    """Batch norm of any make: what it keeps of past batches is called running_something everywhere."""
    return any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False))


def _is_trained(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the module's own parameters are trained; without any, those nearest before it in its parent, or after."""
    own = list(modules[name].parameters())
    if own:
        return any(p.requires_grad for p in own)
    while name:
        name, _, child = name.rpartition(".")
        siblings = list(modules[name].named_children())
        place = [n for n, _ in siblings].index(child)
        before = [p for _, m in siblings[:place] for p in m.parameters()]
        after = [p for _, m in siblings[place:] for p in m.parameters()]
        if before or after:
            return (before[-1] if before else after[0]).requires_grad
    return True


class StageLog(Callback):
    """Keeps what the recorder would forget when the next stage begins: one history over the whole run."""

    order = ParamScheduler.order + 1  # after the recorder and the scheduler have done their part

    def __init__(self):
        self.stage, self.rows, self.lists, self.smooth, self.scheduled = 0, [], {}, (), {}

    def before_fit(self):
        self.stage += 1
        if self.smooth:
            vars(self.recorder).update(self.lists)
            self.recorder.smooth_loss.count, self.recorder.smooth_loss.val = self.smooth

    def after_epoch(self):
        values = dict(zip(list(self.recorder.metric_names)[1:], self.learn.final_record))
        self.rows.append({"stage": self.stage, "epoch": len(self.rows), **values})

    def after_fit(self):
        recorder = self.recorder
        self.lists = {name: getattr(recorder, name) for name in ("lrs", "iters", "losses", "values")}
        self.smooth = recorder.smooth_loss.count, recorder.smooth_loss.val
        for name, values in recorder.hps.items():
            self.scheduled.setdefault(name, []).extend(values)
        recorder.hps = self.scheduled
