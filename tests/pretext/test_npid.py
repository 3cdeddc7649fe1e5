"""NPID: the loss is the code's, Z is that of the first batch, rows change after the step, new images have none."""

import math
import pickle

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.log import SkipValidation
from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.memories import ContrastBank
from selfsup_fastai.errors import TaskError
from selfsup_fastai.losses import nce
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.loader import PretextDL, PretextTransform
from tests.pretext.small_runs import MILD, blots, found_before_and_after, learner, pictures, seeded


def transcription(z: Tensor, rows: Tensor, idx: list[int], negatives: Tensor, t: float, big_z: float | None):
    """The authors' code in loops: exp(z row / T) / Z, then the noise-contrastive loss of each image. And Z."""
    n, k = len(rows), negatives.shape[1]
    out = [[(z[i] @ rows[j] / t).exp() for j in [idx[i], *negatives[i].tolist()]] for i in range(len(z))]
    if big_z is None:
        big_z = sum(x.item() for row in out for x in row) / (len(z) * (k + 1)) * n
    losses = []
    for row in out:
        p = [x / big_z for x in row]
        losses.append(-(p[0] / (p[0] + k / n)).log() - sum(((k / n) / (q + k / n)).log() for q in p[1:]))
    return torch.stack(losses), big_z


def bank_of(n: int = 9, dim: int = 4, t: float = 0.5) -> ContrastBank:
    torch.manual_seed(0)
    return ContrastBank(n, dim, temperature=t).double()


def units(b: int, dim: int = 4, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(b, dim, generator=seeded(seed), dtype=torch.float64), dim=1)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_loss_and_gradients_are_those_of_the_authors_code(temperature):
    bank, big_z = bank_of(t=temperature), None
    for step in range(3):  # the constant is that of the first batch
        idx, negatives = [5, 0, 8], torch.randint(9, (3, 6), generator=seeded(step))
        ours, theirs = units(3, seed=step).requires_grad_(), units(3, seed=step).requires_grad_()
        expected, big_z = transcription(theirs, bank.rows, idx, negatives, temperature, big_z)
        logits = bank.logits(ours, bank.rows[idx], negatives)
        torch.testing.assert_close(nce(logits, "none"), expected)
        task = get_task("npid")
        loss = task.loss((None, logits), None)
        torch.testing.assert_close(loss, expected.mean())
        torch.testing.assert_close(torch.autograd.grad(loss, ours), torch.autograd.grad(expected.mean(), theirs))
        bank.commit()
        assert bank.log_z.exp().item() == pytest.approx(big_z)


def test_only_training_fixes_the_constant():
    bank, negatives = bank_of(), torch.arange(9).expand(2, 9)
    z = units(2).requires_grad_()
    first = bank.eval().logits(z, bank.rows[:2], negatives)
    with torch.no_grad():
        assert torch.equal(bank.train().logits(z, bank.rows[:2], negatives), first)
    bank.commit()
    assert bank.log_z == -math.inf
    bank.logits(z, bank.rows[:2], negatives)
    assert bank.log_z == -math.inf  # and only a step that was taken
    bank.forget()
    bank.commit()
    assert bank.log_z == -math.inf
    bank.logits(z, bank.rows[:2], negatives)
    assert not pickle.loads(pickle.dumps(bank))._measured
    bank.commit()
    fixed = bank.log_z.clone()
    assert fixed.isfinite() and torch.equal(bank.logits(z, bank.rows[:2], negatives), first)
    bank.logits(units(2, seed=3), bank.rows[:2], negatives)
    bank.commit()
    assert torch.equal(bank.log_z, fixed)
    again = bank_of()
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.log_z, fixed)


def test_the_constant_of_a_step_in_parts_is_that_of_the_whole_step():
    """Of parts of any size; each meets the estimate of those so far."""
    z, negatives = units(7), torch.randint(9, (7, 6), generator=seeded(1))
    whole, parts = bank_of(), bank_of()
    expected = whole.logits(z, whole.rows[:7], negatives)
    found = [parts.logits(z[rows], parts.rows[:7][rows], negatives[rows]) for rows in (slice(3), slice(3, 7))]
    assert torch.equal(found[0], bank_of().logits(z[:3], parts.rows[:3], negatives[:3]))  # it knew of no others
    torch.testing.assert_close(found[1], expected[3:])
    whole.commit()
    parts.commit()
    torch.testing.assert_close(parts.log_z, whole.log_z)
    _, big_z = transcription(z, whole.rows, list(range(7)), negatives, 0.5, None)
    assert parts.log_z.exp().item() == pytest.approx(big_z)


