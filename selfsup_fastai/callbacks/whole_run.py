"""Callbacks that see the stages of a fine-tuning as one run."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fastai.callback.core import Callback
from fastai.learner import Learner

from selfsup_fastai.callbacks.log import OnlyInFit


class WholeRun(OnlyInFit):
    """A callback whose run is all stages of a `fine_tune`, or, where nothing says so, each `fit` by itself.

    `begin` and `end` are called once a run, with the model's weights as they are before the first step and after the
    last one; `progress` goes from 0 to 1 over all of it. `validate`, `get_preds` and `lr_find` are no run, and no part
    of one.
    """

    run_epochs, epochs_over, stopped, by_fit = 0, 0, False, False

    def begin(self) -> None:
        """Before the first stage."""

    def end(self) -> None:
        """After the last stage, or when the run was broken off."""

    def start(
        self,
        learn: Learner,
        epochs: int,  # Of all stages
    ) -> None:
        self.learn, self.run_epochs, self.epochs_over, self.stopped = learn, epochs, 0, False
        self.begin()

    def finish(self) -> None:
        self.run_epochs, self.by_fit = 0, False
        self.end()

    @property
    def progress(self) -> float:
        """Share of the run that is over, 0..1."""
        return min(1.0, (self.epochs_over + self.learn.pct_train * self.learn.n_epoch) / self.run_epochs)

    def before_fit(self):
        super().before_fit()
        self.run = self.run and not self.learn.lock.locked()  # fastai holds it in `validate` and `get_preds`
        if self.run and (self.by_fit or not self.run_epochs):  # still by_fit: the last fit was broken off
            self.start(self.learn, self.learn.n_epoch)
            self.by_fit = True

    def after_fit(self):
        self.epochs_over += self.learn.n_epoch
        if self.by_fit:
            self.finish()


@contextmanager
def whole_run(
    learn: Learner,
    cbs: Iterable[Callback],  # Those of the run; the learner's own are found
    epochs: int,  # Of all stages
) -> Iterator[None]:
    """All that is fitted inside is one run to every `WholeRun`."""
    found = [cb for cb in dict.fromkeys([*cbs, *learn.cbs]) if isinstance(cb, WholeRun)]
    found.sort(key=lambda cb: cb.order)  # what keeps the best weights comes after what changes them
    begun = []
    try:
        for cb in found:
            begun.append(cb)
            cb.start(learn, epochs)
        yield
    finally:
        for cb in begun:
            cb.learn = learn  # fastai takes it away after each fit
            cb.finish()
