"""callbacks/log.py: what is written while a learner trains."""

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
