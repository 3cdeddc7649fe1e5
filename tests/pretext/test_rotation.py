"""Turning back recovers the image; the loss against a plain transcription; titles against the pixels shown."""

import math
import re

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from torch import Tensor

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.views import apply_shifts
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner

DEGREES = ["0°", "90°", "180°", "270°"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(b: int, c: int = 3, h: int = 40, w: int = 40) -> Tensor:
    """No two windows of it are alike."""
    return torch.rand(b, c, h, w, generator=seeded(1))


def back(turned: Tensor, turns: int) -> Tensor:
    """`turns` quarter turns clockwise, by transposing and mirroring."""
    for _ in range(turns):
        turned = turned.transpose(-1, -2).flip(-1)
    return turned


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("h, w", [(40, 40), (47, 61), (61, 47), (9, 8)])
def test_turning_back_recovers_the_center_square(channels, h, w):
    x, s = noise(3, channels, h, w), min(h, w)
    top, left = (h - s) // 2, (w - s) // 2
    (turned,), (target,) = get_task("rotation").make_batch(x, generator=seeded(), train=False)
    assert turned.shape == (3, 4, channels, s, s)
    assert target.tolist() == [[0, 1, 2, 3]] * 3
    for k in range(4):
        assert torch.equal(back(turned[:, k], k), x[..., top : top + s, left : left + s])


def test_turns_are_counterclockwise():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(1, 1, 2, 2)
    (turned,), _ = get_task("rotation").make_batch(x, generator=seeded(), train=False)
    quarter, half, three = turned[0, 1:, 0].tolist()
    assert quarter == [[2, 4], [1, 3]] and half == [[4, 3], [2, 1]] and three == [[3, 1], [4, 2]]


def test_one_turn_is_drawn_evenly_and_named_rightly():
    x = noise(400, 1, 8, 8)
    (turned,), (target,) = get_task("rotation", turns="one").make_batch(x, generator=seeded(), train=False)
    assert turned.shape == (400, 1, 1, 8, 8) and target.shape == (400, 1)
    assert all(torch.equal(back(t[0], int(k)), image) for t, k, image in zip(turned, target, x))
    counts = torch.bincount(target[:, 0], minlength=4)
    assert ((counts - 100).abs() < 35).all()  # four standard deviations
    again = get_task("rotation", turns="one").make_batch(x, generator=seeded(), train=False)[1][0]
    other = get_task("rotation", turns="one").make_batch(x, generator=seeded(1), train=False)[1][0]
    assert torch.equal(again, target) and not torch.equal(other, target)


@pytest.mark.parametrize("turns", ["all", "one"])
def test_augmentation_comes_in_training_only_and_before_the_turn(turns):
    x, task = noise(16), get_task("rotation", turns=turns)
    (turned,), (target,) = task.make_batch(x, generator=seeded(), train=True)
    found = []
    for image, views, ks in zip(x, turned, target):
        upright = [back(view, int(k)) for view, k in zip(views, ks)]
        assert all(torch.equal(upright[0], other) for other in upright)  # the same one, turned
        found.append(shift_and_flip(image, upright[0], reach=5))
    downs, rights, flips = zip(*found)
    assert len(set(downs)) > 4 and len(set(rights)) > 4 and 2 < sum(flips) < 14


@pytest.mark.parametrize("turns", ["all", "one"])
def test_without_shift_and_flip_training_asks_of_the_images_as_they_are(turns):
    x, task = noise(6), get_task("rotation", turns=turns, crop=0, flip=0)
    (turned,), (target,) = task.make_batch(x, generator=seeded(), train=True)
    for image, views, ks in zip(x, turned, target):
        assert all(torch.equal(back(view, int(k)), image) for view, k in zip(views, ks))


def shift_and_flip(image: Tensor, got: Tensor, reach: int) -> tuple[int, int, bool]:
    """Which of all shifts up to `reach` and mirrorings made `got` of `image`; fails if none did."""
    all_shifts = torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * 2)
    for flip in (False, True):
        made = apply_shifts(image.expand(len(all_shifts), -1, -1, -1), all_shifts, torch.full((len(all_shifts),), flip))
        hits = (made == got).flatten(1).all(1).nonzero()
        if len(hits):
            return (*all_shifts[hits[0, 0]].tolist(), flip)
    raise AssertionError("no shift and mirroring of the image gives this")


