"""What is written down while a learner trains: lines for people, rows for programs."""

import csv
import os
import sys
from pathlib import Path

import torch
from fastai.callback.core import Callback, CancelValidException
from tqdm.auto import tqdm

from selfsup_fastai.processes import is_first


class OnlyInFit(Callback):
    """A callback that rests while `lr_find` and `get_preds` run."""

    def before_fit(self):
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(self, "gather_preds")


class LossesAsNumbers(Callback):
    """On the CPU the Recorder's list of losses holds numbers, not tensors.

    A tensor kept for each step lies where larger ones were freed and are wanted again. The C library then finds no room
    for those and asks for more: some megabytes a step where a layer is large, until no memory is left. On a GPU, where
    a number would have to be waited for, the list stays as fastai makes it.
    """

    order = 51  # after the Recorder
    run_valid = False

    def before_fit(self):
        self.run = hasattr(self.learn, "recorder")

    def after_batch(self):
        losses = self.recorder.losses
        if losses and isinstance(losses[-1], torch.Tensor) and losses[-1].device.type == "cpu":
            losses[-1] = losses[-1].item()


class EpochLines(OnlyInFit):
    """One aligned line an epoch on stderr, and on a terminal a bar over the batches: for shells and log files.

    Stands in for fastai's bar, whose table goes to stdout: `with learn.no_bar(): learn.fit(3, cbs=EpochLines())`.
    """

    order = 60  # after the Recorder, whose values it prints

    def before_fit(self):
        super().before_fit()
        self.run = self.run and is_first()
        if self.run:
            self.usual_logger, self.learn.logger = self.learn.logger, self._line
            self._line(self.recorder.metric_names)

    def before_train(self):
        self.bar = tqdm(total=len(self.dls.train), desc=f"epoch {self.epoch}", leave=False, disable=None)

    def after_batch(self):
        if self.training:
            self.bar.update()

    def after_train(self):
        self.bar.close()

    def after_fit(self):
        self.learn.logger = self.usual_logger

    def _line(self, values) -> None:
        widths = [max(10, len(name)) for name in self.recorder.metric_names]
        cells = [f"{v:.4f}" if isinstance(v, float) else str("" if v is None else v) for v in values]
        tqdm.write("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)), file=sys.stderr)


class MetricsFile(OnlyInFit):
    """Every epoch's losses and metrics as a row of a CSV file, written at once: a killed run keeps its rows.

    Epochs are numbered through when a learner is fitted several times, as in the stages of `fine_tune`. Of several
    processes the first one writes.
    """

    order = 61

    def __init__(self, file: str | os.PathLike):
        self.file, self.rows = Path(file), 0

    def before_fit(self):
        super().before_fit()
        self.run = self.run and is_first()

    def after_epoch(self):
        if not self.recorder.losses:  # `validate()` ends with this event too, but without a step taken
            return
        with self.file.open("a" if self.rows else "w", newline="") as file:
            writer = csv.writer(file)
            if not self.rows:
                writer.writerow(name for name in self.recorder.metric_names if name != "time")
            writer.writerow([self.rows, *self.learn.final_record])
        self.rows += 1


class SkipValidation(Callback):
    """Trains without validating: where only the end counts, the validation set would cost more than the training."""

    def before_validate(self):
        raise CancelValidException
