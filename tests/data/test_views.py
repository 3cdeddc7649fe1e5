"""Views against torchvision's own functions for the same draw, and the draws against torchvision's rule."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomErasing, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from selfsup_fastai.data import views as views_module
from selfsup_fastai.data.draws import Views, draw_views
from selfsup_fastai.data.recipes import (
    BYOL_1,
    BYOL_2,
    DINO_GLOBAL_1,
    DINO_GLOBAL_2,
    DINO_LOCAL,
    GREY_SCAN,
    MOCO,
    SIMCLR,
    SWAV_GLOBAL,
    SWAV_LOCAL,
    Recipe,
    simclr_recipe,
)
from selfsup_fastai.data.views import (
    apply_shifts,
    apply_views,
    center_square,
    draw_shifts,
    multi_crop,
    random_shift_flip,
    random_view,
    shift_flip_by_share,
)
from selfsup_fastai.errors import TaskError

PLAIN = Recipe(flip=0.0, jitter_p=0.0, grey_p=0.0)
# All that torchvision can do at the same places; turns and shears are in test_sampling.py
EVERYTHING = replace(
    simclr_recipe(), jitter_p=0.9, grey_p=0.3, blur_p=0.6, solarize_p=0.4, vertical_flip=0.4, window=0.5, erase_p=0.5
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(b: int, c: int = 3, h: int = 48, w: int = 40, seed: int = 1) -> Tensor:
    """Smooth at a scale of a few pixels, values over all of [0, 1], with some exactly grey pixels."""
    coarse = torch.rand(b, c, h // 4 + 1, w // 4 + 1, generator=seeded(seed))
    x = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")
    x[..., :3, :3] = 0.25
    return x


def same(a: Views, b: Views) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Views)]
    return all(torch.equal(p, q) if isinstance(p, Tensor) else p == q for p, q in pairs)


def by_torchvision(x: Tensor, views: Views) -> Tensor:
    """One image at a time, with torchvision's functions."""
    return torch.stack([_one_by_torchvision(image, views[i]) for i, image in enumerate(x)])


def _one_by_torchvision(image: Tensor, view: Views) -> Tensor:
    image = tv.resized_crop(image, *view.boxes[0].tolist(), [view.size] * 2, antialias=True)
    if view.flip.item():
        image = tv.horizontal_flip(image)
    if view.vertical_flip.item():
        image = tv.vertical_flip(image)
    black, white = view.window[0].tolist()
    image = ((image - black) / (white - black)).clamp(0, 1)
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    if view.jitter[0].tolist() != [1, 1, 1, 0]:
        for k in view.order[0].tolist():
            image = adjust[k](image, view.jitter[0, k].item())
    if view.grey.item():
        image = tv.rgb_to_grayscale(image, num_output_channels=image.shape[0])
    if view.sigma.item() > 0:
        side = view.size // 10
        image = tv.gaussian_blur(image, [side + 1 - side % 2] * 2, [view.sigma.item()] * 2)
    image = tv.solarize(image, view.threshold) if view.solarize.item() else image
    box = view.erase[0].tolist()
    return tv.erase(image, *box, v=image.mean((1, 2), keepdim=True)) if box[2] else image


