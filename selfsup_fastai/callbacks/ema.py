"""Teachers that follow their students."""

import math

from fastai.callback.training import GradientAccumulation

from selfsup_fastai.callbacks.of_model import OfModel
from selfsup_fastai.encoders.teacher import Teacher
from selfsup_fastai.messages import say

# Momenta of BYOL (Grill et al. 2020, appendix and code) for 40, 100 to 300 and 1000 epochs of 312 steps
_STEPS = (12_500, 94_000, 312_000)
_LEFT = (0.03, 0.01, 0.004)  # 1 - momentum
_MOST_LEFT = 0.1  # where a run of a few hundred steps ends up: the last ten steps count


def momentum_for(
    steps: int,  # That the run will take
) -> float:
    """A start for a teacher's momentum that suits the length of the run, .9 to .996.

    BYOL's own for the lengths it was run at (40 epochs: .97, 300: .99, 1000: .996), and in between and below along a
    straight line in the logarithms of both. A teacher with the momentum of a long run would hardly have moved in a
    short one.
    """
    points = [(math.log(n), math.log(left)) for n, left in zip(_STEPS, _LEFT)]
    at = math.log(max(1, steps))
    (x0, y0), (x1, y1) = points[:2] if at < points[1][0] else points[1:]
    left = math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return 1 - min(_MOST_LEFT, max(_LEFT[-1], left))


class EMATeacher(OfModel):
    """Lets every `Teacher` in the model follow its student after each step of the optimizer.

    The momentum goes from `start` to `end` over the planned steps of a `fit`: along half a cosine (BYOL, MoCo v3,
    DINO), along a straight line (I-JEPA), or not at all (MoCo). Steps that a callback cancels, as gradient
    accumulation does, do not count. A start that suits the number of steps is told when training begins.
    """

    order = 10

    def __init__(
        self,
        start: float | None = None,  # Momentum at the first step; None: by the number of planned steps
        end: float = 1.0,  # At the last
        shape: str = "cosine",  # 'cosine', 'linear', or 'constant': `start` all the time
    ):
        self.start, self.end, self.shape = start, end, shape

    def before_train(self):
        steps = max(1, self.n_epoch * len(self.dls.train) // self._batches_a_step())
        self.first, self.last = self._ends(momentum_for(steps))
        self.teachers = [m for m in self.task_model.modules() if isinstance(m, Teacher)]
        if self.start is None and self.epoch == 0 and not hasattr(self.learn, "lr_finder"):
            way = f"goes from {self.first:.3f} to {self.last:g}" if self.last != self.first else f"is {self.first:.3f}"
            say(f"The teacher's momentum {way}, for the {steps:,} step{'s' * (steps > 1)} of this run.")

    def _batches_a_step(self) -> int:
        images = max((cb.n_acc for cb in self.learn.cbs if isinstance(cb, GradientAccumulation)), default=1)
        bs = getattr(self.dls.train, "bs", None) or getattr(self.dls.train, "batch_size", None) or 1  # of torch, too
        return -(-images // bs)  # rounded up

    def _ends(self, suits: float) -> tuple[float, float]:
        """Momentum at the first and at the last step."""
        if self.shape != "constant":
            return (suits if self.start is None else self.start), self.end
        # The mean of the cosine from there to 1; for MoCo on CIFAR-10 (19,400 steps) .988, the authors' is .99
        middle = (suits + 1) / 2 if self.start is None else self.start
        return middle, middle

    def after_step(self):
        for teacher in self.teachers:
            teacher.follow(self.momentum())

    def momentum(self) -> float:
        """At this step of the run."""
        at = self.pct_train
        way = (1 - math.cos(math.pi * at)) / 2 if self.shape == "cosine" else at
        return self.first + (self.last - self.first) * way
