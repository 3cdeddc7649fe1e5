"""Consistency: the term itself, PIRL's in the limit, what it leaves alone, and which tasks it is not for."""

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.consistency import Consistency
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.checkpoint import read_card
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.invariant import invariant_heads
from selfsup_fastai.encoders.memories import ContrastBank
from selfsup_fastai.errors import SelfsupError, TaskError
from selfsup_fastai.losses import invariant_loss, view_distance
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.base import PerView, PretextTask
from selfsup_fastai.pretext.joint_embedding.pirl import InvariantNet
from selfsup_fastai.pretext.learner import pretext_learner
from selfsup_fastai.pretext.multi import SeveralTasks


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2))


def learner(task="rotation", consistency=None, n: int = 20, **kwargs):
    set_seed(3, reproducible=True)
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(coarse, (40, 40), mode="bilinear").permute(0, 2, 3, 1)
    dls = UnlabeledDataLoaders.from_array((x.numpy() * 255).astype(np.uint8), size=40, bs=4, valid_pct=0.3, seed=1)
    return pretext_learner(dls, task, tiny, consistency=consistency, **kwargs)


def quietly(learn: Learner, epochs: int, lr: float, cbs=None) -> None:
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr, cbs=cbs)


class Watch(Callback):
    """What the first training batch was, and what became of it."""

    order = 5  # before the consistency takes its part of the batch

    def before_fit(self):
        self.batch = self.of_task = self.total = self.grads = None

    def before_batch(self):
        if self.training and self.batch is None:
            self.batch = (*self.xb, *self.yb)
            self.weights = {name: p.detach().clone() for name, p in self.learn.model.state_dict().items()}

    def after_loss(self):
        if self.training and self.of_task is None:
            self.of_task = self.learn.loss_grad.item()

    def before_backward(self):
        if self.total is None:
            self.total = self.learn.loss_grad.item()

    def before_step(self):
        if self.grads is None:
            self.grads = {n: p.grad.clone() for n, p in self.learn.model.named_parameters() if p.grad is not None}


# --- the term ---------------------------------------------------------------------------------------------------------


def test_distances_equal_their_definitions():
    z, changed = torch.randn(3, 5).double(), torch.randn(3, 2, 5).double()
    cosine, mse = torch.zeros(3).double(), torch.zeros(3).double()
    for i in range(3):
        for j in range(2):
            a, b = z[i], changed[i, j]
            cosine[i] += (1 - a @ b / (a.norm() * b.norm())) / 2
            mse[i] += sum((x - y) ** 2 for x, y in zip(a, b)) / 5 / 2
    torch.testing.assert_close(view_distance(z, changed, "cosine", "none"), cosine)
    torch.testing.assert_close(view_distance(z, changed, "mse", "none"), mse)
    torch.testing.assert_close(view_distance(z, changed), cosine.mean())
    with pytest.raises(SelfsupError, match="mse"):
        view_distance(z, changed, "mean")


@pytest.mark.parametrize("term", ["cosine", "mse"])
def test_the_loss_is_the_tasks_plus_the_weighted_term(term):
    learn, watch = learner("rotation", Consistency(0.7, term)), Watch()
    quietly(learn, 1, 0.0, watch)
    x, target, plain = watch.batch
    assert plain.shape == x[:, 0].shape and {len(t) for t in watch.batch} == {4}
    learn.model.load_state_dict(watch.weights)
    encoder, model = learn.model.encoder, learn.model.train()
    of_task = F.cross_entropy(model(x).flatten(0, 1), target.flatten())
    changed = encoder(x.flatten(0, 1)).unflatten(0, (4, -1))
    expected = of_task + 0.7 * view_distance(encoder(plain), changed, term)
    assert watch.of_task == pytest.approx(of_task.item(), rel=1e-4)
    assert watch.total == pytest.approx(expected.item(), rel=1e-4) and expected > of_task
    model.zero_grad()
    expected.backward()
    for name, p in learn.model.named_parameters():
        torch.testing.assert_close(watch.grads[name], p.grad, atol=1e-5, rtol=1e-3)


