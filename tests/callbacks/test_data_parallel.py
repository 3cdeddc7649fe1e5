"""Data parallel training: two processes equal one with batches of twice the size, and keep the same state.

Each of two processes runs this file as a program (tests/two_processes.py).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from torch import Tensor, nn

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.pretext import TASKS
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner
from selfsup_fastai.processes import alone, is_first, join
from tests.two_processes import of_two, run

STILL = {"strength": 0, "flip": 0, "grey_p": 0, "jitter_p": 0, "blur_p": 0, "scale": [1, 1], "ratio": [1, 1]}
EQUAL = {  # Questions in which nothing is drawn
    "rotation": {"crop": 0, "flip": 0},
    "simclr": {"views": STILL},
    "vicreg": {"views": STILL, "dim": 8},
    "barlow_twins": {"views": STILL, "dim": 8},
    "autoencoder": {},
}


def no_norms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.Conv2d(8, 16, 3, 2))


def learner(task, bs: int, n: int = 50, net=no_norms, **settings) -> PretextLearner:
    """37 images to train, 13 to validate."""
    join()
    set_seed(3, reproducible=True)
    array = np.random.default_rng(0).integers(0, 256, (n, 24, 24, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=24, bs=bs, valid_pct=0.26, num_workers=0)
    return pretext_learner(dls, task, net, **settings)


def trained(task: str, bs: int) -> dict[str, Tensor]:
    """What is left of two epochs: weights, losses, metrics."""
    learn = learner(task, bs, **EQUAL[task])
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3)
    values = [[float(v) for v in row] for row in (*learn.recorder.values, learn.validate())]
    numbers = {"losses": torch.tensor([float(loss) for loss in learn.recorder.losses or [0]])}
    numbers |= {"first": torch.tensor(values[:-1]), "validated": torch.tensor(values[-1])}
    numbers["images"] = torch.tensor([learn.images_seen, learn.epochs_done])
    return numbers | learn.model.state_dict()


def equal_ones(folder: Path) -> dict:
    return {task: trained(task, 4) for task in EQUAL}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return of_two(__file__, "equal_ones", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("task", EQUAL)
def test_two_processes_equal_one_with_twice_the_batch(task, two):
    one, (first, second) = trained(task, 8), [found[task] for found in two]
    assert one.keys() == first.keys() and len(one["losses"]) >= 1
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, atol=2e-5, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(first[name], second[name]), name


if __name__ == "__main__":
    run(globals())
