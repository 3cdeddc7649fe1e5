"""PIRL: two terms against the bank, patches cut, recolored and shuffled one by one, two heads; rotation likewise."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.losses import nce
from selfsup_fastai.pretext import get_task
from tests.pretext.small_runs import MILD, blots, found_before_and_after, learner, seeded
from tests.pretext.test_npid import transcription

PLAIN = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 0, "jitter_p": 0, "grey_p": 0}  # views are the image itself


def net(dim: int = 4, **settings):
    torch.manual_seed(0)
    task = get_task("pirl", dim=dim, **settings)
    task.n_rows = 9
    return task.model(create_encoder(nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU())))


def question(n: int = 3, tiles: int = 9, views: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.rand(n, views, 3, 24, 24, generator=seeded(1))
    changed = torch.rand(n, tiles, 3, 8, 8, generator=seeded(2))
    return x, changed, torch.tensor([4, 0, 8])[:n], torch.randint(9, (n, 2, 5), generator=seeded(3))


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 0.25, 1.0])
def test_loss_and_gradients_are_two_terms_against_the_rows_before_the_step(weight):
    """As in the authors' code: first the patches, in whose first batch the constant is found, then the images."""
    bank = net(temperature=0.5).heads.bank.double()
    task, idx, negatives = get_task("pirl", weight=weight), [5, 0, 8], question()[3]
    embedded = [F.normalize(torch.randn(3, 4, generator=seeded(i), dtype=torch.float64), dim=1) for i in range(2)]
    ours, theirs = ([z.clone().requires_grad_() for z in embedded] for _ in range(2))  # patches, images
    of_patches, big_z = transcription(theirs[0], bank.rows, idx, negatives[:, 0], 0.5, None)
    of_images, _ = transcription(theirs[1], bank.rows, idx, negatives[:, 1], 0.5, big_z)
    expected = weight * of_patches + (1 - weight) * of_images
    logits = [bank.logits(z, bank.rows[idx], negatives[:, i], measures=i == 0) for i, z in enumerate(ours)]
    logits = torch.stack(logits, 1)
    torch.testing.assert_close(task.loss((None, logits), None, reduction="none"), expected)
    loss = task.loss((None, logits), None)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(torch.autograd.grad(loss, ours), torch.autograd.grad(expected.mean(), theirs))


def test_patches_go_through_one_layer_each_and_one_together():
    model, (x, tiles, idx, negatives) = net().eval(), question()
    one, _, together = model.heads.changed
    each = torch.stack([one(model.encoder(tiles[:, j])) for j in range(9)], 1)  # (3, 9, 4), in the order shown
    g = F.normalize(together(each.flatten(1)), dim=1)
    f = F.normalize(model.heads.image(model.encoder(x[:, 0])), dim=1)
    found, logits = model(x, tiles, idx, negatives)
    torch.testing.assert_close(found, torch.stack([f, g, model.heads.bank.rows[idx]], 1))
    for i, z in enumerate((g, f)):
        torch.testing.assert_close(
            logits[:, i], model.heads.bank.logits(z, model.heads.bank.rows[idx], negatives[:, i])
        )
    kinds = [type(m).__name__ for m in (one, *together, *model.heads.image)]
    assert kinds == ["Linear", "Linear", "BatchNorm1d", "Linear", "BatchNorm1d"]
    assert (one.in_features, together[0].in_features, model.heads.image[0].in_features) == (6, 36, 6)
    assert isinstance(net(centered=False).heads.image[-1], nn.Linear)


def test_new_images_are_compared_with_another_view():
    model, (x, tiles, idx, negatives) = net().eval(), question(views=2)
    second = F.normalize(model.heads.image(model.encoder(x[:, 1])), dim=1)
    found, logits = model(x, tiles, idx, negatives)
    torch.testing.assert_close(found[:, 2], second)
    torch.testing.assert_close(logits[:, 1], model.heads.bank.logits(found[:, 0], second, negatives[:, 1]))