def test_the_images_are_those_that_the_question_is_about():
    learn = learner("autoencoder", 0.5, denoise=0.3)
    _, target, plain = (t.as_subclass(Tensor) for t in learn.dls.train.one_batch())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (learn.encoder.mean, learn.encoder.std))
    torch.testing.assert_close(plain * std + mean, target)


class Parts(PretextTask):
    """PIRL's patches, and no question about them."""

    name, paper = "parts", "nobody 2000"
    metrics = ()

    def make_batch(self, x: Tensor, *, generator, train, idx=None):
        return (get_task("pirl").patches(x, generator),), (torch.zeros(len(x)),)

    def model(self, encoder):
        return PerView(encoder, nn.Identity())

    def loss(self, pred, target, reduction="mean"):
        return 0 * pred.flatten(1).mean(1) if reduction == "none" else 0 * pred.mean()


def test_without_a_question_it_is_pirl():
    """The task weighs nothing, both terms are against the bank, and the heads are PIRL's two."""
    consistency = Consistency(1.0, "nce", dim=8, temperature=0.3, negatives=5, changed_weight=0.5)
    learn, watch = learner(Parts(), consistency), Watch()
    quietly(learn, 1, 0.0, watch)
    patches, _, plain, idx, negatives = watch.batch
    assert patches.shape[:2] == (4, 9) and negatives.shape == (4, 2, 5) and idx.max() < 14
    twin = create_encoder(tiny, size=40)
    heads = invariant_heads(twin.num_features, 9, 8, ContrastBank(14, 8, 0.5, 0.3))
    pirl = InvariantNet(twin, heads).train()
    saved = {name.replace("consistency.", "heads."): value for name, value in watch.weights.items()}
    pirl.load_state_dict(saved)
    pred = pirl(plain.unsqueeze(1), patches, idx, negatives)
    loss = get_task("pirl", weight=0.5, temperature=0.3).loss(pred, None)
    loss.backward()
    assert watch.total == pytest.approx(loss.item(), rel=1e-4)
    for name, p in pirl.named_parameters():
        expected = watch.grads[name.replace("heads.", "consistency.")]
        torch.testing.assert_close(p.grad, expected, atol=1e-5, rtol=1e-3)
    logits = torch.randn(3, 2, 6)
    both = [invariant_loss(logits, weight) for weight in (0, 1)]
    torch.testing.assert_close(invariant_loss(logits, 0.3), 0.7 * both[0] + 0.3 * both[1])


def test_the_bank_keeps_images_and_moves_in_training_only():
    learn = learner("jigsaw", Consistency(0.5, "nce", dim=8), n_permutations=8)
    bank = learn.model.consistency.bank
    assert bank.rows.shape == (14, 8)
    before = bank.rows.clone()
    learn.validate()
    learn.get_preds()
    assert torch.equal(bank.rows, before) and not bank.log_z.isfinite()
    quietly(learn, 1, 1e-2)
    moved = (bank.rows != before).any(1)
    assert moved.sum() == 12 and bank.log_z.isfinite()  # three whole batches of four


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_it_pulls_embeddings_together():
    found = []
    for weight in (0, 3):
        learn = learner("rotation", Consistency(weight))
        quietly(learn, 20, 1e-2)
        names = learn.recorder.metric_names[1:]
        found.append(dict(zip(names, learn.final_record)))
    assert found[1]["consistency"] < found[0]["consistency"] / 2


def test_the_column_is_the_term_on_all_validation_images():
    learn = learner("rotation", 0.5)
    values = learn.validate()
    encoder = learn.model.encoder.eval()
    each = []
    with torch.no_grad():
        for x, _, plain in learn.dls.valid:
            each.append(
                view_distance(encoder(plain), encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]), "cosine", "none")
            )
    assert len(torch.cat(each)) == 6 and values[-1] == pytest.approx(torch.cat(each).mean().item(), rel=1e-4)


