"""Bins, soft targets, weights and loss against plain transcriptions; why regression goes grey; what is drawn."""

import json
import math
import random

import cv2
import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from torch import Tensor

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders import ab_bins
from selfsup_fastai.encoders.checkpoint import load_encoder
from selfsup_fastai.encoders.inputs import rgb_to_lab
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.generative.colorization import Rarity, annealed_mean, colored
from selfsup_fastai.pretext.learner import pretext_learner
from tests.pretext.two_colors import learner_of_two_colors

CENTERS = ab_bins.ab_centers().tolist()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(b: int, h: int = 32, w: int = 32) -> Tensor:
    return torch.rand(b, 3, h, w, generator=seeded(1))


def colors(n: int, seed: int = 0) -> Tensor:
    """(n, 2, 2, 3): colors within the reach of sRGB."""
    return (torch.rand(n, 2, 2, 3, generator=seeded(seed), dtype=torch.float64) - 0.5) * 140


def accuracy(task):
    return task.metrics[1]


def squared(ab, center) -> float:
    return (ab[0] - center[0]) ** 2 + (ab[1] - center[1]) ** 2


# --- the colors -------------------------------------------------------------------------------------------------------


def test_there_are_313_points_of_a_grid_of_ten_each_once():
    assert len(CENTERS) == ab_bins.N_BINS == 313 and len({tuple(c) for c in CENTERS}) == 313
    assert all(a % 10 == 0 and b % 10 == 0 and -90 <= a <= 100 and -110 <= b <= 100 for a, b in CENTERS)
    assert [0, 0] in CENTERS and [-90, 0] not in CENTERS and [100, 10] not in CENTERS


def test_every_color_of_srgb_has_a_center_nearby():
    side = torch.linspace(0, 1, 24)
    rgb = torch.stack(torch.meshgrid(side, side, side, indexing="ij")).reshape(1, 3, -1, 24)
    gap = ab_bins.squared_distances(rgb_to_lab(rgb)[:, 1:]).amin(1).sqrt()
    assert gap.max() < 10 and gap.median() < 5.5
    used = ab_bins.nearest_bins(rgb_to_lab(rgb)[:, 1:]).unique()
    assert len(used) > 230  # a table with its axes swapped would leave far more of them alone


@pytest.mark.parametrize("neighbors, sigma", [(5, 5.0), (10, 5.0), (1, 3.0), (313, 20.0)])
def test_soft_targets_are_gaussians_over_the_nearest_centers(neighbors, sigma):
    ab = colors(2)
    weights, bins = ab_bins.soft_bins(ab, neighbors, sigma)
    for i, r, c in np.ndindex(2, 2, 3):
        pixel = ab[i, :, r, c].tolist()
        order = sorted(range(313), key=lambda q: squared(pixel, CENTERS[q]))[:neighbors]
        raw = [math.exp(-squared(pixel, CENTERS[q]) / (2 * sigma**2)) for q in order]
        assert bins[i, :, r, c].tolist() == order
        assert weights[i, :, r, c].tolist() == pytest.approx([v / sum(raw) for v in raw])
    assert torch.equal(ab_bins.nearest_bins(ab), bins[:, 0])


def test_weights_make_rare_colors_count_more_and_one_on_average():
    counts = torch.randint(0, 5, (313,), generator=seeded()).double() ** 4
    shares = (counts / counts.sum()).tolist()
    kernel = [[math.exp(-squared(p, q) / 50) for q in CENTERS] for p in CENTERS]
    totals = [sum(kernel[p][q] for p in range(313)) for q in range(313)]
    smooth = [sum(kernel[p][q] / totals[q] * shares[q] for q in range(313)) for p in range(313)]
    there = [c > 0 for c in counts.tolist()]
    assert 0 < sum(there) < 313
    raw = [1 / (0.5 * p + 0.5 / sum(there)) for p in smooth]
    most = max(r for r, counted in zip(raw, there) if counted)
    raw = [r if counted else most for r, counted in zip(raw, there)]
    of = [q for q in range(313) if there[q]]
    scale = sum(smooth[q] * raw[q] for q in of) / sum(smooth[q] for q in of)
    got = Rarity(counts, 0.5)(torch.arange(313))
    assert got.tolist() == pytest.approx([r / scale for r in raw], rel=1e-4)
    assert Rarity(counts, 1.0).weights.tolist() == pytest.approx([1.0] * 313, rel=1e-4)
    assert got[int(np.argmin(smooth))] > 1 > got[int(np.argmax(smooth))]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shares", [[0.25] * 4, [0.9, 0.09, 0.009, 0.001]])