# --- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape, size", [((48, 40), 32), ((47, 61), 64), ((61, 47), None), ((20, 20), 96)])
def test_crop_and_flip_equal_torchvision(channels, shape, size):
    x = images(16, channels, *shape)
    views = draw_views(replace(PLAIN, flip=0.5, vertical_flip=0.5), x.shape, seeded(), size)
    assert 0 < views.flip.sum() < 16 and 0 < views.vertical_flip.sum() < 16
    torch.testing.assert_close(apply_views(x, views), by_torchvision(x, views), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_color_operation_equals_torchvision(name, channels):
    x = images(24, channels)
    recipe = replace(PLAIN, jitter_p=1.0, **{name: 0.5})
    views = draw_views(recipe, x.shape, seeded(), 40)
    out = apply_views(x, views)
    torch.testing.assert_close(out, by_torchvision(x, views), atol=2e-3 if name == "hue" else 1e-3, rtol=0)
    changed = (out - apply_views(x, replace_jitter(views))).abs().amax((1, 2, 3)) > 0.01
    assert changed.sum() == 0 if channels == 1 and name in ("saturation", "hue") else changed.sum() > 15


def replace_jitter(views: Views) -> Views:
    return replace(views, jitter=torch.tensor([[1.0, 1, 1, 0]]).repeat(len(views), 1))


def test_hue_on_pure_colors_turns_the_wheel():
    red, green, blue = torch.eye(3)[:, None, :, None, None].expand(3, 1, 3, 8, 8)
    for shift, expected in [(1 / 3, green), (-1 / 3, blue), (0.5, 1 - red)]:
        whole = draw_views(replace(PLAIN, scale=(1.0, 1.0), ratio=(1.0, 1.0)), (1, 3, 8, 8), seeded())
        out = apply_views(red, replace(whole, jitter=torch.tensor([[1.0, 1, 1, shift]])))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("field", ["grey_p", "blur_p", "solarize_p"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_blur_and_solarize_equal_torchvision_where_they_were_drawn(field, channels):
    x = images(24, channels, 70, 70)
    views = draw_views(replace(PLAIN, **{field: 0.5}), x.shape, seeded(3), 64)
    drawn = {"grey_p": views.grey, "blur_p": views.sigma > 0, "solarize_p": views.solarize}[field]
    assert 4 < drawn.sum() < 20
    out, cropped = apply_views(x, views), apply_views(x, draw_views(PLAIN, x.shape, seeded(3), 64))
    torch.testing.assert_close(out, by_torchvision(x, views), atol=1e-3, rtol=0)
    assert torch.equal(out[~drawn], cropped[~drawn])
    if not (field == "grey_p" and channels == 1):
        assert (out - cropped)[drawn].abs().amax((1, 2, 3)).median() > 0.05  # a narrow blur does little


@pytest.mark.parametrize("channels", [1, 3])
def test_window_stretches_what_was_drawn_to_the_whole_range(channels):
    x = images(24, channels)
    views = draw_views(replace(PLAIN, window=0.8), x.shape, seeded(), 32)
    out, cropped = apply_views(x, views), apply_views(x, draw_views(PLAIN, x.shape, seeded(), 32))
    for image, before, (black, white) in zip(out, cropped, views.window.tolist()):
        torch.testing.assert_close(image, ((before - black) / (white - black)).clamp(0, 1), atol=1e-5, rtol=0)
    assert (out == 0).any() and (out == 1).any() and (out - cropped).abs().mean() > 0.1
    by_hand = replace(views[:1], window=torch.tensor([[0.25, 0.75]]))
    grey = apply_views(
        torch.tensor([0.2, 0.5, 0.6, 0.8]).view(4, 1, 1, 1).expand(4, channels, 48, 40), by_hand[[0] * 4]
    )
    torch.testing.assert_close(grey[:, 0, 5, 5], torch.tensor([0, 0.5, 0.7, 1]))


@pytest.mark.parametrize("channels", [1, 3])
def test_erased_rectangles_have_the_views_mean_color_and_the_rest_stays(channels):
    x = images(24, channels, 47, 61)
    views = draw_views(replace(PLAIN, erase_p=0.5), x.shape, seeded(), 35)
    out, cropped = apply_views(x, views), apply_views(x, draw_views(PLAIN, x.shape, seeded(), 35))
    assert 6 < (views.erase[:, 2] > 0).sum() < 18
    for image, before, (top, left, height, width) in zip(out, cropped, views.erase.tolist()):
        hole = torch.zeros(35, 35, dtype=torch.bool)
        hole[top : top + height, left : left + width] = True
        assert torch.equal(image[:, ~hole], before[:, ~hole])
        expected = before.mean((1, 2))[:, None].expand(-1, height * width)
        torch.testing.assert_close(image[:, hole], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels, shape, size", [(3, (47, 61), 39), (1, (40, 40), 41)])
def test_pixels_do_not_depend_on_how_many_images_are_worked_on_at_a_time(monkeypatch, channels, shape, size):
    x = images(19, channels, *shape)
    views = draw_views(replace(EVERYTHING, turn=20.0, shear=10.0), x.shape, seeded(), size)
    results = []
    for chunk in (1, 4 * channels * size**2, 10**9):  # an image, four and all
        monkeypatch.setattr(views_module, "CHUNK", chunk)
        results.append(apply_views(x, views))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-6, rtol=0)


def test_multi_crop_gives_each_recipe_its_size():
    x, recipes, sizes = images(5), [DINO_GLOBAL_1, DINO_GLOBAL_2, DINO_LOCAL], [32, 32, 14]
    generator = seeded(9)
    expected = [random_view(x, recipe, generator, size) for recipe, size in zip(recipes, sizes)]
    crops = multi_crop(x, recipes, seeded(9), sizes)
    assert [crop.shape[-1] for crop in crops] == sizes
    assert all(torch.equal(a, b) for a, b in zip(crops, expected))
    with pytest.raises(TaskError, match="3 recipes came with 2 sizes"):
        multi_crop(x, recipes, seeded(), [32, 14])


@pytest.mark.parametrize("recipe", [SIMCLR, MOCO, BYOL_1, BYOL_2, EVERYTHING])
@pytest.mark.parametrize(
    "b, channels, shape, size", [(32, 3, (48, 40), 64), (2, 3, (47, 61), 47), (1, 1, (47, 61), 32)]
)
def test_whole_recipes_equal_torchvision(recipe, b, channels, shape, size):
    x = images(b, channels, *shape)
    views = draw_views(recipe, x.shape, seeded(5), size)
    out = apply_views(x, views)
    assert out.shape == (b, channels, size, size) and out.min() >= 0 and out.max() <= 1
    # solarize inverts at a threshold: a pixel within rounding of it may fall on either side
    close = ((out - by_torchvision(x, views)).abs() < 2e-3).float()
    assert close.mean() > 0.9995


def test_values_stay_in_range_and_the_type_is_kept():
    x = torch.rand(8, 3, 33, 35, generator=seeded()).round()
    strong = replace(EVERYTHING, brightness=3.0, contrast=3.0, saturation=3.0, hue=0.5)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        out = random_view(x.to(dtype), strong, seeded(), 30)
        assert out.dtype == dtype and out.min() >= 0 and out.max() <= 1
        reference = random_view(x, strong, seeded(), 30)
        assert ((out.float() - reference).abs() < 0.01).float().mean() > 0.999


def test_a_tiny_view_is_not_blurred_because_a_tenth_of_it_is_one_pixel():
    x = images(2, 3, 19, 19)
    whole = replace(PLAIN, scale=(1.0, 1.0), ratio=(1.0, 1.0), blur_p=1.0)
    torch.testing.assert_close(random_view(x, whole, seeded(), 19), x)
    assert (
        random_view(x, whole, seeded(), 20) - random_view(x, replace(whole, blur_p=0.0), seeded(), 20)
    ).abs().max() > 0


# --- draws ----------------------------------------------------------------------------------------------------------


def test_same_generator_state_same_views_and_applying_twice_is_identical():
    x = images(8)
    a, b, c = (draw_views(EVERYTHING, x.shape, seeded(seed), 32) for seed in (7, 7, 8))
    assert same(a, b) and not same(a, c)
    assert torch.equal(apply_views(x, a), apply_views(x, b))
    assert torch.equal(random_view(x, EVERYTHING, seeded(7), 32), apply_views(x, a))
    assert torch.equal(x, images(8))


def test_every_image_has_its_own_view_and_the_next_draw_is_another():
    x = images(1).expand(16, -1, -1, -1)
    generator = seeded()
    first, second = (random_view(x, SIMCLR, generator, 32) for _ in range(2))
    distances = torch.cdist(torch.cat([first, second]).flatten(1), torch.cat([first, second]).flatten(1))
    assert distances.fill_diagonal_(1).min() > 1e-3


def test_rows_of_views_are_views():
    x = images(6)
    views = draw_views(EVERYTHING, x.shape, seeded(2), 32)
    whole = apply_views(x, views)
    mask = torch.tensor([True, False, True, True, False, False])
    for rows in (slice(1, 4), mask, torch.tensor([5, 0])):
        torch.testing.assert_close(apply_views(x[rows], views[rows]), whole[rows])
    torch.testing.assert_close(apply_views(x[-1:], views[-1]), whole[-1:])
    assert len(views) == 6 and len(views[2]) == 1 and len(list(views)) == 6


def test_drawing_for_grey_images_takes_the_same_numbers_as_for_color():
    assert same(draw_views(SIMCLR, (4, 1, 40, 40), seeded()), draw_views(SIMCLR, (4, 3, 40, 40), seeded()))


def test_what_a_recipe_does_not_ask_for_takes_no_numbers():
    plain = draw_views(SIMCLR, (9, 3, 40, 40), seeded())
    more = draw_views(replace(EVERYTHING, turn=9.0, shear=9.0), (9, 3, 40, 40), seeded())
    for name in ("boxes", "flip", "order"):
        assert torch.equal(getattr(plain, name), getattr(more, name))
    generator = seeded()
    for _ in range(2):
        draw_views(replace(SIMCLR, turn=9.0), (9, 3, 40, 40), generator)
    again = seeded()
    for _ in range(2):
        draw_views(replace(SIMCLR, turn=1.0), (9, 3, 40, 40), again)
    assert torch.equal(generator.get_state(), again.get_state())


N = 20_000


@pytest.fixture(scope="module")
def many() -> Views:
    return draw_views(EVERYTHING, (N, 3, 96, 128), seeded(11))


def _close_in_mean(values: Tensor, expected: float) -> bool:
    values = values.double()
    return abs(values.mean().item() - expected) < 4 * values.std().item() / math.sqrt(len(values))


def test_shares_of_what_is_drawn(many):
    shares = [(many.flip, 0.5), (many.vertical_flip, 0.4), (many.grey, 0.3), (many.sigma > 0, 0.6)]
    for drawn, p in [*shares, (many.solarize, 0.4), (many.erase[:, 2] > 0, 0.5)]:
        assert _close_in_mean(drawn, p)
    assert _close_in_mean((many.jitter != torch.tensor([1.0, 1, 1, 0])).any(1), 0.9)


def test_jitter_is_uniform_within_its_strength(many):
    drawn = many.jitter[(many.jitter != torch.tensor([1.0, 1, 1, 0])).any(1)]
    for column, (low, high) in zip(drawn.T, [(0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2)]):
        assert _is_uniform(column, low, high)
    assert _is_uniform(many.sigma[many.sigma > 0], 0.1, 2.0)
    for k in range(4):
        assert _close_in_mean(many.order[:, 0] == k, 0.25)
    assert torch.equal(many.order.sort(dim=1).values, torch.arange(4).expand(N, 4))
    assert draw_views(replace(SIMCLR, brightness=2.0), (999, 3, 8, 8), seeded()).jitter[:, 0].min() >= 0


def _is_uniform(values: Tensor, low: float, high: float) -> bool:
    """Kolmogorov-Smirnov at about 1 in 10,000, and the bounds."""
    shares = ((values.double().sort().values - low) / (high - low)).clamp(-1, 2)
    distance = (shares - torch.linspace(0, 1, len(shares), dtype=torch.double)).abs().max().item()
    return shares.min() >= -1e-6 and shares.max() <= 1 + 1e-6 and distance < 2.2 / math.sqrt(len(shares))


def test_crop_area_and_ratio_are_uniform_where_every_try_fits():
    recipe = replace(SIMCLR, scale=(0.08, 0.5))  # on a square at most 0.5 * 4/3 of a side squared: always inside
    boxes = draw_views(recipe, (N, 3, 1000, 1000), seeded(12)).boxes.double()
    assert _is_uniform(boxes[:, 2] * boxes[:, 3] / 1e6, 0.0798, 0.5005)
    assert _is_uniform((boxes[:, 3] / boxes[:, 2]).log(), math.log(0.747), math.log(1.338))
    assert _is_uniform(boxes[:, 0] / (1000 - boxes[:, 2]), 0, 1) and _is_uniform(
        boxes[:, 1] / (1000 - boxes[:, 3]), 0, 1
    )


def test_turn_shear_and_window_are_uniform_within_their_limits(many):
    assert not many.turn.any() and not many.shear.any()
    turned = draw_views(replace(PLAIN, turn=30.0, shear=12.0), (N, 1, 9, 9), seeded(15))
    assert _is_uniform(turned.turn, -30, 30) and _is_uniform(turned.shear, -12, 12)
    assert _is_uniform(many.window[:, 0], 0, 0.25) and _is_uniform(many.window[:, 1], 0.75, 1)
    for a, b in [(turned.turn, turned.shear), many.window.T]:
        assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.03


@pytest.mark.parametrize("size, scale", [(64, (0.02, 0.33)), (24, (0.3, 1.0))])
def test_erased_rectangles_are_distributed_as_torchvisions(size, scale):
    recipe = replace(PLAIN, erase_p=1.0, erase_scale=scale)
    ours = draw_views(recipe, (N, 3, 70, 70), seeded(16), size).erase
    torch.manual_seed(17)
    view, theirs = torch.ones(1, size, size), []
    for _ in range(2000):
        *box, _ = RandomErasing.get_params(view, scale, (0.3, 3.3), [0.0])
        theirs.append(box if box[2] < size else [0, 0, 0, 0])  # nothing fitted: the whole view stays as it is
    theirs = torch.tensor(theirs)
    for column in range(4):
        assert _same_distribution(ours[:, column].double(), theirs[:, column].double())
    assert _same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all() and (ours[:, 2:] < size).all()


@pytest.mark.parametrize("h, w", [(96, 128), (30, 200), (200, 30)])
def test_boxes_are_distributed_as_torchvisions(h, w):
    ours = draw_views(SIMCLR, (N, 3, h, w), seeded(13)).boxes
    torch.manual_seed(14)
    image = torch.zeros(3, h, w)
    theirs = [RandomResizedCrop.get_params(image, list(SIMCLR.scale), list(SIMCLR.ratio)) for _ in range(2000)]
    theirs = torch.tensor(theirs)
    for column in range(4):
        assert _same_distribution(ours[:, column].double(), theirs[:, column].double())
    share = ours[:, 2] * ours[:, 3] / (h * w)
    assert _same_distribution(share, theirs[:, 2] * theirs[:, 3] / (h * w))
    inside = (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= h).all() and (ours[:, 1] + ours[:, 3] <= w).all()
    assert inside and (ours[:, 2:] > 0).all()


def _same_distribution(a: Tensor, b: Tensor) -> bool:
    """Two-sample Kolmogorov-Smirnov at about 1 in 10,000."""
    at = torch.cat([a, b]).sort().values
    share_a, share_b = (torch.searchsorted(v.sort().values, at, right=True) / len(v) for v in (a, b))
    return (share_a - share_b).abs().max().item() < 2.2 * math.sqrt(1 / len(a) + 1 / len(b))


@pytest.mark.parametrize(
    "h, w, box", [(10, 400, [0, 193, 10, 13]), (400, 10, [193, 0, 13, 10]), (60, 60, [0, 0, 60, 60])]
)
def test_the_center_is_taken_when_no_try_fits(h, w, box):
    recipe = replace(PLAIN, scale=(1.0, 1.0), ratio=(3 / 4, 4 / 3) if h != w else (0.9, 0.9))
    recipe = recipe if h != w else replace(recipe, ratio=(1.0, 1.0))
    assert draw_views(recipe, (5, 3, h, w), seeded()).boxes.tolist() == [box] * 5


def test_recipes_are_the_papers():
    assert (SIMCLR.scale, SIMCLR.jitter_p, SIMCLR.grey_p, SIMCLR.blur_p) == ((0.08, 1.0), 0.8, 0.2, 0.5)
    assert (SIMCLR.brightness, SIMCLR.contrast, SIMCLR.saturation, SIMCLR.hue) == (0.8, 0.8, 0.8, 0.2)
    cifar = simclr_recipe(strength=0.5, blur=False)
    assert (cifar.brightness, cifar.hue, cifar.blur_p) == (0.4, 0.1, 0.0)
    assert (MOCO.scale, MOCO.saturation, MOCO.hue, MOCO.blur_p, MOCO.solarize_p) == ((0.2, 1.0), 0.4, 0.1, 0.5, 0.0)
    assert (BYOL_1.saturation, BYOL_1.blur_p, BYOL_1.solarize_p) == (0.2, 1.0, 0.0)
    assert (BYOL_2.saturation, BYOL_2.blur_p, BYOL_2.solarize_p) == (0.2, 0.1, 0.2)
    dino = [(r.scale, r.saturation, r.blur_p, r.solarize_p) for r in (DINO_GLOBAL_1, DINO_GLOBAL_2, DINO_LOCAL)]
    assert dino == [((0.4, 1.0), 0.2, 1.0, 0.0), ((0.4, 1.0), 0.2, 0.1, 0.2), ((0.05, 0.4), 0.2, 0.5, 0.0)]
    assert (SWAV_GLOBAL.scale, SWAV_LOCAL.scale) == ((0.14, 1.0), (0.05, 0.14))
    assert replace(SWAV_GLOBAL, scale=SIMCLR.scale) == replace(SWAV_LOCAL, scale=SIMCLR.scale) == SIMCLR


def test_the_recipe_for_grey_scans_treats_equal_channels_alike_and_keeps_left_and_right():
    x = images(12, 1)
    grey, color = (random_view(x.expand(-1, c, -1, -1), GREY_SCAN, seeded(), 40) for c in (1, 3))
    torch.testing.assert_close(color, grey.expand(-1, 3, -1, -1), atol=1e-3, rtol=0)  # luma sums to 0.9999
    views = draw_views(GREY_SCAN, (N, 1, 64, 64), seeded())
    assert not views.flip.any() and not views.vertical_flip.any() and not views.solarize.any()


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"flip": 1.5}, "flip is 1.5"),
        ({"hue": 0.7}, "0.5"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"brightness": -1.0}, "brightness"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"jitter_p": math.nan}, "jitter_p"),
        ({"vertical_flip": -0.1}, "vertical_flip is -0.1"),
        ({"turn": 181.0}, r"turn is 181.0; .* \[0, 180\] degrees"),
        ({"shear": 90.0}, "shear"),
        ({"window": 1.0}, "window"),
        ({"erase_p": 2.0}, "erase_p"),
        ({"erase_scale": (0.0, 0.3)}, "erase_scale"),
        ({"erase_ratio": (3.0, 0.3)}, "erase_ratio"),
    ],
)
def test_impossible_recipes_say_what_is_wrong(change, words):
    with pytest.raises(TaskError, match=words):
        Recipe(**change)


