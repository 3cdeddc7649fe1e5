"""Clocks of a model, set while it is trained."""

from selfsup_fastai.callbacks.log import OnlyInFit
from selfsup_fastai.callbacks.of_model import OfModel
from selfsup_fastai.encoders.clock import Clock


class SetClocks(OnlyInFit, OfModel):
    """Tells every `Clock` in the task's model how many batches and epochs are over, and how many batches are planned.

    In a run that goes on (`Resume`) they go on, too: what was planned stays, and batches that are passed over are not
    counted again.
    """

    order = 9  # before what follows the clocks

    def before_fit(self):
        super().before_fit()
        self.clocks, self.trained = [m for m in self.task_model.modules() if isinstance(m, Clock)], False
        self.stood = [(clock.batches, clock.planned) for clock in self.clocks]

    def before_train(self):  # validation never comes here
        for clock, stood in zip(self.clocks, self.stood):
            if self.epoch == 0 and (clock.batches, clock.planned) == stood:  # else `Resume` set it
                clock.planned = clock.batches + self.n_epoch * len(self.dls.train)

    def after_loss(self):
        self.trained = self.training

    def after_batch(self):
        if self.trained:
            for clock in self.clocks:
                clock.batches += 1
        self.trained = False

    def after_train(self):
        for clock in self.clocks:
            clock.epochs += 1
