"""What is cut out and what counts; the error by its formula; painter and judge each with a gradient and a rate."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.optimizer import SGD
from torch import Tensor
from torch.nn import functional as F

from selfsup_fastai.callbacks.rates import RateOfPart
from selfsup_fastai.data.draws import Draw
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.multi import SeveralTasks
from tests.test_contract import learner

REGIONS = ("irregular", "blocks", "center")
SIZES = [(40, 40), (47, 61), (128, 128)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(b: int = 4, c: int = 3, h: int = 40, w: int = 40) -> Tensor:
    return torch.rand(b, c, h, w, generator=seeded(9))


def holes(region: str, b: int, h: int, w: int) -> Tensor:
    return get_task("inpainting", region=region).holes(b, h, w, Draw(seeded()))


# --- the question -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("channels, h, w", [(3, 40, 40), (1, 47, 61)])
def test_the_hole_is_filled_with_the_mean_color_and_the_rest_is_the_image(region, channels, h, w):
    x, task = noise(4, channels, h, w), get_task("inpainting", region=region)
    task.fill = (0.1, 0.2, 0.3)[:channels]
    (cut,), (target, hole) = task.make_batch(x, generator=seeded(), train=False)
    assert torch.equal(target, x) and hole.shape == (4, 1, h, w) and set(hole.unique().tolist()) == {0, 1}
    inside = hole.bool().expand_as(x)
    assert torch.equal(cut[~inside], x[~inside])
    for channel, value in enumerate(task.fill):
        assert (cut[:, channel][inside[:, channel]] == value).all()


def test_the_fill_is_the_mean_of_the_training_images_and_becomes_zero():
    learn = learner("inpainting")
    assert learn.task.fill == tuple(learn.encoder.mean)
    x, _, hole = learn.dls.valid.one_batch()
    assert x.as_subclass(Tensor)[hole.bool().expand_as(x)].abs().max() < 1e-5


def test_in_training_the_image_is_shifted_and_mirrored_and_the_target_with_it():
    x = noise(64)
    (cut,), (target, hole) = get_task("inpainting").make_batch(x, generator=seeded(), train=True)
    assert all(torch.equal(c[:, h[0] == 0], t[:, h[0] == 0]) for c, t, h in zip(cut, target, hole))
    assert sum(torch.equal(t, i) for t, i in zip(target, x)) < 8
    plain = get_task("inpainting", shift=0, flip=1).make_batch(x, generator=seeded(), train=True)
    assert torch.equal(plain[1][0], x.flip(-1))


# --- the holes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h, w", SIZES)
def test_irregular_holes_have_a_fifth_to_three_tenths_of_the_area(h, w):
    found = holes("irregular", 100, h, w)
    area = found.float().mean((1, 2, 3))
    assert area.min() >= 0.2 - 1 / (h * w) and area.max() <= 0.3 + 1 / (h * w)
    assert area.min() < 0.21 and area.max() > 0.29
    assert found.float().mean(0).min() > 0.03 and found.float().mean(0).max() < 0.6  # everywhere
    edges = (found[..., 1:] != found[..., :-1]).float().mean()  # blobs, not single pixels
    assert edges < 0.1 * 40 / min(40, w) and edges > 0.01


@pytest.mark.parametrize("h, w", SIZES)
def test_blocks_are_squares_under_a_quarter_of_the_area(h, w):
    found = holes("blocks", 200, h, w)[:, 0]
    area = found.float().mean((1, 2))
    side = min(h, w)
    assert area.max() <= 6 / 25 and area.min() * h * w >= int(side / 8) ** 2
    assert area.mean() > 0.05 and not torch.equal(found[0], found[1])
    assert found.any(2).sum(1).min() >= int(side / 8)  # rows touched: of six squares at least one side


def test_the_center_is_the_authors_at_128_pixels():
    found = holes("center", 2, 128, 128)
    rows, columns = found[0, 0].nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (36, 91, 36, 91)  # 56 x 56 of the center's 64
    assert found[0].sum() == 56 * 56
    weights = get_task("inpainting", region="center").weights(found.float())[0, 0]
    expected = torch.zeros(128, 128)
    expected[32:96, 32:96] = 10
    expected[36:92, 36:92] = 1
    assert torch.equal(weights, expected)


# --- the loss ---------------------------------------------------------------------------------------------------------


def logit(x: Tensor) -> Tensor:
    return torch.logit(x.double(), 1e-9)


@pytest.mark.parametrize("region", REGIONS)
def test_the_error_is_its_formula_on_the_scale_of_minus_one_to_one(region):
    task, x = get_task("inpainting", region=region), noise(3, 3, 32, 48)
    hole, z = task.holes(3, 32, 48, Draw(seeded(1))).float(), torch.randn(3, 3, 32, 48, generator=seeded(2))
    painted = np.tanh(z.double().numpy() / 2)
    true, expected = 2 * x.double().numpy() - 1, []
    for i in range(3):
        d = (painted[i] - true[i]) ** 2
        inside = hole[i, 0].bool().numpy()
        if region == "irregular":
            expected.append(d.mean())
        elif region == "blocks":
            expected.append(d[:, inside].mean())
        else:
            assert inside.sum() == (16 - 2) * (24 - 2)
            d[:, ~inside] *= 10
            expected.append(d[:, 8:24, 12:36].mean())
    np.testing.assert_allclose(task.loss(z, x, hole, reduction="none"), expected, rtol=1e-5)
    assert task.loss(z, x, hole).item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert task.loss(logit(x), x, hole).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("region", ["blocks", "center"])
def test_what_is_said_outside_of_the_region_does_not_count(region):
    task, x = get_task("inpainting", region=region), noise()
    hole = task.holes(4, 40, 40, Draw(seeded())).float()
    z = torch.randn(x.shape, generator=seeded(3))
    other = torch.where(task.weights(hole) > 0, z, z + 1)
    assert not torch.equal(z, other) and torch.equal(task.loss(z, x, hole), task.loss(other, x, hole))


def test_metric_looks_into_the_hole_alone():
    task, x = get_task("inpainting"), noise()
    hole = task.holes(4, 40, 40, Draw(seeded())).float()
    (metric,) = task.metrics
    mean = (x * hole).sum((0, 2, 3), keepdim=True) / hole.sum()
    plain = torch.where(hole > 0, mean, noise(b=4).flip(0))
    assert metric(logit(plain), x, hole).item() == pytest.approx(task.chance(), abs=1e-5)
    assert metric((logit(torch.where(hole > 0, x, 0.0)),), x, hole).item() == pytest.approx(1, abs=1e-5)


# --- painter and judge ------------------------------------------------------------------------------------------------


def rivals(region: str = "center"):
    torch.manual_seed(0)
    task = get_task("inpainting", region=region, adversarial=True)
    model = task.model(create_encoder("resnet10t", size=32))
    inputs, targets = task.make_batch(noise(4, 3, 32, 32), generator=seeded(), train=True)
    return task, model, inputs, targets


@pytest.mark.parametrize("region, seen", [("center", 16), ("irregular", 32)])
def test_the_judge_sees_the_part_that_was_painted(region, seen):
    _, model, (_, whole), _ = rivals(region)
    part = model.judged_part(whole)
    low = (32 - seen) // 2
    torch.testing.assert_close(part, 2 * whole[..., low : low + seen, low : low + seen] - 1)


def test_each_of_the_two_gets_its_own_gradient():
    task, model, inputs, (x, hole) = rivals()
    other = deepcopy(model)
    pred = model(*inputs)
    task.loss(pred, x, hole).backward()

    raw = other.painter(inputs[0])
    true, painted = ((2 * t - 1)[..., 8:24, 8:24] for t in (inputs[1], raw.sigmoid()))
    of_true, of_painted = other.judge(true), other.judge(painted.detach())
    ones = torch.ones_like(of_true)
    bce = F.binary_cross_entropy_with_logits
    judge_loss = bce(of_true, ones) + bce(of_painted, 0 * ones)
    weights = 10 - 9 * hole[..., 8:24, 8:24]
    maker_loss = 0.999 * (weights * (painted - true) ** 2).mean() + 0.001 * bce(other.judge(painted), ones)
    assert task.loss(pred, x, hole).item() == pytest.approx((judge_loss + maker_loss).item(), rel=1e-4)
    for part, loss in [("judge", judge_loss), ("painter", maker_loss)]:
        wanted = torch.autograd.grad(loss, list(getattr(other, part).parameters()), retain_graph=True)
        for p, grad in zip(getattr(model, part).parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("region", REGIONS)
def test_with_a_judge_the_painters_own_error_is_a_metric(region):
    task, model, inputs, (x, hole) = rivals(region)
    with torch.no_grad():
        pred = model(*inputs)
    first, own = task.metrics
    alone = get_task("inpainting", region=region)
    assert own.name == "squared_error" and own(pred, x, hole).item() == pytest.approx(
        alone.loss(pred[0], x, hole).item()
    )
    assert task.loss(pred, x, hole) > own(pred, x, hole) + 1  # the judge's, of two logits near 0
    assert first.name == alone.metrics[0].name and len(alone.metrics) == 1


@pytest.mark.parametrize("region", ["irregular", "center"])
def test_with_a_judge_every_verb_works_and_the_answer_is_an_image(region, tmp_path):
    learn = learner("inpainting", region=region, adversarial=True, path=tmp_path)
    learn.lr_find(num_it=3, show_plot=False)
    before = deepcopy(learn.model.state_dict())
    learn.fit_one_cycle(1, 1e-3)
    moved = {k.split(".")[0] for k, v in learn.model.named_parameters() if not torch.equal(v, before[k])}
    assert moved == {"painter", "judge"}
    preds = learn.get_preds()[0]
    assert preds.shape == (8, 3, 40, 40) and preds.min() >= 0 and preds.max() <= 1
    assert learn.predict(np.zeros((40, 40, 3), np.uint8)).decoded.shape == (1, 3, 40, 40)
    learn.show_results(max_n=2)
    learn.save("here")
    learn.load("here")
    learn.export("learner.pkl")


def test_the_judge_learns_at_a_tenth_of_the_rate_under_any_schedule():
    learn = learner("inpainting", adversarial=True, opt_func=SGD)
    rates = []
    learn.create_opt()
    true_step = learn.opt.step

    def watched(*args, **kwargs):
        rates.append([hypers["lr"] for hypers in learn.opt.hypers])
        return true_step(*args, **kwargs)

    learn.opt.step = watched
    learn.fit_one_cycle(1, 1e-2, wd=0)
    assert len(rates) == 6 == len(learn.recorder.lrs) and len({own for own, _ in rates}) == 6
    np.testing.assert_allclose([rest for _, rest in rates], learn.recorder.lrs)
    np.testing.assert_allclose([own for own, _ in rates], 0.1 * np.array(learn.recorder.lrs))
    groups = RateOfPart("judge", 0.1).split(learn.model)
    assert {id(p) for p in groups[0]} == {id(p) for p in learn.model.judge.parameters()}
    assert sum(len(g) for g in groups) == len(list(learn.model.parameters()))


def test_with_a_judge_it_stands_alone():
    tasks = [get_task("rotation"), get_task("inpainting", adversarial=True)]
    with pytest.raises(TaskError, match=r"its judge has a learning rate of its own\. Set adversarial=False"):
        SeveralTasks(tasks)
    SeveralTasks([get_task("rotation"), get_task("inpainting")])


def test_settings_out_of_range():
    with pytest.raises(TaskError, match="region is 'irregular', 'blocks' or 'center'; got 'middle'"):
        get_task("inpainting", region="middle")
    with pytest.raises(TaskError, match="adversarial is True or False, got 1"):
        get_task("inpainting", adversarial=1)
    with pytest.raises(TaskError, match=r"shift is a number, at least 0 and at most 0\.5; got 1"):
        get_task("inpainting", shift=1)


def test_pictures_show_the_hole_as_a_checkerboard_and_how_far_off_the_answer_is_inside():
    x, task = noise(2), get_task("inpainting")
    inputs, targets = task.make_batch(x, generator=seeded(), train=False)
    hole = targets[1].bool().expand_as(x)
    axes = task.show(inputs, targets, pred=torch.where(hole, (x + 0.25) % 1, 0.0))
    for ax, image, inside in zip(axes, x, hole):
        shown = torch.tensor(np.array(ax.images[0].get_array())).permute(2, 0, 1)
        seen, filled, true = (shown[..., start : start + 40] for start in (0, 42, 84))
        assert torch.equal(true, image) and torch.equal(seen[~inside], image[~inside])
        assert sorted(set(seen[inside].tolist())) == pytest.approx([0.5, 0.7])
        assert torch.equal(filled, torch.where(inside, (image + 0.25) % 1, image))
        off = ((image + 0.25) % 1 - image)[inside].abs().mean()
        assert ax.get_title() == f"hole | filled | true, {off:.0%} off"
    assert [ax.get_title() for ax in task.show(inputs, targets)] == ["hole | true"] * 2