def test_a_color_that_was_not_counted_counts_as_much_as_the_rarest(uniform, shares):
    counts, at = torch.zeros(313), [60, 130, 200, 280]
    counts[at] = 10_000 * torch.tensor(shares)
    weights = Rarity(counts, uniform).weights
    others = [q for q in range(313) if q not in at]
    assert torch.equal(weights[others], weights[at].max().expand(len(others)))
    p = [s / sum(shares) for s in shares]
    assert sum(a * w for a, w in zip(p, weights[at].tolist())) == pytest.approx(1, rel=0.1)
    assert weights.max() < 1.2 / (4 * p[-1])
    if uniform == 1:
        torch.testing.assert_close(weights, torch.ones(313))
    task = get_task("colorization", uniform=uniform)
    task.rarity, pred = Rarity(counts, uniform), torch.zeros(1, 313, 8, 8)
    target = ab_bins.ab_centers()[torch.tensor(at).repeat(16)].T.reshape(1, 2, 8, 8).clone()
    before = task.loss(pred, target)
    target[0, :, 0, 0] = torch.tensor([-60.0, 60.0])
    assert task.loss(pred, target) < before + weights.max() * math.log(314) / 64


def test_the_first_metric_is_the_share_of_color_that_the_mean_explains():
    task = get_task("colorization")
    target = colors(6, 3).float()
    target[5] = target[5].clamp(-4, 4)  # without color: does not count
    truth = target[:5].movedim(1, -1).reshape(-1, 2).double().numpy()
    metric, pred = task.metrics[0], 3 * torch.randn(6, 313, 2, 3, generator=seeded(4))
    answers = (pred.softmax(1).movedim(1, -1).double() @ torch.tensor(CENTERS).double())[:5].reshape(-1, 2).numpy()
    total = ((truth - truth.mean(0)) ** 2).sum()
    assert metric(pred, target).item() == pytest.approx(1 - ((answers - truth) ** 2).sum() / total, rel=1e-4)
    regression = get_task("colorization", answer="regression")
    mean = torch.tensor(truth.mean(0)).float().view(1, 2, 1, 1).expand_as(target) / 110
    assert regression.metrics[0](mean, target).item() == pytest.approx(regression.chance(), abs=1e-5)
    assert regression.metrics[0](target / 110, target).item() == pytest.approx(1)
    assert metric.name == regression.metrics[0].name == "ab_explained" and task.chance() == 0


def test_the_weights_of_rare_colors_are_taken_out_of_the_explained_share():
    """Of pictures that look alike nine are grey-green, one is red: what has the least loss overrates red."""
    at = [CENTERS.index([-20, 20]), CENTERS.index([70, 50])]
    counts = torch.zeros(313)
    counts[at] = torch.tensor([900.0, 100.0])
    task = get_task("colorization", neighbors=1, uniform=0)
    task.rarity = Rarity(counts, 0)
    target = ab_bins.ab_centers()[torch.tensor([at[0]] * 9 + [at[1]])].view(10, 2, 1, 1)
    logits = best_answer(task, target, 313)
    assert logits.softmax(1)[0, at[1]].item() == pytest.approx(0.5, abs=0.02)
    mean, *_ = task.mean_colors(logits, target)
    assert mean.flatten().tolist() == pytest.approx(target.mean(0).flatten().tolist(), abs=2)
    assert task.metrics[0](logits.expand(10, -1, -1, -1), target).item() == pytest.approx(0, abs=0.01)


