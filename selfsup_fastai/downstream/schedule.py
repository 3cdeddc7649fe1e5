"""Gradual unfreezing: which groups of layers are trained when, at what rates, and what frozen norm layers do meanwhile.

Groups run from the stem (0) to the head (last). The order is ULMFiT's (Howard & Ruder 2018, arXiv:1801.06146): the
head alone, then more groups from the top, at last everything. A net may have a dozen groups and a run few epochs, so
groups are unfrozen in chunks and there are five stages at most.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import NamedTuple

import pandas as pd
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.schedule import ParamScheduler
from fastcore.basics import even_mults
from torch import nn

from selfsup_fastai.errors import TaskError


class Stage(NamedTuple):
    """A part of a fine-tuning run."""

    epochs: int  # How long it lasts
    first: int  # The first group that is trained; it and all later ones are
    head_only: bool = False  # Whether the encoder is still untouched


def stages(
    n_groups: int,  # Groups of the model, the head included
    epochs: int,  # Epochs after the head's own
    freeze_epochs: int = 1,  # Epochs of the head alone; 0 leaves that stage out
    max_stages: int = 5,  # At most so many stages, the head's included
) -> list[Stage]:
    """The stages of a run; their epochs sum to `epochs + freeze_epochs`.

    First the head alone; then the encoder's groups in even chunks from the top (where they cannot be even, the lower
    chunks are the larger), one epoch each and no more than half of `epochs` together; the last stage trains
    everything for the rest. Raises `TaskError` where an argument makes no sense.
    """
    check_count("epochs", epochs, 1)
    check_count("freeze_epochs", freeze_epochs, 0)
    check_count("n_groups", n_groups, 2)
    check_count("max_stages", max_stages, 2)
    n_chunks = min(max_stages - 1, epochs // 2 + 1, n_groups - 1)
    firsts = _chunk_starts(n_groups - 1, n_chunks)
    gradual = [Stage(1, first) for first in firsts[:-1]]
    head = [Stage(freeze_epochs, n_groups - 1, head_only=True)] if freeze_epochs else []
    return [*head, *gradual, Stage(epochs - len(gradual), 0)]


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
    base_lr: float,  # The head's rate while it is alone; half of it afterwards, as in fastai's `fine_tune`
    lr_mult: float = 100,  # How far the rates are spread once the encoder is trained
) -> list[float]:
    """The peak rate of every group in one stage, frozen groups included (norm layers trained in them use it)."""
    if stage.head_only:
        check_positive("base_lr", base_lr)
        return [base_lr / 10] * (n_groups - 1) + [base_lr]
    return spread_rates(base_lr / 2, n_groups, lr_mult)


def plan(
    run: Sequence[Stage],  # What `stages` returned
    names: Sequence[str],  # The groups' names, stem first, head last
    sizes: Sequence[int],  # The groups' numbers of parameters
    base_lr: float,  # As in `stage_rates`
    lr_mult: float = 100,  # As in `stage_rates`
) -> pd.DataFrame:
    """One row a stage: `stage`, `epochs`, `trained` and `frozen` groups, `lr_min` and `lr_max` of the trained groups,
    `parameters` trained. Norm layers that `norms='train'` trains in frozen groups are not counted.
    """
    rows = []
    for i, stage in enumerate(run, start=1):
        rates = stage_rates(stage, len(names), base_lr, lr_mult)[stage.first :]
        trained, frozen = _listed(names[stage.first :]), _listed(names[: stage.first])
        rows.append((i, stage.epochs, trained, frozen, min(rates), max(rates), sum(sizes[stage.first :])))
    return pd.DataFrame(rows, columns=["stage", "epochs", "trained", "frozen", "lr_min", "lr_max", "parameters"])


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
    """

    order = TrainEvalCallback.order + 1  # right after everything was put in train mode
    run_valid = False

    def before_train(self):
        for norm in frozen_norms(self.model):
            norm.eval()


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
