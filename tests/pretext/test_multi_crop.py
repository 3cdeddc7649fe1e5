"""What SwAV and DINO share: crops of two sizes, which recipes they follow, how they go through, what is drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.torch_core import set_seed
from torch import Tensor, nn

from selfsup_fastai.data.draws import draw_views
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.recipes import GREY_SCAN
from selfsup_fastai.data.views import apply_views
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.pretext import get_task, task_class
from selfsup_fastai.pretext.joint import _beside, clusters, each_crop
from selfsup_fastai.pretext.learner import pretext_learner

TASKS = ("swav", "dino")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(b: int, c: int = 3, h: int = 64, w: int = 64) -> Tensor:
    coarse = torch.rand(b, c, 5, 5, generator=seeded(1))
    return nn.functional.interpolate(coarse, (h, w), mode="bilinear")


def learner(task: str, arch="resnet10t", n: int = 12, size: int = 64, channels: int = 3, **settings):
    array = (images(n, channels, size, size).permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=4, num_workers=0, valid_pct=0.34)
    set_seed(0)
    return pretext_learner(dls, task, arch, **settings)


# --- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_the_papers_recipes(name):
    task = get_task(name)
    large, small = [task.recipe(i, 3, 224) for i in range(2)], task.small_recipe(3, 96)
    assert [r.scale for r in (*large, small)] == {
        "swav": [(0.14, 1.0), (0.14, 1.0), (0.05, 0.14)],
        "dino": [(0.4, 1.0), (0.4, 1.0), (0.05, 0.4)],
    }[name]
    assert [(r.blur_p, r.solarize_p) for r in (*large, small)] == {
        "swav": [(0.5, 0), (0.5, 0), (0.5, 0)],
        "dino": [(1, 0), (0.1, 0.2), (0.5, 0)],
    }[name]
    assert task.n_small == {"swav": 6, "dino": 8}[name]
    assert task.passes == pytest.approx({"swav": 2 + 6 * (96 / 224) ** 2, "dino": 4 + 8 * (96 / 224) ** 2}[name])


@pytest.mark.parametrize("name", TASKS)
def test_border_parts_large_from_small_crops(name):
    task = get_task(name, border=0.3)
    assert task.recipe(0, 3, 224).scale == task.recipe(1, 3, 224).scale == (0.3, 1.0)
    assert task.small_recipe(3, 96).scale == (0.05, 0.3)
    assert task_class(name).recipes[0].scale != (0.3, 1.0)  # of this task alone


def test_views_change_all_crops_but_scale_the_large_ones():
    task = get_task("swav", views={"scale": [0.5, 0.9], "flip": 0})
    assert task.recipe(0, 3, 224) == replace(get_task("swav").recipe(0, 3, 224), scale=(0.5, 0.9), flip=0)
    assert task.small_recipe(3, 96) == replace(get_task("swav").small_recipe(3, 96), flip=0)
    scan = get_task("dino").small_recipe(1, 96)  # grey images
    assert scan == replace(GREY_SCAN, scale=(0.2, 0.4), blur_p=0.5)
    assert get_task("dino").small_recipe(3, 56).blur_p == 0  # nothing below 64 pixels is blurred


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("channels, h, w, side", [(3, 64, 80, 24), (1, 47, 61, 24)])
def test_crops_are_draws_of_the_recipes(name, channels, h, w, side):
    task, x = get_task(name, n_small=3), images(5, channels, h, w)
    (large, small), (target,) = task.make_batch(x, generator=seeded(4), train=True)
    generator = seeded(4)
    whole = min(h, w)
    for i in range(2):
        drawn = draw_views(task.recipe(i, channels, whole), x.shape, generator)
        assert torch.equal(large[:, i], apply_views(x, drawn))
    for i in range(3):
        drawn = draw_views(task.small_recipe(channels, side), x.shape, generator, side)
        assert torch.equal(small[:, i], apply_views(x, drawn))
    assert large.shape == (5, 2, channels, whole, whole) and small.shape == (5, 3, channels, side, side)
    assert target.tolist() == list(range(5))


@pytest.mark.parametrize("name", TASKS)
def test_without_small_crops(name):
    learn = learner(name, n_small=0)
    _, small, _ = learn.dls.one_batch()
    assert small.shape[:2] == (4, 0) and learn.task.passes == (2 if name == "swav" else 4)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert learn.get_preds()[0].shape[:2] == (4, 2)
    assert len(learn.show_batch(max_n=2)) == 2


def test_a_vision_transformer_costs_what_its_patches_cost(capsys):
    learn = learner("dino", create_encoder("test_vit3", size=64, patch_size=8), n_small=4)
    assert learn.task.small_side == 24 and learn.task.passes == pytest.approx(4 + 4 * (24 / 64) ** 2)
    assert "as much as" not in capsys.readouterr().err
    learn = learner("swav", create_encoder("swin_tiny_patch4_window7_224", size=64, depths=(1, 1, 1, 1)), n_small=4)
    assert learn.task.passes == 6
    assert "takes images of 64 pixels only: a small crop costs as much as a large one" in capsys.readouterr().err


def test_crops_of_one_size_go_through_together():
    """As in the authors' codes: batch norms see both large crops at once, and all small ones."""
    encoder, sizes = create_encoder("resnet10t", size=64), []
    encoder.body.register_forward_pre_hook(lambda _, x: sizes.append(tuple(x[0].shape)))
    large, small = torch.rand(4, 2, 3, 64, 64), torch.rand(4, 3, 3, 24, 24)
    found = each_crop(encoder, large, small)
    assert sizes == [(8, 3, 64, 64), (12, 3, 24, 24)] and found.shape == (4, 5, 512)
    encoder.eval()
    with torch.no_grad():
        found = each_crop(encoder, large, small)
        torch.testing.assert_close(found[2, 1], encoder(large[2:3, 1])[0])
        torch.testing.assert_close(found[3, 4], encoder(small[3:4, 2])[0])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(
    "settings, said",
    [
        ({"n_small": -1}, "n_small is a whole number, at least 0"),
        ({"border": 0.05}, "border is a number, above 0.05 and below 1; got 0.05"),
        ({"border": 1}, "border is a number"),
        ({"views": "foto"}, "kind of views"),
        ({"views": {"flips": 1}}, "field of a recipe"),
        ({"frozen_epochs": 0.5}, "frozen_epochs is a whole number"),
        ({"temperature": 0}, "temperature is a number, above 0"),
        ({"dim": 0}, "dim is a whole number, at least 1"),
        ({"prototypes": 1}, "prototypes is a whole number, at least 2"),
    ],
)
def test_settings_out_of_range(name, settings, said):
    with pytest.raises(SelfsupError, match=said):
        get_task(name, **settings)


