"""SimCLR: its loss is NT-Xent on the two projections, its views follow the recipe, its target is the partner."""

import math
import re

import numpy as np
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from torch import Tensor

from selfsup_fastai.data.draws import draw_views
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.views import apply_views
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.losses import nt_xent
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.joint import found_pair
from selfsup_fastai.pretext.learner import pretext_learner


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(b: int, c: int = 3, h: int = 40, w: int = 40) -> Tensor:
    coarse = torch.rand(b, c, 5, 5, generator=seeded(1))
    return torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")


def projections(b: int, d: int = 6) -> Tensor:
    return torch.randn(b, 2, d, generator=seeded(2), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_is_nt_xent_on_the_projections(temperature):
    pred, task = projections(5), get_task("simclr", temperature=temperature)
    target = torch.arange(5)
    assert torch.equal(task.loss(pred, target), nt_xent(pred[:, 0], pred[:, 1], temperature))
    rows = task.loss(pred, target, reduction="none")
    z = torch.nn.functional.normalize(pred, dim=-1)
    for i in range(5):  # image i as the paper writes it: its first view against the 2B - 1 others, and its second
        terms = []
        for v in range(2):
            others = [z[j, u] @ z[i, v] / temperature for j in range(5) for u in range(2) if (j, u) != (i, v)]
            terms.append(torch.logsumexp(torch.stack(others), 0) - z[i, 0] @ z[i, 1] / temperature)
        torch.testing.assert_close(rows[i], sum(terms) / 2)
    torch.testing.assert_close(rows.mean(), task.loss(pred, target))


def test_target_is_the_row_of_the_partner():
    task, x = get_task("simclr"), images(7)
    _, (target,) = task.make_batch(x, generator=seeded(), train=True)
    assert target.tolist() == list(range(7))
    matched = torch.eye(7).unsqueeze(1).expand(7, 2, 7)
    assert found_pair(matched, target) == 1
    swapped = torch.stack([torch.eye(7), torch.eye(7)[[1, 0, 2, 3, 4, 5, 6]]], 1)
    assert found_pair(swapped, target) == pytest.approx(5 / 7)
    first, second = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.1]])  # both second views are nearest to image 0
    assert found_pair(torch.stack([first, second], 1), target[:2]) == 1
    assert found_pair(torch.stack([second, first], 1), target[:2]) == 0.5  # the first views look for the second
    assert found_pair(100 * swapped * torch.rand(7, 2, 1, generator=seeded()), target) == pytest.approx(5 / 7)


def test_decoded_is_the_cosine_of_the_two_views():
    pred, task = projections(4), get_task("simclr")
    expected = [(a @ b / (a.norm() * b.norm())).item() for a, b in pred]
    assert task.decode(pred).tolist() == pytest.approx(expected)
    units = task.activation(pred)
    assert units.norm(dim=-1).flatten().tolist() == pytest.approx([1] * 8)
    assert task.decode(units).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("h, w", [(40, 40), (47, 61), (80, 72)])
def test_views_are_two_draws_of_the_recipe(channels, h, w):
    x, task = images(6, channels, h, w), get_task("simclr")
    (views,), _ = task.make_batch(x, generator=seeded(4), train=True)
    generator = seeded(4)
    for i in range(2):
        assert torch.equal(
            views[:, i], apply_views(x, draw_views(task.recipe(i, channels, min(h, w)), x.shape, generator))
        )
    assert views.shape == (6, 2, channels, min(h, w), min(h, w))
    apart = (views[:, 0] - views[:, 1]).abs().mean((1, 2, 3))
    assert (apart > 0.01).all()


