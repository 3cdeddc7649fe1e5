"""The picture of views shows the pixels that the draws give, under titles that say what was drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from selfsup_fastai.data.draws import draw_views
from selfsup_fastai.data.recipes import BYOL_2, DINO_GLOBAL_1, DINO_LOCAL, SIMCLR
from selfsup_fastai.data.showing import show_views
from selfsup_fastai.data.views import apply_views
from selfsup_fastai.errors import TaskError


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def images(b: int, c: int = 3) -> Tensor:
    return torch.rand(b, c, 30, 40, generator=torch.Generator().manual_seed(1))


def pixels(ax) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


@pytest.mark.parametrize("channels", [1, 3])
def test_stored_views_are_shown_as_they_are_applied_beside_their_image(channels):
    x = images(3, channels)
    views = [draw_views(BYOL_2, x.shape, torch.Generator().manual_seed(s), 24) for s in (2, 3)]
    axes = show_views(x, views)
    assert len(axes) == 3 * (1 + 2)
    for i in range(3):
        whole, *shown = axes[3 * i : 3 * i + 3]
        assert np.array_equal(pixels(whole), x[i].permute(1, 2, 0).squeeze(-1).numpy())
        for k, ax in enumerate(shown):
            expected = apply_views(x, views[k])[i].permute(1, 2, 0).squeeze(-1).numpy()
            np.testing.assert_allclose(pixels(ax), expected, atol=1e-5)
            top, left, height, width = views[k].boxes[i].tolist()
            corners = whole.patches[k].get_xy()[:4]
            assert (corners.min(0) == [left - 0.5, top - 0.5]).all()
            assert (corners.max(0) == [left + width - 0.5, top + height - 0.5]).all()
            assert whole.patches[k].get_edgecolor()[:3] == plt.matplotlib.colors.to_rgb(ax.title.get_color())


def test_recipes_are_drawn_at_their_sizes_and_alike_every_time():
    x = images(6)
    first, second = (show_views(x, [DINO_GLOBAL_1, DINO_LOCAL], sizes=[24, 10], max_n=2) for _ in range(2))
    assert [pixels(ax).shape[0] for ax in first] == [30, 24, 10] * 2
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(first, second))
    one = show_views(x, SIMCLR, torch.Generator().manual_seed(5), n_views=3, max_n=1)
    expected = apply_views(x[:1], draw_views(SIMCLR, (1, 3, 30, 40), torch.Generator().manual_seed(5)))
    assert np.array_equal(pixels(one[1]), expected[0].permute(1, 2, 0).numpy()) and len(one) == 4
    assert not np.array_equal(pixels(one[1]), pixels(one[2]))
    with pytest.raises(TaskError, match="2 views came with 1 sizes"):
        show_views(x, [SIMCLR, SIMCLR], sizes=[8])


def test_titles_and_the_table_say_what_was_drawn():
    views = draw_views(SIMCLR, (2, 3, 30, 40), torch.Generator().manual_seed(4), 24)
    views = replace(
        views,
        boxes=torch.tensor([[1, 2, 20, 30], [0, 0, 30, 40]]),
        flip=torch.tensor([True, False]),
        jitter=torch.tensor([[1.5, 0.5, 1.0, 0.25], [1.0, 1.0, 1.0, 0.0]]),
        order=torch.tensor([[3, 0, 2, 1], [0, 1, 2, 3]]),
        grey=torch.tensor([False, True]),
        sigma=torch.tensor([0.0, 1.5]),
        turn=torch.tensor([-12.0, 0.0]),
        window=torch.tensor([[0.25, 1.0], [0.0, 0.75]]),
        erase=torch.tensor([[0, 0, 0, 0], [3, 4, 5, 6]]),
    )
    axes = show_views(images(2), [views])
    assert axes[1].get_title() == "mirrored, -12°\nhue +90°" and axes[3].get_title() == "grey, blur 1.5\nerased"
    assert show_views(images(2, 1), [views])[1].get_title() == "mirrored, -12°"
    table = views.describe()
    assert table[["top", "left", "height", "width"]].to_numpy().tolist() == views.boxes.tolist()
    assert table.loc[0, ["brightness", "contrast", "saturation", "hue"]].tolist() == [1.5, 0.5, 1.0, 0.25]
    assert table["order"][0] == "hue, brightness, saturation, contrast"
    assert table[["black", "white"]].to_numpy().tolist() == [[0.25, 1.0], [0.0, 0.75]]
    assert table["grey"].tolist() == [False, True] and table["turn"].tolist() == [-12.0, 0.0]
    assert table.loc[1, ["erase_top", "erase_left", "erase_height", "erase_width"]].tolist() == [3, 4, 5, 6]
