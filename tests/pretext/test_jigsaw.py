"""Puzzles put back together; tiles found again in the image they were cut from; each guard against its shortcut."""

import math
import re
from itertools import permutations

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
from selfsup_fastai.pretext.predictive import jigsaw
from selfsup_fastai.pretext.predictive.jigsaw import distant_permutations
from tests.pretext.shortcuts import cheat, textures

NO_GUARDS = {"gap": False, "standardize": False, "shift": False, "grey": 0}
LUMA = torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(b: int, c: int = 3, h: int = 48, w: int = 48) -> Tensor:
    """No two windows of it are alike."""
    return torch.rand(b, c, h, w, generator=seeded(1))


def puzzle(x: Tensor, seed: int = 0, **settings):
    """The task, the tiles (B, 9, C, t, t) and the numbers of the orders (B,)."""
    task = get_task("jigsaw", **{"n_permutations": 8, **settings})
    (tiles,), (target,) = task.make_batch(x, generator=seeded(seed), train=True)
    return task, tiles, target


def hits(plane: Tensor, window: Tensor) -> list[tuple[int, int]]:
    """Where `window` (t, t) lies in `plane` (H, W): every (top, left) at which they are equal."""
    size = len(window)
    corners = (plane[: len(plane) - size + 1, : plane.shape[1] - size + 1] == window[0, 0]).nonzero().tolist()
    return [(r, c) for r, c in corners if torch.equal(plane[r : r + size, c : c + size], window)]


# --- the orders -------------------------------------------------------------------------------------------------------


def test_orders_are_chosen_greedily_by_greatest_mean_distance():
    chosen = [tuple(p) for p in distant_permutations(5)]
    everything = np.array(list(permutations(range(9))))
    assert chosen[0] == tuple(everything[np.random.default_rng(42).integers(len(everything))])
    for k in range(1, 5):
        distance = sum((everything != np.array(earlier)).sum(1) for earlier in chosen[:k])
        free = ~np.array([(everything == np.array(c)).all(1) for c in chosen[:k]]).any(0)
        ours = sum(sum(a != b for a, b in zip(chosen[k], earlier)) for earlier in chosen[:k])
        assert ours == distance[free].max()


def test_orders_are_distinct_far_apart_and_the_same_every_time():
    orders = distant_permutations(64)
    assert (np.sort(orders, axis=1) == np.arange(9)).all() and len({tuple(o) for o in orders}) == 64
    apart = (orders[:, None] != orders[None]).sum(-1)
    assert (apart[:9, :9][~np.eye(9, dtype=bool)] == 9).all()  # nine can differ in every place
    assert apart[~np.eye(64, dtype=bool)].mean() > 8.1  # of random ones: 8
    distant_permutations.cache_clear()
    assert (distant_permutations(64) == orders).all() and (distant_permutations(7) == orders[:7]).all()
    assert (distant_permutations(7, seed=1) != orders[:7]).any()


def test_orders_are_chosen_before_the_first_batch_and_a_long_wait_is_announced(monkeypatch, capsys):
    dls = UnlabeledDataLoaders.from_array(np.zeros((4, 48, 48), np.uint8), size=None, bs=2, num_workers=0)
    distant_permutations.cache_clear()
    pretext_learner(dls, "jigsaw", "resnet10t", n_permutations=8)
    assert distant_permutations.cache_info().currsize == 1 and "orders" not in capsys.readouterr().err
    monkeypatch.setattr(jigsaw, "MANY", 8)
    pretext_learner(dls, "jigsaw", "resnet10t", n_permutations=8)
    assert "8 orders of the tiles are being chosen" in capsys.readouterr().err


def test_settings_out_of_range():
    for n in (1, 10_001):
        with pytest.raises(TaskError, match=f"at least 2 and at most 10,000; got {n}"):
            get_task("jigsaw", n_permutations=n)
    for name, value in {"gap": "no", "shift": "off", "standardize": "false"}.items():
        with pytest.raises(TaskError, match=f"{name} is True or False, got '{value}'"):
            get_task("jigsaw", **{name: value})
    with pytest.raises(TaskError, match="color is 'drop', 'project' or 'keep'; got 'gray'"):
        get_task("jigsaw", color="gray")
    assert get_task("jigsaw", n_permutations=8).chance() == 1 / 8
    assert get_task("jigsaw").passes == 9 * 0.25**2 and get_task("jigsaw", gap=False).passes == 1