def test_recipe_is_the_papers_with_blur_from_64_pixels_up():
    recipe = get_task("simclr").recipe(0, 3, 64)
    strengths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    assert strengths == pytest.approx((0.8, 0.8, 0.8, 0.2))
    assert (recipe.scale, recipe.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert (recipe.flip, recipe.jitter_p, recipe.grey_p, recipe.blur_p) == (0.5, 0.8, 0.2, 0.5)
    assert recipe.blur_sigma == (0.1, 2.0) and recipe.solarize_p == 0
    assert get_task("simclr").recipe(1, 3, 64) == recipe
    assert get_task("simclr").recipe(0, 3, 63).blur_p == 0


def test_one_image_alone_has_nobody_to_be_told_from():
    task, pred = get_task("simclr"), projections(1)
    with torch.no_grad():  # the last batch of a validation set: log(1) by the formula
        assert task.loss(pred, torch.zeros(1)).item() == math.log(1)
        assert task.loss(pred, torch.zeros(1), reduction="none").tolist() == [0]
    assert found_pair(pred, torch.zeros(1)).item() == 0  # nothing was found among others
    with pytest.raises(TaskError, match="at least 2 images"):  # in training it would be a step that does nothing
        task.loss(pred.requires_grad_(), torch.zeros(1))


def loaders(n: int, bs: int, valid_pct: float) -> UnlabeledDataLoaders:
    array = (images(n, 3, 36, 36).permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    return UnlabeledDataLoaders.from_array(array, size=None, bs=bs, valid_pct=valid_pct, num_workers=0)


@pytest.mark.parametrize(
    "n_valid, bs, sizes", [(9, 4, [5, 4]), (5, 2, [3, 2]), (8, 4, [4, 4]), (6, 4, [4, 2]), (2, 2, [2])]
)
def test_no_validation_image_is_left_alone(n_valid, bs, sizes):
    learn = pretext_learner(loaders(21, bs, n_valid / 21), "simclr", "resnet10t")
    assert [len(b[0]) for b in learn.dls.valid] == sizes
    learn.remove_cb(ProgressCallback)
    assert learn.validate()[0] > 0
    assert len(learn.get_preds()[0]) == n_valid and learn.dls.train.bs == bs


def test_a_validation_set_of_one_image_is_told_to_say_nothing(capsys):
    learn = pretext_learner(loaders(10, 4, 0), "simclr", "resnet10t")
    assert capsys.readouterr().err.count("one validation image has nobody to be told from") == 1
    learn.remove_cb(ProgressCallback)
    assert list(learn.validate()) == [0, 0]
    pretext_learner(loaders(10, 4, 0.2), "simclr", "resnet10t")
    assert "nobody" not in capsys.readouterr().err


def test_projector_has_the_batch_norms_of_the_authors_code():
    encoder = create_encoder("resnet10t")
    kinds = [type(m).__name__ for m in get_task("simclr", dim=32).model(encoder).head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]


@pytest.fixture(scope="module")
def learn():
    dls = loaders(24, 8, 0.4)
    set_seed(0)
    learn = pretext_learner(dls, "simclr", "resnet10t")
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3)
    return learn


def test_validation_draws_the_same_views_every_time(learn):
    first, second = ([b[0] for b in learn.dls.valid] for _ in range(2))
    assert len(first) == 2 and all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[0][:2], first[1])


def test_pictures_show_both_views_and_titles_their_cosine(learn):
    dl = learn.dls.valid
    b = dl.one_batch()
    (views,), _ = dl.question(b)
    for i, ax in enumerate(dl.show_batch(b)):
        assert ax.get_title() == f"two views of image {i}"
        torch.testing.assert_close(shown(ax), views[i], atol=1e-5, rtol=0)
    axes = dl.show_results(b, learn.get_preds(dl=[b], with_decoded=True)[2])
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in (learn.encoder.mean, learn.encoder.std))
    for ax in axes:
        with torch.no_grad():
            a, z = learn.model.eval()(((shown(ax) - mean) / std)[None])[0]
        (cosine,) = re.fullmatch(r"cosine (-?\d\.\d\d)", ax.get_title()).groups()
        assert float(cosine) == pytest.approx((a @ z / (a.norm() * z.norm())).item(), abs=0.006)
    assert len(axes) == 8


def shown(ax) -> Tensor:
    """(2, C, H, W): the two views in a picture, with a white stripe between them."""
    pixels = torch.from_numpy(np.array(ax.images[0].get_array())).permute(2, 0, 1).float()
    side = pixels.shape[1]
    assert pixels.shape[2] == 2 * side + 2 and (pixels[..., side : side + 2] == 1).all()
    return torch.stack([pixels[..., :side], pixels[..., side + 2 :]])
