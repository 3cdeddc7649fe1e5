"""Maps recomputed corner by corner; images warped and brought back; losses transcribed."""

import math

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.predictive.aet import CORNERS, DEVIATIONS, GRAY, inverse, projective_maps, warp

KINDS = ["affine", "projective"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(b: int, c: int = 3, h: int = 64, w: int = 64) -> Tensor:
    """Images without fine detail, which survive being resampled twice."""
    return F.interpolate(torch.rand(b, c, 6, 6, generator=seeded(1)), (h, w), mode="bicubic").clamp(0, 1)


def through(matrix: np.ndarray, x: float, y: float) -> np.ndarray:
    """Where a place goes by a map."""
    u = matrix @ np.array([x, y, 1.0])
    return u[:2] / u[2]


# --- the maps ---------------------------------------------------------------------------------------------------------


def test_affine_maps_are_the_composition_of_their_parameters():
    task = get_task("aet", transform="affine")
    target = task.draw(50, seeded())
    for row, matrix in zip(target.double().tolist(), task.matrix(target).double().numpy()):
        cos, sin, across, down, scale, shear = row
        turn, slant = math.atan2(sin, cos), math.radians(30 * shear)
        size = 1 + 0.3 * scale
        for x, y in [(0, 0), (0.5, 0.1), (-0.3, 0.9)]:  # a place in the image, moved by hand to the copy
            there_x = size * (x * math.cos(turn) - y * math.sin(turn + slant)) + 0.4 * across
            there_y = size * (x * math.sin(turn) + y * math.cos(turn + slant)) + 0.4 * down
            np.testing.assert_allclose(through(matrix, there_x, there_y), (x, y), atol=1e-5)


def test_affine_parameters_fill_their_ranges_evenly():
    target = get_task("aet", transform="affine").draw(20_000, seeded())
    torch.testing.assert_close(target[:, :2].norm(dim=1), torch.ones(20_000))
    turn = torch.atan2(target[:, 1], target[:, 0]) / math.pi
    for values in (turn, *target[:, 2:].T):
        assert -1 <= values.min() < -0.99 and 0.99 < values.max() <= 1
        shares = torch.histc(values, 10, -1, 1) / 20_000
        assert (shares - 0.1).abs().max() < 5 * math.sqrt(0.09 / 20_000)
    assert np.abs(np.corrcoef(target[:, 2:].T) - np.eye(4)).max() < 0.05
    still = get_task("aet", transform="affine", turn=0, shift=0, shear=0, scale=0.5)
    target = still.draw(100, seeded())
    assert torch.equal(target[:, [0, 1, 2, 3, 5]], torch.tensor([1.0, 0, 0, 0, 0]).expand(100, 5))
    size = 1 / still.matrix(target)[:, 0, 0]
    assert 0.5 <= size.min() < 0.6 and 1.4 < size.max() <= 1.5


def test_projective_targets_are_homographies_from_four_corners():
    task = get_task("aet", transform="projective")
    target = task.draw(40, seeded())
    corners, seen = np.array(CORNERS), set()
    for row in target.double().numpy() * np.array(DEVIATIONS):
        back = np.linalg.inv(np.append(row, 1).reshape(3, 3))
        there = np.array([through(back, *c) for c in corners])  # where the image's corners lie in the copy
        a, b = [], []
        for (x, y), (u, v) in zip(there, corners):
            a += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
            b += [u, v]
        np.testing.assert_allclose(np.linalg.solve(a, b), row, atol=1e-5)
        fits = [k for k in range(4) if np.abs(there - np.roll(corners, -k, 0)).max() < 0.46]  # .2 of scale and .25
        assert len(fits) == 1
        seen.add(fits[0])
        moved = there - np.roll(corners, -fits[0], 0)
        signs = np.roll(corners, -fits[0], 0)
        assert any(np.abs(moved - s * signs).max() <= 0.25 + 1e-5 for s in np.linspace(-0.2, 0.2, 401))
    assert seen == {0, 1, 2, 3}


def test_deviations_are_those_of_many_draws():
    maps = projective_maps(100_000, seeded()).flatten(1)
    assert torch.equal(maps[:, 8], torch.ones(100_000))
    torch.testing.assert_close(maps[:, :8].std(0), torch.tensor(DEVIATIONS), rtol=0.01, atol=0)
    assert (maps[:, :8].mean(0).abs() < 5 * maps[:, :8].std(0) / math.sqrt(100_000)).all()


# --- the warp ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", KINDS)
def test_unwarping_with_the_truth_gives_the_image_back(transform):
    x, task = smooth(30), get_task("aet", transform=transform)
    maps = task.matrix(task.draw(30, seeded()))
    back, known = (warp(warp(images, maps), inverse(maps)) for images in (x, torch.ones(30, 1, 64, 64)))
    inside = (known > 0.999).expand_as(x)
    assert inside.float().mean() > 0.4
    assert (back - x)[inside].abs().mean() < 0.01 and (back - x)[inside].abs().max() < 0.15
    wrong = warp(warp(x, maps), inverse(maps.roll(1, 0)))
    assert (wrong - x)[inside].abs().mean() > 0.05


@pytest.mark.parametrize("transform", KINDS)
def test_the_warp_is_that_of_pillow(transform):
    x, task = smooth(6, 1), get_task("aet", transform=transform)
    maps = task.matrix(task.draw(6, seeded(1)))
    pixels = np.array([[32, 0, 32], [0, 32, 32], [0, 0, 1]], dtype=np.float64)  # from -1..1 to pixels
    for image, matrix, ours in zip(x[:, 0], maps.double().numpy(), warp(x, maps)[:, 0]):
        in_pixels = pixels @ matrix @ np.linalg.inv(pixels)
        coefficients = (in_pixels / in_pixels[2, 2]).flatten()[:8]
        theirs = Image.fromarray(image.numpy()).transform(
            (64, 64), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR, fillcolor=GRAY
        )
        off = np.abs(np.asarray(theirs) - ours.numpy())
        assert np.quantile(off, 0.9) < 1e-3 and off.mean() < 0.01  # at the borders Pillow does not blend


def test_what_is_not_in_the_image_is_gray():
    away = torch.tensor([[[1.0, 0, 2.5], [0, 1, 0], [0, 0, 1]]])
    assert (warp(torch.ones(1, 1, 8, 8), away) == GRAY).all()
    behind = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [-2, 0, 1]]])  # the right quarter lies behind the eye
    seen = warp(torch.ones(1, 1, 8, 8), behind)
    assert (seen[..., 6:] == GRAY).all() and (seen[..., 2:5] > GRAY).any()


