"""callbacks/log.py: what is written while a learner trains."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from fastai.callback.core import Callback

from selfsup_fastai.callbacks.log import EpochLines, MetricsFile, SkipValidation
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.pretext.learner import pretext_learner
from tests.conftest import write_images


@pytest.fixture
def learn(tmp_path):
    dls = UnlabeledDataLoaders.from_folder(
        write_images(tmp_path / "images", 12, (16, 16)), size=16, bs=4, num_workers=0
    )
    return pretext_learner(dls, "rotation", arch="resnet10t", turns="one")


def test_metrics_file_has_a_row_for_each_epoch_of_every_fit(learn, tmp_path):
    log = MetricsFile(tmp_path / "metrics.csv")
    learn.add_cb(log)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        first = [float(v) for v in learn.recorder.values[-1]]
        learn.fit(1)
        learn.validate()
        learn.get_preds()
    rows = pd.read_csv(tmp_path / "metrics.csv")
    assert list(rows.columns) == ["epoch", "train_loss", "valid_loss", "accuracy"]
    assert list(rows["epoch"]) == [0, 1, 2]
    assert rows.iloc[1, 1:].tolist() == pytest.approx(first)


def test_epoch_lines_are_aligned_on_stderr_and_the_logger_comes_back(learn, capsys):
    logger = learn.logger
    with learn.no_bar():
        learn.fit(2, cbs=EpochLines())
    out, err = capsys.readouterr()
    lines = err.strip("\n").split("\n")[-3:]
    assert out == ""
    assert lines[0].split() == ["epoch", "train_loss", "valid_loss", "accuracy", "time"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1"]
    assert len({len(line) for line in lines}) == 1
    assert learn.logger is logger


def test_skip_validation_trains_and_measures_nothing(learn):
    class Watch(Callback):
        def after_batch(self):
            steps.append(self.training)

    steps, before = [], [p.clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2, cbs=[SkipValidation(), Watch()])
    assert steps == [True, True, True]  # 11 images in batches of 3
    assert any((a != b).any() for a, b in zip(before, learn.model.parameters()))


def test_losses_are_kept_as_the_numbers_that_they_were(learn):
    class Watch(Callback):
        order = 50.5  # between the Recorder and ours

        def after_batch(self):
            if self.training:
                seen.append(float(self.recorder.losses[-1]))

    seen = []
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, cbs=Watch())
        assert learn.recorder.losses == seen and all(type(loss) is float for loss in seen)
        learn.recorder.plot_loss(skip_start=0)
        learn.lr_find(num_it=10, show_plot=False, suggest_funcs=())


MANY_STEPS = """
import torch
from torch import nn
from selfsup_fastai.all import *

class Watch(Callback):
    order = 99

    def after_batch(self):
        if self.training and self.train_iter in (60, 260):
            fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
            seen.append(int(fields["VmRSS"].split()[0]) / 1024)

def net():
    wide = [nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 9000)]
    return nn.Sequential(nn.Conv2d(3, 48, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *wide)

seen = []
dls = UnlabeledDataLoaders.from_array(np.zeros((1000, 16, 16, 3), np.uint8), size=16, bs=8, num_workers=0)
learn = pretext_learner(dls, "rotation", net, turns="one")
with learn.no_bar(), learn.no_logging():
    learn.fit(3, cbs=Watch())
print(seen[1] - seen[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_many_steps_take_no_more_memory_than_some():
    """A network with a large layer: with a tensor kept for each step this grows by hundreds of megabytes."""
    done = subprocess.run([sys.executable, "-c", MANY_STEPS], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 100, done.stdout