def test_rows_take_in_the_images_not_the_patches_after_the_step():
    learn = learner("pirl", n=16, bs=4, side=36, dim=4, views=MILD)
    bank, seen = learn.model.heads.bank, []

    class Watch(KeepMemories):
        order = KeepMemories.order - 1

        def after_step(self):
            found, idx = self.learn.pred[0], self.learn.xb[2]
            torch.testing.assert_close(found[:, 2], bank.rows[idx])
            seen.append((idx.clone(), found[:, 0].detach().clone(), bank.rows.clone()))

    learn.add_cb(Watch())
    with learn.no_logging():
        learn.fit(1, 1e-2)
    for (idx, f, before), after in zip(seen, [rows for _, _, rows in seen[1:]] + [bank.rows]):
        torch.testing.assert_close(after[idx], F.normalize(0.5 * before[idx] + 0.5 * f, dim=1))
    rows = bank.rows.clone()
    learn.validate()
    assert len(seen) == 3 and torch.equal(bank.rows, rows)


# --- what is asked ----------------------------------------------------------------------------------------------------


def asked(x: Tensor, seed: int = 0, train: bool = True, **settings):
    task = get_task("pirl", **settings)
    return task.make_batch(x, generator=seeded(seed), train=train, idx=torch.arange(len(x)))[0]


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_the_nine_cells_each_once_in_any_order(channels):
    cells = torch.arange(9.0).view(1, 1, 3, 3) / 10
    x = cells.repeat_interleave(12, 2).repeat_interleave(12, 3).expand(40, channels, 36, 36)
    views = {**PLAIN, "kind": "photo"}
    image, tiles, idx, negatives = asked(x, views=views)
    torch.testing.assert_close(image[:, 0], x)
    assert tiles.shape == (40, 9, channels, 9, 9) and idx.tolist() == list(range(40)) and negatives.shape[:2] == (40, 2)
    assert tiles.flatten(2).std(2).max() < 1e-5  # a tile lies in one cell
    numbers = (10 * tiles.mean((2, 3, 4))).round().long()
    assert (numbers.sort(1).values == torch.arange(9)).all()
    assert len({tuple(order) for order in numbers.tolist()}) == 40
    first = numbers[:, 0].bincount(minlength=9)
    assert first.max() < 14  # any patch may be the first


def test_tiles_lie_at_any_place_in_their_cells():
    ramp = torch.linspace(0, 1, 36).expand(60, 3, 36, 36)
    tiles = asked(ramp, views=PLAIN)[1]
    left = (tiles[..., 0, 0, 0] * 35).round().long()  # first column of each tile
    assert {c % 12 for c in left.flatten().tolist()} == {0, 1, 2, 3} and left.max() == 27


def test_each_patch_has_colors_and_flip_of_its_own():
    flat = torch.tensor([0.7, 0.5, 0.2]).view(1, 3, 1, 1).expand(4, 3, 36, 36)
    colors = asked(flat)[1].mean((3, 4))  # (4, 9, 3)
    assert torch.cdist(colors, colors).add(torch.eye(9)).amin() > 1e-4
    ramp = torch.linspace(0, 1, 36).expand(40, 3, 36, 36)
    tiles = asked(ramp, views={**PLAIN, "flip": 0.5})[1]
    mirrored = (tiles[..., 0, 0, 0] > tiles[..., 0, 0, -1]).float()
    assert 0.4 < mirrored.mean() < 0.6 and mirrored.std(1).min() > 0


def test_the_image_and_its_patches_are_other_crops():
    recipes = [get_task("pirl").recipe(v, 3, 64) for v in range(2)]
    assert [r.scale for r in recipes] == [(0.08, 1.0), (0.6, 1.0)]
    for r in recipes:
        assert (r.brightness, r.contrast, r.saturation, r.hue, r.jitter_p) == (0.4, 0.4, 0.4, 0.2, 1.0)
        assert (r.grey_p, r.flip, r.blur_p) == (0.2, 0.5, 0)
    image, tiles, _, _ = asked(blots(5), train=False)
    assert image.shape == (5, 2, 3, 36, 36) and (image[:, 0] - image[:, 1]).abs().mean() > 0.01
    again = asked(blots(5), train=False)
    assert torch.equal(image, again[0]) and torch.equal(tiles, again[1])


