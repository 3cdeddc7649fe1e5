"""Several tasks at once: one encoder, and in each training batch another task's question."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import islice
from typing import Any

import torch
from fastai.learner import Metric
from fastcore.basics import listify
from torch import Tensor, nn

from selfsup_fastai.callbacks.of_model import OfModel
from selfsup_fastai.checks import check_number
from selfsup_fastai.encoders.inputs import to_input
from selfsup_fastai.errors import TaskError, unknown
from selfsup_fastai.metrics import OfSums, average
from selfsup_fastai.pictures import figure_blocks
from selfsup_fastai.pretext.base import PretextTask
from selfsup_fastai.seeding import VALID_SEED, host_of


class SeveralTasks(PretextTask):
    """What do several tasks ask, one in each batch?

    Doersch & Zisserman, Multi-task Self-Supervised Visual Learning, 2017 (arXiv 1708.07860): combining tasks helped
    every one of them. The encoder is shared, each task has its own head; which task a training batch is for is drawn.
    In validation, and wherever else images are only looked at (a loader that does not shuffle), every task is asked
    about every image.

    In: the inputs of all tasks, one after the other; those of the tasks that are not asked are empty, (B, 0). Targets
    and predictions likewise; the last prediction are the log variances, (B, number of tasks), of the balanced loss.
    Loss: each task's own times its weight, the mean over the tasks that were asked: one in training, all in validation,
    so that the two can be compared. With `weights='uncertainty'` the loss of task i is exp(-s) * loss + s with a
    learned s for each (Kendall, Gal & Cipolla 2018, arXiv 1705.07115; the factors 1/2 of theirs, which depend on the
    kind of loss, are left out).

    Harmonized inputs (Doersch & Zisserman 2017): where a task feeds the encoder with lightness or Lab, the others get
    their images so, too. Two tasks that feed it with different things cannot be combined.
    """

    paper = "Doersch & Zisserman 2017"

    def __init__(
        self,
        tasks: Sequence[PretextTask],
        weights: str | Mapping[str, float] | None = None,  # By name of the task, 1 if missing; or 'uncertainty'
    ):
        self.tasks, self.names = list(tasks), [task.name for task in tasks]
        self.weights = weights
        self._check()
        self.name = "+".join(self.names)
        self.n_inp = sum(task.n_inp for task in tasks)
        self.normalized = sum((task.normalized for task in tasks), ())
        self.needs = tuple({need for task in tasks for need in task.needs})
        self.channels = tuple(c for c in (1, 3) if all(c in self._seen(task, c) for task in tasks))
        self.instead = " ".join(task.instead for task in tasks if task.instead)
        self.accumulates = all(task.accumulates for task in tasks)
        self.by_map = all(task.by_map for task in tasks)
        self.min_side = max(task.min_side for task in tasks)
        self.arch = next((task.arch for task in tasks if task.arch != PretextTask.arch), PretextTask.arch)
        self._given = [task.n_targets for task in tasks]
        self.n_targets = sum(self._given)
        self._ask_all = False

    def _check(self) -> None:
        if len(set(self.names)) < max(2, len(self.names)):
            raise TaskError(f"Several tasks at once are two or more different ones; got {', '.join(self.names)}.")
        alone = [task for task in self.tasks if task.alone]
        if alone:
            raise TaskError(f"{alone[0].name} cannot be combined with other tasks: {alone[0].alone}")
        inputs = {task.input for task in self.tasks if task.input}
        if len(inputs) > 1:
            said = ", ".join(f"{task.name}: {task.input or 'images'}" for task in self.tasks)
            raise TaskError(f"These tasks feed the encoder with different things ({said}) and cannot be combined.")
        self.input = inputs.pop() if inputs else None
        self.split = any(task.split for task in self.tasks)
        if not (self.weights in (None, "uncertainty") or isinstance(self.weights, Mapping)):
            raise TaskError(f"weights are a number for each task by name, or 'uncertainty'; got {self.weights!r}.")
        for name, weight in self._by_hand().items():
            if name not in self.names:
                raise unknown("task in weights", name, self.names)
            check_number(f"the weight of {name}", weight, above=0)

    def _by_hand(self) -> dict[str, float]:
        return dict(self.weights) if isinstance(self.weights, Mapping) else {}

    @property
    def passes(self) -> float:
        """On average: a batch is for one task."""
        return sum(task.passes for task in self.tasks) / len(self.tasks)

    def settings(self) -> dict:
        weights = self._by_hand() or self.weights
        return {**{task.name: task.settings() for task in self.tasks}, "weights": weights}

    @property
    def metrics(self) -> list[Metric]:
        """For each task its loss and its metrics, named after it."""
        losses = [OfTask(self, i, task.loss, "loss") for i, task in enumerate(self.tasks)]
        own = [[OfTask(self, i, m) for m in listify(task.metrics)] for i, task in enumerate(self.tasks)]
        return [metric for loss, metrics in zip(losses, own) for metric in (loss, *metrics)]

    def levels(self) -> dict[str, float | None]:
        """The first metric of each task, by its name here, and what it would be by guessing."""
        first = [(i, task, listify(task.metrics)[:1]) for i, task in enumerate(self.tasks)]
        return {OfTask(self, i, metric).name: task.chance() for i, task, metrics in first for metric in metrics}

    def arch_settings(self, side):
        return next(task for task in self.tasks if task.arch == self.arch).arch_settings(side)

    def setup(self, dls, encoder):
        for task in self.tasks:
            task.setup(dls, encoder)
        self.n_known = sum(task.n_known for task in self.tasks)

    def known(self, facts):
        """What each task learns from the facts, side by side."""
        return torch.cat([task.known(facts) for task in self.tasks if "facts" in task.needs], 1)

    def callbacks(self):
        """Those of all tasks, each told where in `SharedEncoder` its task's model is."""
        made = [(i, callback) for i, task in enumerate(self.tasks) for callback in task.callbacks()]
        for i, callback in made:
            if isinstance(callback, OfModel):
                callback.place = f"models.{i}"
        return [callback for _, callback in made]

    def _seen(self, task: PretextTask, channels: int) -> tuple[int, ...]:
        """`channels`, if images of so many become something that the task can work with."""
        kind = None if task.input else self.input
        return (channels,) if (channels if kind is None else 1 if kind == "L" else 3) in task.channels else ()

    # --- one batch ----------------------------------------------------------------------------------------------------

    def wanted(self, known=None, others=None, common=None):
        return {**super().wanted(known, others), "common": common}

    def make_batch(self, x, *, generator, train, idx=None, known=None, common=None):
        asked, n = None, len(self.tasks)
        widths = [task.n_known for task in self.tasks]
        learned = [None] * n if known is None else known.split(widths, 1)
        if train and not self._ask_all and generator.initial_seed() != VALID_SEED:  # else somebody only looks
            draws = common or host_of(generator)  # all processes are asked the same
            asked = torch.randint(n, (1,), generator=draws, device=draws.device).item()
        inputs, targets = (), ()
        for i, task in enumerate(self.tasks):
            if asked in (None, i):
                images = x if task.input or not self.input else to_input(x, self.input)
                extras = task.wanted(known=learned[i])
                made, answers = task.make_batch(images, generator=generator, train=train, idx=idx, **extras)
            else:
                made, answers = (_nothing(x),) * task.n_inp, (_nothing(x),) * task.n_targets
            inputs, targets = inputs + made, targets + answers
        return inputs, targets

    @contextmanager
    def all_asked(self) -> Iterator[None]:
        """Meanwhile every task is asked about training batches, too."""
        self._ask_all = True
        try:
            yield
        finally:
            self._ask_all = False

    def model(self, encoder):
        return SharedEncoder(encoder, self)

    def loss(self, pred, *targets, reduction="mean"):
        *preds, log_variances = pred
        losses = []
        for i, (task, own) in enumerate(zip(self.tasks, self.apart(targets, self._given))):
            if own[0].numel():
                loss = task.loss(preds[i], *own, reduction=reduction) * self._by_hand().get(task.name, 1.0)
                if self.weights == "uncertainty":
                    s = log_variances[0, i]
                    loss = (-s).exp() * loss + s
                losses.append(loss)
        return sum(losses) / len(losses)

    @staticmethod
    def apart(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """A row of tensors cut into one row for each task."""
        rest = iter(tensors)
        return [tuple(next(rest) for _ in range(count)) for count in counts]

    def activation(self, pred):
        *preds, log_variances = pred
        return (*(_if_asked(task.activation, p) for task, p in zip(self.tasks, preds)), log_variances)

    def decode(self, pred):
        *preds, log_variances = pred
        return (*(_if_asked(task.decode, p) for task, p in zip(self.tasks, preds)), log_variances)

    def parts(self, inputs, targets, pred=None) -> list[tuple[PretextTask, tuple, tuple, Any]]:
        """Each task that was asked with its own inputs, targets and prediction."""
        counts = [task.n_inp for task in self.tasks]
        preds = [None] * len(counts) if pred is None else pred
        rows = zip(self.tasks, self.apart(inputs, counts), self.apart(targets, self._given), preds)
        return [row for row in rows if row[1][0].numel()]

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """One figure with the pictures of each task that was asked, under its name."""
        parts = self.parts(inputs, targets, pred)
        if ctxs is None:
            places = figure_blocks([task.name for task, *_ in parts], figsize)
        else:
            given = iter(ctxs)
            places = [list(islice(given, min(max_n, len(own[0])))) for _, own, _, _ in parts]
        shown = [task.show(*own, ctxs=place, max_n=max_n) for (task, *own), place in zip(parts, places)]
        return [ax for axes in shown for ax in axes]


class SharedEncoder(nn.Module):
    """The models of several tasks around one encoder; empty inputs give empty predictions."""

    def __init__(self, encoder: nn.Module, task: SeveralTasks):
        super().__init__()
        self.encoder, self.counts = encoder, [t.n_inp for t in task.tasks]
        self.models = nn.ModuleList([t.model(encoder) for t in task.tasks])
        self.log_variances = nn.Parameter(torch.zeros(len(task.tasks)), requires_grad=task.weights == "uncertainty")

    def forward(self, *inputs: Tensor) -> tuple:
        rows = SeveralTasks.apart(inputs, self.counts)
        preds = [model(*own) if own[0].numel() else own[0] for model, own in zip(self.models, rows)]
        return (*preds, self.log_variances.expand(len(inputs[0]), -1))


class OfTask(Metric):
    """A metric of one of several tasks, over the images about which it was asked."""

    def __init__(self, several: SeveralTasks, i: int, metric: Callable, name: str | None = None):
        own = getattr(metric, "name", None) or getattr(metric, "__name__", "metric")
        self.several, self.i, self.own_name = several, i, f"{several.names[i]}_{name or own}"
        # a copy, as tasks of one class share their metrics
        self.metric = copy(metric) if isinstance(metric, OfSums) else average(own, metric)

    def reset(self):
        self.metric.reset()

    def accumulate(self, learn):
        targets = self.several.apart(listify(learn.yb), self.several._given)[self.i]
        if targets[0].numel():
            self.metric.add(learn.pred[self.i], *targets)

    @property
    def value(self):
        return self.metric.value

    @property
    def name(self):
        return self.own_name


def _nothing(x: Tensor) -> Tensor:
    """What stands for a task that is not asked: a row for each image and nothing in it."""
    return x.new_zeros(len(x), 0)


def _if_asked(change, pred):
    return change(pred) if not isinstance(pred, Tensor) or pred.numel() else pred
