"""MoCo v2: its loss against the queue, the order of events in a step, and what its defaults make of the data."""

from copy import deepcopy

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.ema import EMATeacher
from selfsup_fastai.callbacks.fill import FillForRates
from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.data.recipes import MOCO
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.memories import FeatureQueue
from selfsup_fastai.errors import SelfsupError, TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.joint import found_pair
from selfsup_fastai.pretext.joint_embedding.moco import MoCo
from selfsup_fastai.pretext.learner import pretext_learner
from tests.pretext.vectors import learner, measured, net, pairs
from tests.test_contract import learner as small_learner
from tests.test_contract import loaders, pictures, tiny


def made(**settings) -> MoCo:
    return MoCo(**{"queue": 10, "groups": 1, "dim": 6, **settings})


def test_loss_is_cross_entropy_over_the_own_key_and_the_queue():
    task = made(temperature=0.3)
    model = task.model(create_encoder(net())).double()
    with torch.no_grad():  # key and query network differ
        for p in model.teacher.parameters():
            p.mul_(0.9).add_(0.01)
    twin, x = deepcopy(model), pairs(5).double()
    loss = task.loss(model(x), torch.arange(5))
    loss.backward()
    q = F.normalize(twin.projector(twin.encoder(x[:, 0])), dim=1)
    k = F.normalize(twin.teacher.net(x[:, 1]), dim=1)
    logits = []
    for i in range(5):
        logits.append(torch.stack([q[i] @ k[i], *(q[i] @ row for row in twin.queue.rows)]) / 0.3)
    expected = F.cross_entropy(torch.stack(logits), torch.zeros(5, dtype=torch.long))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for part in ("encoder", "projector"):
        for own, other in zip(getattr(model, part).parameters(), getattr(twin, part).parameters()):
            torch.testing.assert_close(own.grad, other.grad)
    assert all(p.grad is None for p in model.teacher.parameters()) and not model.queue.rows.requires_grad
    with torch.no_grad():
        pred = deepcopy(model).eval()(x)
        each = task.loss(pred, torch.arange(5), reduction="none")
        torch.testing.assert_close(each.mean(), task.loss(pred, torch.arange(5)))
    assert each.shape == (5,)


def test_loss_where_nothing_is_known():
    task, z = made(queue=7, temperature=0.5), torch.eye(4)[:1].expand(3, 2, 4)
    alike = torch.full((3,), 7 * 2.718281828**2).log()  # each of 7 keys is as near as the own one
    assert task.loss((z, alike), torch.arange(3)).item() == pytest.approx(2.0794, abs=1e-4)  # log 8


class Watch(Callback):
    """The parts of each step as they were: the prediction, the queue, and the key network's weights."""

    order = 5

    def before_fit(self):
        self.steps, self.after = [], []

    def after_pred(self):
        if self.training:
            pred = [part.detach().clone() for part in self.pred]
            self.steps.append((*pred, *self._state()))

    def after_batch(self):
        if self.training:
            self.after.append((*self._state(), torch.cat([p.detach().flatten() for p in self._query()])))

    def _query(self):
        return [*self.model.encoder.parameters(), *self.model.projector.parameters()]

    def _state(self):
        weights = torch.cat([p.flatten() for p in self.model.teacher.parameters()])
        return self.model.queue.rows.clone(), weights.clone()


def test_keys_enter_after_the_step_and_the_key_network_follows_with_one_momentum():
    learn = small_learner("moco", loaders(pictures(16)), cbs=Watch())
    learn.fit(1, 1e-2)
    watch = learn.watch
    assert len(watch.steps) == 3 and learn.task.queue == 3  # of 12 images
    for (z, negatives, rows, key_weights), (later, new_weights, query) in zip(watch.steps, watch.after):
        expected = (z[:, 0] @ rows.T / learn.task.temperature).logsumexp(1)
        torch.testing.assert_close(negatives, expected)  # against the queue as it was before this batch
        torch.testing.assert_close(later, z[-3:, 1])  # a queue of 3 keeps the last of 4
        torch.testing.assert_close(new_weights, 0.95 * key_weights + 0.05 * query)
    for (later, _, _), (_, _, rows, _) in zip(watch.after, watch.steps[1:]):
        assert torch.equal(later, rows)
    torch.testing.assert_close(watch.steps[0][2].norm(dim=1), torch.ones(3))
    assert learn.model.queue.entered == 12
    before = learn.model.queue.rows.clone()
    learn.validate()
    learn.get_preds()
    learn.predict(pictures(1)[0])
    assert torch.equal(learn.model.queue.rows, before) and learn.model.queue.entered == 12


def test_the_projector_has_no_batch_norm():
    model = made(dim=128).model(create_encoder(net()))
    assert [type(m) for m in model.projector] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(m.weight.shape) for m in model.projector if isinstance(m, nn.Linear)] == [(32, 32), (128, 32)]