# --- the question -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", KINDS)
def test_the_copy_is_the_image_seen_through_the_map_of_the_target(transform):
    x, task = smooth(4, 3, 47, 61), get_task("aet", transform=transform)
    (pairs,), (target,) = task.make_batch(x, generator=seeded(), train=False)
    assert pairs.shape == (4, 2, 3, 47, 47) and torch.equal(pairs[:, 0], x[..., 7:54])
    torch.testing.assert_close(pairs[:, 1], warp(x[..., 7:54], task.matrix(target)))
    (trained,), _ = task.make_batch(x, generator=seeded(), train=True)
    assert not torch.equal(trained[:, 0], pairs[:, 0])
    (plain,), _ = get_task("aet", transform=transform, crop=0, flip=0).make_batch(x, generator=seeded(), train=True)
    assert torch.equal(plain[:, 0], pairs[:, 0])


# --- net, losses, metric ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", KINDS)
def test_the_net_sees_both_images_in_their_order(transform):
    set_seed(0)
    encoder = create_encoder(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU()))
    net = get_task("aet", transform=transform).model(encoder).eval()
    x = torch.rand(2, 2, 3, 16, 16, generator=seeded())
    with torch.no_grad():
        raw = net.head(torch.cat([encoder(x[:, 0]), encoder(x[:, 1])], 1))
        torch.testing.assert_close(net(x), raw.tanh() if transform == "affine" else raw)


@pytest.mark.parametrize("transform, n", zip(KINDS, (6, 8)))
def test_losses_are_those_of_the_code_and_of_the_paper(transform, n):
    task = get_task("aet", transform=transform)
    pred, target = torch.rand(3, n, generator=seeded()) - 0.5, task.draw(3, seeded())
    rows = [np.mean((p - t) ** 2) for p, t in zip(pred.double().numpy(), target.double().numpy())]
    assert task.loss(pred, target, reduction="none").tolist() == pytest.approx(rows, rel=1e-5)
    assert task.loss(pred, target).item() == pytest.approx(np.mean(rows), rel=1e-5)
    paper = get_task("aet", transform=transform, compare="matrix")
    maps = zip(task.matrix(pred).double().numpy(), task.matrix(target).double().numpy())
    rows = [0.5 * np.linalg.norm(a - b) ** 2 for a, b in maps]
    assert paper.loss(pred, target, reduction="none").tolist() == pytest.approx(rows, rel=1e-5)
    assert paper.loss(target, target).item() == 0


