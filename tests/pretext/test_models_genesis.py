"""Each distortion by itself: what it may change, how often it comes, and that the order is the paper's."""

import numpy as np
import pytest
import torch
from torch import Tensor

from selfsup_fastai.data.draws import Draw
from selfsup_fastai.encoders.decoders import PerPixel, with_map_of
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.generative import models_genesis as genesis

NOTHING = {"shuffle": 0, "curve": 0, "paint": 0, "flip": False}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(b: int = 8, c: int = 1, h: int = 40, w: int = 40) -> Tensor:
    return torch.rand(b, c, h, w, generator=seeded(9))


def distorted(x: Tensor, seed: int = 0, **settings) -> tuple[Tensor, Tensor]:
    """Question and target of a task that does only what `settings` say."""
    task = get_task("models_genesis", **{**NOTHING, **settings})
    (question,), (target,) = task.make_batch(x, generator=seeded(seed), train=True)
    return question, target


def all_of(b: int) -> Tensor:
    return torch.ones(b, dtype=torch.bool)


# --- flips ------------------------------------------------------------------------------------------------------------


def test_flips_are_those_of_the_rule_and_the_target_is_flipped_with_the_image():
    x = noise(1, 1, 20, 21).expand(4000, -1, -1, -1)
    question, target = distorted(x, flip=True)
    assert torch.equal(question, target)
    found = torch.stack([(question == x.flip(axes)).all((1, 2, 3)) for axes in ((), (2,), (3,), (2, 3))], 1)
    assert (found.sum(1) == 1).all()
    # k flips in all: .6, .24, .096, .064; each along either axis; twice the same axis is none
    k = [0.6, 0.4 * 0.6, 0.16 * 0.6, 0.064]
    once, both = k[1] / 2 + k[3] / 2, k[2] / 2  # of three flips an odd number goes along either axis
    expected = torch.tensor([k[0] + k[2] / 2, once, once, both])
    assert (found.float().mean(0) - expected).abs().max() < 0.035


# --- shuffling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h, w", [(40, 40), (47, 61)])
def test_one_window_keeps_its_values_and_its_surroundings(h, w):
    source = genesis.shuffled_places(300, h, w, seeded(), count=1)
    places = torch.arange(h * w)
    heights, widths, moved = set(), set(), 0
    for row in source:
        assert torch.equal(row.sort().values, places)  # the same pixels, each once
        changed = (row != places).nonzero()[:, 0]
        if len(changed):
            moved += 1
            r, c = changed // w, changed % w
            heights.add(int(r.max() - r.min()) + 1)
            widths.add(int(c.max() - c.min()) + 1)
    assert max(heights) == h // 10 and max(widths) == w // 10 and moved > 150


def test_all_orders_of_a_small_window_are_equally_likely():
    source = genesis.shuffled_places(20_000, 20, 20, seeded(), count=1)  # windows of up to 2 x 2
    moved = (source != torch.arange(400)).sum(1)
    # a quarter are 2 x 2 windows: of 24 orders 9 move all four pixels, 8 three, 6 two, 1 none;
    # half are 2 x 1 or 1 x 2: one order in two moves two
    expected = {0: 0.25 + 0.25 + 0.25 / 24, 2: 0.25 + 0.25 * 6 / 24, 3: 0.25 * 8 / 24, 4: 0.25 * 9 / 24}
    for n, share in expected.items():
        assert (moved == n).float().mean().item() == pytest.approx(share, abs=0.01)