@pytest.mark.parametrize("groups, n", [(1, 12), (3, 12), (3, 14), (4, 5)])
def test_in_training_the_key_networks_norms_see_groups(groups, n):
    model, x = made(groups=groups).model(create_encoder(net())), pairs(n)[:, 1]
    twin, norm = deepcopy(model), model.teacher.net[0].body[1]
    keys = model.keys(x)
    n_groups = min(groups, n // 2)  # no group of one image
    torch.testing.assert_close(keys, torch.cat([twin.teacher.net(part) for part in x.tensor_split(n_groups)]))
    assert norm.num_batches_tracked == n_groups
    assert model.eval().keys(x).shape == (n, 6)
    torch.testing.assert_close(model.keys(x), twin.eval().teacher.net(x))


def test_the_query_networks_norms_see_whole_batches():
    model, x = made(groups=3).model(create_encoder(net())), pairs(12)
    twin = deepcopy(model)
    (z, _) = model(x)
    torch.testing.assert_close(z[:, 0], F.normalize(twin.projector(twin.encoder(x[:, 0])), dim=1))
    assert model.encoder.body[1].num_batches_tracked == 1


@pytest.mark.parametrize("bs, n, groups, queue", [(4, 24, 1, 5), (16, 40, 2, 9), (70, 160, 8, 39)])
def test_groups_and_queue_suit_the_data(bs, n, groups, queue, capsys):
    learn = small_learner("moco", loaders(pictures(n), bs=bs, valid_pct=2 / n if n < 100 else 0.02))
    assert (learn.task.groups, learn.model.groups) == (groups, groups)
    assert learn.task.queue == len(learn.model.queue.rows) == queue
    said = f"moco: the queue holds {queue} keys, for {len(learn.dls.train_ds)} training images."
    assert capsys.readouterr().err.count(said) == 1


def test_a_net_without_batch_norms_needs_no_groups():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
    assert pretext_learner(loaders(pictures(40), bs=16), "moco", plain).task.groups == 1


def test_a_queue_longer_than_the_data_is_told(capsys):
    dls = loaders(pictures(32))
    assert len(pretext_learner(dls, "moco", tiny, queue=25).model.queue.rows) == 25
    assert (
        "moco: with 25 keys of 24 images the queue holds an image's own keys as negatives." in capsys.readouterr().err
    )
    pretext_learner(dls, "moco", tiny, queue=24)
    assert "moco" not in capsys.readouterr().err


@pytest.mark.parametrize("share, own", [(1 / 4, 1 / 32), (1, 1 / 2)])
def test_how_often_the_queue_holds_an_images_own_key(share, own):
    """What the docstring says of queues a quarter as long as the data, and as long."""
    n, generator, found = 400, torch.Generator().manual_seed(0), []
    length = round(share * n)
    seen = torch.cat([torch.randperm(n, generator=generator) for _ in range(30)])
    for i in range(n, len(seen)):
        found.append((seen[i - length : i] == seen[i]).any().item())
    assert sum(found) / len(found) == pytest.approx(own, abs=0.02)


def test_callbacks_and_views():
    teacher, memories, fill = get_task("moco", momentum=0.9).callbacks()
    assert isinstance(teacher, EMATeacher) and (teacher.start, teacher.shape) == (0.9, "constant")
    assert isinstance(memories, KeepMemories) and isinstance(fill, FillForRates)
    assert get_task("moco").recipe(0, 3, 64) == get_task("moco").recipe(1, 3, 64) == MOCO


@pytest.mark.parametrize("task", ["moco", "rotation+moco"])
def test_the_rate_finder_meets_a_full_queue_and_leaves_no_trace(task):
    """Against random directions the loss of the first step is low, and soon four times as high: the finder's end."""
    learn, seen = small_learner(task, loaders(pictures(64), bs=8)), []
    (queue,) = (m for m in learn.model.modules() if isinstance(m, FeatureQueue))
    rows = queue.rows.clone()

    class Watch(Callback):
        def before_batch(self):
            seen.append(queue.is_full)

    learn.add_cb(Watch())
    learn.lr_find(num_it=24, show_plot=False)
    assert len(learn.recorder.losses) == 24 and all(seen)
    assert torch.equal(queue.rows, rows) and queue.entered == 0 and queue._noted == []
    seen.clear()
    with learn.no_logging():
        learn.fit(1, 0.0)
    assert not seen[0]


def test_under_autocast_similarities_are_float32():
    model, x = made().model(create_encoder(net())), pairs(4)
    with torch.autocast("cpu", torch.bfloat16):
        z, negatives = model(x)
        loss = made().loss((z, negatives), torch.arange(4))
    assert z.dtype == negatives.dtype == loss.dtype == torch.float32
    expected = (z[:, 0] @ model.queue.rows.T / 0.2).logsumexp(1)
    torch.testing.assert_close(negatives, expected)


def test_pairs_are_found():
    learn = learner(MoCo(queue=64, groups=2, dim=32))
    assert measured(learn, found_pair)[0] < 0.06  # one of 64 by guessing
    learn.fit(15, 3e-3)
    assert measured(learn, found_pair)[0] > 0.4


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"temperature": 0}, "temperature is a number, above 0"),
        ({"queue": 0}, "queue is a whole number, at least 1"),
        ({"momentum": 1}, "momentum is a number, at least 0 and below 1"),
        ({"groups": 1.5}, "groups is a whole number, at least 1"),
        ({"dim": 1}, "dim is a whole number, at least 2"),
        ({"views": 3}, "views is one of"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(SelfsupError, match=said):
        get_task("moco", **settings)


def test_groups_of_one_image_are_refused():
    with pytest.raises(TaskError, match="groups=3 leave less than 2 images of a batch of 4 to a group"):
        pretext_learner(loaders(pictures(32)), "moco", tiny, groups=3)