@pytest.mark.parametrize(
    "settings", [{}, {"turn": 30}, {"turn": 0, "shear": 0}, {"scale": 0}, {"transform": "projective"}]
)
def test_the_metric_is_nought_for_the_best_guess_and_one_for_the_truth(settings):
    task = get_task("aet", **{"transform": "affine", **settings})
    target = task.draw(50_000, seeded())
    guess = target.mean(0, keepdim=True).expand_as(target)
    assert task.explained(guess, target).item() == pytest.approx(task.chance(), abs=0.02)
    assert task.explained(target, target) == 1


def test_what_is_named_is_a_map_with_a_true_turn():
    task = get_task("aet", transform="affine")
    pred = torch.rand(5, 6, generator=seeded()) * 0.8
    turn, size = torch.atan2(pred[:, 1], pred[:, 0]), 1 + 0.3 * pred[:, 4]
    decoded = task.decode(pred)
    clean = torch.cat([turn.cos()[:, None], turn.sin()[:, None], pred[:, 2:]], 1)
    torch.testing.assert_close(decoded, task.matrix(clean))
    slant = (math.radians(30) * pred[:, 5]).cos()
    torch.testing.assert_close(torch.linalg.det(decoded), 1 / (size**2 * slant))


@pytest.mark.parametrize("transform", KINDS)
def test_pictures_show_image_copy_and_the_copy_brought_back(transform):
    x, task = smooth(2), get_task("aet", transform=transform)
    inputs, targets = task.make_batch(x, generator=seeded(4), train=False)
    for pred in (task.decode(targets[0]), torch.zeros(2, 3, 3)):  # the truth; a map that has no inverse
        ax = task.show(inputs, targets, pred=pred)[0]
        picture = torch.tensor(ax.images[0].get_array()).permute(2, 0, 1)
        assert picture.shape == (3, 64, 3 * 64 + 2 * 2) and picture.isfinite().all()
        torch.testing.assert_close(picture[..., :64], x[0])
        torch.testing.assert_close(picture[..., 66:130], inputs[0][0, 1])
    ax = task.show(inputs, targets, pred=task.decode(targets[0]))[0]
    back, known = torch.tensor(ax.images[0].get_array()).permute(2, 0, 1)[..., 132:], torch.ones(1, 1, 64, 64)
    maps = task.matrix(targets[0])[:1]
    inside = warp(warp(known, maps), inverse(maps))[0, 0] > 0.999
    assert (back - x[0])[:, inside].abs().mean() < 0.01
    asked, named = ax.get_title().split("; ")
    assert asked.removeprefix("turned ") == named.removeprefix("named ")
    if transform == "affine":
        cos, sin = targets[0][0, :2].tolist()
        turn = float(asked.removeprefix("turned ").split("°")[0])
        # a shear turns a little, too
        assert abs((turn - math.degrees(math.atan2(sin, cos)) + 180) % 360 - 180) < 16


def test_settings_out_of_range():
    for name, value in [("turn", 181), ("shift", -0.1), ("scale", 1), ("shear", 61), ("crop", 0.6), ("flip", 2)]:
        with pytest.raises(TaskError, match=f"{name} is a number"):
            get_task("aet", **{"transform": "affine", name: value})
    with pytest.raises(TaskError, match="transform is 'affine' or 'projective'; got 'turn'"):
        get_task("aet", transform="turn")
    with pytest.raises(TaskError, match="compare is 'parameters' or 'matrix'; got 'mse'"):
        get_task("aet", compare="mse")
    with pytest.raises(TaskError, match="all 0"):
        get_task("aet", transform="affine", turn=0, shift=0, scale=0, shear=0)
    for name, value in {"turn": 20, "shift": 0, "scale": 0.1, "shear": 10}.items():
        with pytest.raises(TaskError, match=f"{name}={value} has no effect with transform='projective'"):
            get_task("aet", transform="projective", **{name: value})
