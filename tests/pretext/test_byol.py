"""BYOL: its loss, what learns and what follows, and how it collapses where a part of it is missing."""

from copy import deepcopy

import pytest
import torch
from fastai.callback.core import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.ema import EMATeacher, momentum_for
from selfsup_fastai.data.recipes import BYOL_1, BYOL_2
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.features import feature_std
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.joint import found_pair, spread
from selfsup_fastai.pretext.joint_embedding.byol import BYOL
from tests.pretext.vectors import learner, measured, net, pairs
from tests.test_contract import learner as small_learner
from tests.test_contract import loaders, pictures


def answers(b: int = 5, d: int = 6) -> tuple[Tensor, Tensor]:
    """Predictions and projections, (B, 2, D) each."""
    z = torch.randn(2, b, 2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z[0].clone().requires_grad_(), z[1].clone().requires_grad_()


def test_loss_is_the_authors_regression_of_each_view_on_the_other():
    p, t = answers()
    task, rows = get_task("byol"), torch.arange(5)
    loss = task.loss((p, t), rows)
    loss.backward()
    q = p.detach().clone().requires_grad_()
    terms = []
    for i in range(5):  # the squared distance of normalized vectors, summed over the two directions
        for view in range(2):
            x, y = q[i, view], t[i, 1 - view].detach()
            terms.append((x / x.norm() - y / y.norm()).square().sum())
    (sum(terms) / 5).backward()
    torch.testing.assert_close(loss, sum(terms) / 5)
    torch.testing.assert_close(p.grad, q.grad)
    assert t.grad is None  # nothing flows into the teacher
    each = task.loss((p, t), rows, reduction="none")
    torch.testing.assert_close(each, torch.stack(terms).view(5, 2).sum(1))


def test_loss_of_pairs_that_agree_that_are_unrelated_and_that_are_opposite():
    task, p = get_task("byol"), torch.eye(4).view(1, 4, 4)[:, :2]
    values = [task.loss((p, t), torch.zeros(1)).item() for t in (3 * p.flip(1), p, -p.flip(1))]
    assert values == pytest.approx([0, 4, 8])


def test_projector_and_predictor_are_the_codes():
    model = get_task("byol").model(create_encoder(net()))
    for head, n_in in [(model.projector, 32), (model.predictor, 256)]:
        assert [type(m) for m in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert [tuple(m.weight.shape) for m in head if isinstance(m, nn.Linear)] == [(1024, n_in), (256, 1024)]
        assert head[-1].bias is None and head[1].affine
    for own, student in zip(model.teacher.parameters(), [*model.encoder.parameters(), *model.projector.parameters()]):
        assert torch.equal(own, student) and own is not student and not own.requires_grad


def test_each_view_goes_through_student_and_teacher_by_itself():
    model, x = get_task("byol", dim=8, hidden=16).model(create_encoder(net())), pairs(6)
    twin = deepcopy(model)
    p, t = model(x)
    assert p.requires_grad and not t.requires_grad
    for view in range(2):  # in this order, as batch norms remember
        torch.testing.assert_close(p[:, view], twin.predictor(twin.projector(twin.encoder(x[:, view]))))
        torch.testing.assert_close(t[:, view], twin.teacher.net(x[:, view]))
    norms = [m for part in (model.encoder, model.projector, model.teacher) for m in part.modules()]
    assert {m.num_batches_tracked.item() for m in norms if hasattr(m, "num_batches_tracked")} == {2}


class Follows(Callback):
    """Keeps the student's and the teacher's weights after each step."""

    order = 30

    def before_fit(self):
        self.kept = [self._weights()]

    def after_step(self):
        self.kept.append(self._weights())

    def _weights(self) -> tuple[Tensor, Tensor]:
        model = self.learn.model
        student = [*model.encoder.parameters(), *model.projector.parameters()]
        return tuple(
            torch.cat([p.detach().flatten() for p in parts]) for parts in (student, model.teacher.parameters())
        )


def test_the_teacher_follows_after_each_step_and_nothing_else_moves_it():
    learn = small_learner("byol", loaders(pictures(16)), cbs=Follows())
    learn.fit(2, 1e-2)
    ema, kept = learn.ema_teacher, learn.follows.kept
    assert len(kept) == 7  # 12 images to train with, in batches of 4
    start = momentum_for(6)
    for k in range(6):
        momentum = 1 - (1 - start) * (torch.cos(torch.tensor(torch.pi * k / 6)).item() + 1) / 2
        expected = momentum * kept[k][1] + (1 - momentum) * kept[k + 1][0]
        torch.testing.assert_close(kept[k + 1][1], expected)
        assert not torch.equal(kept[k + 1][0], kept[k][0])
    assert not any(p.requires_grad for p in learn.model.teacher.parameters())
    trained = {id(p) for group in learn.opt.param_lists for p in group}
    assert not trained & {id(p) for p in learn.model.teacher.parameters()}
    before = {name: value.clone() for name, value in learn.model.teacher.state_dict().items()}
    learn.validate()
    learn.get_preds()
    assert all(torch.equal(value, before[name]) for name, value in learn.model.teacher.state_dict().items())
    assert (ema.first, ema.last) == (start, 1)


@pytest.mark.parametrize("momentum, said", [(None, True), (0.9, False)])
def test_the_momentum_is_the_settings_or_suits_the_run_which_is_said(momentum, said, capsys):
    (callback,) = get_task("byol", momentum=momentum).callbacks()
    assert isinstance(callback, EMATeacher)
    assert (callback.start, callback.end, callback.shape) == (momentum, 1, "cosine")
    learn = learner(BYOL(momentum=momentum, dim=8, hidden=16), n=32)
    learn.fit(3)
    text = capsys.readouterr().err
    assert text.count("The teacher's momentum goes from 0.900 to 1, for the 3 steps of this run.") == said
    assert learn.ema_teacher.first == pytest.approx(0.9)


def test_the_two_views_have_the_papers_two_recipes():
    task = get_task("byol")
    assert (task.recipe(0, 3, 64), task.recipe(1, 3, 64)) == (BYOL_1, BYOL_2)
    assert (BYOL_1.blur_p, BYOL_1.solarize_p, BYOL_2.blur_p, BYOL_2.solarize_p) == (1, 0, 0.1, 0.2)


def test_one_image_alone_has_an_answer_and_no_neighbor():
    learn = small_learner("byol")
    answer = learn.predict(pictures(1)[0])
    loss = learn.task.loss(tuple(answer.pred), torch.zeros(1))
    assert torch.isfinite(loss) and -1 <= answer.decoded.item() <= 1
    assert found_pair(answer.pred, torch.zeros(1)) == 0 and spread(answer.pred) == 0


def test_the_spread_of_embeddings_tells_a_collapse():
    z = torch.randn(512, 2, 16, generator=torch.Generator().manual_seed(0))
    assert spread(z) == pytest.approx(1, abs=0.02) and spread(7 * z) == pytest.approx(spread(z).item())
    assert spread(z[:1].expand(512, 2, 16)) == 0
    torch.testing.assert_close(spread((z, None)), F.normalize(z[:, 0], dim=1).std(0).mean() * 4)
    assert spread(z).item() == feature_std(z[:, 0])
    assert spread(z + 5) < 0.3


@pytest.mark.slow
def test_pairs_are_found_and_embeddings_stay_apart():
    learn = learner(BYOL(dim=64, hidden=256))
    assert measured(learn, found_pair)[0] < 0.09  # one of 64 by guessing
    learn.fit(30, 3e-3)
    found, apart = measured(learn, found_pair, spread)
    assert found > 0.12 and apart > 0.6


class NoPredictor(BYOL):
    def model(self, encoder):
        model = super().model(encoder)
        model.predictor = nn.Identity()
        return model


def test_without_the_predictor_it_collapses():
    learn = learner(NoPredictor(dim=64, hidden=128))
    before = measured(learn, spread)[0]
    learn.fit(10, 1e-2)
    assert before > 0.3 and measured(learn, spread)[0] < 0.1
    assert learn.final_record[0] < 0.2  # of which the loss says nothing


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"momentum": 1}, "momentum is a number, at least 0 and below 1"),
        ({"momentum": -0.1}, "momentum is a number"),
        ({"dim": 1}, "dim is a whole number, at least 2"),
        ({"hidden": 2.5}, "hidden is a whole number"),
        ({"views": "foto"}, "kind of views"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(SelfsupError, match=said):
        get_task("byol", **settings)