def test_a_net_of_fixed_size_sees_nine_enlarged_tiles_and_that_is_what_is_counted():
    array = np.random.default_rng(0).integers(0, 256, (6, 48, 48, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=4, num_workers=0)
    task = get_task("jigsaw", n_permutations=8)
    for arch, passes in [("vit_tiny_patch16_224", 9), ("resnet10t", 9 * 0.25**2)]:
        learn = pretext_learner(dls, task, arch)
        assert bool(learn.encoder.fixed_size) == (passes == 9) and learn.task.passes == passes
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        assert learn.images_seen == 4 * passes


def test_the_smallest_images_give_tiles_of_eight_pixels():
    dls = UnlabeledDataLoaders.from_array(np.zeros((2, 33, 40), np.uint8), size=None, num_workers=0)
    assert pretext_learner(dls, "jigsaw", "resnet10t").dls.one_batch()[0].shape == (1, 9, 1, 8, 8)
    with pytest.raises(TaskError, match="at least 33 pixels a side, these are 32 x 32"):
        get_task("jigsaw").batch(noise(2, 1, 32, 32), generator=seeded(), train=True)


# --- the tiles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("h, w", [(48, 48), (48, 61), (71, 51)])
def test_without_guards_solving_gives_the_image_back(channels, h, w):
    x, s = noise(12, channels, h, w), min(h, w)
    task, tiles, target = puzzle(x, **NO_GUARDS)
    assert len(target.unique()) > 4
    top, left = (h - s) // 2, (w - s) // 2
    for image, pieces, number in zip(x, tiles, target):
        rows = [torch.cat(list(row), -1) for row in task.solve(pieces, int(number)).split(3)]
        assert torch.equal(torch.cat(rows, -2), image[:, top : top + s, left : left + s])
        wrong = (int(number) + 1) % 8
        assert not torch.equal(task.solve(pieces, wrong), task.solve(pieces, int(number)))


def test_tile_j_of_the_puzzle_is_the_tile_of_the_image_that_the_order_names():
    x = torch.arange(9.0).view(1, 1, 3, 3).repeat_interleave(16, 2).repeat_interleave(16, 3).expand(20, 1, 48, 48)
    task, tiles, target = puzzle(x, **{**NO_GUARDS, "gap": True})
    assert torch.equal(tiles.mean((2, 3, 4)).long(), task.permutations[target])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [48, 50, 33])
