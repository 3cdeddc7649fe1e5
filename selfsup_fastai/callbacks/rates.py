"""A part of the model that learns at a rate of its own."""

from fastai.callback.core import Callback
from fastai.torch_core import params
from torch import nn


class RateOfPart(Callback):
    """Steps one part of the model with `factor` times the learning rate of the rest, whatever schedule sets that.

    With Adam, scaling the part's gradients or loss would change nothing. The optimizer gets two groups of parameters,
    the part's first; between steps both show the same rate, so schedules, `lr_find` and the Recorder see one.
    """

    def __init__(
        self,
        part: str,  # Name of the submodule
        factor: float,  # Its learning rate as a multiple of the rest's
    ):
        self.part, self.factor, self._rates = part, factor, None

    def after_create(self):
        self.learn.splitter = self.split

    def split(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Parameters of the part, and of the rest."""
        own = params(model.get_submodule(self.part))
        ids = {id(p) for p in own}
        return [own, [p for p in params(model) if id(p) not in ids]]

    def before_step(self):
        self._rates = [hypers["lr"] for hypers in self.opt.hypers]
        own, *rest = self._rates
        self.opt.set_hyper("lr", [own * self.factor, *rest])

    def after_step(self):
        if self._rates is not None:  # None where another callback canceled the step
            self.opt.set_hyper("lr", self._rates)
            self._rates = None
