"""NAT: squared distance to codes that are dealt out anew within the batch, in every third epoch, and kept."""

from itertools import permutations

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from torch.nn import functional as F

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.memories import NoiseTargets
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from tests.pretext.small_runs import MILD, learner, pictures, seeded


def units(n: int, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, dim, generator=seeded(seed)), dim=1)


def targets(n: int = 9, dim: int = 4) -> NoiseTargets:
    torch.manual_seed(1)
    return NoiseTargets(n, dim).train()


def test_the_loss_is_the_squared_distance_to_the_code():
    pred = torch.stack([units(5), units(5, seed=1)], 1).requires_grad_()
    expected = torch.stack([((a - b) ** 2).sum() for a, b in pred])
    task = get_task("nat")
    torch.testing.assert_close(task.loss(pred, None, reduction="none"), expected)
    loss = task.loss(pred, None)
    torch.testing.assert_close(loss, expected.mean())
    loss.backward()
    torch.testing.assert_close(pred.grad[:, 0], 2 * (pred[:, 0] - pred[:, 1]).detach() / 5)
    assert (expected >= 0).all() and (expected <= 4).all()


@pytest.mark.parametrize("seed", range(4))
def test_codes_of_a_batch_go_to_whom_they_suit_best(seed):
    held, idx, z = targets(), torch.tensor([7, 2, 0, 5]), units(4, seed=seed).requires_grad_()
    had = held(idx)
    found = held.exchanged(z, idx)
    best = max(permutations(range(4)), key=lambda order: (z * had[list(order)]).sum().item())
    torch.testing.assert_close(found, had[list(best)])
    assert not found.requires_grad


def test_an_exchange_is_kept_after_the_step_and_stays_a_permutation():
    held, idx = targets(), torch.tensor([7, 2, 0, 5])
    found = held.exchanged(units(4).requires_grad_(), idx)
    assert torch.equal(held.places, torch.arange(9))  # not yet
    held.commit()
    assert torch.equal(held(idx), found) and held.places.tolist() != list(range(9))
    assert sorted(held.places.tolist()) == list(range(9))
    others = [i for i in range(9) if i not in idx.tolist()]
    assert held.places[others].tolist() == others
    again = targets()
    again.load_state_dict(held.state_dict())
    assert torch.equal(again(idx), found)


def test_half_precision_deals_as_full_precision_does():
    held, idx, z = targets(), torch.tensor([7, 2, 0, 5]), units(4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = held.exchanged(z, idx)
    assert torch.equal(half, held.exchanged(z, idx))


def test_edges_cannot_be_combined_with_other_tasks_and_images_can():
    with pytest.raises(TaskError, match=r"nat cannot be combined .* with sobel=False it can"):
        get_task(["nat", "rotation"])
    assert get_task(["nat", "rotation"], nat={"sobel": False}).accumulates is False


def test_grey_images_keep_the_views_of_scans_in_a_second_round_and_when_asked_about(tmp_path, capsys):
    grey = pictures(24).mean(-1).astype(np.uint8)
    dls = UnlabeledDataLoaders.from_array(grey, size=None, bs=6, num_workers=0)
    first = pretext_learner(dls, "nat", "resnet10t", dim=8)
    assert "grey images get views for scans" in capsys.readouterr().err
    second = pretext_learner(dls, "nat", encoder=first.encoder, dim=8)
    said = capsys.readouterr().err
    assert "grey images get views for scans" in said and "repeated" not in said
    seen = []
    second.task.recipe = lambda view, channels, side: (seen.append(channels), get_task("nat").recipe(view, 1, side))[1]
    second.dls.valid.transform.task.recipe = second.task.recipe
    second.predict(grey[0])
    assert set(seen) == {1}


def test_an_image_that_comes_twice_has_one_code():
    held, idx, z = targets(), torch.tensor([7, 2, 7, 5]), units(4)
    found = held.exchanged(z.requires_grad_(), idx)
    assert torch.equal(found[0], found[2])
    held.commit()
    assert sorted(held.places.tolist()) == list(range(9)) and torch.equal(held(idx), found)


class Watch(Callback):
    order = 0  # before memories take up what was noted

    def __init__(self):
        self.epochs = {}

    def after_train(self):
        self.epochs[self.epoch] = self.model.noise.places.clone()


@pytest.mark.parametrize("every", [3, 2])
def test_codes_are_exchanged_in_the_first_of_so_many_epochs(every):
    learn, watch = learner("nat", n=24, bs=6, dim=8, views=MILD, every=every), Watch()
    codes = learn.model.noise.codes.clone()
    with learn.no_logging():
        learn.fit(5, 1e-2, cbs=watch)
    before = torch.arange(18)
    for epoch, after in watch.epochs.items():
        assert torch.equal(before, after) is (epoch % every != 0), epoch
        assert sorted(after.tolist()) == list(range(18))
        before = after
    assert torch.equal(learn.model.noise.codes, codes)
    places = learn.model.noise.places.clone()
    learn.validate()
    learn.get_preds(ds_idx=0)
    assert torch.equal(learn.model.noise.places, places)


def test_training_images_are_compared_with_codes_and_new_ones_with_another_view():
    learn = learner("nat", n=24, bs=6, dim=8)
    net = learn.model.eval()
    x, idx, _ = learn.dls.train.one_batch()
    pairs = net(x, idx)
    torch.testing.assert_close(pairs[:, 1], net.noise.codes[idx])
    torch.testing.assert_close(pairs[:, 0], F.normalize(net.head(net.encoder(x[:, 0])), dim=1))
    x, idx, _ = learn.dls.valid.one_batch()
    assert x.shape[1] == 2
    pairs = net(x, idx)
    torch.testing.assert_close(pairs[:, 1], F.normalize(net.head(net.encoder(x[:, 1])), dim=1))
    new = list(pictures(40, seed=3))
    found, _ = learn.get_preds(dl=learn.dls.test_dl(new))
    assert found.shape == (40, 2, 8) and -1 <= learn.predict(new[0]).decoded.item() <= 1


def test_the_batch_is_trained_on_with_the_codes_it_has_just_been_dealt():
    learn = learner("nat", n=24, bs=6, dim=8, sobel=False)
    net = learn.model.train()
    x, idx, _ = learn.dls.train.one_batch()
    z, codes = net(x, idx).unbind(1)
    assert (z * codes).sum().item() > (z * net.noise(idx)).sum().item()
    (kept,) = net.noise._noted
    order = kept[0].argsort()
    assert torch.equal(kept[0][order], idx.sort().values)


def test_training_brings_embeddings_nearer_to_their_codes():
    learn = learner("nat", n=96, valid_pct=1 / 3, dim=32, sobel=False, views=MILD)
    before = learn.validate()[1]
    with learn.no_logging():
        learn.fit_one_cycle(15, 3e-3)
    without_exchange = [row[0] for epoch, row in enumerate(learn.recorder.values) if epoch % 3]
    assert without_exchange[-1] < 0.85 * without_exchange[0] < 2 and np.isfinite(learn.recorder.values).all()
    assert learn.validate()[1] > max(before, 3 / 16)


@pytest.mark.parametrize("settings", [{"dim": 1}, {"every": 0}, {"sobel": 1}, {"centered": 1}])
def test_settings_out_of_range(settings):
    with pytest.raises(TaskError, match=next(iter(settings))):
        get_task("nat", **settings)