# --- the question -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h, w", [(32, 32), (47, 61), (16, 20)])
def test_lightness_goes_in_and_color_at_a_quarter_is_asked_for(h, w):
    x = noise(2, h, w)
    (lightness,), (ab,) = get_task("colorization").make_batch(x, generator=seeded(), train=False)
    assert lightness.shape == (2, 1, h, w) and ab.shape == (2, 2, h // 4, w // 4)
    for i in range(2):
        lab = cv2.cvtColor(np.ascontiguousarray(x[i].permute(1, 2, 0).numpy()), cv2.COLOR_RGB2LAB)
        np.testing.assert_allclose(lightness[i, 0] * 100, lab[..., 0], atol=0.35)
        if h == w:
            blocks = lab.reshape(h // 4, 4, w // 4, 4, 3).mean((1, 3))
            np.testing.assert_allclose(ab[i].permute(1, 2, 0), blocks[..., 1:], atol=0.35)


def test_shift_and_flip_come_in_training_only_and_move_color_with_lightness():
    x = noise(1).repeat(8, 1, 1, 1)
    task = get_task("colorization")
    (lightness,), (ab,) = task.make_batch(x, generator=seeded(), train=True)
    assert len({tuple(image.flatten().tolist()) for image in lightness}) > 4
    grey = (0.6 * x[:, :1]).expand_as(x).clone()
    grey[:, 0] += 0.4 * (x[:, 0] > 0.5)  # reddish exactly where it is light
    (lightness,), (ab,) = task.make_batch(grey, generator=seeded(), train=True)
    small = torch.nn.functional.adaptive_avg_pool2d(lightness, 8)
    for light, a in zip(small[:, 0], ab[:, 0]):
        assert np.corrcoef(light.flatten(), a.flatten())[0, 1] > 0.8
    (calm,), _ = get_task("colorization", shift=0, flip=0).make_batch(x, generator=seeded(), train=True)
    assert torch.equal(calm, task.make_batch(x, generator=seeded(), train=False)[0][0])


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_is_the_weighted_cross_entropy_with_the_soft_target():
    task = get_task("colorization")
    task.rarity = Rarity(torch.arange(313).double() ** 2, 0.5)
    target, pred = colors(3), torch.randn(3, 313, 2, 3, generator=seeded(2), dtype=torch.float64)
    target[2] = target[2] / 30  # grey: no |a| or |b| above 5
    rows = []
    for i in range(3):
        total = 0.0
        for r, c in np.ndindex(2, 3):
            pixel = target[i, :, r, c].tolist()
            order = sorted(range(313), key=lambda q: squared(pixel, CENTERS[q]))[:5]
            raw = [math.exp(-squared(pixel, CENTERS[q]) / 50) for q in order]
            logits = pred[i, :, r, c].tolist()
            log_sum = math.log(sum(map(math.exp, logits)))
            terms = [v / sum(raw) * (logits[q] - log_sum) for v, q in zip(raw, order)]
            total -= task.rarity.weights[order[0]].item() * sum(terms)
        rows.append(total / 6 * (i < 2))
    assert task.loss(pred, target, reduction="none").tolist() == pytest.approx(rows, rel=1e-5)
    assert task.loss(pred, target).item() == pytest.approx(sum(rows) / 3, rel=1e-5)


def test_regression_is_half_the_squared_distance():
    task = get_task("colorization", answer="regression")
    target, pred = colors(2), torch.randn(2, 2, 2, 3, generator=seeded(2), dtype=torch.float64)
    rows = [
        sum(squared(pred[i, :, r, c].tolist(), (target[i, :, r, c] / 110).tolist()) / 2 for r, c in np.ndindex(2, 3))
        / 6
        for i in range(2)
    ]
    assert task.loss(pred, target, reduction="none").tolist() == pytest.approx(rows)
    torch.testing.assert_close(task.activation(pred), 110 * pred)


def test_grey_images_weigh_nothing():
    task, pred = get_task("colorization"), torch.randn(2, 313, 2, 3, generator=seeded(), requires_grad=True)
    target = colors(2).float()
    target[1] = target[1].clamp(-5, 5)
    task.loss(pred, target).backward()
    assert (pred.grad[0] != 0).any() and (pred.grad[1] == 0).all()
    good = torch.nn.functional.one_hot(ab_bins.nearest_bins(target), 313).permute(0, 3, 1, 2).float()
    good[1] = -good[1]
    assert accuracy(task)(good, target) == 1  # the grey one is wrong throughout, and does not count
    assert accuracy(task)(-good, target) == 0
    assert accuracy(task)(good[1:], target[1:]) == 0  # nothing to count


def test_annealed_mean_lies_between_the_mean_and_the_likeliest_color():
    logits = torch.full((1, 313, 1, 1), -30.0)
    red, blue = CENTERS.index([70, 50]), CENTERS.index([30, -70])
    logits[:, red], logits[:, blue] = math.log(0.7), math.log(0.3)
    p = 0.7 ** (1 / 0.38) / (0.7 ** (1 / 0.38) + 0.3 ** (1 / 0.38))
    for temperature, share in [(1.0, 0.7), (0.38, p), (0.01, 1.0)]:
        expected = [share * r + (1 - share) * b for r, b in zip(CENTERS[red], CENTERS[blue])]
        assert annealed_mean(logits, temperature).flatten().tolist() == pytest.approx(expected, abs=1e-3)
    assert get_task("colorization").activation(logits).flatten().tolist() == pytest.approx(
        annealed_mean(logits, 0.38).flatten().tolist()
    )


# --- training ---------------------------------------------------------------------------------------------------------


def test_where_two_colors_are_possible_regression_names_neither_and_classes_both():
    green, red = [-40.0, 40.0], [40.0, 0.0]  # of three pictures that look alike two are green
    between = [2 / 3 * g + 1 / 3 * r for g, r in zip(green, red)]
    target = torch.tensor([green, green, red]).view(3, 2, 1, 1)
    task = get_task("colorization", answer="regression")
    ab = task.activation(best_answer(task, target, 2)).flatten()
    assert ab.tolist() == pytest.approx(between, abs=0.5) and ab.norm() < 40  # paler than green, 57
    task = get_task("colorization")
    logits = best_answer(task, target, 313)
    share = logits.softmax(1).flatten().tolist()
    near = [sum(share[q] for q in range(313) if squared(color, CENTERS[q]) < 150) for color in (green, red, between)]
    assert near == pytest.approx([2 / 3, 1 / 3, 0], abs=0.02)
    assert task.activation(logits).norm() > 1.2 * ab.norm()


def best_answer(task, target: Tensor, n_out: int) -> Tensor:
    """The one raw prediction for all images of `target` that has the least loss, (1, n_out, 1, 1)."""
    pred = torch.zeros(1, n_out, 1, 1, requires_grad=True)
    opt = torch.optim.Adam([pred], 0.1)
    for _ in range(200):
        opt.zero_grad()
        task.loss(pred.expand(len(target), -1, 1, 1), target).backward()
        opt.step()
    return pred.detach()


@pytest.fixture(scope="module")
def learn():
    rng = np.random.default_rng(0)
    array = np.kron(rng.integers(0, 256, (30, 4, 5, 3), dtype=np.uint8), np.ones((1, 8, 8, 1), dtype=np.uint8))
    array[::5] = array[::5].mean(-1, keepdims=True)  # some without color
    set_seed(0)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=8, valid_pct=0.1, num_workers=0)
    learn = pretext_learner(dls, "colorization", "test_resnet")
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 3e-3)
    return learn


