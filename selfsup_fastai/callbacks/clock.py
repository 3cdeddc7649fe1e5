"""Clocks of a model, set while it is trained."""

from selfsup_fastai.callbacks.log import OnlyInFit
from selfsup_fastai.callbacks.of_model import OfModel
from selfsup_fastai.encoders.clock import Clock


class SetClocks(OnlyInFit, OfModel):
    """Tells every `Clock` in the task's model how many batches and epochs are over, and how many batches are planned.

    What is planned is told before a fit begins, so that a run that goes on (`Resume`) finds it as it was; batches that
    such a run passes over are not counted again.
    """

    order = 9  # before what follows the clocks

    def before_fit(self):
        super().before_fit()
        self.clocks, self.trained = [m for m in self.task_model.modules() if isinstance(m, Clock)], False
        if self.run:
            for clock in self.clocks:
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