def test_impossible_images_say_what_is_wrong():
    with pytest.raises(TaskError, match="4"):
        draw_views(SIMCLR, (2, 4, 8, 8), seeded())
    with pytest.raises(TaskError, match="uint8"):
        random_view(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), SIMCLR, seeded())
    with pytest.raises(TaskError, match="size"):
        draw_views(SIMCLR, (2, 3, 8, 8), seeded(), size=0)
    with pytest.raises(TaskError, match="3 views"):
        apply_views(images(2), draw_views(SIMCLR, (3, 3, 48, 40), seeded()))


# --- shifts and squares ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h, w", [(32, 32), (47, 61)])
@pytest.mark.parametrize("channels", [1, 3])
def test_shift_and_flip_can_be_undone(h, w, channels):
    x, pad = torch.rand(40, channels, h, w, generator=seeded()), 4
    shifts, mirrored = draw_shifts(x.shape, seeded(3), pad, 0.5)
    out = random_shift_flip(x, seeded(3), pad, 0.5)
    assert torch.equal(out, apply_shifts(x, shifts, mirrored))
    for image, moved, (down, right), mirror in zip(x, out, shifts.tolist(), mirrored.tolist()):
        moved = moved.flip(2) if mirror else moved
        rows, columns = slice(pad, h - pad), slice(pad, w - pad)
        back = moved[:, pad - down : h - pad - down, pad - right : w - pad - right]
        assert torch.equal(back, image[:, rows, columns])


