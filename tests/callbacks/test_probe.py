"""OnlineKNN: the accuracy of features.py after each epoch, and a run that goes as without it."""

import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from torch import nn

from selfsup_fastai.callbacks.probe import OnlineKNN
from selfsup_fastai.data.blocks import UnlabeledBlock
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.features import embed, knn_accuracy
from selfsup_fastai.pretext.learner import pretext_learner


def images(n: int) -> np.ndarray:
    """Stripes across or down, by turns, with noise."""
    rng = np.random.default_rng(0)
    wave = np.broadcast_to(127 + 80 * np.sin(np.arange(24) * 1.2), (24, 24))
    each = [(wave if i % 2 else wave.T) + rng.normal(0, 20, (24, 24)) for i in range(n)]
    return np.repeat(np.stack(each).clip(0, 255).astype(np.uint8)[..., None], 3, -1)


@pytest.fixture
def labeled(tmp_path) -> DataLoaders:
    array = images(40)
    block = DataBlock(
        (UnlabeledBlock(n_in=3), CategoryBlock()),
        get_x=lambda i: array[i],
        get_y=lambda i: "down" if i % 2 else "across",
        splitter=lambda items: (list(range(28)), list(range(28, 40))),
    )
    return block.dataloaders(list(range(40)), bs=8, num_workers=0)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())


def learner():
    set_seed(0, reproducible=True)
    return pretext_learner(UnlabeledDataLoaders.from_array(images(30), size=24, bs=8, seed=1), "rotation", tiny)


def fit(learn, epochs: int, cbs=None):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-3, cbs=cbs)
    return learn


def test_the_column_is_the_accuracy_of_the_encoder_after_the_epoch(labeled):
    learn, probe = learner(), OnlineKNN(labeled, k=5)
    fit(learn, 2, probe)
    train, valid = (embed(learn.encoder, dl) for dl in (labeled.train, labeled.valid))
    assert probe.rows[-1] == {"epoch": 1, "knn": knn_accuracy(train, valid, 5)} and probe.rows[-1]["knn"] > 0.8
    assert learn.recorder.metric_names[-2] == "knn" and learn.last_values["knn"] == probe.rows[-1]["knn"]
    learn.validate()
    assert len(probe.rows) == 2 and "knn" not in learn.recorder.metric_names


def test_the_run_goes_as_without(labeled):
    first, second = fit(learner(), 2), fit(learner(), 2, OnlineKNN(labeled))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters()))


def test_what_has_no_labels_is_refused():
    with pytest.raises(DataError, match="labeled images"):
        OnlineKNN(None)
    unlabeled = UnlabeledDataLoaders.from_array(images(12), size=24, bs=4)
    with pytest.raises(TaskError, match="labels"):
        fit(learner(), 1, OnlineKNN(unlabeled))
