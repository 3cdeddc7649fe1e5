"""The size in which images are kept, against a plain transcription of the rule; and what is kept of their pixels."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from selfsup_fastai.data.covering import MAX_ASPECT, cover, covering_size, from_stored, to_stored

SIDES = (1, 2, 3, 7, 8, 31, 64, 100, 127, 128, 129, 1000, 4096)
WINDOWS = ((8, 8), (24, 40), (128, 128), (224, 96))


def transcribed(width, height, size):
    """The part that is kept, then the smaller factor by which both sides still reach the window's: exactly."""
    wide = min(width, MAX_ASPECT * height * size[1] // size[0])
    high = min(height, MAX_ASPECT * width * size[0] // size[1])
    wide, high = max(1, wide), max(1, high)
    factor = max(Fraction(size[1], wide), Fraction(size[0], high))
    return max(size[1], round(wide * factor)), max(size[0], round(high * factor))


@pytest.mark.parametrize("size", WINDOWS)
def test_one_side_is_exactly_the_windows_and_the_other_no_shorter(size):
    for width in SIDES:
        for height in SIDES:
            wide, high = covering_size(width, height, size)
            wanted = transcribed(width, height, size)
            assert abs(wide - wanted[0]) <= 1 and abs(high - wanted[1]) <= 1  # halves are rounded in floats
            assert wide >= size[1] and high >= size[0] and (wide == size[1] or high == size[0])


@pytest.mark.parametrize(
    ("image", "size", "wanted"),
    [
        ((640, 480), (128, 128), (171, 128)),
        ((480, 640), (128, 128), (128, 171)),
        ((128, 128), (128, 128), (128, 128)),
        ((10, 20), (128, 128), (128, 256)),  # small images are enlarged
        ((1000, 100), (10, 10), (40, 10)),  # a strip: its middle
        ((100, 1000), (10, 10), (10, 40)),
        ((1000, 100), (24, 40), (160, 24)),  # four times as long as the window, whatever the shape of that
        ((1, 4000), (8, 8), (8, 32)),
    ],
)
def test_sizes_by_hand(image, size, wanted):
    assert covering_size(*image, size) == wanted


def test_of_a_strip_the_middle_is_kept_and_squares_are_only_resized():
    strip = np.zeros((10, 100), np.uint8)
    strip[:, 30:70] = 200
    assert (np.asarray(cover(Image.fromarray(strip), (10, 10))) == 200).all()
    strip[:, 29], strip[:, 70] = 255, 255
    assert (np.asarray(cover(Image.fromarray(strip), (10, 10))) == 200).all()
    values = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    assert np.array_equal(cover(image, (8, 8)), image.resize((8, 8), Image.Resampling.BILINEAR))
    assert cover(image, (20, 20)) is image


def test_covering_twice_changes_nothing():
    rng = np.random.default_rng(1)
    for shape in ((30, 90), (90, 30), (17, 170), (8, 200), (40, 40)):
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        once = cover(image, (24, 16))
        assert np.array_equal(once, cover(once, (24, 16)))


def test_what_is_stored_comes_back_to_the_last_bit():
    rng = np.random.default_rng(2)
    for shape, channels in ((9, 7), 1), ((9, 7, 3), 3):
        values = rng.integers(0, 256, shape, dtype=np.uint8)
        stored = to_stored(Image.fromarray(values))
        assert stored.shape == (channels, 9, 7) and np.array_equal(from_stored(stored, channels), values)
    grey = rng.integers(0, 256, (9, 7), dtype=np.uint8)
    assert np.array_equal(from_stored(grey[None], 3), np.stack([grey] * 3, axis=-1))


def test_deep_images_keep_16_bits_and_are_rounded_as_rgb():
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = Image.fromarray(deep.astype(np.float32) / np.float32(257))
    stored = to_stored(image)
    assert stored.dtype == np.uint16 and np.array_equal(stored[0], deep)
    back = from_stored(stored, 1)
    assert back.mode == "F" and np.array_equal(back, np.asarray(image))
    rounded = np.rint(deep / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(from_stored(stored, 3)), np.stack([rounded] * 3, axis=-1))
    beyond = to_stored(Image.fromarray(np.array([[-3.0, 300.0]], np.float32)))  # as interpolation may overshoot
    assert beyond.tolist() == [[[0, 65535]]]