def test_shifted_borders_are_reflected_as_in_a_padded_crop():
    x = torch.rand(6, 3, 9, 7, generator=seeded())
    shifts = torch.tensor([[-4, 4], [4, -4], [0, 0], [3, 1], [-1, 0], [0, -2]])
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")
    expected = torch.stack([p[:, 4 + d : 13 + d, 4 + r : 11 + r] for p, (d, r) in zip(padded, shifts.tolist())])
    assert torch.equal(apply_shifts(x, shifts, torch.zeros(6, dtype=torch.bool)), expected)
    assert torch.equal(apply_shifts(x, shifts, torch.ones(6, dtype=torch.bool)), expected.flip(3))


def test_shifts_are_uniform_and_their_limits_are_checked():
    shifts, mirrored = draw_shifts((N, 3, 32, 32), seeded(4), 4, 0.3)
    for column in shifts.T:
        counts = torch.bincount(column + 4, minlength=9)
        assert len(counts) == 9 and ((counts - N / 9).abs() < 4 * math.sqrt(N / 9)).all()
    assert _close_in_mean(mirrored, 0.3)
    x = images(3)
    assert torch.equal(random_shift_flip(x, seeded(), 0, 0.0), x)
    with pytest.raises(TaskError, match=r"0\.\.7"):
        random_shift_flip(torch.rand(2, 3, 8, 9), seeded(), 8, 0.5)


def test_a_share_is_of_the_shorter_side():
    x = torch.rand(50, 1, 40, 60, generator=seeded())
    assert torch.equal(shift_flip_by_share(x, seeded(1), 0.125, 0.5), random_shift_flip(x, seeded(1), 5, 0.5))
    assert torch.equal(shift_flip_by_share(x, seeded(1), 0, 0), x)


def test_center_square_is_the_middle():
    x = torch.arange(5 * 8).view(1, 1, 5, 8)
    assert torch.equal(center_square(x), x[..., 1:6])
    assert torch.equal(center_square(x.transpose(2, 3)), x.transpose(2, 3)[..., 1:6, :])
    odd = torch.rand(2, 3, 47, 61, generator=seeded())
    assert torch.equal(center_square(odd), odd[..., 7:54])
    assert torch.equal(center_square(odd[0]), odd[0, :, :, 7:54])
    assert torch.equal(center_square(odd, 36), odd[..., 5:41, 12:48])
