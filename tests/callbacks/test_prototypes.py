"""Prototypes: still at first, of length 1 where they are to be; and the clocks that say when."""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam
from torch import nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.clock import SetClocks
from selfsup_fastai.callbacks.prototypes import TendPrototypes
from selfsup_fastai.encoders.clock import Clock
from selfsup_fastai.encoders.prototypes import Prototypes


class Net(nn.Module):
    def __init__(self, frozen: int = 1, unit: bool = True):
        super().__init__()
        self.first, self.prototypes = nn.Linear(2, 3), Prototypes(3, 4, frozen, unit)
        self.seen = []

    def forward(self, x):
        if self.training:
            clock = self.prototypes.clock
            rows = self.prototypes.weight.detach().clone()
            self.seen.append((clock.epochs, clock.batches, clock.planned, self.prototypes.is_frozen, rows))
        return self.prototypes(F.normalize(self.first(x), dim=1))


def learner(net: nn.Module, *cbs, n: int = 8, places: tuple[str, ...] = ("",)) -> Learner:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(n, 2), torch.randn(n, 4))
    loaders = [torch.utils.data.DataLoader(data, batch_size=2) for _ in range(2)]
    cbs = list(cbs)
    for place in places:
        cbs += [SetClocks(), TendPrototypes()]
        cbs[-1].place = cbs[-2].place = place
    learn = Learner(DataLoaders(*loaders), net, loss_func=F.mse_loss, opt_func=Adam, lr=0.1, wd=0.1, cbs=cbs)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *_: None
    return learn


@pytest.mark.parametrize("unit", [True, False])
def test_scores_are_cosines(unit):
    prototypes = Prototypes(3, 4, 1, unit)
    z = F.normalize(torch.randn(5, 3), dim=1)
    expected = F.cosine_similarity(z[:, None], prototypes.weight[None], dim=-1)
    torch.testing.assert_close(prototypes(z), expected)
    prototypes(z)[0, 0].backward()
    along = (prototypes.weight.grad * prototypes.weight).sum(1)[0]
    assert (along.abs() > 1e-3) == unit  # weight norm takes away what would only change the length


def test_they_stay_as_they_are_in_the_first_epoch_and_are_trained_then():
    net = Net()
    learn = learner(net)
    first = net.first.weight.detach().clone()
    learn.fit(10)
    rows = [seen[-1] for seen in net.seen]
    assert all(torch.equal(rows[0], r) for r in rows[:5])  # four steps are an epoch
    assert all(not torch.equal(a, b) for a, b in pairwise(rows[4:]))
    assert [seen[3] for seen in net.seen] == [True] * 4 + [False] * 36
    assert not torch.equal(first, net.first.weight)
    torch.testing.assert_close(net.prototypes.weight.norm(dim=1), torch.ones(4))  # after the last step, too


def test_without_unit_their_length_is_left_to_the_optimizer():
    net = Net(0, unit=False)
    learner(net).fit(2)
    assert (net.prototypes.weight.norm(dim=1) - 1).abs().min() > 1e-3


@pytest.mark.parametrize("epochs, frozen, steps", [(1, 1, 0), (5, 1, 2), (10, 1, 4), (20, 2, 8), (5, 0, 0), (20, 9, 8)])
def test_of_short_runs_only_a_tenth(epochs, frozen, steps):
    net = Net(frozen)
    learner(net).fit(epochs)
    assert [seen[3] for seen in net.seen] == [True] * steps + [False] * (4 * epochs - steps)


def test_a_second_fit_goes_on():
    net = Net()
    learn = learner(net)
    learn.fit(2)
    assert [s[:3] for s in net.seen] == [(i // 4, i, 8) for i in range(8)]
    learn.validate()
    learn.get_preds(dl=learn.dls.valid)
    learn.fit(1)
    assert [s[:3] for s in net.seen[8:]] == [(2, 8 + i, 12) for i in range(4)]
    assert not any(seen[3] for seen in net.seen[8:])


def test_each_of_two_tasks_sets_its_own_clocks():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.models = nn.ModuleList([Net(), Net()])

        def forward(self, x):
            return sum(model(x) for model in self.models)

    net = Both()
    learner(net, places=("models.0", "models.1")).fit(2)
    for model in net.models:
        assert [s[:3] for s in model.seen] == [(i // 4, i, 8) for i in range(8)]


def test_clocks_are_saved_with_the_model():
    clock = Clock()
    clock.epochs, clock.batches, clock.planned = 2, 30, 40
    other = Clock()
    other.load_state_dict(clock.state_dict())
    assert (other.epochs, other.batches, other.planned, other.share) == (2, 30, 40, 0.75)
    assert deepcopy(clock).share == 0.75 and Clock().share == 0
    assert clock.past(2, 0.9) and clock.past(3, 0.75) and not clock.past(3, 0.8)


def test_accumulated_batches_are_counted_and_take_no_step():
    net = Net(1)
    learner(net, GradientAccumulation(4)).fit(10)  # a step for two batches
    rows = [seen[-1] for seen in net.seen]
    assert all(torch.equal(rows[0], r) for r in rows[:6]) and not torch.equal(rows[5], rows[6])
    assert all(torch.equal(rows[i], rows[i + 1]) for i in range(4, 40, 2))