@pytest.mark.parametrize("views", [4, 1])
def test_loss_is_the_mean_negative_log_probability_of_the_turns(views):
    pred = torch.randn(5, views, 4, generator=seeded(), dtype=torch.float64)
    target = torch.randint(4, (5, views), generator=seeded())
    rows = []
    for image, turns in zip(pred.tolist(), target.tolist()):
        logs = [math.log(math.exp(row[k]) / sum(map(math.exp, row))) for row, k in zip(image, turns)]
        rows.append(-sum(logs) / views)
    task = get_task("rotation")
    assert task.loss(pred, target).item() == pytest.approx(sum(rows) / 5)
    assert task.loss(pred, target, reduction="none").tolist() == pytest.approx(rows)


def test_a_perfect_answer_is_decoded_and_counted_as_such():
    task, target = get_task("rotation"), torch.arange(4).expand(3, 4)
    pred = 10 * torch.eye(4).expand(3, 4, 4)
    assert torch.equal(task.decode(task.activation(pred)), target)
    assert task.metrics[0](pred, target) == 1 and task.metrics[0](pred.flip(-1), target) == 0
    assert task.loss(pred, target) < 2e-4
    assert task.activation(torch.zeros(1, 4, 4)).eq(task.chance()).all()


@pytest.fixture(scope="module")
def learn():
    array = np.random.default_rng(0).integers(0, 256, (24, 32, 36, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=8, valid_pct=0.4, num_workers=0)
    set_seed(0)
    learn = pretext_learner(dls, "rotation", "resnet10t")
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, 1e-2)
    return learn


def shown(ax) -> Tensor:
    return torch.from_numpy(np.array(ax.images[0].get_array())).permute(2, 0, 1).float()


def test_titles_name_the_turn_of_the_pixels_shown(learn):
    images = [torch.tensor(a).permute(2, 0, 1).float()[..., 2:34] / 255 for a in learn.dls.valid.dataset.items]
    axes = learn.dls.valid.show_batch(max_n=8)
    for i, ax in enumerate(axes):
        (turn,) = (k for k in range(4) if torch.allclose(back(shown(ax), k), images[i], atol=1e-5))
        assert ax.get_title() == DEGREES[turn]
    assert {ax.get_title() for ax in axes} == set(DEGREES)


def test_results_name_what_the_network_says_of_the_pixels_shown(learn):
    dl = learn.dls.valid
    b = dl.one_batch()
    axes = dl.show_results(b, learn.get_preds(dl=[b], with_decoded=True)[2])
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in (learn.encoder.mean, learn.encoder.std))
    for i, ax in enumerate(axes):
        with torch.no_grad():
            named = learn.model.eval()(((shown(ax) - mean) / std)[None, None]).argmax().item()
        true, guess, mark = re.fullmatch(r"(\d+°), named (\d+°)  ([✓✗])", ax.get_title()).groups()
        assert (true, guess) == (DEGREES[i % 4], DEGREES[named]) and mark == "✗✓"[true == guess]
    assert len(axes) == 8
    (inputs, targets), wrong = dl.question(b), (b[1] + 1) % 4
    for pred, mark in [(targets[0], "✓"), (wrong, "✗")]:
        assert {ax.get_title()[-1] for ax in learn.task.show(inputs, targets, pred=pred)} == {mark}


def test_settings_out_of_range():
    with pytest.raises(TaskError, match="turns is 'all' or 'one'; got 'four'"):
        get_task("rotation", turns="four")
    assert get_task("rotation").passes == 4 and get_task("rotation", turns="one").passes == 1
