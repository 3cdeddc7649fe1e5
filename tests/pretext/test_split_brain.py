"""Targets and losses against plain transcriptions; no half sees its answer; hidden triangles are hidden."""

import cv2
import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from matplotlib import pyplot as plt
from torch import Tensor, nn

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.ab_bins import ab_centers
from selfsup_fastai.encoders.inputs import to_input
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.generative.split_brain import hidden_cells
from selfsup_fastai.pretext.learner import pretext_learner
from tests.pretext.two_colors import learner_of_two_colors, net

DIRECTIONS = {"both": ("lab", slice(0, 3)), "L_to_ab": ("L", slice(1, 3)), "ab_to_L": ("ab", slice(0, 1))}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(b: int, c: int = 3, h: int = 36, w: int = 36) -> Tensor:
    return torch.rand(b, c, h, w, generator=seeded(1))


def blocks(n: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, channels), dtype=np.uint8)
    return np.kron(coarse, np.ones((1, 8, 8, 1), dtype=np.uint8))


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())


def learner(array: np.ndarray, arch=tiny, **settings):
    set_seed(0)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=8, valid_pct=0.25, num_workers=0)
    return pretext_learner(dls, "split_brain", **({} if arch is None else {"arch": arch}), **settings)


# --- lightness and color ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_goes_in_and_what_is_asked(direction):
    x, (eaten, channels) = noise(2), DIRECTIONS[direction]
    task = get_task("split_brain", direction=direction)
    (seen,), (cells,) = task.make_batch(x, generator=seeded(), train=False)
    assert torch.equal(seen, to_input(x, eaten)) and task.input == eaten and task.split == (direction == "both")
    for image, got in zip(x, cells):
        lab = cv2.cvtColor(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), cv2.COLOR_RGB2LAB)
        means = lab.reshape(12, 3, 12, 3, 3).mean((1, 3))[..., channels]
        np.testing.assert_allclose(got.permute(1, 2, 0), means, atol=0.35)


