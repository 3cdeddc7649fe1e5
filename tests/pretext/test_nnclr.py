"""NNCLR: neighbors come from the queue as it was, gradients flow through predictions alone, the loss is the formula."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.joint_embedding.nnclr import QUEUE, nnclr_loss
from tests.pretext.small_runs import MILD, found_before_and_after, learner, seeded


def embeddings(b: int = 5, d: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(b, 2, d, generator=seeded(seed), dtype=torch.float64)


def transcription(neighbors: Tensor, p: Tensor, temperature: float) -> list[Tensor]:
    """Of each image: -log softmax of its own among all predictions of the other view, the mean of both directions."""
    b, rows = len(p), []
    for i in range(b):
        terms = []
        for v in range(2):
            scores = [neighbors[i, v] @ (p[j, 1 - v] / p[j, 1 - v].norm()) / temperature for j in range(b)]
            terms.append(-torch.log(scores[i].exp() / sum(s.exp() for s in scores)))
        rows.append(sum(terms) / 2)
    return rows


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_and_gradients_are_those_of_the_formula(temperature):
    neighbors = F.normalize(embeddings(seed=1), dim=-1)
    ours, theirs = embeddings().requires_grad_(), embeddings().requires_grad_()
    task = get_task("nnclr", temperature=temperature)
    rows = task.loss((embeddings(seed=2), ours, neighbors), None, reduction="none")
    expected = torch.stack(transcription(neighbors, theirs, temperature))
    torch.testing.assert_close(rows, expected)
    loss = task.loss((embeddings(seed=2), ours, neighbors), None)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(torch.autograd.grad(loss, ours), torch.autograd.grad(expected.mean(), theirs))


def test_one_image_alone_has_nobody_to_be_told_from():
    neighbors = F.normalize(embeddings(1), dim=-1)
    assert nnclr_loss(neighbors, embeddings(1, seed=1)).item() == math.log(1)


def test_half_precision_is_left_for_float32():
    neighbors, p = F.normalize(embeddings(seed=1), dim=-1), embeddings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nnclr_loss(neighbors.float(), p.half())
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(nnclr_loss(neighbors, p).item(), rel=1e-2)


def model(hidden: int | None = 8, queue: int = 7):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6))
    return get_task("nnclr", queue=queue, hidden=hidden, dim=4).model(create_encoder(body))


def test_neighbors_are_rows_of_the_queue_and_gradients_flow_through_predictions_alone():
    net, x = model(), torch.rand(3, 2, 3, 12, 12, generator=seeded())
    z, p, neighbors = net(x)
    for v in range(2):
        plain = net.projector(net.encoder(x[:, v]))  # a batch norm sees one view at a time
        torch.testing.assert_close(z[:, v], F.normalize(plain, dim=1))
        torch.testing.assert_close(p[:, v], net.predictor(plain))
        for i in range(3):
            cosines = [float(z[i, v] @ row) for row in net.queue.rows]
            assert torch.equal(neighbors[i, v], net.queue.rows[cosines.index(max(cosines))])
    assert p.requires_grad and not z.requires_grad and not neighbors.requires_grad
    nnclr_loss(neighbors, p).backward()
    for part in (net.encoder, net.projector, net.predictor):
        assert any((q.grad != 0).any() for q in part.parameters())


def test_first_views_enter_after_the_step_and_in_training_only():
    learn = learner("nnclr", n=24, bs=4, queue=9, dim=4, views=MILD)
    assert isinstance(learn.keep_memories, KeepMemories)
    queue, seen = learn.model.queue, []

    class Watch(KeepMemories):
        order = KeepMemories.order - 1  # after the loss and the optimizer's step, before the queue changes

        def after_step(self):
            z, _, neighbors = self.learn.pred
            again = self.learn.model.queue.nearest(z)
            assert torch.equal(neighbors, again)  # the queue is still what the loss met
            seen.append((z[:, 0].clone(), self.learn.model.queue.rows.clone()))

    learn.add_cb(Watch())
    with learn.no_logging():
        learn.fit(1, 1e-2)
    assert len(seen) == 4
    for (z, before), (_, after) in pairwise(seen):
        entered = torch.cdist(z, after).min(1).values
        assert entered.max() < 1e-3 and torch.cdist(z, before).min(1).values.min() > 1e-2
    rows, count = queue.rows.clone(), int(queue.entered)
    learn.validate()
    learn.get_preds(ds_idx=0)
    assert torch.equal(queue.rows, rows) and int(queue.entered) == count == 16


def test_heads_are_those_of_the_paper_at_the_encoders_width():
    net = model(hidden=None)
    norm = ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(m).__name__ for m in net.projector] == [*norm, *norm, "Linear", "BatchNorm1d"]
    assert [type(m).__name__ for m in net.predictor] == [*norm, "Linear"]
    widths = [[m.out_features for m in head if isinstance(m, nn.Linear)] for head in (net.projector, net.predictor)]
    assert widths == [[6, 6, 4], [12, 4]]  # the paper's: 2048, 2048, 256 and 4096, 256 for 2048 features
    assert net.projector[-1].affine
    assert model(hidden=8).predictor[0].out_features == 16


def test_the_queue_is_half_as_long_as_the_training_set_and_says_so(capsys):
    learn = learner("nnclr", n=30, bs=4, valid_pct=0.2)
    assert learn.model.queue.rows.shape == (12, 256)
    err = capsys.readouterr().err
    assert "among 12 projections, for 24 training images" in err
    assert "hidden layers as wide as the encoder's 32 features (paper: 2,048)" in err
    assert learn.task.settings()["queue"] is None
    given = learner("nnclr", n=30, bs=4, queue=50)
    assert len(given.model.queue.rows) == 50 and "projections" not in capsys.readouterr().err
    assert QUEUE == 98_304


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"queue": 0}, {"hidden": 1.5}, {"dim": 0}])
def test_settings_out_of_range(settings):
    with pytest.raises(TaskError, match=next(iter(settings))):
        get_task("nnclr", **settings)


def test_pairs_are_found_after_a_few_dozen_steps():
    learn = learner("nnclr", n=96, valid_pct=1 / 3, temperature=0.2, dim=32, views=MILD)
    start = learn.validate()[0]
    before, after = found_before_and_after(learn, 12)
    assert after > max(before, 3 / 16) and learn.validate()[0] < start - 0.1