def test_with_gaps_each_tile_is_a_window_of_its_cell_at_any_place(channels, side):
    x = noise(30, channels, side, side)
    task, tiles, target = puzzle(x, **{**NO_GUARDS, "gap": True})
    cell, size = side // 3, (side // 3) * 3 // 4
    assert tiles.shape == (30, 9, channels, size, size)
    places = set()
    for image, pieces, number in zip(x, tiles, target):
        for at, piece in enumerate(task.solve(pieces, int(number))):
            ((top, left),) = {p for plane, window in zip(image, piece) for p in hits(plane, window)}
            places.add((top - at // 3 * cell, left - at % 3 * cell))
    free = cell - size + 1
    assert places == {(i, j) for i in range(free) for j in range(free)}


def test_color_channels_are_shifted_by_up_to_a_32nd_of_the_tile():
    x = noise(3, 3, 192, 192)
    task, tiles, target = puzzle(x, **{**NO_GUARDS, "gap": True, "shift": True})
    assert tiles.shape[-1] == 48
    spreads, outside = [], 0
    for image, pieces, number in zip(x, tiles, target):
        for at, piece in enumerate(task.solve(pieces, int(number))):
            places = torch.tensor([hits(plane, window)[0] for plane, window in zip(image, piece)])  # (3, 2)
            spreads += (places.amax(0) - places.amin(0)).tolist()
            corner = torch.tensor([at // 3, at % 3]) * 64
            assert ((places >= corner - 2) & (places <= corner + 16 + 2)).all()
            outside += int((places != places[0]).any())
    assert set(spreads) == {0, 1, 2, 3, 4}  # each by -2..2, so 4 from one another
    assert outside > 20


def test_one_channel_is_not_shifted_against_itself():
    x = noise(6, 1)
    guards = {**NO_GUARDS, "gap": True}
    assert torch.equal(puzzle(x, **guards)[1], puzzle(x, **{**guards, "shift": True})[1])


def test_tiles_are_standardized_by_channel():
    x = noise(10) * torch.tensor([0.2, 1.0, 0.5]).view(3, 1, 1)
    x[0, :, :16] = 0.3  # flat
    task, tiles, target = puzzle(x, grey=0)
    flat = torch.zeros(10, 9, dtype=torch.bool)
    flat[0, :3] = True  # in the order of the image
    flat = torch.stack([f[order] for f, order in zip(flat, task.permutations[target])])
    assert tiles[~flat].mean((-2, -1)).abs().max() < 1e-5
    torch.testing.assert_close(tiles[~flat].std((-2, -1)), torch.ones(87, 3), atol=1e-4, rtol=0)
    shallow = tiles[flat].std((-2, -1))
    assert (shallow < 1.001).all() and tiles[flat].isfinite().all()
    assert (puzzle(x, **{**NO_GUARDS, "gap": True})[1] >= 0).all()  # off: pixels as they are


def test_a_third_of_the_images_is_grey_all_nine_tiles_of_it():
    x = noise(500, 3, 33, 33)
    _, tiles, target = puzzle(x, **{**NO_GUARDS, "grey": 0.3})
    grey = (tiles == tiles[:, :, :1]).flatten(1).all(1)
    assert abs(grey.float().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 500)
    luma = (x * LUMA).sum(1, keepdim=True).expand_as(x)
    task = get_task("jigsaw", n_permutations=8, **NO_GUARDS)
    cut = task.cut(torch.where(grey.view(-1, 1, 1, 1), luma, x), seeded())
    expected = torch.stack([c[order] for c, order in zip(cut, task.permutations[target])])
    torch.testing.assert_close(tiles, expected)  # those that are grey are luma, the others untouched
    standardized = puzzle(x)[1]
    assert not (standardized == standardized[:, :, :1]).flatten(1).all(1).all()


def test_every_visit_draws_another_order():
    x = noise(40)
    first, second = (puzzle(x, seed)[2] for seed in (0, 1))
    assert set(first.tolist()) == set(range(8)) and (first != second).sum() > 20


# --- the shortcuts ----------------------------------------------------------------------------------------------------


def solved_by_tile_means(x: Tensor, **guards) -> float:
    """Share of the last third of the puzzles that a nearest-mean classifier on the tiles' means solves."""
    _, tiles, target = puzzle(x, **guards)
    features = tiles.mean((-2, -1)).flatten(1)
    train = len(x) * 2 // 3
    means = torch.stack([features[:train][target[:train] == k].mean(0) for k in range(8)])
    return (torch.cdist(features[train:], means).argmin(1) == target[train:]).float().mean().item()


def test_standardization_takes_the_brightness_gradient_away():
    slope = torch.linspace(0, 0.3, 36)
    x = 0.2 + slope.view(-1, 1) + 0.7 * slope + 0.2 * torch.rand(600, 3, 36, 36, generator=seeded())
    x = x * (0.7 + 0.3 * torch.rand(600, 1, 1, 1, generator=seeded(2)))  # exposure
    assert solved_by_tile_means(x, standardize=False) > 0.95
    assert solved_by_tile_means(x) < 0.125 + 4 * math.sqrt(0.125 * 0.875 / 200)


def solved_by_edges(x: Tensor, **guards) -> float:
    """Share of the puzzles whose right order is the one in which the edges of neighboring tiles differ least."""
    task, tiles, target = puzzle(x, **guards)
    solved = torch.stack([tiles[:, order.argsort()] for order in task.permutations], 1)  # (B, 8, 9, C, t, t)
    grid = solved.unflatten(2, (3, 3))
    across = (grid[:, :, :, :-1, ..., -1] - grid[:, :, :, 1:, ..., 0]).abs().mean((2, 3, 4, 5))
    down = (grid[:, :, :-1, :, ..., -1, :] - grid[:, :, 1:, :, ..., 0, :]).abs().mean((2, 3, 4, 5))
    return ((across + down).argmin(1) == target).float().mean().item()


def test_gaps_take_the_continuing_edges_away():
    x = F.avg_pool2d(noise(200, 3, 98, 98), 3, 1)  # texture of three pixels
    guards = {"standardize": False, "shift": False, "grey": 0}
    assert solved_by_edges(x, gap=False, **guards) > 0.99
    assert solved_by_edges(x, gap=True, **guards) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("fringe", [0, 0.5, 1, 2])
def test_a_net_that_sees_nine_pixels_solves_puzzles_without_the_guards_but_not_with_them(fringe):
    """Wide fringes, of 1 and 2 of 54 pixels, are hidden only by taking the color away."""
    x = textures(800, 54, fringe)
    small = {"n_permutations": 8, "tile_features": 16, "hidden": 64, "dropout": 0}
    chance = 0.125 + 3 * math.sqrt(0.125 * 0.875 / 200)
    assert cheat(get_task("jigsaw", **small, **NO_GUARDS), x[:200], epochs=8) > 0.9
    told = cheat(get_task("jigsaw", **small), x, epochs=4)
    assert told < chance if fringe < 1 else told > chance  # the docstring warns of wide fringes
    assert cheat(get_task("jigsaw", **small, color="drop"), x, epochs=4) < chance


# --- network, loss, pictures ------------------------------------------------------------------------------------------


def test_network_sees_each_tile_alone_and_then_all_in_order():
    set_seed(0)
    encoder = create_encoder(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()))
    net = get_task("jigsaw", n_permutations=8, tile_features=6, hidden=10).model(encoder).eval()
    tiles = torch.rand(2, 9, 3, 12, 12, generator=seeded())
    with torch.no_grad():
        features = torch.cat([net.tile(encoder(tiles[:, j])) for j in range(9)], 1)  # (2, 9 * 6)
        torch.testing.assert_close(net(tiles), net.head(features))
        assert net(tiles).shape == (2, 8) and (net(tiles) - net(tiles.flip(1))).abs().max() > 1e-4
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_loss_is_the_negative_log_probability_of_the_order():
    pred, target = torch.randn(4, 8, generator=seeded(), dtype=torch.float64), torch.tensor([0, 7, 3, 3])
    rows = [-math.log(math.exp(r[t]) / sum(map(math.exp, r))) for r, t in zip(pred.tolist(), target.tolist())]
    task = get_task("jigsaw", n_permutations=8)
    assert task.loss(pred, target, reduction="none").tolist() == pytest.approx(rows)
    assert task.loss(pred, target).item() == pytest.approx(sum(rows) / 4)


@pytest.fixture(scope="module")
def learn():
    array = np.random.default_rng(0).integers(0, 256, (24, 48, 48, 3), dtype=np.uint8)
    set_seed(0)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=8, valid_pct=0.4, num_workers=0)
    learn = pretext_learner(dls, "jigsaw", "resnet10t", n_permutations=8, shift=False, grey=0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3)
    return learn


def shown(ax, panel: int) -> Tensor:
    """The tiles (9, C, t, t) of one of the puzzles side by side in a picture."""
    pixels = torch.from_numpy(np.array(ax.images[0].get_array())).permute(2, 0, 1).float()
    start = panel * (pixels.shape[1] + 6)  # half a tile of white between two
    pixels = pixels[:, :, start : start + pixels.shape[1]]
    tiles = pixels.unflatten(1, (3, -1)).unflatten(3, (3, -1)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    assert tiles[..., 0, :].eq(1).all() and tiles[..., -1].eq(1).all()  # white borders
    return tiles[..., 1:-1, 1:-1]


def standardized(tiles: Tensor) -> Tensor:
    return (tiles - tiles.mean((-2, -1), keepdim=True)) / tiles.std((-2, -1), keepdim=True)


def cells(tiles: Tensor, image: Tensor) -> list[int]:
    """The cell of a 48 x 48 image that each tile was cut from."""
    windows = standardized(image.unfold(1, 12, 1).unfold(2, 12, 1))  # (C, 37, 37, 12, 12)
    found = []
    for tile in standardized(tiles):
        apart = (windows - tile[:, None, None]).abs().amax((0, 3, 4))
        top, left = divmod(int(apart.argmin()), 37)
        assert apart.min() < 1e-3
        found.append(top // 16 * 3 + left // 16)
    return found


def test_titles_name_the_order_of_the_tiles_shown(learn):
    images = [torch.tensor(a).permute(2, 0, 1).float() / 255 for a in learn.dls.valid.dataset.items]
    titles = []
    for image, ax in zip(images, learn.dls.valid.show_batch(max_n=8)):
        order = torch.tensor(cells(shown(ax, 0), image))
        number = int((learn.task.permutations == order).all(1).nonzero())
        titles.append(ax.get_title())
        assert titles[-1] == f"shuffled | true (order {number})" and cells(shown(ax, 1), image) == list(range(9))
    assert len(titles) == 8 and len(set(titles)) > 2


def test_results_show_the_puzzle_as_the_network_would_solve_it(learn):
    images = [torch.tensor(a).permute(2, 0, 1).float() / 255 for a in learn.dls.valid.dataset.items]
    dl = learn.dls.valid
    b = dl.one_batch()
    for image, ax in zip(images, dl.show_results(b, learn.get_preds(dl=[b], with_decoded=True)[2])):
        title = r"shuffled \| as named \(order (\d)\) \| true \(order (\d)\)  ([✓✗])"
        named, true, mark = re.fullmatch(title, ax.get_title()).groups()
        posed, put_together, solved = (shown(ax, panel) for panel in range(3))
        assert cells(posed, image) == learn.task.permutations[int(true)].tolist()
        assert torch.equal(put_together[learn.task.permutations[int(named)]], posed)
        assert cells(solved, image) == list(range(9))
        with torch.no_grad():
            assert learn.model.eval()(standardized(posed)[None]).argmax() == int(named)
        assert mark == "✗✓"[true == named]
    inputs, targets = dl.question(b)
    for ax, image in zip(learn.task.show(inputs, targets, pred=targets[0]), images):
        assert ax.get_title()[-1] == "✓" and cells(shown(ax, 1), image) == list(range(9))
