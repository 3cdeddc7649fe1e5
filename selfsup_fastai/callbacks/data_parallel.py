"""One model trained by several processes, each on its part of every batch."""

from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.learner import AvgLoss, AvgMetric, Metric, ValueMetric
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup_fastai.callbacks.aside import Steady
from selfsup_fastai.errors import TaskError
from selfsup_fastai.messages import say
from selfsup_fastai.metrics import OfSums
from selfsup_fastai.processes import agreed, averaged, n_processes, shared, totals, unequal


class DataParallel(Steady):
    """Keeps the models of several processes equal: they start as the first one's, and take the mean of all gradients.

    `pretext_learner` adds it. With one process it does nothing. The model stays what it is; it is not wrapped in
    torch's DistributedDataParallel, which wants all that is trained to pass through one `forward`, and the same parts
    of it in each step: consistency goes through the encoder a second time, several tasks at once take turns, and banks
    of all images would be sent around with each batch. What that saves, sending gradients while others are still being
    computed, is given up.

    On GPUs batch norms see the images of all processes (`learn.data_parallel.sync_bn = False`: they do not); on CPUs,
    where torch has none that do, those of their own process, and the running statistics are means over the processes.
    """

    order = 7  # after gradient accumulation (6), which cancels steps; before what looks at gradients

    def __init__(
        self,
        sync_bn: bool = True,  # On GPUs
    ):
        self.sync_bn, self.together, self.told = sync_bn, False, False
        self.own_norms, self.statistics = {}, []

    def before_fit(self):
        self.together = n_processes() > 1
        if not self.together:
            return
        if hasattr(self.learn, "lr_finder"):
            raise TaskError("lr_find works in one process: find the rate first, then start several.")
        unequal(False)
        self._part_norms()  # of a fit that was broken off
        shared(self.learn.model)
        self._meet_norms()

    def before_train(self):
        self.computed = False  # a loss that is not yet shared
        if self.together:
            unequal(False)
            rng = self.dls.train.rng  # a process that has looked at a batch by itself would draw another order
            version, state, gauss = agreed(rng.getstate())
            rng.setstate((version, tuple(state), gauss))

    def after_loss(self):
        self.computed = self.training

    def before_step(self):
        self.computed = False
        if self.together:
            own = self.learn.loss.detach().clone()  # all must see the same: a loss that is none may end the training
            averaged([*_gradients(self.learn.model), *self.statistics, own])
            self.learn.loss = own

    def after_cancel_batch(self):
        """Where gradients are gathered over batches, the losses between steps are all processes', too."""
        if self.together and self.computed and any(isinstance(cb, GradientAccumulation) for cb in self.learn.cbs):
            self.computed, own = False, self.learn.loss.detach().clone()
            averaged([own])
            self.learn.loss = own

    def before_validate(self):
        unequal(True)  # the last batch

    def after_fit(self):
        unequal(False)
        self._part_norms()

    def _meet_norms(self) -> None:
        norms = {name: m for name, m in self.learn.model.named_modules() if isinstance(m, _BatchNorm)}
        on_gpu = next(self.learn.model.parameters()).is_cuda
        self.own_norms = norms if on_gpu and self.sync_bn else {}
        for name, norm in self.own_norms.items():
            _replace(self.learn.model, name, convert_sync_batchnorm(norm))
        kept = [] if self.own_norms else norms.values()
        self.statistics = [t for m in kept for t in (m.running_mean, m.running_var) if t is not None]
        if self.statistics and not self.told:
            self.told = True
            say("Batch norms see the images of their own process; running statistics are the means over the processes.")

    def _part_norms(self) -> None:
        """The norms that were there: with the same weights and statistics, but for one process."""
        for name, norm in self.own_norms.items():
            norm.train(self.learn.model.get_submodule(name).training)
            _replace(self.learn.model, name, norm)
        self.own_norms = {}


class ShareMetrics(Callback):
    """Before the Recorder reads losses and metrics of a validation, their sums become those over all processes."""

    order = 49  # before the Recorder (50), after callbacks that fill columns (45)

    def after_validate(self):
        if n_processes() > 1 and hasattr(self.learn, "recorder"):
            for metric in (self.recorder.loss, *self.learn.metrics):
                _share(metric)
        unequal(False)


def _share(metric: Metric) -> None:
    metric = getattr(metric, "metric", metric)  # of one of several tasks
    if isinstance(metric, OfSums):
        metric.totals = metric.totals and totals(metric.totals)
    elif isinstance(metric, AvgLoss | AvgMetric):
        metric.total, metric.count = totals([metric.total, metric.count])
    elif not isinstance(metric, ValueMetric):  # those of callbacks are shared by the callbacks
        say(f"The metric {metric.name} is that of the images of the first of {n_processes()} processes.")


def _gradients(model: nn.Module) -> list:
    return [p.grad for p in model.parameters() if p.grad is not None]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    above, _, own = name.rpartition(".")
    setattr(model.get_submodule(above), own, module)