@pytest.mark.parametrize("task", ["npid", "pirl"])
def test_with_accumulated_gradients_a_run_has_the_constant_of_its_whole_first_step(task):
    """In evaluation mode, as batch norms see the parts only; the four parts of a step are the first four batches."""
    learn, seen = learner(task, n=24, bs=4, side=36, dim=4, views=MILD, negatives=5), []
    learn.model.eval()
    learn.model.train = lambda mode=True: learn.model  # stays so
    bank = next(m for m in learn.model.modules() if isinstance(m, ContrastBank)).train()
    rows = bank.rows.clone()

    class Watch(Callback):
        def after_pred(self):
            z = self.learn.pred[0][:, 0 if task == "npid" else 1].detach()
            seen.append((z, rows[self.xb[1 if task == "npid" else 2]], self.xb[-1]))

    with learn.no_logging():
        learn.fit(1, 0.0, cbs=[Watch(), GradientAccumulation(16), SkipValidation()])
    z, own, negatives = (torch.cat(parts) for parts in zip(*seen[:4]))
    negatives = negatives if task == "npid" else negatives[:, 0]  # those of the patches
    cosines = torch.cat([(z * own).sum(1, keepdim=True), (z @ rows.T).gather(1, negatives)], 1)
    assert bank.log_z.exp().item() == pytest.approx(18 * (cosines / bank.temperature).exp().mean().item(), rel=1e-4)


def test_small_temperatures_and_half_precision_do_not_overflow():
    bank = ContrastBank(9, 4, temperature=0.005)
    z = bank.rows[:3].clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = bank.logits(z.bfloat16(), bank.rows[:3], torch.arange(9).expand(3, 9))
    assert logits.dtype == torch.float32 and nce(logits).isfinite()


def net(dim: int = 4, **settings):
    torch.manual_seed(0)
    task = get_task("npid", dim=dim, **settings)
    task.n_rows = 9
    return task.model(create_encoder(nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())))


def test_training_images_are_compared_with_their_rows_and_new_ones_with_another_view():
    model, x = net().eval(), torch.rand(3, 2, 3, 12, 12, generator=seeded())
    idx, negatives = torch.tensor([4, 0, 8]), torch.randint(9, (3, 5), generator=seeded())
    first, second = (F.normalize(model.head(model.encoder(x[:, v])), dim=1) for v in range(2))
    pairs, logits = model(x[:, :1], idx, negatives)
    torch.testing.assert_close(pairs, torch.stack([first, model.bank.rows[idx]], 1))
    torch.testing.assert_close(logits, model.bank.logits(first, model.bank.rows[idx], negatives))
    pairs, logits = model(x, idx, negatives)
    torch.testing.assert_close(pairs, torch.stack([first, second], 1))
    torch.testing.assert_close(logits, model.bank.logits(first, second, negatives))


def test_rows_change_after_the_step_by_the_images_that_were_seen():
    learn = learner("npid", n=24, bs=4, dim=4, views=MILD)
    bank, seen = learn.model.bank, []

    class Watch(KeepMemories):
        order = KeepMemories.order - 1  # after the optimizer's step, before the bank changes

        def after_step(self):
            (pairs, _), (idx,) = self.learn.pred, self.learn.xb[1:2]
            torch.testing.assert_close(pairs[:, 1], bank.rows[idx])  # still those that the loss met
            seen.append((idx.clone(), pairs[:, 0].detach().clone(), bank.rows.clone()))

    learn.add_cb(Watch())
    with learn.no_logging():
        learn.fit(1, 1e-2)
    assert len(torch.cat([idx for idx, _, _ in seen]).unique()) == 16  # of 18, in whole batches
    befores = [rows for _, _, rows in seen] + [bank.rows]
    for (idx, z, before), after in zip(seen, befores[1:]):
        torch.testing.assert_close(after[idx], F.normalize(0.5 * before[idx] + 0.5 * z, dim=1))
        others = [i for i in range(18) if i not in idx.tolist()]
        assert torch.equal(after[others], before[others]) and not torch.equal(after[idx], before[idx])
    rows, constant = bank.rows.clone(), bank.log_z.clone()
    learn.validate()
    learn.get_preds(ds_idx=0)
    assert torch.equal(bank.rows, rows) and torch.equal(bank.log_z, constant)


