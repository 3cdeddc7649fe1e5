"""What happens to prototypes before and after a step."""

from selfsup_fastai.callbacks.of_model import OfModel
from selfsup_fastai.encoders.prototypes import Prototypes


class TendPrototypes(OfModel):
    """Keeps a model's prototypes as they are in the first epochs, and at length 1 where they are to have it.

    The gradient is dropped, so the optimizer passes them by: a gradient of 0 would leave it momentum and weight decay.
    """

    order = 9  # before gradients are clipped by their norm, and before steps in mixed precision

    def before_train(self):
        self.tended = [m for m in self.task_model.modules() if isinstance(m, Prototypes)]

    def before_step(self):
        for prototypes in self.tended:
            if prototypes.is_frozen:
                prototypes.weight.grad = None

    def after_step(self):
        for prototypes in self.tended:
            if not prototypes.is_frozen:
                prototypes.shorten()