def test_other_verbs_are_as_without_it():
    plain, learn = learner("rotation"), learner("rotation", 0.5)
    assert learn.validate()[:2] == plain.validate()
    for a, b in zip(learn.get_preds(), plain.get_preds()):
        assert torch.equal(a, b)
    for a, b in zip(learn.dls.valid.show_batch(show=False), plain.dls.valid.show_batch(show=False)):
        assert len(a) == len(b) == 1 and torch.equal(a[0], b[0])
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert repr(learn.predict(image)) == repr(plain.predict(image))
    assert len(learn.show_batch()) == len(plain.show_batch())
    assert learn.model.encoder._forward_hooks == {} and "feature_map" not in vars(learn.model.encoder)


def test_the_card_says_so_and_the_images_are_counted(tmp_path):
    learn = learner("rotation", Consistency(0.25, "mse"))
    quietly(learn, 1, 1e-3)
    card = read_card(learn.save_encoder(tmp_path / "net"))
    assert card["settings"]["consistency"] == {"weight": 0.25, "term": "mse"}
    assert "consistency" in card["metrics"] and learn.images_seen == 12 * (learn.task.passes + 1)


def test_several_tasks_at_once():
    learn = learner(["rotation", "relative_position"], 0.5)
    assert isinstance(learn.task, SeveralTasks)
    quietly(learn, 1, 1e-3)
    assert learn.recorder.metric_names[-2] == "consistency" and learn.validate()[-1] > 0


# --- what it is not for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, term, said",
    [
        ("colorization", "cosine", "the images as they are, if in other colors"),
        ("split_brain", "cosine", "the images as they are, if in other colors"),
        ("pirl", "nce", "equally many things"),
        (["rotation", "jigsaw"], "nce", "equally many things"),
    ],
)
def test_tasks_that_leave_nothing_to_compare(task, term, said):
    with pytest.raises(TaskError, match=said):
        learner(task, Consistency(0.5, term))


def test_an_autoencoder_without_noise_and_a_net_that_sees_patches_are_refused():
    with pytest.raises(TaskError, match="shows the network the images as they are: consistency has nothing"):
        learner("autoencoder", 0.5, denoise=0)
    dls = UnlabeledDataLoaders.from_array(np.zeros((8, 48, 48, 3), np.uint8), size=48, bs=2)
    vit = create_encoder("test_vit", size=48, patch_size=8)
    with pytest.raises(TaskError, match="mae feeds its network with parts of images only"):
        pretext_learner(dls, "mae", encoder=vit, consistency=0.5)


@pytest.mark.parametrize("given, said", [(-1, "at least 0"), (True, "at least 0"), ("high", "at least 0")])
def test_weights_that_are_none(given, said):
    with pytest.raises(TaskError, match=said):
        learner("rotation", given)


def test_terms_that_are_none():
    with pytest.raises(SelfsupError, match="cosine"):
        Consistency(0.5, "cos")


@pytest.mark.parametrize(
    "setting, good, bad",
    [
        ("dim", (1, 64), (0, 1.5, True, "64")),
        ("temperature", (0.01, 5), (0, -1, float("nan"), None)),
        ("negatives", (None, 1), (0, 2.5, False)),
        ("bank_momentum", (0, 0.99), (1, -0.1, "0.5")),
        ("changed_weight", (0, 0.5, 1), (-0.1, 1.1, None)),
    ],
)
def test_settings_out_of_range(setting, good, bad):
    for value in good:
        assert Consistency(0.5, "nce", **{setting: value}).settings()[setting] == value
    for value in bad:
        with pytest.raises(TaskError, match=f"^{setting} is a .*got {value!r}"):
            Consistency(0.5, "nce", **{setting: value})
