"""The weights of the best epoch."""

import torch
from fastai.callback.core import CancelFitException

from selfsup_fastai.callbacks.whole_run import WholeRun
from selfsup_fastai.checks import check_number
from selfsup_fastai.errors import TaskError, unknown
from selfsup_fastai.messages import say

LESS = ("loss", "error", "mae", "mse", "msle", "rmspe", "perplexity")  # In names of what is better when less


class KeepBest(WholeRun):
    """At the end of a run the model has the weights of the epoch that was best, over all stages of a `fine_tune`.

    A name with 'loss', 'error', 'mae', 'mse', 'msle', 'rmspe' or 'perplexity' in it is better when less, every other
    when more; of equals the first is kept. The weights are kept in memory. Which epoch is best must not be told by
    images that the model is tested on afterwards.
    """

    order = 62  # after the Recorder and what writes its values down

    def __init__(
        self,
        by: str = "valid_loss",  # 'valid_loss', or the name of a metric
        patience: int | None = None,  # Stop after so many epochs without a better one; None: never
    ):
        if not isinstance(by, str):
            raise TaskError(f"The best epoch is told by 'valid_loss' or the name of a metric; got {by!r}.")
        if patience is not None:
            check_number("patience", patience, 1, whole=True)
        self.by, self.patience = by, patience
        self.sign = -1 if any(word in by for word in LESS) else 1

    def begin(self) -> None:
        self.best, self.best_epoch, self.weights, self.seen = float("-inf"), None, None, 0

    def after_epoch(self):
        names = list(self.recorder.metric_names)[1:]
        if self.by not in names:
            raise unknown("metric to choose the best epoch by", self.by, [n for n in names if n != "time"])
        value = dict(zip(names, self.learn.final_record))[self.by]
        if value is None:
            raise TaskError(f"There is no {self.by} to choose the best epoch by: nothing was validated.")
        if self.sign * float(value) > self.best:
            self.best, self.best_epoch = self.sign * float(value), self.seen
            self.weights = {k: v.detach().clone() for k, v in self.learn.model.state_dict().items()}
        self.seen += 1
        if self.patience and self.best_epoch is not None and self.seen - 1 - self.best_epoch >= self.patience:
            self.stopped = True
            raise CancelFitException

    def end(self) -> None:
        if self.weights is None:
            return
        with torch.no_grad():
            self.learn.model.load_state_dict(self.weights)
        stopped = f" of {self.seen}, then stopped" if self.stopped else ""
        say(f"Kept the weights of epoch {self.best_epoch}{stopped}: {self.by} {self.sign * self.best:.4f}.")
        self.weights = None
