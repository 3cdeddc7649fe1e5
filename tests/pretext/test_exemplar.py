"""Exemplar: where the seeds lie, what their variants are, whose class is asked for, and who is validated on."""

import colorsys
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.data.block import DataBlock
from PIL import Image
from torch import Tensor

from selfsup_fastai.data.blocks import UnlabeledBlock
from selfsup_fastai.data.colors import scale_components
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.sampling import sample_squares
from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from selfsup_fastai.pretext.loader import PretextDL, PretextTransform
from selfsup_fastai.pretext.multi import SeveralTasks
from selfsup_fastai.pretext.predictive.exemplar import seed_found, seed_in_top_5

STILL = {"shift": 0, "scale": 1, "turn": 0, "contrast": 1, "power": 1, "factor": 1, "offset": 0, "hue": 0}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(b: int, c: int = 3, h: int = 30, w: int = 30) -> Tensor:
    return torch.rand(b, c, h, w, generator=seeded(1))


def variants(x: Tensor, seed: int = 0, idx: Tensor | None = None, **settings) -> tuple[Tensor, Tensor]:
    idx = torch.arange(len(x)) if idx is None else idx
    task = get_task("exemplar", **{**STILL, **settings})
    (patches,), (target, _) = task.make_batch(x, generator=seeded(seed), train=True, idx=idx)
    return patches, target


def loaders(n: int = 30, side: tuple[int, int] = (30, 30), valid_pct: float = 0.3, **kwargs):
    array = np.random.default_rng(0).integers(0, 256, (n, *side, 3), dtype=np.uint8)
    return UnlabeledDataLoaders.from_array(
        array, valid_pct=valid_pct, **{"bs": 4, "size": None, "num_workers": 0, **kwargs}
    )


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h, w, size", [(30, 30, 10), (47, 61, 16), (24, 40, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_unchanged_variant_is_a_window_of_the_image_always_the_same(channels, h, w, size):
    x = noise(8, channels, h, w)
    patches, target = variants(x)
    assert patches.shape == (8, channels, size, size) and target.tolist() == list(range(8))
    corners = get_task("exemplar").corners(x, torch.arange(8), size)
    for image, patch, (top, left) in zip(x, patches, corners.tolist()):
        torch.testing.assert_close(patch, image[:, top : top + size, left : left + size], atol=1e-5, rtol=0)
    assert torch.equal(patches, variants(x, seed=5)[0])
    alone = variants(x[3:4], idx=torch.tensor([3]))[0]
    torch.testing.assert_close(alone, patches[3:4])  # whatever else is in the batch
    other_seed = get_task("exemplar", seed=1).corners(x, torch.arange(8), size)
    assert (other_seed != corners).any(1).float().mean() > 0.7


def test_places_are_drawn_in_proportion_to_the_mean_squared_gradient():
    image = noise(1, 1, 14, 17)
    image[..., :8] = 0.1 * image[..., :8]  # flat on the left
    size, n = 9, 20_000
    weights = np.zeros((6, 9))
    grey = image[0, 0].numpy()
    for top in range(6):
        for left in range(9):
            for r in range(top, top + size):
                for c in range(left, left + size):
                    weights[top, left] += (grey[r, c + 1] - grey[r, c]) ** 2 if c + 1 < 17 else 0
                    weights[top, left] += (grey[r + 1, c] - grey[r, c]) ** 2 if r + 1 < 14 else 0
    expected = weights / weights.sum()
    corners = get_task("exemplar").corners(image.expand(n, 1, 14, 17), torch.arange(n), size)
    found = (corners[:, 0] * 9 + corners[:, 1]).bincount(minlength=54).view(6, 9).numpy() / n
    assert expected.max() / expected.min() > 2  # else nothing would be told
    np.testing.assert_allclose(found, expected, atol=4 * math.sqrt(expected.max() / n))


