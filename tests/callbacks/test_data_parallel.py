"""Data parallel training: two processes equal one with batches of twice the size, and keep the same state.

Each of two processes runs this file as a program (tests/two_processes.py).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Recorder
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup_fastai.callbacks.consistency import Consistency
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.pretext import TASKS, get_task
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner
from selfsup_fastai.processes import is_first, join
from tests import test_contract
from tests.two_processes import of_two, run

STILL = {
    "strength": 0,
    "flip": 0,
    "grey_p": 0,
    "jitter_p": 0,
    "blur_p": 0,
    "solarize_p": 0,
    "scale": [1, 1],
    "ratio": [1, 1],
}
EQUAL = {  # Questions in which nothing is drawn
    "rotation": {"crop": 0, "flip": 0},
    "simclr": {"views": STILL},
    "vicreg": {"views": STILL, "dim": 8},
    "barlow_twins": {"views": STILL, "dim": 8},
    "moco": {"views": STILL, "dim": 8},
    "nat": {"views": STILL, "dim": 8, "centered": False},
    "autoencoder": {"denoise": 0},
}


def no_norms() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GELU(), nn.Conv2d(8, 16, 3, 2))


def learner(task, bs: int, n: int = 52, net=no_norms, **settings) -> PretextLearner:
    """37 images to train; 15 to validate: 8 and 7, of which one process has 3 and the other 4."""
    join()
    set_seed(3, reproducible=True)
    array = np.random.default_rng(0).integers(0, 256, (n, 24, 24, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=24, bs=bs, valid_pct=0.29, num_workers=0)
    return pretext_learner(dls, task, net, **settings)


def trained(task: str, bs: int) -> dict[str, Tensor]:
    """What is left of two epochs: weights, losses, metrics."""
    pairs = "views" in EQUAL[task]  # among the images of a batch of one process: so `found_pair` differs
    more = {"metrics": []} if pairs else {}
    learn = learner(task, bs, opt_func=SGD, **EQUAL[task], **more)  # Adam would make much of roundings
    for name, module in list(learn.model.named_modules()):
        if isinstance(module, _BatchNorm):
            learn.model.set_submodule(name, nn.Identity())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2)
        losses, values = learn.recorder.losses, learn.recorder.values
        values = [[float(v) for v in row] for row in (*values, [values[-1][0], *learn.validate()])]
    numbers = {"losses": torch.tensor([float(loss) for loss in losses]), "values": torch.tensor(values)}
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
    assert one.keys() == first.keys() and len(one["losses"]) == 8
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(first[name], second[name]), name


class Looks(Callback):
    def after_epoch(self):
        if self.epoch == 0 and self.learn.fitting and not hasattr(self, "looked"):
            self.looked = True
            self.learn.validate()
            self.learn.get_preds(dl=self.learn.dls.valid)  # by itself, and last: nothing puts right what it leaves


class FirstLooks(Callback):
    """After the first epoch the first process looks at predictions and at a batch, and the second one does not."""

    def after_epoch(self):
        if self.epoch == 0 and self.learn.fitting and is_first() and not hasattr(self, "looked"):
            self.looked = True  # looks end epochs, too
            self.learn.get_preds(dl=self.learn.dls.valid)
            self.learn.dls.train.one_batch()


def looked(folder: Path, who: str) -> dict:
    """Weights of a run with a look after the first epoch, and of one without; where one looks, nobody records, and the
    loss compares images of both."""
    task, looks = {"both": ("rotation", Looks), "first": ("simclr", FirstLooks)}[who]
    found = {}
    for name, cbs in (("looked", [looks()]), ("plain", [])):
        learn = learner(task, 4, opt_func=SGD, **EQUAL[task])
        if who == "first":
            learn.remove_cbs([ProgressCallback, Recorder])
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-2, cbs=cbs)
        found |= {f"{name} {key}": value for key, value in learn.model.state_dict().items()}
    return found


@pytest.mark.parametrize("who", ["both", "first"])
def test_a_look_in_the_middle_of_a_fit_keeps_the_models_equal(tmp_path, who):
    first, second = of_two(__file__, "looked", tmp_path, who)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if who == "both":  # a look at a training batch draws
            assert torch.equal(value, first[name.replace("looked", "plain")]), name


class NoNumber(Callback):
    """In the second process, between two steps, the loss is none."""

    order = -20

    def after_cancel_batch(self):
        if not is_first() and self.learn.train_iter == 4:
            self.learn.loss = torch.tensor(torch.nan)


class Batches(Callback):
    """Losses, as whoever may end the training sees them."""

    order = -8  # after TerminateOnNaN

    def before_fit(self):
        self.losses = []

    def after_batch(self):
        if self.training:
            self.losses.append(float(self.learn.loss))


def accumulated(folder: Path) -> dict:
    """Losses of two epochs in steps of two batches; and of a run that is ended in the second process."""
    found = {}
    for name, cbs in (("whole", []), ("ended", [NoNumber(), TerminateOnNaNCallback()])):
        learn, seen = learner("rotation", 4, opt_func=SGD, **EQUAL["rotation"]), Batches()
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-2, cbs=[GradientAccumulation(8), seen, *cbs])
        found |= {name: torch.tensor(seen.losses)}
        found |= {f"{name} {key}": value for key, value in learn.model.state_dict().items()}
    return found


def test_a_loss_that_is_none_between_steps_ends_all_processes(tmp_path):
    first, second = of_two(__file__, "accumulated", tmp_path)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert len(first["whole"]) == 8  # two epochs of four
    assert torch.equal(first["ended"], first["whole"][: len(first["ended"])]) and 0 < len(first["ended"]) < 8


TOGETHER = [*TASKS, "rotation+simclr", "jigsaw with a bank"]


def state(task: str) -> dict[str, Tensor]:
    """What two epochs leave; each process draws its own questions."""
    join()
    asked = get_task(["rotation", "simclr"]) if "+" in task else task.split()[0]
    more = {"consistency": Consistency(0.5, "nce", 8)} if "bank" in task else {}
    learn = test_contract.learner(asked, test_contract.loaders(test_contract.pictures(34)), **more)
    begun = {name: value.clone() for name, value in learn.model.state_dict().items()}
    with learn.no_bar():
        learn.fit(2, 1e-3)
        values = [float(v or 0) for row in (*learn.recorder.values, learn.validate()) for v in row]
        if is_first():  # by itself
            _, targets = learn.get_preds(dl=learn.dls.valid)
            assert len(targets if isinstance(targets, Tensor) else targets[0]) == len(learn.dls.valid_ds)
    numbers = {"values": torch.tensor(values), "images": torch.tensor(learn.images_seen)}
    moved = sum((value != begun[name]).any() for name, value in learn.model.state_dict().items())
    return {**numbers, "moved": moved, **learn.model.state_dict()}


def states(folder: Path) -> dict:
    return {task: state(task) for task in TOGETHER}


@pytest.fixture(scope="module")
def states_of_two(tmp_path_factory):
    return of_two(__file__, "states", tmp_path_factory.mktemp("states"))


@pytest.mark.slow
@pytest.mark.parametrize("task", TOGETHER)
def test_two_processes_end_with_one_state(task, states_of_two):
    """Weights, statistics, teachers, queues, banks, clusters; losses and metrics, too."""
    first, second = (found[task] for found in states_of_two)
    assert first["moved"] > 1
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, equal_nan=True, msg=name)


if __name__ == "__main__":
    run(globals())
