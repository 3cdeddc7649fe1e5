"""Not waiting for the GPU: what fastai does after each step with the loss, without bringing it to the CPU."""

import time

import torch
from fastai.callback.core import Callback
from fastai.learner import AvgSmoothLoss
from torch import Tensor

SECONDS = 1.0  # Between two looks at the loss, for the bar


class SmoothLossThere(AvgSmoothLoss):
    """fastai's running average of the loss, kept on the device where the loss is."""

    def accumulate(self, learn) -> None:
        """Take in the loss of a batch."""
        self.count += 1
        loss = learn.loss.detach().mean()
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class LossesThere(Callback):
    """While a GPU trains, losses stay on it: the Recorder's running average, its list, and what the bar shows.

    fastai brings the loss to the CPU after each step, for which the CPU waits until the step is done, when it could
    prepare the next one. Here the bar looks once a second, and the list becomes numbers after each epoch. `lr_find`
    looks at each step.
    """

    order = 52  # after the Recorder and `LossesAsNumbers`, before the bar
    run_valid = False

    def before_fit(self):
        self.there = trains_elsewhere(self.dls.device) and hasattr(self.learn, "recorder")
        if self.there and not isinstance(self.recorder.smooth_loss, SmoothLossThere):
            self.recorder.smooth_loss = SmoothLossThere(self.recorder.smooth_loss.beta)
        self.shown, self.next = None, 0.0

    def after_batch(self):
        if not self.there or hasattr(self.learn, "lr_finder"):
            return
        if time.monotonic() >= self.next:
            self.shown, self.next = self.recorder.smooth_loss.value.cpu(), time.monotonic() + SECONDS
        self.learn.smooth_loss = self.shown

    def after_train(self):
        self._as_numbers()

    def after_fit(self):
        self._as_numbers()  # of an epoch that was broken off

    def _as_numbers(self) -> None:
        losses = self.recorder.losses if self.there else []
        there = [i for i, loss in enumerate(losses) if isinstance(loss, Tensor)]
        if there:
            numbers = torch.stack([losses[i].to(losses[there[-1]].device) for i in there]).tolist()
            for i, number in zip(there, numbers):
                losses[i] = number


def trains_elsewhere(device: torch.device | str | None) -> bool:
    """Whether a device is another than the CPU, which gives it work and need not wait."""
    return torch.device(device or "cpu").type != "cpu"
