"""encoders/frozen.py: two rivals trained by one backward pass are what two optimizers make of them."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from selfsup_fastai.encoders.frozen import TrainedFirst, as_it_stands


def rivals() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 1))
    return nn.Conv2d(1, 1, 3, padding=1), judge


def losses(maker, judge, x, judge_of_fake):
    fake = maker(x)
    real, found = judge(x), judge(fake.detach())
    d = F.softplus(-real).mean() + F.softplus(found).mean()
    return d, F.softplus(-judge_of_fake(fake)).mean()


def test_one_sum_gives_each_its_own_gradient():
    maker, judge = rivals()
    x = torch.randn(6, 1, 8, 8)
    d, g = losses(maker, judge, x, lambda fake: as_it_stands(judge, fake))
    (d + g).backward()
    other_maker, other_judge = deepcopy(maker), deepcopy(judge)
    d, g = losses(other_maker, other_judge, x, other_judge)
    expected_judge = torch.autograd.grad(d, list(other_judge.parameters()), retain_graph=True)
    expected_maker = torch.autograd.grad(g, list(other_maker.parameters()))
    for p, grad in zip([*judge.parameters(), *maker.parameters()], [*expected_judge, *expected_maker], strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_running_statistics_stay():
    _, judge = rivals()
    before = deepcopy(judge.state_dict())
    out = as_it_stands(judge.train(), x := torch.randn(6, 1, 8, 8, requires_grad=True))
    out.sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in judge.state_dict().items())
    assert all(p.grad is None for p in judge.parameters()) and x.grad is not None
    torch.testing.assert_close(out, judge(x))


class Scale(TrainedFirst):
    what = "scale"

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5))
        self.freeze()

    def own_loss(self, x):
        return self.layers(x).square().mean()


def test_a_part_that_is_trained_first_stands_still_but_while_it_learns():
    part = Scale()
    whole = nn.Sequential(part, nn.Conv2d(1, 1, 3))
    whole.train()
    assert whole[1].training and not any(m.training for m in part.modules())
    assert not any(p.requires_grad for p in part.parameters()) and not part.is_trained
    with part.learning():
        assert all(m.training and p.requires_grad for m in part.layers for p in part.parameters())
        part.own_loss(torch.randn(4, 1, 8, 8)).backward()
    assert part.is_trained and not any(m.training for m in part.modules())
    assert not any(p.requires_grad or p.grad is not None for p in part.parameters())


def test_whether_it_was_trained_goes_with_its_weights_and_an_error_leaves_it_undone():
    part, other = Scale(), Scale()
    with pytest.raises(KeyboardInterrupt), part.learning():
        raise KeyboardInterrupt
    assert not part.is_trained and not part.layers[0].training
    with part.learning():
        pass
    other.load_state_dict(part.state_dict())
    assert other.is_trained
