"""messages.py, errors.py and pictures.py."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from selfsup_fastai.errors import SelfsupError, UnknownNameError, unknown
from selfsup_fastai.messages import quiet, say
from selfsup_fastai.pictures import draw, figure_blocks, grid_axes, plot_history, side_by_side


def test_say_goes_to_stderr_and_can_be_silenced(capsys):
    say("one line")
    with quiet():
        say("not this")
    logging.getLogger("selfsup_fastai").setLevel("WARNING")
    say("nor this")
    logging.getLogger("selfsup_fastai").setLevel("INFO")
    assert capsys.readouterr() == ("", "one line\n")


def test_unknown_names_the_nearest_and_all_of_few():
    error = unknown("fruit", "aple", ["apple", "kiwi"])
    assert str(error) == "There is no fruit called 'aple'. Did you mean 'apple'? Known: apple, kiwi."
    assert isinstance(error, UnknownNameError) and isinstance(error, SelfsupError) and isinstance(error, ValueError)
    many = str(unknown("fruit", "zzz", [f"fruit{i}" for i in range(100)]))
    assert many == "There is no fruit called 'zzz'."


@pytest.mark.parametrize("channels", [1, 3])
def test_draw_shows_the_pixels(channels):
    image = torch.rand(channels, 5, 7) * 1.5 - 0.2
    (ax,) = grid_axes(1)
    draw(ax, image, "title", right=False)
    shown = torch.as_tensor(ax.images[0].get_array().data)
    expected = image.clamp(0, 1).permute(1, 2, 0)
    assert torch.equal(shown, expected[..., 0] if channels == 1 else expected)
    assert ax.images[0].get_clim() == (0, 1)  # no stretching of the contrast
    assert ax.get_title() == "title  ✗"


def test_grid_uses_given_axes_and_hides_the_rest():
    _, given = plt.subplots(1, 4)
    assert grid_axes(3, list(given)) == list(given[:3])
    axes = grid_axes(5)
    assert len(axes) == 5 and not any(ax.axison for ax in axes[0].figure.axes)


def test_side_by_side_keeps_every_image():
    images = torch.rand(3, 1, 4, 5)
    row = side_by_side(images, gap=2)
    assert row.shape == (1, 4, 19)
    assert all(torch.equal(row[:, :, i * 7 : i * 7 + 5], image) for i, image in enumerate(images))
    assert (row[:, :, 5:7] == 1).all()


def test_axes_in_a_block_are_laid_out_as_the_pictures_are_largest():
    wide, high = figure_blocks(["a", "b"], figsize=(8, 8))  # two of 8 x 4 inches
    assert [ax.get_subplotspec().get_gridspec().ncols for ax in grid_axes(2, wide, aspect=4)] == [1] * 2
    assert [ax.get_subplotspec().get_gridspec().ncols for ax in grid_axes(2, high)] == [2] * 2
    assert plt.get_fignums() == [wide.figure.number]


def history(epochs: int, **metrics) -> pd.DataFrame:
    losses = np.linspace(2, 1, epochs)
    return pd.DataFrame({"epoch": range(epochs), "train_loss": losses, "valid_loss": losses, **metrics})


def test_history_shows_the_curve_wherever_it_runs():
    for values, limits in [
        ([0.2, 0.9], (0, 1)),
        ([-0.5, 0.4], (-0.55, 1)),
        ([-2.2, 0.3], (-1, 1)),
    ]:
        plot_history(history(2, share=values))
        assert plt.gcf().axes[1].get_ylim() == pytest.approx(limits)
    for values in ([-3.0, -2.0], [0.5, 7.0]):
        plot_history(history(2, share=values), 0.0)
        low, high = plt.gcf().axes[1].get_ylim()
        assert low < min(*values, 0) and high > max(*values, 0)  # with the level of guessing


def test_history_of_one_epoch_has_whole_ticks_and_draws_the_metrics_named():
    plot_history(history(1, a_loss=[2.0], a_share=[0.4], b_share=[0.1]), {"a_share": 0.25, "b_share": None, "c": 0.5})
    axes = plt.gcf().axes
    assert [ax.get_ylabel() for ax in axes] == ["loss", "a share", "b share"]
    assert [len(ax.lines) for ax in axes[1:]] == [2, 1] and axes[1].lines[1].get_ydata()[0] == 0.25
    for ax in axes:
        low, high = ax.get_xlim()
        assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]
