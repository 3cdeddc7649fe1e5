"""messages.py, errors.py and pictures.py."""

import logging

import pytest
import torch
from matplotlib import pyplot as plt

from selfsup_fastai.errors import SelfsupError, UnknownNameError, unknown
from selfsup_fastai.messages import quiet, say
from selfsup_fastai.pictures import draw, grid_axes, side_by_side


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