def test_windows_are_read_from_the_unshuffled_image_and_the_last_one_wins():
    source = genesis.shuffled_places(4, 40, 40, seeded())
    r, c = source // 40, source % 40
    at = torch.arange(1600)
    assert ((r - at // 40).abs().max(), (c - at % 40).abs().max()) == (3, 3)  # no value goes farther than one window
    assert len(source[0].unique()) < 1600  # where windows overlap, values are lost and others are there twice
    x = noise(4, 3)
    out = genesis.shuffled(x, torch.tensor([True, False, True, True]), seeded())
    assert torch.equal(out[1], x[1]) and not torch.equal(out[0], x[0])
    pixels, before = out[0].flatten(1).T, x[0].flatten(1).T
    assert (pixels[:, None] == before[None]).all(-1).any(1).all()  # channels stay together


@pytest.mark.parametrize("h, w", [(64, 64), (47, 61), (224, 224)])
def test_windows_cover_the_image_as_often_as_the_papers_cover_a_cube(h, w):
    mean = np.mean([a * b for a in range(1, h // 10 + 1) for b in range(1, w // 10 + 1)])
    assert genesis.window_count(h, w) * mean / (h * w) == pytest.approx(1.9, abs=0.01)


# --- curves -----------------------------------------------------------------------------------------------------------


def test_curves_are_bezier_curves():
    points = torch.tensor([[[0.2, 0.9], [0.7, 0.1]]])  # (u, u'), (v, v')
    x, y = genesis.bezier(points)[0].double().numpy()
    for i, t in zip((0, 250, 999), np.linspace(1, 0, genesis.CURVE_POINTS)[[0, 250, 999]]):
        ends = 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2
        assert x[i] == pytest.approx(0.2 * ends[0] + 0.7 * ends[1] + t**3, abs=1e-5)
        assert y[i] == pytest.approx(0.9 * ends[0] + 0.1 * ends[1] + t**3, abs=1e-5)


def test_interpolation_is_numpys():
    at = torch.rand(3, 50, generator=seeded()).sort(1).values
    at[:, 0], at[:, -1] = 0, 1
    value, x = torch.rand(3, 50, generator=seeded(1)), noise(3, 2, 7, 5)
    got = genesis.interpolated(x, at, value)
    for i in range(3):
        np.testing.assert_allclose(got[i], np.interp(x[i], at[i], value[i]), atol=1e-4)


def test_half_of_the_curves_rise_and_half_turn_black_into_white():
    ramp = torch.linspace(0, 1, 400).view(1, 1, 20, 20).expand(600, 3, -1, -1)
    out, target = distorted(ramp, curve=1)
    assert torch.equal(target, ramp)
    assert torch.equal(out[:, 0], out[:, 1]) and not torch.equal(out[0], out[1])  # one curve for all channels
    line = out[:, 0].flatten(1)
    rising = (line.diff(dim=1) >= -1e-6).all(1)
    ends = line[:, [0, -1]]
    torch.testing.assert_close(ends[rising], torch.tensor([0.0, 1.0]).expand(int(rising.sum()), 2))
    torch.testing.assert_close(ends[~rising], torch.tensor([1.0, 0.0]).expand(int((~rising).sum()), 2))
    assert rising.float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert out.min() >= 0 and out.max() <= 1


# --- painting ---------------------------------------------------------------------------------------------------------


def changed(outward: float, b: int = 300, h: int = 64, w: int = 64) -> Tensor:
    x = noise(b, 1, h, w)
    question, target = distorted(x, paint=1, outward=outward)
    assert torch.equal(target, x)
    return (question != x)[:, 0]


def test_inward_boxes_leave_the_border_and_outward_noise_covers_it():
    inward, outward = changed(0), changed(1)
    rim = torch.ones(64, 64, dtype=torch.bool)
    rim[3:-3, 3:-3] = False
    assert not inward[:, rim].any() and outward[:, rim].all()
    assert inward[:, 3, 3:-3].any() and inward[:, -4, 3:-3].any()  # up to there they do go
    # inward: at most five boxes of a third; outward: at least one box of 3/7 stays
    assert inward.float().mean((1, 2)).max() <= 5 / 9 and outward.float().mean((1, 2)).max() <= 1 - (27 / 64) ** 2
    assert (inward.flatten(1).any(1)).float().mean().item() == pytest.approx(0.95, abs=0.04)
    assert (~outward).flatten(1).any(1).all()


def test_single_boxes_have_the_papers_sides():
    draw = Draw(seeded())
    for share, least, most in [((1 / 6, 1 / 3), 10, 21), ((3 / 7, 4 / 7), 27, 36)]:
        found = genesis.boxes(3000, 64, 64, draw, *share, first=1.0)[:, 0]
        rows = found.any(2).sum(1)  # of one box, or of several: never less than the least
        assert rows.min() >= least and rows[rows <= most].max() >= most - 1


def test_painted_noise_is_uniform_and_of_each_channel():
    x = torch.full((50, 3, 64, 64), 2.0)
    question, _ = distorted(x, paint=1)
    values = question[question != 2]
    assert values.min() >= 0 and values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.01)
    assert values.std().item() == pytest.approx(12**-0.5, abs=0.01)
    there = (question != 2).all(1)
    assert (
        torch.equal(there, (question != 2).any(1)) and (question[:, 0] != question[:, 1])[there].float().mean() > 0.99
    )


@pytest.mark.parametrize("paint, outward", [(0.0, 0.8), (0.9, 0.8), (1.0, 0.0)])
def test_painting_comes_as_often_as_said_and_one_of_its_kinds_at_a_time(paint, outward):
    x = noise(800, 1, 32, 32)
    question, _ = distorted(x, paint=paint, outward=outward)
    corner = (question != x)[:, 0, 0, 0].float().mean().item()
    assert corner == pytest.approx(paint * outward, abs=0.05)
    touched = (question != x).flatten(1).any(1).float().mean().item()
    assert touched == pytest.approx(paint * (outward + (1 - outward) * 0.95), abs=0.05)


# --- the whole --------------------------------------------------------------------------------------------------------


def test_paint_comes_last_and_windows_before_the_curve():
    x = torch.full((40, 1, 40, 40), 0.5)
    question, _ = distorted(x, shuffle=1, curve=1, paint=1, outward=0)
    for image in question[:, 0]:
        plain = image[0, 0]  # never painted: 0.5 through the curve
        assert (image == plain).float().mean() > 0.4
        assert len(image[image != plain].unique()) in (0, int((image != plain).sum()))  # noise, unshuffled, unbent


def test_loss_is_the_mean_squared_error_of_all_pixels():
    task, x = get_task("models_genesis"), noise(3, 3)
    z = torch.randn(x.shape, generator=seeded(4))
    expected = ((1 / (1 + np.exp(-z.double().numpy())) - x.double().numpy()) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(task.loss(z, x, reduction="none"), expected, rtol=1e-5)
    assert task.loss(z, x).item() == pytest.approx(expected.mean(), rel=1e-5)
    assert task.loss(torch.logit(x, 1e-6), x).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("arch, has", [("resnet10t", True), ("vit_tiny_patch16_224", False), ("convnext_atto", True)])
def test_the_skip_is_of_the_first_level_alone(arch, has):
    encoder = create_encoder(arch, size=64)
    model = PerPixel(encoder, 3, skip=True).eval()
    assert (model.first is not None) == has
    if has:
        x = noise(2, 3, 47, 61)
        with torch.no_grad():
            last, first = with_map_of(encoder, x, model.first[0])
            torch.testing.assert_close(first, encoder.feature_maps(x, encoder.layer_names[:1])[encoder.layer_names[0]])
            torch.testing.assert_close(last, encoder.feature_map(x))
            assert model(x).shape == x.shape
        assert not encoder.body.get_submodule(model.first[0])._forward_hooks
    assert get_task("models_genesis", skip=None).model(encoder).first is None


def test_settings_out_of_range():
    with pytest.raises(TaskError, match="curve is a number, at least 0 and at most 1; got 2"):
        get_task("models_genesis", curve=2)
    with pytest.raises(TaskError, match="skip is 'first' or None; got 'all'"):
        get_task("models_genesis", skip="all")
    with pytest.raises(TaskError, match="flip is True or False, got 'no'"):
        get_task("models_genesis", flip="no")
