"""FusedAdam: the steps of fastai's Adam, in one go."""

import numpy as np
import pytest
import torch
from fastai.optimizer import Adam
from fastai.torch_core import norm_bias_params, set_seed
from torch import nn

from selfsup_fastai.callbacks.layout import lay_out
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.optimizers import FusedAdam, FusedOptimizer
from selfsup_fastai.pretext.learner import pretext_learner


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())


def optimizer(make, model: nn.Module, **kwargs):
    """With two groups and, as fastai's learners have it, no decay of norms and biases."""
    opt = make([list(model[:2].parameters()), list(model[2:].parameters())], **kwargs)
    for p in norm_bias_params(model, True).map(opt.state):
        p["do_wd"] = False
    return opt


def steps(opt, model: nn.Module, n: int = 6, first: int = 0) -> None:
    """Rates and momentums change from step to step, as in one cycle; the groups have rates of their own."""
    draw = torch.Generator().manual_seed(1)
    for i in range(first + n):
        x = torch.randn(4, 3, 8, 8, generator=draw)
        if i >= first:
            opt.set_hypers(lr=[1e-3 * (i + 1), 1e-2 / (i + 1)], mom=[0.95 - 0.02 * i, 0.85 + 0.02 * i], wd=[0.5, 0.1])
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()


def same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_defaults_are_those_of_fastai():
    params = [nn.Parameter(torch.ones(2))]
    assert FusedAdam(params, lr=0.1).hypers == Adam(params, lr=0.1).hypers


def test_steps_are_those_of_fastai():
    models = net(), net()
    start = [p.detach().clone() for p in models[0].parameters()]
    opts = [optimizer(make, model, lr=1e-3) for make, model in zip((Adam, FusedAdam), models)]
    for opt, model in zip(opts, models):
        steps(opt, model)
    assert all((p - old).abs().max() > 1e-3 for p, old in zip(models[0].parameters(), start))
    same(*models)
    for (*_, one, _), (*_, other, _) in zip(*(opt.all_params() for opt in opts)):
        assert one.keys() == other.keys() and one.get("do_wd") == other.get("do_wd") and one["step"] == other["step"]
        torch.testing.assert_close(one["sqr_avg"], other["sqr_avg"])


def test_norms_and_biases_do_not_decay():
    p, exempt = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = FusedAdam([p, exempt], lr=0.1, wd=0.5)
    opt.state[exempt]["do_wd"] = False
    p.grad, exempt.grad = torch.zeros(2), torch.zeros(2)
    opt.step()
    assert p.tolist() == pytest.approx([0.95, 0.95]) and exempt.tolist() == [1, 1]


def test_frozen_parameters_stay_and_keep_their_count():
    model = net()
    opt = optimizer(FusedAdam, model, lr=1e-3)
    opt.freeze_to(1)
    before = model[0].weight.detach().clone()
    steps(opt, model, 2)
    assert torch.equal(model[0].weight, before) and "step" not in opt.state[model[0].weight]
    assert opt.state[model[3].weight]["step"] == 2


def test_what_the_one_saved_the_other_goes_on_from():
    models = net(), net()
    first = optimizer(Adam, models[0], lr=1e-3)
    steps(first, models[0], 3)
    models[1].load_state_dict(models[0].state_dict())
    second = optimizer(FusedAdam, models[1], lr=1e-3)
    saved = first.state_dict()
    second.load_state_dict(
        {"hypers": [dict(h) for h in saved["hypers"]], "state": [_copied(s) for s in saved["state"]]}
    )
    steps(first, models[0], 3, first=3)
    steps(second, models[1], 3, first=3)
    same(*models)


def test_weights_and_memory_may_be_laid_out_differently():
    """torch's kernel reads both as they lie: a state of another layout, as from a file, would be mixed up."""
    models = net(), net()
    opts = [optimizer(FusedAdam, model, lr=1e-3) for model in models]
    for opt, model in zip(opts, models):
        steps(opt, model, 3)
    lay_out(models[1], True)
    assert models[1][0].weight.stride() != opts[1].state[models[1][0].weight]["grad_avg"].stride()
    for opt, model in zip(opts, models):
        steps(opt, model, 3, first=3)
    same(*models)


def test_learners_take_it_and_train_alike():
    array = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    ends = []
    for given in ({"opt_func": Adam}, {}):
        set_seed(0, reproducible=True)
        dls = UnlabeledDataLoaders.from_array(array, size=32, bs=4, valid_pct=0.2, num_workers=0, seed=1)
        learn = pretext_learner(dls, "rotation", lambda: net()[:-1], wd=0.1, **given)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(2, 1e-2)
        ends.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert isinstance(learn.opt, FusedOptimizer)
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def _copied(state: dict) -> dict:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def test_no_closure():
    with pytest.raises(NotImplementedError, match="closure"):
        FusedAdam([nn.Parameter(torch.ones(1))], lr=0.1).step(lambda: None)


def test_a_parameter_with_gaps_in_memory():
    """Part of a larger tensor: the fused kernel would take what lies between for its numbers."""
    found = []
    for make in (Adam, FusedAdam):
        whole = torch.linspace(-1, 1, 40).reshape(4, 10)
        p, beside = nn.Parameter(whole[:, :5]), whole[:, 5:].clone()
        opt = make([p], lr=0.1)
        for i in range(3):
            p.grad = torch.cos(i + p.detach())
            opt.step()
        assert torch.equal(whole[:, 5:], beside)
        found.append(p.detach().clone())
    torch.testing.assert_close(*found)
