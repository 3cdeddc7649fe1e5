"""Going on with a run that was killed."""

import json
import os
import time

import numpy as np
from fastai.callback.core import CancelBatchException, CancelEpochException, CancelFitException
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import TrackerCallback
from fastai.learner import Learner

from selfsup_fastai.callbacks.log import OnlyInFit
from selfsup_fastai.callbacks.precision import AutoPrecision
from selfsup_fastai.callbacks.state import (
    State,
    StateFolder,
    captured,
    drawn_state,
    everywhere,
    plain,
    restore,
    restore_drawn,
    restore_records,
)
from selfsup_fastai.errors import ResumeError
from selfsup_fastai.messages import say
from selfsup_fastai.processes import agreed, is_first, n_processes, rank

SHARE = 0.05  # of the time, at most, may be spent on writing
TOGETHER = 10  # Steps after which several processes ask whether it is time to write
SAMPLED = (0.0, 0.1, 0.3, 0.6, 1.0)  # where of the run two schedules are compared


class Resume(OnlyInFit):
    """Keeps the state of a run in a folder, at the end of each epoch and every minute; a killed run goes on from there.

    Start the same program again, with the same folder: `learn.fit_one_cycle(20, cbs=Resume('runs/mine'))`. On one CPU
    process the weights come out bit for bit as if nothing had happened; on a GPU as far as its kernels repeat. Finished
    epochs are not trained again but logged again; of the one that was under way the batches that had been trained on
    are made again, so that what follows is drawn as it would have been, but do not go through the network. Several
    fits one after the other with one `Resume` work, too: those that had ended are passed over.

    The state is that of the model, the optimizer, the generators and the recorder, and what fastai's callbacks that
    watch a metric know. Callbacks of your own that remember things are not part of it; those that change the model at
    the beginning of an epoch do so in `before_train`. Metrics of the training set (`train_metrics`) are those of the
    part trained anew. A run with another number of epochs, schedule, task, network or data is refused with a
    `ResumeError`. If the disk is full, a line says so and the run goes on.

    Of several processes the first one writes, for all of them, to a folder that all can read; as many must go on.

    The file holds weights and numbers, no images and no file names.
    """

    order = 5  # before callbacks that open something for a batch (mixed precision: 10) or train in `before_train`

    def __init__(
        self,
        folder: str | os.PathLike,  # Made if missing; for this run alone
        every: float = 60.0,  # Seconds between two states within an epoch
        about: dict | None = None,  # What else makes this run this run and no other, such as its seed
    ):
        self.kept, self.every, self.about = StateFolder(folder), every, about or {}
        self.fits, self.ahead, self.late = -1, None, KeepState(self)

    def check_about(self) -> None:
        """Raises `ResumeError` now, rather than in the first epoch, if the state says something else of the run."""
        state = self.kept.read()
        if state is not None:
            self._check(state, plain(self.about))

    def clear(self) -> None:
        """Remove the state: the run is over and saved, or is to begin anew."""
        if is_first():
            self.kept.clear()

    def before_fit(self):
        super().before_fit()
        if self.run and self.late not in self.learn.cbs:
            self.learn.add_cb(self.late)

    def before_train(self):  # validation never comes here
        if self.epoch == 0:
            self._begin()
        if self.ahead is None:
            return
        if self.ahead.facts["fit"] > self.fits:
            raise CancelFitException
        if self.epoch < self.ahead.facts["epoch"]:
            raise CancelEpochException

    def before_batch(self):
        if self.training and self.skips():
            self.learn.yb = ()  # nothing to record
            raise CancelBatchException

    def after_cancel_epoch(self):
        if self.ahead is not None and self.epoch < self.ahead.facts["epoch"]:
            self.recorder.log = self.recorder.log[:1] + self.ahead.facts["recorder"]["values"][self.epoch]

    def after_fit(self):
        self.learn.remove_cb(self.late)

    def skips(self) -> bool:
        """Whether the batch at hand was trained on before the run was killed."""
        return self.ahead is not None and self.iter < self.ahead.facts["batch"]

    def _begin(self) -> None:
        """What is to be done before the first step of a fit: find out where it ended, and go there."""
        self.fits, self.print = self.fits + 1, _print_of(self.learn, self.about)
        self.ahead = self._read()
        if self.ahead is None or self.ahead.facts["fit"] < self.fits:
            self.ahead = None
        elif self.ahead.facts["fit"] == self.fits:
            self._check(self.ahead, self.print)
            restore(self.learn, self.ahead)
            restore_records(self.learn, self.ahead)
            self.resting = [cb for cb in self.learn.cbs if isinstance(cb, TrackerCallback)]
            for cb in self.resting:  # they counted these epochs when they happened
                cb.run = False
            self._tell()

    def _read(self) -> State | None:
        """The state that is there. Raises `ResumeError` where not all processes find the same."""
        state = self.kept.read()
        where = state and [state.facts[name] for name in ("fit", "epoch", "batch")]
        if where != agreed(where):
            fix = "All processes must be able to read it: take a folder that they share."
            raise ResumeError(f"Process {rank()} finds another state than the first one. {fix}")
        return state

    def _check(self, state: State, run: dict) -> None:
        saved = {"processes": 1, **state.facts["print"]}
        other = [_other(name, saved.get(name), here) for name, here in run.items() if saved.get(name) != here]
        if other:
            raise ResumeError(
                f"The state in {str(self.kept.folder)!r} is of a run that differs from this one in {', '.join(other)}. "
                "Start the very same run, take another folder, or remove this one to begin anew."
            )

    def arrived(self) -> None:
        """Nothing is skipped any more."""
        self.ahead = None
        for cb in self.resting:
            cb.run = True

    def _tell(self) -> None:
        epoch, batch = self.ahead.facts["epoch"], self.ahead.facts["batch"]
        if epoch == self.n_epoch:
            say(f"This run was finished already; its state is in {str(self.kept.folder)!r}. Nothing is left to train.")
        else:
            at = f", batch {batch + 1} of {len(self.dls.train)}" if batch else ""
            say(f"The run goes on in epoch {epoch + 1} of {self.n_epoch}{at}.")