def test_shares_are_those_of_the_training_images_and_are_saved_with_the_model(learn):
    x = torch.tensor(np.stack(list(learn.dls.train.dataset.items))).permute(0, 3, 1, 2).float() / 255
    ab = torch.nn.functional.avg_pool2d(rgb_to_lab(x)[:, 1:], 4)
    colored = ab[ab.abs().amax((1, 2, 3)) > 5]
    assert 0 < len(colored) < len(ab)
    bins = [
        min(range(313), key=lambda q: squared(pixel, CENTERS[q]))
        for pixel in colored.movedim(1, -1).reshape(-1, 2).tolist()
    ]
    shares = np.bincount(bins, minlength=313) / len(bins)
    torch.testing.assert_close(learn.model.state_dict()["rarity.weights"], Rarity(torch.tensor(shares), 0.5).weights)
    assert learn.model.rarity is learn.task.rarity
    assert learn.model.rarity.weights.std() > 0.1


def test_setup_leaves_the_draws_of_training_alone(learn):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before, shuffling, own = state(), learn.dls.train.rng.getstate(), learn.dls.rng.getstate()
    learn.task.setup(learn.dls, learn.encoder)
    assert state() == before and learn.dls.train.rng.getstate() == shuffling and learn.dls.rng.getstate() == own
    learn.model.rarity = learn.task.rarity


