"""SimSiam: its loss, its heads, the predictor's rate, and how it collapses where a part of it is missing."""

from copy import deepcopy

import pytest
import torch
from fastai.callback.core import Callback
from torch import Tensor, nn

from selfsup_fastai.data.recipes import MOCO
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.losses import units
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.base import per_image
from selfsup_fastai.pretext.joint import found_pair, spread
from selfsup_fastai.pretext.joint_embedding.simsiam import SimSiam
from tests.pretext.vectors import learner, measured, net, pairs
from tests.test_contract import learner as small_learner
from tests.test_contract import pictures


def answers(b: int = 5, d: int = 6) -> tuple[Tensor, Tensor]:
    """Projections and predictions, (B, 2, D) each."""
    z = torch.randn(2, b, 2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z[0].clone().requires_grad_(), z[1].clone().requires_grad_()


def test_loss_is_one_more_than_the_papers_and_no_gradient_flows_through_z():
    z, p = answers()
    task, rows = get_task("simsiam"), torch.arange(5)
    loss = task.loss((z, p), rows)
    loss.backward()
    q = p.detach().clone().requires_grad_()

    def away(p: Tensor, z: Tensor) -> Tensor:  # the paper's D, algorithm 1
        return -(p / p.norm()) @ (z / z.norm()).detach()

    terms = [away(q[i, 0], z[i, 1]) / 2 + away(q[i, 1], z[i, 0]) / 2 for i in range(5)]
    (sum(terms) / 5).backward()
    torch.testing.assert_close(loss, 1 + sum(terms) / 5)
    torch.testing.assert_close(p.grad, q.grad)
    assert z.grad is None
    torch.testing.assert_close(task.loss((z, p), rows, reduction="none"), 1 + torch.stack(terms))


def test_loss_of_pairs_that_agree_that_are_unrelated_and_that_are_opposite():
    task, z = get_task("simsiam"), torch.eye(4).view(1, 4, 4)[:, :2]
    values = [task.loss((z, p), torch.zeros(1)).item() for p in (3 * z.flip(1), z, -z.flip(1))]
    assert values == pytest.approx([0, 1, 2])


@pytest.mark.parametrize("layers", [2, 3])
def test_projector_and_predictor_are_the_papers(layers):
    model = get_task("simsiam", layers=layers).model(create_encoder(net()))
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(m) for m in model.projector] == [*hidden * (layers - 1), nn.Linear, nn.BatchNorm1d]
    linear = [m for m in model.projector if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(2048, 32), *[(2048, 2048)] * (layers - 1)]
    assert all(m.bias is None for m in linear)  # a norm follows each
    assert [m.affine for m in model.projector if isinstance(m, nn.BatchNorm1d)] == [*[True] * (layers - 1), False]
    assert [type(m) for m in model.predictor] == [*hidden, nn.Linear]
    first, last = model.predictor[0], model.predictor[3]
    assert (tuple(first.weight.shape), tuple(last.weight.shape)) == ((512, 2048), (2048, 512))
    assert first.bias is None and last.bias is not None


def test_each_view_goes_through_the_network_by_itself():
    model, x = get_task("simsiam", dim=8, bottleneck=4).model(create_encoder(net())), pairs(6)
    twin = deepcopy(model)
    z, p = model(x)
    for view in range(2):
        projected = twin.projector(twin.encoder(x[:, view]))
        torch.testing.assert_close(z[:, view], projected)
        torch.testing.assert_close(p[:, view], twin.predictor(projected))
    norms = [m for m in model.modules() if hasattr(m, "num_batches_tracked")]
    assert {m.num_batches_tracked.item() for m in norms} == {2}
    assert z.mean(0).abs().max() < 1e-5  # nothing behind the norm that takes the mean away


class Rates(Callback):
    """The rates of the optimizer's groups at each step."""

    order = 30

    def before_fit(self):
        self.taken = []

    def before_step(self):
        self.taken.append([group["lr"] for group in self.opt.hypers])


def test_the_predictors_rate_warms_up_and_stays():
    learn = small_learner("simsiam", cbs=Rates())
    learn.fit_one_cycle(3, 1e-2)
    predictor, rest = zip(*learn.rates.taken)
    assert [id(p) for p in learn.opt.param_lists[0]] == [id(p) for p in learn.model.predictor.parameters()]
    assert list(rest) == learn.recorder.lrs and rest[-1] < max(rest) / 50
    assert list(predictor) == [max(rest[: i + 1]) for i in range(len(rest))] and predictor[-1] > 9e-3
    learn.fit(1, 1e-4)
    assert {rate for step in learn.rates.taken for rate in step} == {1e-4}  # nothing is left of the fit before


def test_views_are_those_of_moco():
    task = get_task("simsiam")
    assert task.recipe(0, 3, 64) == task.recipe(1, 3, 64) == MOCO


def test_one_image_alone_has_an_answer():
    learn = small_learner("simsiam")
    answer = learn.predict(pictures(1)[0])
    assert torch.isfinite(learn.task.loss(tuple(answer.pred), torch.zeros(1)))
    assert -1 <= answer.decoded.item() <= 1


class NoStop(SimSiam):
    """Gradients flow through both sides."""

    def loss(self, pred, target, reduction="mean"):
        z, p = pred
        return per_image(1 - (units(p) * units(z.flip(1))).sum(-1), reduction)


class NoPredictor(SimSiam):
    def model(self, encoder):
        model = super().model(encoder)
        model.predictor = nn.Identity()
        return model

    def callbacks(self):
        return []


def test_pairs_are_found_and_embeddings_stay_apart():
    learn = learner(SimSiam(dim=128, bottleneck=32))
    assert measured(learn, found_pair)[0] < 0.06  # one of 64 by guessing
    learn.fit(15, 3e-3)
    found, apart = measured(learn, found_pair, spread)
    assert found > 0.15 and apart > 0.9


@pytest.mark.parametrize("task, rate", [(NoStop, 3e-3), (NoPredictor, 1e-2)])
def test_it_collapses_without_the_stop_of_gradients_or_the_predictor(task, rate):
    learn = learner(task(dim=128, bottleneck=32))
    learn.fit(15, rate)
    found, apart = measured(learn, found_pair, spread)
    assert apart < 0.5 and found < 0.08
    assert learn.final_record[0] < 0.5  # of which the loss says nothing: the right network's is no lower


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"dim": 1}, "dim is a whole number, at least 2"),
        ({"bottleneck": 0}, "bottleneck is a whole number, at least 1"),
        ({"layers": 0}, "layers is a whole number, at least 1"),
        ({"views": {"flop": 1}}, "field of a recipe"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(SelfsupError, match=said):
        get_task("simsiam", **settings)
