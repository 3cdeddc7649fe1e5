"""callbacks/train_first.py: parts that are trained once, before the rest and without disturbing it."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.train_first import TrainFirst
from selfsup_fastai.encoders.frozen import TrainedFirst


class Pairs(DataLoader):
    """Batches of an input and a target."""

    n_inp = 1


class Mean(TrainedFirst):
    """Learns the mean of what it sees."""

    what = "mean"

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(3))
        self.freeze()

    def own_loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.value.expand_as(x), x)


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.head = Mean(), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x - self.mean.value)


class Watch(Callback):
    """What the part was, and which batch came, at each step of the rest."""

    def __init__(self):
        self.values, self.batches = [], []

    def before_batch(self):
        if self.training:
            self.values.append(self.model.mean.value.clone())
            self.batches.append(self.xb[0].clone())


X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 2.0, 3.0])


def learner(n_epochs: int = 30, step_size: float = 0.2) -> Learner:
    set_seed(0)
    data = [(x, x.sum(0, keepdim=True)) for x in X]
    dls = DataLoaders(Pairs(data, bs=8, shuffle=True), Pairs(data, bs=8))
    first = TrainFirst(n_epochs, step_size)
    learn = Learner(dls, Centered(), nn.MSELoss(), lr=1e-2, cbs=[first, Watch()])
    learn.remove_cb(ProgressCallback)
    return learn


def test_the_part_is_ready_before_the_first_step_and_stays(capsys):
    learn = learner()
    learn.validate()
    assert not learn.model.mean.is_trained and not learn.model.mean.value.any()
    learn.fit(2)
    torch.testing.assert_close(learn.watch.values[0], X.mean(0), atol=0.05, rtol=0)
    assert len(learn.watch.values) == 8 and all(torch.equal(v, learn.watch.values[0]) for v in learn.watch.values)
    learn.fit(1)
    assert torch.equal(learn.model.mean.value, learn.watch.values[0])
    said = capsys.readouterr().err
    for once in ("First the mean is trained: 30 epochs.", "The mean is trained, its own loss is"):
        assert said.count(once) == 1


def test_the_loss_that_is_said_is_that_of_the_last_epoch(capsys):
    learn = learner(n_epochs=1, step_size=1e-9)
    learn.fit(1)
    assert f"its own loss is {X.square().mean():.3g}, and" in capsys.readouterr().err


def test_the_step_size_falls_linearly_and_the_momentum_is_the_papers(monkeypatch):
    seen, step = [], torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        seen.append((self.param_groups[0]["lr"], self.param_groups[0]["betas"]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    learner(n_epochs=2).fit(1)
    rates, betas = zip(*seen)
    assert list(rates) == pytest.approx([0.2 * (1 - k / 8) for k in range(8)]) and set(betas) == {(0.5, 0.999)}


def test_the_rest_sees_the_batches_that_it_would_have_seen():
    learn, done = learner(), learner()  # made by one seed: fastai shuffles by what it draws then
    done.model.mean.is_trained.fill_(True)
    for each in (learn, done):
        set_seed(5)
        each.fit(2)
    assert not done.model.mean.value.any()
    assert torch.equal(torch.stack(learn.watch.batches), torch.stack(done.watch.batches))


def test_what_breaks_off_is_not_done(monkeypatch):
    learn = learner()
    monkeypatch.setattr(Mean, "own_loss", lambda self, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        learn.fit(1)
    assert not learn.model.mean.is_trained and not learn.model.mean.value.requires_grad