def test_color_that_is_told_by_lightness_is_learned():
    learn = learner_of_two_colors("colorization")
    learn.fit(6, 5e-3)
    ab_explained, accuracy = learn.validate()[1:]
    assert ab_explained > learn.task.chance() + 0.5 and accuracy > 0.4


def test_the_encoder_takes_lightness_ever_after(learn, tmp_path):
    encoder = load_encoder(learn.save_encoder(tmp_path / "encoder")).eval()
    x = noise(2)
    assert encoder.input == "L" and encoder.in_chans == 1
    torch.testing.assert_close(encoder.prepare(x), 2 * rgb_to_lab(x)[:, :1] / 100 - 1)
    json.dumps(learn.task.settings())


def test_images_of_another_size_are_colored_at_their_own(learn):
    answer = learn.predict(np.random.default_rng(1).integers(0, 256, (48, 44, 3), dtype=np.uint8))
    assert answer.pred.shape == (1, 2, 12, 11)


def test_pictures_show_question_answer_and_truth(learn):
    dl = learn.dls.valid
    b = dl.one_batch()
    ab = learn.get_preds(dl=[b], with_decoded=True)[2]
    (lightness,), (target,) = dl.question(b)
    for pred, axes in [(None, dl.show_batch(b)), (ab, dl.show_results(b, ab))]:
        for i, ax in enumerate(axes):
            shown = torch.from_numpy(np.array(ax.images[0].get_array())).permute(2, 0, 1)
            w = lightness.shape[-1]
            parts = [shown[..., at * (w + 2) : at * (w + 2) + w] for at in range(2 if pred is None else 3)]
            assert shown.shape[-1] == len(parts) * (w + 2) - 2
            torch.testing.assert_close(parts[0], lightness[i].expand(3, -1, -1))
            torch.testing.assert_close(parts[-1], colored(lightness[i : i + 1], target[i : i + 1])[0])
            if pred is not None:
                torch.testing.assert_close(parts[1], colored(lightness[i : i + 1], pred[i : i + 1])[0])
            assert [name in ax.get_title() for name in ("grey", "network", "true")] == [True, pred is not None, True]


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_grey_data_is_told_what_to_take():
    array = np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8)
    with pytest.raises(TaskError, match=r"images of 3 channels, these have 1\. Grey images have no color.*rotation"):
        pretext_learner(UnlabeledDataLoaders.from_array(array, size=None, bs=4, num_workers=0), "colorization")
    grey_in_color = np.repeat(array[..., None], 3, -1)
    dls = UnlabeledDataLoaders.from_array(grey_in_color, size=None, bs=4, n_in=3, num_workers=0)
    with pytest.raises(TaskError, match=r"found no color in the training images.*split_brain"):
        pretext_learner(dls, "colorization", "test_resnet")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"answer": "colors"}, "answer is 'classes' or 'regression'; got 'colors'"),
        ({"answer": "regression", "neighbors": 9}, "neighbors=9 has no effect with answer='regression'"),
        ({"answer": "regression", "sigma": 1}, "sigma=1 has no effect with answer='regression'"),
        ({"answer": "regression", "uniform": 0}, "uniform=0 has no effect with answer='regression'"),
        ({"answer": "regression", "temperature": 2}, "temperature=2 has no effect with answer='regression'"),
        ({"neighbors": 0}, "neighbors is a whole number, at least 1 and at most 313; got 0"),
        ({"sigma": 0}, "sigma is a number, above 0; got 0"),
        ({"uniform": 1.1}, "uniform is a number, at least 0 and at most 1; got 1.1"),
        ({"temperature": 0}, "temperature is a number, above 0"),
        ({"shift": 0.6}, "shift is a number, at least 0 and at most 0.5"),
        ({"flip": -1}, "flip is a number"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(TaskError, match=said):
        get_task("colorization", **settings)
