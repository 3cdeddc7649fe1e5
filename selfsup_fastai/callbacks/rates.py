"""Steps of other sizes than the schedule says: of one part of the model, or of a game between two networks."""

from abc import abstractmethod

from fastai.torch_core import trainable_params
from torch import nn

from selfsup_fastai.callbacks.of_model import OfModel


class OwnSteps(OfModel):
    """Changes the optimizer's learning rates and momentum for the time of a step.

    Between steps they are what the schedule made of them, so schedules, `lr_find` and the Recorder see that alone.
    """

    order = 20  # after what cancels a step: GradientAccumulation (6) and MixedPrecision (10)
    _scheduled = None

    @abstractmethod
    def change(self) -> None:
        """Set what holds for this step."""

    def before_step(self):
        names = [name for name in ("lr", "mom") if name in self.opt.hypers[0]]
        self._scheduled = {name: [hypers[name] for hypers in self.opt.hypers] for name in names}
        self.change()

    def after_step(self):
        if self._scheduled is not None:  # None where another callback canceled the step before it was changed
            for name, values in self._scheduled.items():
                self.opt.set_hyper(name, values)
            self._scheduled = None

    after_cancel_batch = after_step

    def _scale(self, factors: list[float]) -> None:
        rates = [hypers["lr"] for hypers in self.opt.hypers]
        self.opt.set_hyper("lr", [rate * factor for rate, factor in zip(rates, factors, strict=True)])


class PartSteps(OwnSteps):
    """Steps in which one part of the model has a learning rate of its own.

    The optimizer gets two groups of parameters, the part's first.
    """

    def after_create(self):
        self.learn.splitter = self.split

    def split(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Trained parameters of the part, and of the rest; `unfreeze` would wake what else there is."""
        own = trainable_params(model.get_submodule(self.place).get_submodule(self.part))
        ids = {id(p) for p in own}
        return [own, [p for p in trainable_params(model) if id(p) not in ids]]


class RateOfPart(PartSteps):
    """Steps one part of the model with `factor` times the learning rate of the rest, whatever schedule sets that.

    With Adam, scaling the part's gradients or loss would change nothing.
    """

    def __init__(
        self,
        part: str,  # Name of the submodule
        factor: float,  # Its learning rate as a multiple of the rest's
    ):
        self.part, self.factor = part, factor

    def change(self):
        self._scale([self.factor, *[1.0] * (len(self.opt.hypers) - 1)])


class RateThatStays(PartSteps):
    """Steps one part of the model with the highest learning rate that the schedule has come to in this `fit`.

    It warms up with the rest and does not fall with it (the predictor of SimSiam, Chen & He 2020).
    """

    _highest = 0.0

    def __init__(
        self,
        part: str,  # Name of the submodule
    ):
        self.part = part

    def before_fit(self):
        self._highest = 0.0

    def change(self):
        first, *others = [hypers["lr"] for hypers in self.opt.hypers]
        self._highest = max(self._highest, first)
        self.opt.set_hyper("lr", [self._highest, *others])


class GameSteps(OwnSteps):
    """Steps with `factor` times the learning rate and with this momentum, whatever schedule sets the two.

    For networks that are trained against each other: with the rates and the momentum of one-cycle each overshoots what
    the other has just become, and the game swings instead of going on.
    """

    def __init__(
        self,
        factor: float,  # Of the learning rate
        momentum: float,  # Adam's first beta
    ):
        self.factor, self.momentum = factor, momentum

    def change(self):
        self._scale([self.factor] * len(self.opt.hypers))
        if "mom" in self.opt.hypers[0]:
            self.opt.set_hyper("mom", self.momentum)
