"""Patches found again in the image they were cut from; each guard against its shortcut; the answers' places."""

import math

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from selfsup_fastai.pretext.predictive.relative_position import NAMES, QUESTIONS, shrunken
from tests.pretext.shortcuts import cheat, seeded, textures

NO_GUARDS = {"gap": 0, "jitter": 0, "color": "keep", "standardize": False, "shrink": 0}
GRID = {**NO_GUARDS, "gap": 0.5}


def noise(b: int, c: int = 3, h: int = 64, w: int = 64) -> Tensor:
    """No two windows of it are alike."""
    return torch.rand(b, c, h, w, generator=seeded(1))


def asked(x: Tensor, seed: int = 0, **settings) -> Tensor:
    """The patches (B, 9, C, p, p)."""
    (patches,), (target,) = get_task("relative_position", **settings).make_batch(x, generator=seeded(seed), train=True)
    assert target.shape == (len(x), 40) and patches.shape[:3] == (len(x), 9, x.shape[1])
    return patches


def places(x: Tensor, patches: Tensor) -> np.ndarray:
    """Row and column of the first pixel of every patch, (B, 9, 2)."""
    size, found = patches.shape[-1], []
    for image, of_image in zip(x, patches):
        for patch in of_image:
            corners = (image[0] == patch[0, 0, 0]).nonzero().tolist()
            windows = {(row, col): image[:, row : row + size, col : col + size] for row, col in corners}
            (at,) = (place for place, window in windows.items() if torch.equal(window, patch))
            found.append(at)
    return np.array(found).reshape(len(x), 9, 2)


