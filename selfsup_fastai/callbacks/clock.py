"""Clocks of a model, set while it is trained."""

from fastai.callback.core import Callback

from selfsup_fastai.encoders.clock import Clock


class SetClocks(Callback):
    """Tells every `Clock` in the model how many batches and epochs of training are over, and how many are planned."""

    order = 9  # before what follows the clocks

    def before_train(self):
        clocks = [m for m in self.learn.model.modules() if isinstance(m, Clock)]
        self.since = [(clock, clock.batches, clock.epochs) for clock in clocks]
        for clock in clocks:
            clock.planned = clock.batches + (self.n_epoch - self.epoch) * len(self.dls.train)

    def after_batch(self):
        if self.training:
            for clock, batches, _ in self.since:  # not one more each time: two tasks may both bring this callback
                clock.batches = batches + self.iter + 1

    def after_train(self):
        for clock, _, epochs in self.since:
            clock.epochs = epochs + 1