@pytest.mark.parametrize("h, w, expected", [(36, 36, (12, 12)), (47, 61, (12, 12)), (16, 40, (8, 12))])
def test_cells_are_at_least_two_pixels_wide(h, w, expected):
    _, (cells,) = get_task("split_brain").make_batch(noise(1, 3, h, w), generator=seeded(), train=True)
    assert cells.shape[2:] == expected


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_is_the_sum_of_the_cross_entropies(direction):
    bins = {} if direction == "L_to_ab" else {"l_bins": 10}
    task, centers = get_task("split_brain", direction=direction, **bins), ab_centers().tolist()
    n = {"both": 323, "L_to_ab": 313, "ab_to_L": 10}[direction]
    lab = torch.rand(2, 3, 2, 2, generator=seeded(), dtype=torch.float64) * 100
    lab[0, 0, 0, 0], lab[0, 0, 0, 1] = 100.0, 0.0  # the ends of the scale
    pred = torch.randn(2, n, 2, 2, generator=seeded(1), dtype=torch.float64)
    rows, right = [], {"color": 0, "lightness": 0}
    for image, logits in zip(lab, pred):
        total = 0.0
        for r, c in np.ndindex(2, 2):
            lightness, a, b = image[:, r, c].tolist()
            color = min(range(313), key=lambda q: (centers[q][0] - a) ** 2 + (centers[q][1] - b) ** 2)
            parts = {"color": logits[:313, r, c], "lightness": logits[n - 10 :, r, c]}
            for kind, named in [("color", color), ("lightness", min(9, int(lightness // 10)))]:
                if kind in task.asked:
                    p = np.exp(parts[kind].numpy())
                    total -= np.log(p[named] / p.sum())
                    right[kind] += int(p.argmax() == named)
        rows.append(total / 4)
    target = lab[:, DIRECTIONS[direction][1]]
    assert task.loss(pred, target, reduction="none").tolist() == pytest.approx(rows)
    assert task.loss(pred, target).item() == pytest.approx(sum(rows) / 2)
    for metric in task.metrics[len(task.asked) :]:
        assert metric(pred, target).item() == pytest.approx(right[metric.name.removesuffix("_accuracy")] / 8)


@pytest.mark.parametrize("direction, names", [("both", "abL"), ("L_to_ab", "ab"), ("ab_to_L", "L")])
def test_the_first_metrics_are_the_shares_of_color_and_lightness_that_are_explained(direction, names):
    task = get_task("split_brain", direction=direction)
    lab = torch.rand(4, 3, 3, 5, generator=seeded()) * 100
    target = lab[:, DIRECTIONS[direction][1]]
    pred = 3 * torch.randn(4, sum(task.n_bins(kind) for kind in task.asked), 3, 5, generator=seeded(1))
    answer, metrics = task.activation(pred).double().numpy(), task.metrics
    assert [m.name.split("_")[0] for m in metrics[: len(task.asked)]] == [n for n in ("ab", "L") if n in names]
    for metric in metrics[: len(task.asked)]:
        at = slice(-2, None) if metric.name == "ab_explained" else slice(0, 1)
        truth = target.double().numpy()[:, at]
        total = ((truth - truth.mean((0, 2, 3), keepdims=True)) ** 2).sum()
        assert metric(pred, target).item() == pytest.approx(1 - ((answer[:, at] - truth) ** 2).sum() / total, rel=1e-4)
    assert task.chance() == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_color_that_is_told_by_lightness_and_the_reverse_are_learned(direction):
    learn = learner_of_two_colors("split_brain", direction=direction)
    learn.fit(6, 5e-3)
    values = learn.validate()[1:]
    assert len(values) == 2 * len(learn.task.asked)
    assert all(share > learn.task.chance() + 0.5 for share in values[: len(learn.task.asked)])


def test_each_half_predicts_what_it_does_not_see():
    learn = learner(blocks(16))
    assert learn.encoder.split and learn.encoder.input == "lab"
    x = learn.dls.one_batch()[0].as_subclass(Tensor)
    changed_color, changed_lightness = x.clone(), x.clone()
    changed_color[:, 1:], changed_lightness[:, :1] = -x[:, 1:], -x[:, :1]
    model = learn.model.eval()
    with torch.no_grad():
        whole, of_lightness, of_color = (model(i).split([313, 100], 1) for i in (x, changed_color, changed_lightness))
    assert torch.equal(whole[0], of_lightness[0]) and not torch.allclose(whole[1], of_lightness[1])
    assert torch.equal(whole[1], of_color[1]) and not torch.allclose(whole[0], of_color[0])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_sure_answer_is_given_in_units_of_lab(direction):
    task = get_task("split_brain", direction=direction)
    color, shade = torch.full((1, 313, 1, 1), -50.0), torch.full((1, 100, 1, 1), -50.0)
    color[:, 7], shade[:, 30] = 50, 50
    pred = torch.cat([{"color": color, "lightness": shade}[kind] for kind in task.asked], 1)
    expected = [30.5, *ab_centers()[7].tolist()][DIRECTIONS[direction][1]]
    assert task.activation(pred).flatten().tolist() == pytest.approx(expected, abs=1e-3)
    assert task.loss(pred, task.activation(pred)) < 1e-4


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_way_trains_an_ordinary_encoder(direction):
    learn = learner(blocks(16), direction=direction)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert learn.encoder.in_chans == {"both": 3, "L_to_ab": 1, "ab_to_L": 2}[direction]
    assert learn.encoder.split == (direction == "both")
    assert len(learn.get_preds()[0]) == 4 and learn.show_results(max_n=2) is None
    assert len(plt.gcf().axes) == 2
    answer = learn.predict(blocks(1)[0])
    (ax,) = answer.show()
    panels = {"both": "L | colored | ab | lit | true", "L_to_ab": "L | colored | true", "ab_to_L": "ab | lit | true"}
    assert ax.get_title() == panels[direction]


def test_a_network_in_one_piece_cannot_be_split_later():
    first = learner(blocks(8), direction="L_to_ab")
    with pytest.raises(TaskError, match="split_brain needs an encoder of two halves, this one"):
        learner(blocks(8), None, encoder=first)
    split = learner(blocks(8))
    assert learner(blocks(8), None, encoder=split).encoder.split


# --- the diagonal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("h, w, side, cells", [(36, 36, 36, 12), (47, 61, 36, 12), (17, 20, 16, 8)])
def test_one_triangle_is_hidden_and_filled_with_what_the_other_tells(channels, h, w, side, cells):
    x = noise(2, channels, h, w)
    task = get_task("split_brain", halves="diagonal")
    (seen,), (target,) = task.make_batch(x, generator=seeded(), train=False)
    assert seen.shape == (2, 2, channels, side, side) and target.shape == (2, channels, cells, cells)
    top, left = (h - side) // 2, (w - side) // 2
    square = x[..., top : top + side, left : left + side]
    rows, columns = np.indices((side, side))
    for at, hidden in enumerate((columns > rows, columns < rows)):
        mask = torch.from_numpy(hidden)
        assert torch.equal(seen[:, at][..., ~mask], square[..., ~mask])
        fill = square[..., ~mask].mean(-1, keepdim=True).expand_as(seen[:, at][..., mask])
        torch.testing.assert_close(seen[:, at][..., mask], fill)
    step = side // cells
    means = square.reshape(2, channels, cells, step, cells, step).mean((3, 5))
    torch.testing.assert_close(target, means)


def test_no_pixel_of_a_cell_that_counts_is_seen():
    x = noise(1, 1)
    task = get_task("split_brain", halves="diagonal")
    (before,), (target,) = task.make_batch(x, generator=seeded(), train=False)
    hidden = hidden_cells(torch.zeros(1, 2, 1, 12, 12))[0, :, 0]
    assert hidden.sum().item() == 2 * 66 and (hidden[0] == hidden[1].T).all() and hidden.sum(0).diagonal().sum() == 0
    for at in range(2):
        r, c = hidden[at].nonzero()[20].tolist()
        changed = x.clone()
        changed[..., 3 * r : 3 * r + 3, 3 * c : 3 * c + 3] = 0
        (after,), (other,) = task.make_batch(changed, generator=seeded(), train=False)
        assert torch.equal(before[:, at], after[:, at]) and other[0, 0, r, c] == 0 != target[0, 0, r, c]


def test_loss_of_the_diagonal_is_the_mean_square_over_hidden_cells():
    task = get_task("split_brain", halves="diagonal")
    pred, target = torch.rand(3, 2, 2, 5, 5, generator=seeded()), torch.rand(3, 2, 5, 5, generator=seeded(1))
    errors, whole = [], []
    for i in range(3):
        at = [(q, ch, r, c) for q, ch, r, c in np.ndindex(2, 2, 5, 5) if (c > r if q == 0 else c < r)]
        errors.append([(pred[i, q, ch, r, c] - target[i, ch, r, c]).item() ** 2 for q, ch, r, c in at])
        for q, ch, r, c in at:
            seen = [target[i, ch, a, b].item() for a, b in np.ndindex(5, 5) if not (b > a if q == 0 else b < a)]
            whole.append((target[i, ch, r, c].item() - np.mean(seen)) ** 2)
    rows = [np.mean(e) for e in errors]
    assert task.loss(pred, target, reduction="none").tolist() == pytest.approx(rows, rel=1e-5)
    assert task.loss(pred, target).item() == pytest.approx(np.mean(rows), rel=1e-5)
    (metric,) = task.metrics
    assert metric(pred, target).item() == pytest.approx(1 - np.sum(errors) / np.sum(whole), rel=1e-4)
    assert metric(target.unsqueeze(1).expand_as(pred), target) == 1 and task.chance() == 0


@pytest.mark.parametrize("h, w, shift", [(36, 36, 0.125), (36, 36, 0.5), (47, 61, 0.125)])
def test_in_training_no_hidden_pixel_of_the_diagonal_has_a_mirror_copy_that_is_seen(h, w, shift):
    task = get_task("split_brain", halves="diagonal", shift=shift)
    (seen,), (target,) = task.make_batch(noise(1, 1, h, w).repeat(20, 1, 1, 1), generator=seeded(2), train=True)
    assert seen.shape == (20, 2, 1, 36, 36) and len(target.unique(dim=0)) == 20
    above = torch.ones(36, 36, dtype=torch.bool).triu(1)
    for upper_hidden, lower_hidden in seen[:, :, 0]:
        whole = torch.where(above, lower_hidden, upper_hidden)
        assert len(whole.flatten().unique()) > 36 * 36 - 5  # a row of copies would be 36; one or two come by chance
        torch.testing.assert_close(upper_hidden[above], upper_hidden[~above].mean().expand(630))


def test_without_shift_and_mirror_images_the_square_is_the_same_in_training_where_nothing_is_cut_off():
    task, x = get_task("split_brain", halves="diagonal", shift=0, flip=0), noise(2)
    for got, expected in zip(*(task.make_batch(x, generator=seeded(), train=train) for train in (True, False))):
        torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_diagonal_learns_on_grey_and_color_images(channels):
    array = np.repeat(blocks(4, channels), 8, 0)  # the same four pictures again and again
    array = array if channels == 3 else array[..., 0]
    learn = learner(array, net, halves="diagonal", shift=0, flip=0)  # a net that sees from one triangle to the other
    assert learn.encoder.in_chans == channels and not learn.encoder.split
    before = learn.validate()[0]
    with learn.no_bar(), learn.no_logging():
        learn.fit(15, 3e-3)
    assert learn.validate()[0] < 0.5 * before and learn.validate()[1] > 0.3
    (asked,), _ = learn.dls.valid.question(b := learn.dls.valid.one_batch())
    hidden = torch.ones(asked.shape[-2:], dtype=torch.bool).triu(1)
    for i, ax in enumerate(learn.dls.valid.show_batch(b, max_n=2)):  # the one question, then the other
        seen = torch.tensor(np.atleast_3d(ax.images[0].get_array())).permute(2, 0, 1)[..., : asked.shape[-1]]
        inside = (hidden.T if i else hidden).expand_as(seen)
        assert torch.equal(seen[~inside], asked[i, i][~inside])
        assert sorted(set(seen[inside].tolist())) == pytest.approx([0.5, 0.7])
    answer = learn.predict(array[0])
    assert answer.pred.shape == (1, 2, channels, 12, 12)
    (ax,) = answer.show()
    assert ax.get_title() == "seen | painted | true"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_grey_data_is_told_of_the_diagonal():
    with pytest.raises(TaskError, match=r"images of 3 channels, these have 1\..*halves='diagonal'"):
        learner(blocks(8, 1)[..., 0])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"direction": "up"}, "direction is 'both', 'L_to_ab' or 'ab_to_L'; got 'up'"),
        ({"halves": "rows"}, "halves is 'channels' or 'diagonal'; got 'rows'"),
        ({"halves": "diagonal", "direction": "L_to_ab"}, "direction='L_to_ab' has no effect with halves='diagonal'"),
        ({"halves": "diagonal", "l_bins": 7}, "l_bins=7 has no effect with halves='diagonal'. Leave it out"),
        ({"direction": "L_to_ab", "l_bins": 7}, "l_bins=7 has no effect with direction='L_to_ab'"),
        ({"grid": 1}, "grid is a whole number, at least 2"),
        ({"l_bins": 1}, "l_bins is a whole number, at least 2"),
        ({"shift": 0.6}, "shift is a number"),
        ({"flip": 2}, "flip is a number"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(TaskError, match=said):
        get_task("split_brain", **settings)


def test_a_saved_network_does_not_carry_its_task():
    for settings in ({}, {"halves": "diagonal"}):
        model = learner(blocks(8), **settings).model
        assert model.grid == 12 and not any(callable(v) for k, v in vars(model).items() if not k.startswith("_"))