# --- where the patches lie --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h, w, size, gap", [(64, 64, 14, 7), (47, 61, 10, 5), (71, 40, 8, 4), (33, 33, 8, 4)])
def test_the_grid_lies_anywhere_in_the_image(h, w, size, gap):
    x = noise(60, 1, h, w)
    patches = asked(x, **GRID)
    at = places(x, patches)
    assert patches.shape[-1] == size
    grid = np.array([(i // 3, i % 3) for i in range(9)]) * (size + gap)
    assert (at - at[:, :1] == grid).all()
    for side, origins in zip((h, w), at[:, 0].T):
        room = side - 3 * size - 2 * gap
        assert origins.min() >= 0 and origins.max() <= room and len(set(origins)) >= min(room + 1, 5)


def test_patches_touch_without_a_gap():
    x = noise(4)
    at = places(x, asked(x, **NO_GUARDS))
    assert (at[:, 1, 1] - at[:, 0, 1] == 14).all() and (at[:, 3, 0] - at[:, 0, 0] == 14).all()


def test_jitter_moves_each_patch_by_itself_but_never_out_of_the_image():
    x = noise(150, 1, 100, 100)
    jittered = places(x, asked(x, **{**GRID, "jitter": 0.15}))  # patches of 22, shifts of 3
    middle = jittered[:, 4:5] + (np.array([(i // 3, i % 3) for i in range(9)]) - 1) * 33
    apart = (jittered - middle)[:, [1, 3, 5, 7]]
    assert set(apart.flatten()) == set(range(-6, 7))  # each of the two by -3..3
    assert jittered.min() == 0 and jittered.max() == 100 - 22
    small = places(x[:20], asked(x[:20], **{**GRID, "jitter": 0.001}))
    assert (small[:, 1, 0] != small[:, 0, 0]).any()  # one pixel at least


def test_answers_of_a_batch_can_be_changed_and_others_stay():
    task, x = get_task("relative_position", **GRID), torch.rand(2, 3, 60, 60)
    (_,), (answers,) = task.make_batch(x, generator=seeded(), train=True)
    kept = answers.clone()
    answers.zero_()
    (_,), (again,) = task.make_batch(x, generator=seeded(), train=True)
    assert torch.equal(again, kept) and kept.any()


def test_answers_say_where_the_second_patch_lies():
    x = noise(3)
    task = get_task("relative_position", **GRID)
    (patches,), (target,) = task.make_batch(x, generator=seeded(), train=True)
    at = places(x, patches)
    for first, second, answer in QUESTIONS:
        down, right = np.sign(at[0, second] - at[0, first])
        name = {-1: "above", 0: "", 1: "below"}[down] + " " + {-1: "left", 0: "", 1: "right"}[right]
        assert NAMES[answer] == name.strip()
    assert target.tolist() == [[q[2] for q in QUESTIONS]] * 3
    neighbors = {(a, b) for a in range(9) for b in range(9) if a != b and abs(at[0, a] - at[0, b]).max() <= 21}
    assert {q[:2] for q in QUESTIONS} == neighbors and len(QUESTIONS) == 40
    assert NAMES == ("above left", "above", "above right", "left", "right", "below left", "below", "below right")
    assert task.chance() == max(np.bincount(target[0])) / 40


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 14])
def test_shrinking_by_a_matrix_is_bilinear_resizing(size):
    patches = noise(5, 3, size, size)
    for s in (1, 2, 5, size - 1):
        expected = F.interpolate(F.interpolate(patches, (s, s), mode="bilinear"), (size, size), mode="bilinear")
        torch.testing.assert_close(shrunken(size)[s] @ patches @ shrunken(size)[s].T, expected)
    assert torch.equal(shrunken(size)[size], torch.eye(size))


def test_a_third_of_the_patches_is_blurred_the_others_are_untouched():
    x = noise(200, 1)
    sharp = asked(x, **GRID)
    task = get_task("relative_position", **{**GRID, "shrink": 0.33})
    mild = task.blurred(sharp, seeded(5))
    same = (mild == sharp).flatten(2).all(2)
    assert abs(same.float().mean().item() - 0.67) < 4 * math.sqrt(0.33 * 0.67 / 1800)
    task.shrink = 1.0
    blurred = task.blurred(sharp, seeded(5))
    left = []
    for before, after in zip(sharp[:40].flatten(0, 1), blurred[:40].flatten(0, 1)):
        each = shrunken(14)[2:14] @ before @ shrunken(14)[2:14].mT
        off = (each - after[0]).abs().amax((1, 2))
        assert off.min() < 1e-5
        left.append(2 + int(off.argmin()))
    expected = np.sqrt(np.linspace((10 / 96) ** 2, (95 / 96) ** 2, 10_001)) * 14
    assert set(left) <= set(range(2, 14)) and abs(np.mean(left) - np.floor(expected).mean()) < 0.6


def test_one_channel_of_each_patch_is_kept_the_others_are_faint_noise():
    x = 0.2 + 0.8 * noise(100)
    whole, dropped = asked(x, **GRID), asked(x, **{**GRID, "color": "drop"})
    kept = (whole == dropped).flatten(3).all(3)  # (B, 9, 3)
    assert (kept.sum(2) == 1).all()
    counts = kept.sum((0, 1)) / 900
    assert (counts - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / 900)
    assert (kept != kept[:, :1]).any()  # drawn for each patch
    rest = dropped[~kept]
    assert rest.abs().max() <= 0.5 / 255 and rest.std() == pytest.approx(1 / 255 / math.sqrt(12), rel=0.02)


def test_projection_takes_the_axis_from_green_to_magenta_away():
    x = noise(10)
    whole, projected = asked(x, **GRID), asked(x, **{**GRID, "color": "project"})
    a = np.array([[-1.0, 2.0, -1.0]])
    matrix = np.eye(3) - a.T @ a / (a @ a.T)
    expected = np.einsum("bncij,cd->bndij", whole.numpy(), matrix)
    np.testing.assert_allclose(projected.numpy(), expected, atol=1e-6)
    gray = x[:, :1]
    assert torch.equal(asked(gray, **{**GRID, "color": "project"}), asked(gray, **{**GRID, "color": "drop"}))


def test_patches_are_standardized():
    x = (
        noise(20)
        * torch.tensor([0.2, 1.0, 0.5]).view(3, 1, 1)
        * (0.3 + 0.7 * torch.rand(20, 1, 1, 1, generator=seeded()))
    )
    x[0] = 0.3  # flat
    patches = asked(x, **{**GRID, "standardize": True})
    assert patches[1:].mean((-2, -1)).abs().max() < 1e-5
    torch.testing.assert_close(patches[1:].square().mean((-3, -2, -1)), torch.ones(19, 9), atol=1e-4, rtol=0)
    assert patches[0].abs().max() < 1e-4
    spread = patches[1:].std((0, 1, 3, 4))
    assert spread[1] > 1.5 * spread[2] > 2 * spread[0]  # the channels keep their shares
    with_color = asked(x, standardize=True, shrink=0)
    torch.testing.assert_close(with_color[1:].square().mean((-3, -2, -1)), torch.ones(19, 9), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{"patch": 0.25}, {"patch": 0.25, "gap": 0.49}, {}])
def test_patches_fit_into_images_of_every_side(settings):
    for side in range(33, 131):
        patches = asked(noise(2, 1, side, side), **{**settings, "shrink": 0})
        assert patches.shape == (2, 9, 1, *[max(8, int(settings.get("patch", 0.22) * side))] * 2)


@pytest.mark.slow
def test_a_net_that_sees_nine_pixels_answers_without_the_guards_but_not_with_them():
    x = textures(200, 64)
    narrow = {"patch_features": 32, "hidden": 32}
    bound = 6 / 40 + 4 * math.sqrt(0.15 * 0.85 / 2000)
    assert cheat(get_task("relative_position", **narrow, **NO_GUARDS), x, epochs=6) > 0.3
    colors_alone = {**NO_GUARDS, "standardize": True}
    assert cheat(get_task("relative_position", **narrow, **colors_alone), x, epochs=6) > 0.5
    assert cheat(get_task("relative_position", **narrow), x, epochs=6) < bound


# --- net, loss, settings ----------------------------------------------------------------------------------------------


def test_each_pair_is_judged_by_its_two_patches_in_their_order():
    set_seed(0)
    encoder = create_encoder(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()))
    net = get_task("relative_position", patch_features=6, hidden=10).model(encoder).eval()
    x = noise(2, 27, 12, 12).view(2, 9, 3, 12, 12)
    with torch.no_grad():
        pred = net(x)
        for k, (first, second, _) in enumerate(QUESTIONS):
            pair = torch.cat([net.patch(encoder(x[:, first])), net.patch(encoder(x[:, second]))], 1)
            torch.testing.assert_close(pred[:, k], net.pair(pair))
        changed = x.clone()
        changed[:, 4] += 1
        moved = (net(changed) != pred).flatten(2).any(2)
    assert moved.tolist() == [[4 in q[:2] for q in QUESTIONS]] * 2
    norms = [m for part in (net.patch, net.pair) for m in part if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == 2 and not any(list(m.parameters()) for m in norms)


def test_loss_is_the_mean_negative_log_probability_of_the_answers():
    pred = torch.randn(3, 40, 8, generator=seeded(), dtype=torch.float64)
    target = torch.tensor([q[2] for q in QUESTIONS]).expand(3, -1)
    rows = [
        sum(math.log(sum(map(math.exp, q))) - q[t] for q, t in zip(p, target[0].tolist())) / 40 for p in pred.tolist()
    ]
    task = get_task("relative_position")
    assert task.loss(pred, target, reduction="none").tolist() == pytest.approx(rows)
    assert task.loss(pred, target).item() == pytest.approx(sum(rows) / 3)


def test_settings_out_of_range():
    for name, value, text in [("patch", 0.26, "at most 0.25"), ("gap", 0.6, "at most 0.5"), ("jitter", -1, "at least")]:
        with pytest.raises(TaskError, match=f"{name} is a number, .*{text}"):
            get_task("relative_position", **{name: value})
    with pytest.raises(TaskError, match="color is 'drop', 'project' or 'keep'; got 'gray'"):
        get_task("relative_position", color="gray")
    with pytest.raises(TaskError, match="standardize is True or False, got 'false'"):
        get_task("relative_position", standardize="false")
    with pytest.raises(TaskError, match="at least 33 pixels a side, these are 32 x 40"):
        get_task("relative_position").batch(noise(2, 1, 32, 40), generator=seeded(), train=True)
    largest = asked(noise(2, 3, 64, 64), patch=0.25)
    assert largest.shape[-1] == 16


def test_passes_are_the_area_of_the_patches_or_nine_enlarged_ones():
    array = np.random.default_rng(0).integers(0, 256, (6, 48, 48, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=4, num_workers=0)
    assert get_task("relative_position").passes == pytest.approx(9 * 0.22**2)
    for arch, passes in [("vit_tiny_patch16_224", 9), ("resnet10t", 9 * 0.22**2)]:
        assert pretext_learner(dls, "relative_position", arch).task.passes == pytest.approx(passes)


def test_pictures_show_the_second_patch_where_it_lay_and_where_it_is_put():
    x = noise(2, 3)
    task = get_task("relative_position", **GRID)
    (patches,), targets = task.make_batch(x, generator=seeded(), train=True)
    low, high = patches.amin((2, 3, 4), True), patches.amax((2, 3, 4), True)
    stretched = (patches - low) / (high - low)

    def at(picture: np.ndarray, place: tuple[int, int]) -> Tensor:
        top, left = (21 * (1 + p) for p in place)
        return torch.tensor(picture[top : top + 14, left : left + 14]).permute(2, 0, 1)

    first, second, _ = QUESTIONS[7]
    picture = task.show((patches,), targets)[1].images[0].get_array()
    assert picture.shape == (56, 56, 3)
    down, right = (np.array(divmod(second, 3)) - divmod(first, 3)).tolist()
    torch.testing.assert_close(at(picture, (0, 0)), stretched[1, first])
    torch.testing.assert_close(at(picture, (down, right)), stretched[1, second])
    named = (targets[0] + 1) % 8
    ax = task.show((patches,), targets, pred=named)[1]
    truth = NAMES[targets[0][1, 7]]
    assert ax.get_title() == f"{truth}, named {NAMES[named[1, 7]]}  ✗"
    assert task.show((patches,), targets, pred=targets[0])[1].get_title() == f"{truth}, named {truth}  ✓"
    both = ax.images[0].get_array()
    np.testing.assert_array_equal(both[:, :56], picture)
    steps = {name: (i // 3 - 1, i % 3 - 1) for i, name in enumerate([*NAMES[:4], "middle", *NAMES[4:]])}
    torch.testing.assert_close(at(both[:, 56 + 14 :], steps[NAMES[named[1, 7]]]), stretched[1, second])