@pytest.mark.parametrize("train", [True, False])
def test_negatives_are_drawn_from_all_rows_alike(train):
    task = get_task("npid", negatives=4000)
    task.n_rows, task.n_negatives = 8, 4000
    idx = torch.tensor([7, 2])
    (views, places, negatives), (target,) = task.make_batch(blots(2), generator=seeded(), train=train, idx=idx)
    assert views.shape[:2] == (2, 1 if train else 2) and torch.equal(places, idx) and target.tolist() == [0, 1]
    counts = torch.stack([row.bincount(minlength=8) for row in negatives]).double() / 4000
    assert negatives.shape == (2, 4000) and counts.shape == (2, 8)
    assert (counts - 1 / 8).abs().max() < 4 * math.sqrt(1 / 8 * 7 / 8 / 4000)
    assert not torch.equal(negatives[0], negatives[1])


def test_as_many_negatives_as_training_images_and_that_is_said(capsys):
    learn = learner("npid", n=30, bs=4, valid_pct=0.2)
    assert learn.task.n_negatives == 24 and learn.model.bank.rows.shape == (24, 128)
    assert "told from 24 draws out of as many" in capsys.readouterr().err
    assert learn.task.settings()["negatives"] is None
    given = learner("npid", n=30, bs=4, valid_pct=0.2, negatives=7)
    assert given.task.n_negatives == 7 and "draws" not in capsys.readouterr().err
    task = get_task("npid")

    class Many:
        train_ds, loaders = range(10_000), []
        train = type("Loader", (), {"bs": 64})

    task.setup(Many, create_encoder(nn.Sequential(nn.Conv2d(3, 4, 3))))
    assert (task.n_rows, task.n_negatives) == (10_000, 4096) and "draws" not in capsys.readouterr().err


def test_new_images_can_be_asked_about_however_many():
    learn = learner("npid", n=20, bs=4, dim=8)
    new = list(pictures(40, seed=3))
    (pairs, logits), _ = learn.get_preds(dl=learn.dls.test_dl(new))
    assert len(new) > len(learn.model.bank.rows) and pairs.shape == (40, 2, 8) and logits.shape == (40, 16)
    torch.testing.assert_close(pairs.norm(dim=-1), torch.ones(40, 2))
    cosine = learn.predict(new[0]).decoded
    assert -1 <= cosine.item() < 0.9999


def test_loaders_made_by_hand_ask_before_there_is_a_learner():
    dl = PretextDL(list(blots(6)), bs=3, batch_tfms=[PretextTransform("npid")])
    _, idx, negatives, _ = dl.one_batch()
    assert idx.shape == (3,) and (negatives == 0).all()


def test_head_is_one_layer_centered_or_not():
    encoder = create_encoder(nn.Sequential(nn.Conv2d(3, 6, 3)))
    assert [type(m).__name__ for m in get_task("npid").model(encoder).head] == ["Linear", "BatchNorm1d"]
    plain = get_task("npid", centered=False).model(encoder).head
    assert [type(m).__name__ for m in plain] == ["Linear"] and plain[0].bias is not None


def test_views_are_those_of_the_code():
    recipe = get_task("npid").recipe(0, 3, 64)
    assert recipe.scale == (0.2, 1.0) and (recipe.jitter_p, recipe.grey_p, recipe.flip) == (1.0, 0.2, 0.5)
    assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == (0.4, 0.4, 0.4, 0.4)
    assert recipe.blur_p == recipe.solarize_p == 0


@pytest.mark.parametrize(
    "settings",
    [{"negatives": 0}, {"temperature": 0}, {"dim": 0}, {"bank_momentum": 1}, {"bank_momentum": -0.1}, {"centered": 1}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(TaskError, match=next(iter(settings))):
        get_task("npid", **settings)


def test_parts_of_a_step_meet_the_bank_of_the_whole_step():
    """Accumulating gradients is exact: a batch's loss is the mean of its halves', whatever was noted in between."""
    model = net(centered=False).eval()
    x, idx = torch.rand(4, 1, 3, 12, 12, generator=seeded()), torch.tensor([1, 1, 5, 3])
    negatives = torch.randint(9, (4, 6), generator=seeded())
    model(x, idx, negatives)
    model.bank.train()
    model.bank.log_z.fill_(3.0)
    whole = nce(model(x, idx, negatives)[1])
    halves = [nce(model(x[rows], idx[rows], negatives[rows])[1]) for rows in (slice(2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, whole)


def test_pairs_of_images_never_seen_are_found_after_a_few_dozen_steps():
    learn = learner("npid", n=96, valid_pct=1 / 3, dim=32, views=MILD)
    before, after = found_before_and_after(learn, 12, 3e-3)
    assert after > max(before, 3 / 16) and np.isfinite(learn.recorder.values).all()