def test_a_seed_is_where_something_is_and_flat_images_have_one_too():
    x = torch.zeros(50, 3, 48, 48)
    x[:, :, 30:40, 5:15] = noise(50, 3, 10, 10)
    corners = get_task("exemplar").corners(x, torch.arange(50), 16)
    assert ((corners[:, 0] + 16 > 29) & (corners[:, 1] < 16)).all()
    flat = get_task("exemplar").corners(torch.zeros(400, 3, 48, 48), torch.arange(400), 16)
    assert flat.min() == 0 and flat.max() == 32


# --- variants ---------------------------------------------------------------------------------------------------------


def test_numbers_stay_within_the_papers_limits_and_reach_them():
    drawn = get_task("exemplar").draw(20_000, seeded())
    ranges = {
        "shift": (drawn.shift, -0.2, 0.2),
        "scale": (drawn.scale, 1 / 1.4, 1.4),
        "turn": (drawn.turn, -20, 20),
        "contrast": (drawn.contrast, 0.5, 2),
        "power of saturation": (drawn.saturation[:, 0], 0.25, 4),
        "factor of saturation": (drawn.saturation[:, 1], 1 / 1.4, 1.4),
        "offset of saturation": (drawn.saturation[:, 2], -0.1, 0.1),
        "power of value": (drawn.value[:, 0], 0.25, 4),
        "factor of value": (drawn.value[:, 1], 1 / 1.4, 1.4),
        "offset of value": (drawn.value[:, 2], -0.1, 0.1),
        "hue": (drawn.hue, -0.1, 0.1),
    }
    columns = []
    for name, (values, low, high) in ranges.items():
        assert low - 1e-5 <= values.min() < low + 0.01 * (high - low), name
        assert high - 0.02 * (high - low) < values.max() <= high + 1e-5, name
        columns.append(values.view(len(values), -1))
    apart = torch.corrcoef(torch.cat(columns, 1).T) - torch.eye(14)
    assert apart.abs().max() < 0.04  # each is drawn for itself
    assert (drawn.scale < 1).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_every_visit_makes_another_variant_and_each_setting_does_something():
    x = noise(4, 3, 60, 60)
    for name, value in {**STILL, "shift": 0.2, "scale": 1.4, "turn": 20}.items():
        changed = value if value not in (0, 1) else {"offset": 0.1, "hue": 0.1}.get(name, 2)
        one, two = (variants(x, seed, **{name: changed})[0] for seed in (0, 1))
        assert (one - two).abs().amax((1, 2, 3)).min() > 1e-3, name
    assert torch.equal(variants(x, 1, power=2)[0], variants(x, 1, power=2)[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_colors_are_changed_as_a_plain_transcription_does(channels):
    x = noise(5, channels)
    task = get_task("exemplar", shift=0, scale=1, turn=0)
    corners = task.corners(x, torch.arange(5), 10)
    got, drawn = task.vary(x, corners, 10, seeded(3)), task.draw(5, seeded(3))
    for i, (top, left) in enumerate(corners.tolist()):
        pixels = x[i].flatten(1).T.double().numpy()  # (H * W, C)
        mean = pixels.mean(0)
        components = np.linalg.eigh((pixels - mean).T @ (pixels - mean))[1]
        patch = x[i, :, top : top + 10, left : left + 10].flatten(1).T.double().numpy() - mean
        factors = drawn.contrast[i, -channels:].double().numpy()
        patch = np.clip(mean + sum(f * np.outer(patch @ v, v) for f, v in zip(factors, components.T)), 0, 1)

        def bent(value, numbers):
            power, factor, offset = numbers.tolist()
            return min(1.0, max(0.0, value**power * factor + offset))

        for ours, pixel in zip(got[i].flatten(1).T, patch):
            if channels == 1:
                want = [bent(pixel[0], drawn.value[i])]
            else:
                h, s, v = colorsys.rgb_to_hsv(*pixel)
                h = (h + drawn.hue[i].item()) % 1
                want = colorsys.hsv_to_rgb(h, bent(s, drawn.saturation[i]), bent(v, drawn.value[i]))
            assert ours.tolist() == pytest.approx(want, abs=2e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_half_precision_have_components_too(channels):
    x, factors = noise(5, channels), torch.rand(5, channels, generator=seeded()) + 0.5
    half = scale_components(x.half(), factors, of=x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), scale_components(x, factors, of=x.half().float()), atol=2e-3, rtol=0)
    assert variants(x.half(), contrast=2.0, power=2.0, hue=0.1)[0].dtype == torch.float16


def test_grey_color_images_stay_grey():
    x = noise(6, 1).expand(6, 3, 30, 30)
    patches = variants(x, contrast=2, power=4, factor=1.4, offset=0.1, hue=0.1)[0]
    torch.testing.assert_close(patches, patches.mean(1, keepdim=True).expand_as(patches), atol=1e-3, rtol=0)


def test_shift_turn_and_scale_move_the_patch_over_the_image():
    """On an image whose colors are its coordinates, a variant says where each of its pixels came from."""
    rows = torch.linspace(0, 1, 90).view(1, 1, 90, 1).expand(200, 1, 90, 90)
    x = torch.cat([rows, rows.mT, 0 * rows], 1)  # ramps are flat in gradient: any place
    task = get_task("exemplar", **{**STILL, "shift": 0.2, "scale": 1.4, "turn": 20})
    corners = task.corners(x, torch.arange(200), 30)
    patches, drawn = task.vary(x, corners, 30, seeded(2)) * 89, task.draw(200, seeded(2))
    inside = ((corners > 20) & (corners < 40)).all(1)
    assert inside.sum() > 10
    for i in inside.nonzero()[:, 0].tolist():
        center = corners[i] + 14.5 + 30 * drawn.shift[i]
        torch.testing.assert_close(patches[i, :2].mean((1, 2)), center, atol=1e-2, rtol=0)
        across = (patches[i, :2, 0, -1] - patches[i, :2, 0, 0]) / 29  # one step to the right, as (row, column)
        assert across.norm().item() == pytest.approx(drawn.scale[i].item(), abs=1e-3)
        turned = math.degrees(math.atan2(-across[0], across[1]))  # the content turns clockwise: it is read upward
        assert turned == pytest.approx(drawn.turn[i].item(), abs=0.1)


def test_squares_are_windows_and_quarter_turns_are_exact():
    x = noise(3, 2, 20, 24)
    centers, sides = torch.tensor([[8.0, 9.0], [5.0, 12.0], [10.0, 14.0]]), torch.full((3,), 10.0)
    window = torch.stack(
        [x[i, :, int(r) - 5 : int(r) + 5, int(c) - 5 : int(c) + 5] for i, (r, c) in enumerate(centers)]
    )
    for turn, k in [(0.0, 0), (90.0, -1), (180.0, 2)]:
        got = sample_squares(x, centers, sides, torch.full((3,), turn), 10)
        torch.testing.assert_close(got, torch.rot90(window, k, (2, 3)), atol=1e-4, rtol=0)
    beyond = sample_squares(x, torch.zeros(3, 2), sides, torch.zeros(3), 10)
    assert torch.allclose(beyond, beyond.flip(2), atol=1e-5) and torch.allclose(beyond, beyond.flip(3), atol=1e-5)


# --- classes and loaders ----------------------------------------------------------------------------------------------


def test_validation_asks_about_training_images_and_names_their_class():
    learn = pretext_learner(loaders(), "exemplar", "resnet10t", **STILL)
    train, valid = learn.dls.loaders
    assert learn.task.n_classes == len(train.dataset) == 21 and learn.task.chance() == 1 / 21
    assert len(valid.dataset) == 9 and train.is_training and not valid.is_training
    seeds = torch.cat([b[1] for b in valid])
    assert seeds.shape == (9,) and len(seeds.unique()) == 9 and not torch.equal(seeds, torch.arange(9))
    seen = {int(c): patch for b in train.new(shuffle=False, drop_last=False) for patch, c, _ in zip(*b)}
    assert sorted(seen) == list(range(21))
    for b in valid:
        for patch, c, _ in zip(*b):
            torch.testing.assert_close(patch, seen[int(c)], atol=1e-4, rtol=0)  # the very seed, unchanged here


def test_validation_variants_are_others_than_training_has():
    learn = pretext_learner(loaders(), "exemplar", "resnet10t")
    train = {int(c): p for b in learn.dls.train.new(shuffle=False, drop_last=False) for p, c, _ in zip(*b)}
    apart = [float((p - train[int(c)]).abs().max()) for b in learn.dls.valid for p, c, _ in zip(*b)]
    assert min(apart) > 0.05


@pytest.mark.parametrize("n", [2, 10])
def test_images_beyond_the_limit_are_left_out_always_the_same_ones(n):
    dls = loaders()
    learn = pretext_learner(dls, "exemplar", "resnet10t", max_classes=n)
    assert len(learn.dls.train.dataset) == learn.task.n_classes == n and learn.dls.train.bs == min(
        4, n, 5 if n > 5 else n
    )
    assert len(learn.dls.valid.dataset) == min(n, 9) and len(dls.train_ds) == 21
    items = [i.tobytes() for i in learn.dls.train.dataset.items]
    again = pretext_learner(dls, "exemplar", "resnet10t", max_classes=n)
    assert items == [i.tobytes() for i in again.dls.train.dataset.items]
    other = pretext_learner(dls, "exemplar", "resnet10t", max_classes=n, seed=1)
    assert items != [i.tobytes() for i in other.dls.train.dataset.items]
    targets = torch.cat([b[1] for b in learn.dls.train.new(shuffle=False, drop_last=False)])
    assert targets.tolist() == list(range(n)) and learn.model.head[-1].out_features == n
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert np.isfinite(learn.recorder.losses).all() and len(learn.recorder.losses) > 0


def test_seeds_stand_still_on_images_that_are_cut(tmp_path):
    """With and without the store of pixels, and in validation: `size=` takes windows from the center."""
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (30, 30 + 10 * (i % 3), 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    seen = []
    for cache in (True, False):
        dls = UnlabeledDataLoaders.from_folder(
            tmp_path, size=30, bs=4, valid_pct=0.3, num_workers=0, cache=cache, seed=3
        )
        learn = pretext_learner(dls, "exemplar", "resnet10t", **STILL)
        fixed = learn.dls.train.new(get_idxs=lambda dls=dls: list(range(len(dls.train_ds))))
        first, second = (torch.cat([b[0] for b in fixed]) for _ in range(2))
        assert torch.equal(first, second) and learn.dls.train.is_fast == learn.dls.valid.is_fast == cache
        by_class = {int(c): p for b in fixed for p, c, _ in zip(*b)}
        for b in learn.dls.valid:
            for patch, c, _ in zip(*b):
                if int(c) in by_class:  # the last short batch of an epoch is dropped
                    torch.testing.assert_close(patch, by_class[int(c)], atol=1e-5, rtol=0)
        seen.append(first)
        assert not dls.train.after_item.fs[0].still  # the user's own loaders draw as before
    torch.testing.assert_close(seen[0], seen[1], atol=0.05, rtol=0)


def test_new_images_can_be_asked_about_however_many():
    learn = pretext_learner(loaders(), "exemplar", "resnet10t")
    new = list(np.random.default_rng(3).integers(0, 256, (14, 30, 30, 3), dtype=np.uint8))
    preds, (targets, _) = learn.get_preds(dl=learn.dls.test_dl(new))
    assert preds.shape == (14, 21) and targets.max() < 21
    torch.testing.assert_close(preds.sum(1), torch.ones(14))


def test_without_a_validation_set_it_trains_and_predicts(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(9)]
    for file, pixels in zip(files, np.random.default_rng(0).integers(0, 256, (9, 30, 30, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(file)
    block = DataBlock(UnlabeledBlock, get_items=lambda source: source, splitter=lambda items: (range(9), []))
    learn = pretext_learner(block.dataloaders(files, bs=4, num_workers=0), "exemplar", "resnet10t")
    assert len(learn.dls.valid_ds) == 0
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    new = np.random.default_rng(3).integers(0, 256, (40, 30, 30, 3), dtype=np.uint8)
    answer = learn.predict(new[0])
    assert answer.pred.shape == (1, learn.task.n_classes) and answer.targets[0].tolist() == [0]
    preds, (targets, _) = learn.get_preds(dl=learn.dls.test_dl(list(new)))
    assert len(new) > learn.task.n_classes > targets.max() and len(preds) == len(new)


def test_loaders_made_by_hand_ask_before_there_is_a_learner():
    dl = PretextDL(list(noise(6)), bs=3, batch_tfms=[PretextTransform("exemplar")])
    x, target, _ = dl.one_batch()
    assert x.shape == (3, 3, 10, 10) and target.tolist() == [0, 1, 2]
    assert get_task("exemplar").chance() is None
    with pytest.raises(DataError, match="chosen from fastai's Datasets only, not from list"):
        dl.over(dl, [0])


def test_settings_and_data_out_of_range():
    for name, value in {"max_classes": 1, "patch": 0, "scale": 0.9, "power": 11, "hue": 0.6, "seed": -1}.items():
        with pytest.raises(TaskError, match=f"{name} is a .*number.*; got {value}"):
            get_task("exemplar", **{name: value})
    with pytest.raises(TaskError, match="at least 24 pixels a side, these are 20 x 40"):
        get_task("exemplar").check_shape((1, 3, 20, 40))
    assert get_task("exemplar", patch=1).min_side == 8 and get_task("exemplar", patch=0.1).min_side == 80
    with pytest.raises(TaskError, match="exemplar tells training images apart: it needs 2 or more, not 1"):
        pretext_learner(loaders(2, valid_pct=0.5), "exemplar", "resnet10t")
    with pytest.raises(TaskError, match="exemplar tells images of a batch apart: it needs a batch size of 2 or more"):
        pretext_learner(loaders(bs=1), "exemplar", "resnet10t")
    with pytest.raises(TaskError, match="exemplar cannot be combined with other tasks: it leaves out images"):
        SeveralTasks([get_task("exemplar"), get_task("rotation")])


# --- loss and metrics -------------------------------------------------------------------------------------------------


def test_loss_is_the_negative_log_probability_of_the_seed():
    pred, target = torch.randn(4, 9, generator=seeded(), dtype=torch.float64), torch.tensor([0, 8, 3, 3])
    rows = [-math.log(math.exp(r[t]) / sum(map(math.exp, r))) for r, t in zip(pred.tolist(), target.tolist())]
    task = get_task("exemplar")
    assert task.loss(pred, target, reduction="none").tolist() == pytest.approx(rows)
    assert task.loss(pred, target).item() == pytest.approx(sum(rows) / 4)


def test_metrics_count_first_and_first_five_of_few_classes_too():
    pred = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]]).expand(7, 7)
    target = torch.arange(7)
    assert seed_found(pred, target) == pytest.approx(1 / 7) and seed_in_top_5(pred, target) == pytest.approx(5 / 7)
    assert seed_in_top_5(pred[:3, :3], target[:3]) == 1 and seed_in_top_5(F.one_hot(target).float(), target) == 1


def test_pictures_show_the_seed_beside_its_variant_and_say_which_was_named():
    task, x = get_task("exemplar"), noise(2)
    asked = task.make_batch(x, generator=seeded(), train=True, idx=torch.tensor([7, 3]))
    _, (_, seeds) = asked
    assert [ax.get_title() for ax in task.show(*asked)] == ["seed 7 | variant", "seed 3 | variant"]
    axes = task.show(*asked, pred=torch.tensor([7, 5]))
    assert [ax.get_title() for ax in axes] == ["seed 7 | variant,\nnamed 7  ✓", "seed 3 | variant,\nnamed 5  ✗"]
    drawn = torch.as_tensor(axes[1].get_images()[0].get_array()).movedim(-1, 0).float()
    assert torch.allclose(drawn[:, :10, :10], seeds[1], atol=1e-6)


def test_the_seed_that_is_shown_is_the_unchanged_variant():
    x = noise(8, 3, 47, 61)
    task = get_task("exemplar", **STILL)
    (patches,), (_, seeds) = task.make_batch(x, generator=seeded(), train=True, idx=torch.arange(8))
    assert torch.allclose(patches, seeds, atol=1e-4)