# --- what a person sees -----------------------------------------------------------------------------------------------


def test_pictures_show_large_crops_and_columns_of_small_ones():
    large, small = torch.rand(2, 3, 64, 64) / 2, torch.rand(5, 3, 24, 24) / 2  # nothing of them is white
    picture = _beside(large, small)
    assert picture.shape == (3, 64, 2 * 64 + 2 + 3 * 26)  # two of 24 in a column of 64
    assert torch.equal(picture[..., :64], large[0]) and torch.equal(picture[..., 66:130], large[1])
    top = (64 - 50) // 2
    for i, crop in enumerate(small[:4]):
        left, down = 132 + 26 * (i // 2), top + 26 * (i % 2)
        assert torch.equal(picture[:, down : down + 24, left : left + 24], crop)
    assert torch.equal(picture[:, 20:44, 184:208], small[4])  # the last alone in its column, in the middle
    assert (picture < 1).all(0).sum() == 2 * 64**2 + 5 * 24**2


@pytest.mark.parametrize("name", TASKS)
def test_titles_tell_the_cosine_of_the_large_crops(name):
    learn = learner(name, n_small=2)
    b = learn.dls.valid.one_batch()
    assert [ax.get_title() for ax in learn.dls.valid.show_batch(b)] == [f"crops of image {i}" for i in range(4)]
    with learn.no_bar():
        units, _, decoded = learn.get_preds(dl=[b], with_decoded=True)
    assert units.shape[:2] == (4, 4)
    torch.testing.assert_close(units.norm(dim=-1), torch.ones(4, 4))
    torch.testing.assert_close(decoded, (units[:, 0] * units[:, 1]).sum(-1))
    titles = [ax.get_title() for ax in learn.dls.valid.show_results(b, decoded)]
    assert titles == [f"cosine {c:.2f}" for c in decoded]


def prediction(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(0), torch.zeros(0), codes


def test_clusters_counts_what_codes_tell_apart():
    one_each = torch.eye(6).repeat(2, 1).view(6, 2, 6)
    assert clusters(prediction(one_each)).item() == pytest.approx(6)
    assert clusters(prediction(torch.full((6, 2, 8), 1 / 8))).item() == pytest.approx(1)  # all of them a little
    one_for_all = torch.eye(8)[3].expand(6, 2, 8)
    assert clusters(prediction(one_for_all)).item() == pytest.approx(1)
    halves = torch.eye(8)[:2].repeat(6, 1).view(6, 2, 8)
    assert clusters(prediction(halves)).item() == pytest.approx(2)
    mixed = torch.stack([torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])]).view(1, 2, 2)
    information = np.log(2) + 0.9 * np.log(0.9) + 0.1 * np.log(0.1)
    assert clusters(prediction(mixed)).item() == pytest.approx(np.exp(information), rel=1e-5)


def test_clusters_of_many_batches_are_those_of_all_images():
    codes = torch.rand(20, 2, 5, generator=seeded()).pow(6)
    codes = codes / codes.sum(-1, keepdim=True)
    clusters.reset()
    for part in codes.split(7):
        clusters.add(prediction(part), part)
    assert clusters.value.item() == pytest.approx(clusters(prediction(codes)).item())
    clusters.reset()
