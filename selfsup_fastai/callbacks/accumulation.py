"""Accumulated gradients, where they would be those of another loss."""

from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation

from selfsup_fastai.errors import TaskError

INSTEAD = "moco, byol, simsiam or dino"  # which compare views and accumulate


class RefuseAccumulation(Callback):
    """Refuses fastai's `GradientAccumulation` where small batches do not add up to a large one.

    They do, batch norms aside, where the loss of a batch is the mean of those of its images (`task.accumulates`). Where
    the images of a batch are told apart, sorted or measured together, the sum over small batches is the loss of small
    batches still. Raises `TaskError` before the first step.

    A step that the last fit did not finish is dropped: `GradientAccumulation` counts from 0 again, so the next one must
    not find a gradient there.
    """

    order = -5  # before what trains a part of the model first

    def before_fit(self):
        if hasattr(self.learn, "lr_finder"):  # before it saves the model to put it back in the end
            self._check()

    def before_train(self):  # `validate` and `get_preds` never come here
        self._check()
        if self.epoch == 0:
            self.opt.zero_grad()

    def _check(self) -> None:
        bs = self.dls.train.bs or 1
        accumulating = [cb for cb in self.learn.cbs if isinstance(cb, GradientAccumulation) and cb.n_acc > bs]
        whole = [task.name for task in _tasks(self.learn.task) if not task.accumulates]
        if accumulating and whole:
            raise TaskError(_said(accumulating[0].n_acc, whole))


def _tasks(task: object) -> list:
    """The task itself, or the parts of several at once."""
    return getattr(task, "tasks", [task])


def _said(n_acc: int, whole: list[str]) -> str:
    names = " and ".join(whole)
    return (
        f"GradientAccumulation({n_acc}) does not go with {names}, whose loss is that of a batch as a whole: small "
        f"batches do not add up to a large one. Leave it out and take larger batches (bs={n_acc}, as far as the memory "
        f"goes), or a task for which it is exact, such as {INSTEAD}."
    )
