"""Callbacks that measure something after each epoch and show it beside the metrics."""

from fastai.learner import ValueMetric
from fastcore.foundation import L

from selfsup_fastai.callbacks.log import OnlyInFit
from selfsup_fastai.processes import agreed, alone, is_first


class Columns(OnlyInFit):
    """Measures after each epoch of training: a column for each of `names`, and a row in `rows` of all fits."""

    order = 45  # before the Recorder takes the columns
    names: tuple[str, ...] = ()
    cheap = False  # To look at: `validate()` does so, too

    def __init__(self):
        self.values, self.rows = {}, []

    def look(self, encoder) -> dict[str, float]:
        """The number for each name, of the encoder as it is now."""
        raise NotImplementedError

    def before_fit(self):
        super().before_fit()
        if self.run:
            self.values = {}
            own = [ValueMetric(_Value(self, name), name) for name in self.names]
            self.learn.metrics = self._others() + own

    def after_validate(self):
        trained = bool(getattr(getattr(self.learn, "recorder", None), "losses", None))  # `validate()` takes no step
        if self.run and (trained or self.cheap):
            with alone():  # one process looks, or two might go on differently
                found = self.look(self.learn.encoder) if is_first() else None
            self.values = agreed(found)
        if self.run and trained:
            self.rows.append({"epoch": len(self.rows), **self.values})

    def after_fit(self):
        if self.run:
            self.learn.metrics = self._others()

    def _others(self) -> L:
        """The learner's metrics without these columns, which a fit that was broken off left there."""
        return L(m for m in self.learn.metrics if getattr(getattr(m, "func", None), "columns", None) is not self)


class _Value:
    """One of the values, for a metric. A class, as lambdas could not be exported with a learner."""

    def __init__(self, columns: Columns, name: str):
        self.columns, self.name = columns, name

    def __call__(self) -> float | None:
        return self.columns.values.get(self.name)
