"""Looks at the validation set in the middle of a fit.

fastai sends `before_fit` and `after_fit` around `validate` and `get_preds`, too. A callback of a fit under way that
calls one of them would have other callbacks end what they hold for the whole fit, or begin it anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from fastai.callback.core import Callback


class Steady(Callback):
    """A callback that the `before_fit` and `after_fit` of a look aside do not reach."""

    aside = False  # Whether its learner looks aside just now

    def __call__(self, event_name):
        """fastai's, but for these two events."""
        if not (self.aside and event_name in ("before_fit", "after_fit")):
            return super().__call__(event_name)


class LooksAside:
    """A `Learner` that tells its callbacks of looks aside: to stand before `Learner` among the base classes."""

    fitting = False

    def fit(self, *args, **kwargs):
        """fastai's."""
        before, self.fitting = self.fitting, True
        try:
            return super().fit(*args, **kwargs)
        finally:
            self.fitting = before

    def validate(self, *args, **kwargs):
        """fastai's; a fit under way goes on afterwards as if nobody had looked."""
        with self._aside():
            return super().validate(*args, **kwargs)

    def get_preds(self, *args, **kwargs):
        """fastai's; a fit under way goes on afterwards as if nobody had looked."""
        with self._aside():
            return super().get_preds(*args, **kwargs)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        steady = [cb for cb in self.cbs if isinstance(cb, Steady)] if self.fitting else []
        runs = [(cb, cb.run) for cb in self.cbs] if self.fitting else []  # some rest while others look
        for cb in steady:
            cb.aside = True
        try:
            yield
        finally:
            for cb in steady:
                cb.aside = False
            for cb, run in runs:
                cb.run = run
