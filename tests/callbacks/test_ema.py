"""When teachers follow, and how fast; when memories are brought up to date."""

import math

import fastai.callback.schedule  # noqa: F401  (lr_find)
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.ema import EMATeacher, momentum_for
from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.encoders.memories import FeatureQueue
from selfsup_fastai.encoders.teacher import Teacher


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = nn.Linear(2, 2)
        self.teacher = Teacher(self.student)
        self.queue = FeatureQueue(8, 2)

    def forward(self, x):
        z = self.student(x)
        self.queue.note(z)
        return z


def learner(cbs) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(8, 2)
    data = torch.utils.data.TensorDataset(x, -x)
    loaders = [torch.utils.data.DataLoader(data, batch_size=2) for _ in range(2)]
    learn = Learner(DataLoaders(*loaders), Net(), loss_func=F.mse_loss, opt_func=SGD, lr=0.1, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


def test_momentum_grows_with_the_run_and_is_byols_where_byol_was_run():
    assert momentum_for(12_500) == pytest.approx(0.97) and momentum_for(94_000) == pytest.approx(0.99)
    assert momentum_for(312_000) == pytest.approx(0.996) and momentum_for(10**9) == pytest.approx(0.996)
    assert momentum_for(1) == pytest.approx(0.9)
    found = [momentum_for(10**i) for i in range(8)]
    assert found == sorted(found)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_momentum_goes_from_start_to_end_over_the_planned_steps(shape):
    seen, ema = [], EMATeacher(0.9, shape=shape)
    learn = learner([ema, KeepMemories()])
    follow = learn.model.teacher.follow
    learn.model.teacher.follow = lambda momentum: (seen.append(momentum), follow(momentum))
    learn.fit(3)
    assert len(seen) == 12
    for k, momentum in enumerate(seen):
        way = 1 - (math.cos(math.pi * k / 12) + 1) / 2 if shape == "cosine" else k / 12
        assert momentum == pytest.approx(1 - (1 - 0.9) * (1 - way))


@pytest.mark.parametrize("start, momentum", [(0.7, 0.7), (None, 0.95)])
def test_a_constant_momentum_is_the_start_or_the_mean_of_the_way_to_one(start, momentum):
    seen, ema = [], EMATeacher(start, shape="constant")
    learn = learner([ema, KeepMemories()])
    learn.model.teacher.follow = seen.append
    learn.fit(2)
    assert seen == pytest.approx([momentum] * 8)
    assert (momentum_for(19_400) + 1) / 2 == pytest.approx(0.99, abs=0.002)  # 200 epochs of CIFAR-10: the authors' .99


@pytest.mark.parametrize(
    "ema, said",
    [
        (EMATeacher(), "The teacher's momentum goes from 0.900 to 1, for the 8 steps of this run.\n"),
        (EMATeacher(shape="constant"), "The teacher's momentum is 0.950, for the 8 steps of this run.\n"),
        (EMATeacher(0.5), ""),
    ],
)
def test_a_momentum_that_nobody_chose_is_told_once_a_run(ema, said, capsys):
    learn = learner([ema, KeepMemories()])
    learn.lr_find(num_it=4, show_plot=False)
    assert capsys.readouterr().err == ""
    learn.fit(2)
    learn.validate()
    assert capsys.readouterr().err == said


def test_batches_that_are_accumulated_are_one_step_of_the_run(capsys):
    learn = learner([EMATeacher(), KeepMemories(), GradientAccumulation(4)])
    learn.fit(2)
    assert "for the 4 steps of this run" in capsys.readouterr().err  # 8 batches of 2 images


def test_a_teacher_follows_each_step_and_steps_alone():
    learn = learner([EMATeacher(0.5, end=0.5), KeepMemories(), GradientAccumulation(4)])
    average = learn.model.teacher.net.weight.clone()
    steps = []
    learn.model.teacher.follow = lambda momentum, follow=learn.model.teacher.follow: (
        follow(momentum),
        steps.append(learn.model.student.weight.detach().clone()),
    )
    learn.fit(2)
    assert len(steps) == 4  # 8 batches of 2 images, a step for 4 images
    for weight in steps:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(learn.model.teacher.net.weight, average)
    rows = learn.model.queue.rows.clone()
    assert learn.model.queue.entered == 16
    learn.validate()
    learn.get_preds(dl=learn.dls.valid)
    assert torch.equal(rows, learn.model.queue.rows) and learn.model.queue.entered == 16


def test_a_step_that_spans_two_epochs_brings_the_memory_all_of_its_parts():
    learn = learner([KeepMemories(), GradientAccumulation(6)])
    learn.fit(3)  # 4 batches of 2 images an epoch: 4 steps, the second of batches 4, 5 and 6
    assert learn.model.queue.entered == 24


def test_a_step_that_a_fit_did_not_finish_is_forgotten():
    learn = learner([KeepMemories(), GradientAccumulation(6)])
    for entered in (6, 12):
        learn.fit(1)
        assert learn.model.queue.entered == entered


def test_a_batch_without_a_step_leaves_the_memory_as_it_was():
    learn = learner([KeepMemories(), GradientAccumulation(100)])
    rows = learn.model.queue.rows.clone()
    learn.fit(1)
    assert torch.equal(rows, learn.model.queue.rows)
    assert learn.model.queue._noted == []
