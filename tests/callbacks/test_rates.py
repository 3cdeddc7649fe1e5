"""callbacks/rates.py: what a step is taken with, and what the schedule sees."""

from collections import OrderedDict
from copy import deepcopy
from functools import partial

import fastai.callback.schedule  # noqa: F401  (fit_one_cycle)
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam, OptimWrapper
from torch import nn

from selfsup_fastai.callbacks.rates import GameSteps, RateOfPart, RateThatStays

CHANGED = [
    (RateOfPart("last", 0.1), (0.1, 1.0)),
    (RateThatStays("last"), (1.0, 1.0)),
    (GameSteps(0.1, 0.5), (0.1,)),
]  # each with the factor of every group at a constant rate


class Steps(Callback):
    """What each step was taken with, and what was shown after each batch."""

    def before_fit(self):
        self.taken, self.shown, step = [], [], self.opt.step

        def watched(*args, **kwargs):
            self.taken.append(self._now())
            return step(*args, **kwargs)

        self.learn.opt.step = watched

    def after_batch(self):
        if self.training:
            self.shown.append(self._now())

    def _now(self) -> list[tuple[float, float]]:
        return [(h["lr"], h["mom"]) for h in self.opt.hypers]


class Cancels(Callback):
    """Breaks every second batch off just before its step."""

    order = 30

    def before_step(self):
        if self.iter % 2:
            raise CancelBatchException


def learner(callback, *cbs, opt_func=Adam) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(16, 3)
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    dl = torch.utils.data.DataLoader(data, 2)
    model = nn.Sequential(OrderedDict(first=nn.Linear(3, 4), last=nn.Linear(4, 1)))
    cbs = [deepcopy(callback), Steps(), *cbs]
    learn = Learner(DataLoaders(dl, dl), model, nn.MSELoss(), opt_func=opt_func, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    return learn


def test_a_part_has_a_rate_of_its_own():
    learn = learner(RateOfPart("last", 0.1))
    learn.fit(1, 1e-3)
    assert learn.opt.param_lists[0] == list(learn.model.last.parameters())
    assert learn.opt.param_lists[1] == list(learn.model.first.parameters())
    own, rest = zip(*learn.steps.taken)
    assert [rate for rate, _ in own] == pytest.approx([1e-4] * 8) and [rate for rate, _ in rest] == [1e-3] * 8
    assert learn.steps.shown == [[(1e-3, 0.9)] * 2] * 8


def test_a_rate_that_stays_is_the_highest_so_far():
    learn = learner(RateThatStays("last"))
    learn.fit_one_cycle(2, 1e-2)
    own, rest = ([rate for rate, _ in group] for group in zip(*learn.steps.taken))
    assert learn.opt.param_lists[0] == list(learn.model.last.parameters())
    assert rest == learn.recorder.lrs and rest[-1] < rest[0] < max(rest)
    assert own == [max(rest[: i + 1]) for i in range(16)]
    assert [shown[0] for shown in learn.steps.shown] == [shown[1] for shown in learn.steps.shown]
    learn.fit(1, 1e-4)
    assert {rate for step in learn.steps.taken for rate, _ in step} == {1e-4}


def test_what_is_frozen_is_in_no_group():
    callback = RateThatStays("last")
    learn = learner(callback)
    learn.model.first.bias.requires_grad_(False)
    learn.fit(1, 1e-3)
    assert learn.opt.param_lists[1] == [learn.model.first.weight]
    learn.unfreeze()
    assert not learn.model.first.bias.requires_grad


@pytest.mark.parametrize("callback, factors", CHANGED)
@pytest.mark.parametrize("other, n_steps", [(GradientAccumulation(8), 2), (Cancels(), 4)])
def test_a_batch_without_a_step_leaves_the_rates_alone(callback, factors, other, n_steps):
    learn = learner(callback, other)
    learn.fit(2, 1e-3)
    assert len(learn.steps.taken) == 2 * n_steps
    for step in learn.steps.taken:
        assert [rate for rate, _ in step] == pytest.approx([1e-3 * factor for factor in factors])
    assert {rate for shown in learn.steps.shown for rate, _ in shown} == {1e-3}


def test_a_game_goes_on_at_its_own_pace_whatever_one_cycle_says():
    learn = learner(GameSteps(0.1, 0.5))
    learn.fit_one_cycle(2, 1e-2)
    rates, momenta = zip(*(step[0] for step in learn.steps.taken))
    assert list(rates) == pytest.approx([0.1 * rate for rate in learn.recorder.lrs]) and max(rates) > 9e-4
    assert set(momenta) == {0.5}
    shown = [momentum for ((_, momentum),) in learn.steps.shown]
    assert min(shown) == pytest.approx(0.85, abs=0.005) and max(shown) == pytest.approx(0.95)  # those of one-cycle


@pytest.mark.parametrize("opt_func", [partial(SGD, mom=0.9), partial(OptimWrapper, opt=torch.optim.Adam)])
def test_other_optimizers_too(opt_func):
    learn = learner(GameSteps(0.1, 0.5), opt_func=opt_func)
    learn.fit(1, 1e-2)
    assert learn.steps.taken == [[(pytest.approx(1e-3), 0.5)]] * 8
    assert learn.steps.shown == [[(1e-2, 0.9)]] * 8