class KeepState(OnlyInFit):
    """The late half of `Resume`: writes the state once all other callbacks have seen a batch or an epoch."""

    order = 90

    def __init__(self, early: Resume):
        self.early, self.full, self.pending = early, False, False

    def before_train(self):
        ahead = self.early.ahead
        if ahead is not None and not ahead.facts["batch"]:
            self._arrive()
        elif ahead is not None:
            restore_records(self.learn, ahead)
            restore_drawn(self.learn, _part(ahead, "at start"))
        self.at_start, self.stepped = drawn_state(self.learn), False
        self.next = time.monotonic() + self.early.every

    def after_step(self):
        self.stepped = True

    def after_batch(self):
        if not self.training:
            return
        if self.early.skips():
            if self.iter == self.early.ahead.facts["batch"] - 1:
                self._arrive()
        elif self.stepped and self._is_time():
            self._write(self.epoch, self.iter + 1)
        # Between the parts of an accumulated step there are gradients that nobody keeps; it may span two epochs
        self.pending, self.stepped = not self.stepped, False

    def after_epoch(self):
        if self.early.ahead is None:
            finished = self.epoch == self.n_epoch - 1  # what is left of a step then is dropped
            if self.recorder.losses and (finished or not self.pending):  # `validate()` comes here without any losses
                self._write(self.epoch + 1, 0)
        elif self.epoch == self.n_epoch - 1:  # all was done already
            self._arrive()

    def _is_time(self) -> bool:
        if n_processes() > 1 and self.iter % TOGETHER != TOGETHER - 1:
            return False
        return agreed(time.monotonic() >= self.next)

    def _arrive(self) -> None:
        """The place where the run was killed: from here on it is trained."""
        restore_records(self.learn, self.early.ahead)
        restore_drawn(self.learn, _part(self.early.ahead, "now"))
        self.early.arrived()

    def _write(self, epoch: int, batch: int) -> None:
        began = time.monotonic()
        drawn = {"at start": everywhere(self.at_start), "now": everywhere(drawn_state(self.learn))}
        if is_first():
            where = {"fit": self.early.fits, "epoch": epoch, "batch": batch, "print": self.early.print}
            self._keep(
                where, {_mark(name, k): state for name, states in drawn.items() for k, state in enumerate(states)}
            )
        now = time.monotonic()
        self.next = now + max(self.early.every, (now - began) / SHARE)

    def _keep(self, where: dict, drawn: dict[str, State]) -> None:
        tensors, facts = captured(self.learn)
        for mark, state in drawn.items():
            tensors |= {f"{mark}/{key}": value for key, value in state.tensors.items()}
            facts[mark] = state.facts
        try:
            self.early.kept.write(State(tensors, facts | where))
            self.full = False
        except OSError as error:
            if not self.full:
                kept = "the last one stays" if self.early.kept.last.exists() else "there is none yet"
                say(f"The state of the run could not be written ({error.strerror}); {kept}. The run goes on.")
            self.full = True


def _mark(name: str, process: int) -> str:
    return f"{name} of {process}" if process else name


def _part(state: State, name: str) -> State:
    """The generators of this process as they were at the start of the epoch, or when the state was written."""
    facts, mark = state.facts[_mark(name, rank())], f"{_mark(name, rank())}/"
    return State({k.removeprefix(mark): t for k, t in state.tensors.items() if k.startswith(mark)}, facts)


def _print_of(learn: Learner, about: dict) -> dict:
    """What makes a run this run and no other, as JSON has it."""
    task, train = getattr(learn, "task", None), learn.dls.train
    curves = {name: curve for cb in learn.cbs if isinstance(cb, ParamScheduler) for name, curve in cb.scheds.items()}
    fixed = [{name: v for name, v in hypers.items() if name not in curves} for hypers in learn.opt.hypers]
    found = {
        "epochs": learn.n_epoch,
        "processes": n_processes(),
        "batches an epoch": len(train),
        "batch size": train.bs,
        "images": getattr(learn, "data", None) or len(train.dataset),
        "task": task and task.name,
        "settings of the task": task and task.settings(),
        "network": [[name, list(p.shape)] for name, p in learn.model.named_parameters()],
        "optimizer": [getattr(step, "__name__", "") for step in getattr(learn.opt, "cbs", [])],
        "precision": [cb.asked for cb in learn.cbs if isinstance(cb, AutoPrecision)] or None,
        "hyperparameters": plain(fixed),
        "schedule": {name: [plain(np.ravel(curve(at))) for at in SAMPLED] for name, curve in curves.items()},
        **about,
    }
    return json.loads(json.dumps(found, default=str))


def _other(name: str, there: object, here: object) -> str:
    """How two runs differ, in a few words."""
    both = f" ({there!r} there, {here!r} here)"
    return name + (both if len(both) <= 60 else "")
