"""What training cost and where it ended, kept on the learner for the card of its encoder."""

from selfsup_fastai.callbacks.aside import Steady
from selfsup_fastai.callbacks.log import OnlyInFit
from selfsup_fastai.processes import n_processes


class CountImages(Steady, OnlyInFit):
    """Keeps on the learner `epochs_done`, `images_seen` (through the encoder) and `last_values` over all its fits.

    Images are those of all processes. `last_values` are the losses and metrics of the last epoch, which the Recorder
    forgets at the next `validate` or `get_preds`. `lr_find` does not count. The learner sets the three attributes (0,
    0, {}) when it is made.
    """

    order = 51  # after the Recorder, whose values it reads

    def __init__(
        self,
        passes: float = 1,  # Images through the encoder for each image of a batch (RotNet: four)
    ):
        self.passes = passes

    def before_fit(self):
        super().before_fit()
        self.trained = False  # a step since the last epoch that was counted

    def before_train(self):
        self.trained = False

    def after_batch(self):
        if self.training:
            self.trained = True
            self.learn.images_seen += len(self.xb[0]) * self.passes * n_processes()

    def after_epoch(self):
        if self.trained:  # `validate()` ends with this event too, but without a step taken
            self.trained, recorder = False, getattr(self.learn, "recorder", None)
            self.learn.epochs_done += 1
            if recorder:
                self.learn.last_values = dict(zip(recorder.metric_names[1:], self.learn.final_record))