def test_rotation_turns_another_view():
    x = blots(40)
    image, turned, _, _ = asked(x, transform="rotation", views=PLAIN)
    assert turned.shape == (40, 1, 3, 36, 36)
    torch.testing.assert_close(image[:, 0], x)
    turns = [
        [torch.allclose(torch.rot90(a, k, (-2, -1)), b[0], atol=1e-5) for k in range(4)] for a, b in zip(x, turned)
    ]
    assert torch.tensor(turns).sum(1).eq(1).all() and torch.tensor(turns).any(0).all()
    model, (view, one, idx, negatives) = net(transform="rotation").eval(), question(tiles=1)
    g = F.normalize(model.heads.changed[1](model.encoder(one[:, 0])), dim=1)
    torch.testing.assert_close(model(view, one, idx, negatives)[0][:, 1], g)
    learn = learner("pirl", n=16, bs=4, dim=4, transform="rotation", views=MILD)
    with learn.no_logging():
        learn.fit(1, 1e-2)
    assert learn.show_batch() and learn.task.passes == 2


def test_costs_and_sizes():
    assert get_task("pirl").passes == 1 + 9 / 16 and get_task("pirl").min_side == 33
    assert get_task("pirl", transform="rotation").min_side == 8
    with pytest.raises(TaskError, match="at least 33 pixels"):
        learner("pirl", n=8, bs=4, side=32)


@pytest.mark.parametrize(
    "settings", [{"transform": "jigsow"}, {"weight": 1.5}, {"negatives": 0}, {"temperature": 0}, {"centered": "no"}]
)
def test_settings_out_of_range(settings):
    with pytest.raises(TaskError, match=next(iter(settings))):
        get_task("pirl", **settings)


def test_pictures_show_image_and_patches_then_their_cosine():
    learn = learner("pirl", n=16, bs=4, side=36, dim=4)
    dl = learn.dls.valid
    b = dl.one_batch()
    views, tiles, _, _ = dl.question(b)[0]
    for i, ax in enumerate(dl.show_batch(b)):
        assert ax.get_title() == f"image {i} | shuffled"
        pixels = torch.tensor(ax.images[0].get_array()).permute(2, 0, 1)
        assert pixels.shape == (3, 36, 74)
        torch.testing.assert_close(pixels[:, :, :36], views[i, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(pixels[:, 2:11, 40:49], tiles[i, 0], atol=1e-5, rtol=0)  # a white border of 1 + 1
    preds = learn.get_preds(dl=[b], with_decoded=True)
    for i, ax in enumerate(dl.show_results(b, preds[2])):
        f, g = preds[0][0][i, :2]
        assert ax.get_title() == f"cosine {f @ g:.2f}"


def test_logits_of_a_batch_are_those_of_each_image():
    model, (x, tiles, idx, negatives) = net().eval(), question()
    _, logits = model(x, tiles, idx, negatives)
    model.heads.bank.train()
    model.heads.bank.log_z.fill_(2.0)
    whole = model(x, tiles, idx, negatives)[1]
    alone = torch.cat(
        [model(x[i : i + 1], tiles[i : i + 1], idx[i : i + 1], negatives[i : i + 1])[1] for i in range(3)]
    )
    torch.testing.assert_close(alone, whole)
    assert nce(logits[:, 0]).isfinite()


@pytest.mark.parametrize(
    "settings, epochs, lr",
    [
        ({"transform": "rotation"}, 20, 3e-3),
        pytest.param({"temperature": 0.5}, 30, 1e-2, marks=pytest.mark.slow),
    ],
)
def test_changed_images_never_seen_are_found_after_a_few_dozen_steps(settings, epochs, lr):
    learn = learner("pirl", n=96, valid_pct=1 / 3, side=36, dim=32, views=MILD, **settings)
    before, after = found_before_and_after(learn, epochs, lr)
    assert after > max(before, 3 / 16)
