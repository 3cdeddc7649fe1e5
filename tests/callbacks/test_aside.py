"""A look at the validation set in the middle of a fit leaves the fit as it was."""

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.torch_core import set_seed

from selfsup_fastai.callbacks.log import MetricsFile
from selfsup_fastai.callbacks.speed import Checkpointing
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.pretext.learner import pretext_learner


class Looks(Callback):
    """After the first epoch, in all ways; and notes what holds in the next steps."""

    order = 80

    def __init__(self, looks: bool):
        self.looks, self.seen = looks, []

    def after_epoch(self):
        if self.looks and self.epoch == 0 and self.learn.training is False and "looking" not in self.seen:
            self.seen.append("looking")
            before = self.learn.recorder.log
            self.learn.get_preds()
            self.learn.validate()
            self.learn.recorder.log = before

    def after_pred(self):
        if self.training:
            half = self.learn.pred.dtype  # fastai makes floats of predictions; what autocast does holds within
            on = (
                torch.is_autocast_enabled("cpu"),
                any(getattr(m, "grad_checkpointing", False) for m in self.learn.model.modules()),
            )
            self.seen.append((half, *on))


def fitted(looks: bool, tmp_path):
    set_seed(1, reproducible=True)
    array = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=32, bs=4, valid_pct=0.2, num_workers=0)
    learn = pretext_learner(dls, "rotation", "resnet10t", precision="bf16", checkpointing=True)
    cb = Looks(looks)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3, cbs=[cb, MetricsFile(tmp_path / f"{looks}.csv")])
    return learn, cb


def test_a_fit_goes_on_as_if_nobody_had_looked(tmp_path):
    (plain, steps), (looked, seen) = fitted(False, tmp_path), fitted(True, tmp_path)
    assert "looking" in seen.seen and "looking" not in steps.seen
    assert [s for s in seen.seen if s != "looking"] == steps.seen == 8 * [(torch.float32, True, True)]
    assert not any(getattr(m, "grad_checkpointing", False) for m in looked.model.modules())
    assert not torch.is_autocast_enabled("cpu")
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, looked.model.state_dict()[name]), name
    rows = [(tmp_path / f"{looks}.csv").read_text().splitlines() for looks in (False, True)]
    plain_row, row = (lines[-1].split(",") for lines in rows)  # the last epoch is written, too
    assert rows[0][0] == rows[1][0] and row[2:] == plain_row[2:]  # fastai's Recorder begins its smooth loss anew


def test_outside_of_a_fit_a_look_has_its_own_beginning_and_end(tmp_path):
    learn, _ = fitted(False, tmp_path)
    began = []
    learn.add_cb(type("Notes", (Callback,), {"before_validate": lambda self: began.append(self.learn.scaler)})())
    with learn.no_bar():
        learn.get_preds()
    assert len(began) == 1 and began[0] is not None and learn.scaler is None  # AutoPrecision's, and it is gone
    assert not learn.fitting and not any(cb.aside for cb in learn.cbs if isinstance(cb, Checkpointing | MixedPrecision))


def test_a_fit_that_breaks_is_over(tmp_path):
    learn, _ = fitted(False, tmp_path)

    class Breaks(Callback):
        def before_batch(self):
            raise RuntimeError("broken")

    with learn.no_bar(), pytest.raises(RuntimeError):
        learn.fit(1, cbs=Breaks())
    assert not learn.fitting
