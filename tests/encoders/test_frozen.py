"""encoders/frozen.py: two rivals trained by one backward pass are what two optimizers make of them."""

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from selfsup_fastai.encoders.frozen import as_it_stands


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
