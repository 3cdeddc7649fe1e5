"""`UnlabeledDataLoaders`: what comes out, pixel by pixel, against PIL and NumPy alone."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import albumentations as A
import fastai.callback.schedule  # noqa: F401  (brings lr_find)
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip, Resize, ResizeMethod, aug_transforms
from fasttransform import Transform
from PIL import Image
from torch import nn

from selfsup_fastai.data.cache import PixelCache
from selfsup_fastai.data.images import UnlabeledDataLoaders, auto_workers, split
from selfsup_fastai.errors import DataError
from selfsup_fastai.pretext.learner import pretext_learner
from tests.conftest import write_images

RNG = np.random.default_rng(3)


def loaders(source, size=32, num_workers=0, **kwargs):
    make = UnlabeledDataLoaders.from_array if isinstance(source, np.ndarray) else UnlabeledDataLoaders.from_folder
    return make(source, size=size, num_workers=num_workers, device="cpu", **kwargs)


def batches(dl):
    """One pass, as a list of plain tensors."""
    return [b[0].as_subclass(torch.Tensor).clone() for b in dl]


def in_order(dl):
    """(N, C, H, W) of all images of a loader that does not shuffle."""
    return torch.cat(batches(dl))


def center(image, size):
    """The square in the middle of a PIL image whose shorter side was resized to `size`."""
    shorter = min(image.size)
    wide, high = round(image.width * size / shorter), round(image.height * size / shorter)
    left, top = (wide - size) // 2, (high - size) // 2
    return image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))


def as_tensor(images):
    """PIL images of one mode to (N, C, H, W) in [0, 1]."""
    array = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / np.float32(255)
    return torch.from_numpy(array if array.ndim == 4 else array[..., None]).permute(0, 3, 1, 2)


def noise(n, channels=3, size=(32, 32)):
    """`n` different images of noise, uint8 (N, H, W[, C])."""
    return np.random.default_rng(n).integers(0, 256, (n, *size, channels)[: 4 if channels == 3 else 3], dtype=np.uint8)


# ---- pixels


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_validation_sees_the_center_of_each_image_resized(tmp_path, channels, mode):
    write_images(tmp_path, 12, (38, 50), channels)
    dls = loaders(tmp_path, valid_pct=0.5, bs=4)
    files = list(dls.valid_ds.items)
    expected = as_tensor([center(Image.open(f).convert(mode), 32) for f in files])
    found = in_order(dls.valid)
    assert found.shape == (6, channels, 32, 32)
    assert torch.equal(found, expected)
    assert [len(b) for b in batches(dls.valid)] == [4, 2]


def test_training_sees_a_window_of_each_image_that_moves_from_epoch_to_epoch(tmp_path):
    tall = noise(9, size=(64, 32))
    for i, pixels in enumerate(tall):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    dls = loaders(tmp_path, bs=8)
    seen = Counter()
    for _ in range(3):
        (x,) = batches(dls.train)
        for window in (x * 255).round().byte().permute(0, 2, 3, 1).numpy():
            places = [(i, top) for i in range(9) for top in range(33) if (tall[i, top : top + 32] == window).all()]
            assert len(places) == 1
            seen[places[0]] += 1
    assert {i for i, _ in seen} == {int(f.stem) for f in dls.train_ds.items}
    assert len({top for _, top in seen}) > 8


def test_height_and_width_may_differ(tmp_path):
    pixels = noise(4, size=(32, 64))
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    dls = loaders(tmp_path, size=(np.int64(16), 32), valid_pct=0.5)
    expected = [Image.open(f).resize((32, 16), Image.Resampling.BILINEAR) for f in dls.valid_ds.items]
    assert torch.equal(in_order(dls.valid), as_tensor(expected))


def deep_folder(folder, with_color=False):
    """Grey files of 8 bits, 16 bits and floats, and if asked a color one; what they hold, in [0, 1], by name."""
    folder.mkdir(exist_ok=True)
    truth = {}
    for i in range(4):
        eight = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
        sixteen = RNG.integers(0, 65536, (32, 32)).astype(np.uint16)
        floats = RNG.random((32, 32)).astype(np.float32)
        Image.fromarray(eight).save(folder / f"{i}a.png")
        Image.fromarray(sixteen).save(folder / f"{i}b.png")
        Image.fromarray(floats).save(folder / f"{i}c.tiff")
        truth |= {f"{i}a.png": eight / 255, f"{i}b.png": sixteen / 65535, f"{i}c.tiff": floats}
    if with_color:
        color = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(color).save(folder / "color.png")
        truth["color.png"] = color / 255
    return truth


@pytest.mark.parametrize("num_workers", [0, 2])
def test_grey_files_of_any_depth_make_one_batch_and_keep_their_depth(tmp_path, num_workers):
    truth = deep_folder(tmp_path)
    dls = loaders(tmp_path, valid_pct=0.75, num_workers=num_workers)
    expected = np.stack([truth[f.name] for f in dls.valid_ds.items])[:, None]
    found = in_order(dls.valid)
    assert found.shape == (9, 1, 32, 32)
    np.testing.assert_allclose(found, expected, atol=0.51 / 65535)  # floats are kept as 16 bits
    names = [f.name for f in dls.train_ds.items]
    (x,) = batches(dls.train)
    distances = np.abs(x.numpy()[:, None] - np.stack([truth[n] for n in names])[None, :, None]).max((2, 3, 4))
    assert sorted(distances.argmin(1)) == [0, 1, 2]
    assert distances.min(1).max() < 0.51 / 65535


def test_deep_files_beside_a_color_one_are_rounded_to_8_bits(tmp_path):
    truth = deep_folder(tmp_path, with_color=True)
    dls = loaders(tmp_path, valid_pct=0.75)
    expected = [np.rint(truth[f.name] * 255) / 255 for f in dls.valid_ds.items]
    expected = np.stack([e if e.ndim == 3 else np.stack([e] * 3, axis=-1) for e in expected]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(in_order(dls.valid), expected, atol=1e-6)


def test_deep_images_are_resized_as_floats(tmp_path):
    values = RNG.integers(0, 65536, (4, 48, 60)).astype(np.uint16)
    for i, image in enumerate(values):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    dls = loaders(tmp_path, size=20, valid_pct=0.5)
    images = [Image.fromarray(values[int(f.stem)].astype(np.float32)) for f in dls.valid_ds.items]
    expected = np.stack([np.asarray(center(image, 20)) / 65535 for image in images])[:, None]
    np.testing.assert_allclose(in_order(dls.valid), expected, atol=1e-5)


def test_large_jpegs_are_decoded_smaller_but_look_the_same(tmp_path):
    for i, image in enumerate(write_images(tmp_path / "png", 4, (500, 700)).iterdir()):
        Image.open(image).save(tmp_path / f"{i}.jpg", quality=95)
    dls = loaders(tmp_path, size=32, valid_pct=0.5, recurse=False)
    assert dls.valid_ds.tls[0][0].size == (45, 32)
    tfms = loaders(tmp_path, size=32, valid_pct=0.5, recurse=False, item_tfms=Resize(40))
    assert tfms.valid_ds.tls[0][0].size == (175, 125)  # a quarter: the smallest scale with both sides at least 2 x 32
    expected = as_tensor([center(Image.open(f), 32) for f in dls.valid_ds.items])
    assert (in_order(dls.valid) - expected).abs().mean() < 0.01


def test_a_photo_is_turned_as_exif_says(tmp_path):
    pixels = noise(2, size=(40, 60))
    exif = Image.Exif()
    exif[0x112] = 6
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png", exif=exif)
    dls = loaders(tmp_path, size=None, item_tfms=Resize((60, 40), method=ResizeMethod.Squish))
    (file,) = dls.valid_ds.items
    upright = np.rot90(pixels[int(file.stem)], -1)
    assert torch.equal(in_order(dls.valid), as_tensor([upright]))
    assert dls.items_df[["width", "height"]].to_numpy().tolist() == [[40, 60]] * 2


# ---- channels, report, items


@pytest.mark.parametrize(("colored", "n_in", "channels"), [(0, None, 1), (1, None, 3), (0, 3, 3), (1, 1, 1)])
def test_one_channel_when_all_are_grey_unless_told(tmp_path, colored, n_in, channels):
    grey, color = noise(5, 1), noise(1)
    for i, image in enumerate(grey):
        rgb = Image.merge("RGB", [Image.fromarray(image)] * 3)  # grey, though the file says RGB
        (rgb if i % 2 else rgb.convert("L")).save(tmp_path / f"{i}.png")
    if colored:
        Image.fromarray(color[0]).save(tmp_path / "color.png")
    dls = loaders(tmp_path, n_in=n_in)
    assert batches(dls.train)[0].shape[1] == channels
    assert dls.items_df["channels"].tolist() == [1] * 5 + [3] * colored


def hostile(folder):
    """A folder in which 5 files can be used; the others, by name, with the reason why not."""
    write_images(folder / "deep" / "er", 4)
    good = (folder / "deep" / "er" / "0000.png").read_bytes()
    (folder / "deep" / "no_suffix").write_bytes(good)
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("not an image")
    (folder / "page.png").write_text("<html>not found</html>")
    Image.new("L", (1, 900)).save(folder / "line.png")
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    (folder / "deep" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return {
        "bomb.png": "too_large",
        "cut.png": "truncated",
        "empty.jpg": "empty",
        "gone.png": "missing",
        "line.png": "too_small",
        "notes.txt": "not_an_image",
        "page.png": "not_an_image",
    }


def test_what_cannot_be_read_is_reported_and_the_rest_is_used(tmp_path, capsys):
    reasons = hostile(tmp_path)
    dls = loaders(tmp_path)
    assert list(dls.report.columns) == ["file", "code", "message"]
    assert {f.name: code for f, code in zip(dls.report["file"], dls.report["code"])} == reasons
    assert dls.report["message"].str.len().min() > 20
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "left out" in line] == [
        "7 of 12 files left out: 2 not an image, 1 too large, 1 truncated, 1 empty, 1 missing, 1 too small "
        "(dls.report lists them)"
    ]
    assert said[-1] == "5 images (4 to train, 1 to validate), 3 channels."
    assert not any(name in line for line in said for name in reasons)
    names = sorted(f.name for f in dls.items_df["file"])
    assert names == ["0000.png", "0001.png", "0002.png", "0003.png", "no_suffix"]
    assert [len(x) for x in batches(dls.train)] == [4]


def test_items_df_has_a_row_for_each_image_and_says_where_it_is_used(tmp_path):
    write_images(tmp_path, 8, (20, 30))
    dls = loaders(tmp_path, valid_pct=0.25)
    table = dls.items_df
    assert len(table) == 8 and len(dls.report) == 0
    assert (table[["width", "height"]].to_numpy() == [30, 20]).all()
    assert table["file"][table["is_valid"]].tolist() == list(dls.valid_ds.items)
    assert table["file"][~table["is_valid"]].tolist() == list(dls.train_ds.items)


# ---- errors


def nothing_to_read(folder):
    (folder / "a.txt").write_text("a")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "There is no file in the folder"),
        (lambda folder: write_images(folder / "below", 2) and None, r"no file in the folder .* \(recurse=False\)"),
        (nothing_to_read, "Found no image to read; at least two are needed.* 1 files were left out: .*not_an_image"),
        (lambda folder: write_images(folder, 1) and None, "Found one image.*from_single_image"),
    ],
)
def test_a_folder_with_too_little_in_it_is_explained(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(DataError, match=message):
        loaders(tmp_path, recurse="below" not in os.listdir(tmp_path))


def test_a_path_that_is_no_folder_is_explained(tmp_path, color_folder):
    with pytest.raises(DataError, match=r"no folder .*missing"):
        loaders(tmp_path / "missing")
    with pytest.raises(DataError, match=r"is a file, but a folder was expected.*from_single_image"):
        loaders(color_folder / "0000.png")
    with pytest.raises(DataError, match="got NoneType"):
        loaders(None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": 0}, "size is the side .*got 0"),
        ({"size": 7}, "from 8 up.*got 7"),
        ({"size": "128"}, "got '128'"),
        ({"size": 64.0}, "got 64.0"),
        ({"size": (64, 64, 3)}, r"got \(64, 64, 3\)"),
        ({"size": ()}, r"got \(\)"),
        ({"bs": 0}, "bs is the batch size.*got 0"),
        ({"bs": 2.5}, "got 2.5"),
        ({"valid_pct": 1}, "valid_pct is the share.*got 1"),
        ({"valid_pct": -0.1}, "got -0.1"),
        ({"valid_pct": "0.1"}, "got '0.1'"),
        ({"seed": -1}, "seed is an integer.*got -1"),
        ({"n_in": 2}, r"n_in is 1 \(grey\).*got 2"),
        ({"num_workers": -1}, "num_workers is the number of processes.*got -1"),
    ],
)
@pytest.mark.parametrize("make", ["from_folder", "from_files", "from_array", "from_single_image"])
def test_settings_that_make_no_sense_are_refused_before_any_file_is_read(make, setting, message, monkeypatch):
    monkeypatch.setattr("selfsup_fastai.data.usable.check_files", pytest.fail)
    monkeypatch.setattr("selfsup_fastai.data.images.find_files", pytest.fail)
    monkeypatch.setattr("selfsup_fastai.data.images.picture", pytest.fail)
    with pytest.raises(DataError, match=message):
        getattr(UnlabeledDataLoaders, make)([], **setting)
    with pytest.raises(TypeError, match="shuffle"):
        getattr(UnlabeledDataLoaders, make)([], shuffle=True)


def test_other_sources_that_cannot_be_used_are_explained(color_folder):
    make = UnlabeledDataLoaders
    for given in str(color_folder), color_folder, None, 3:
        with pytest.raises(DataError, match=f"a list of files, got {type(given).__name__}.*from_folder"):
            make.from_files(given)
    with pytest.raises(DataError, match=r"pandas DataFrame, got list"):
        make.from_df(["a.png"])
    frame = pd.DataFrame({"name": ["a.png"], "sex": ["f"]})
    for column in "file", 2, -1:
        with pytest.raises(DataError, match=f"no column {column!r}; its columns: name, sex"):
            make.from_df(frame, fn_col=column)
    with pytest.raises(DataError, match="1 of 2 rows hold no file name"):
        make.from_df(pd.DataFrame({"name": ["a.png", None]}))
    with pytest.raises(DataError, match=r"Found no image to read.*1 missing"):
        make.from_df(frame)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 16, 16), np.float32), "uint8 NumPy array, got dtype float32.*by 255"),
        (torch.zeros(4, 16, 16, dtype=torch.uint8), "got Tensor"),
        (np.zeros((16, 16), np.uint8), r"got shape \(16, 16\)"),
        (np.zeros((4, 3, 16, 16), np.uint8), r"C of 1 or 3, got shape \(4, 3, 16, 16\)"),
        (np.zeros((4, 0, 16), np.uint8), r"got shape \(4, 0, 16\)"),
        (np.zeros((0, 16, 16), np.uint8), "Found no image"),
        (
            np.zeros((480, 640, 3), np.uint8),
            r"many images, got shape \(480, 640, 3\).*from_single_image\(Image.fromarray",
        ),
        (np.zeros((48, 64, 4), np.uint8), r"many images, got shape \(48, 64, 4\)"),
        (np.zeros((5, 1, 16), np.uint8), "at least 2 x 2 pixels, got 1 x 16"),
        (np.zeros((5, 16, 1, 3), np.uint8), "at least 2 x 2 pixels, got 16 x 1"),
    ],
)
def test_arrays_that_are_no_images_are_explained(array, message):
    with pytest.raises(DataError, match=message):
        UnlabeledDataLoaders.from_array(array)


# ---- batches: size, split, repetition


def test_the_batch_is_cut_to_the_images_and_that_is_said(capsys):
    dls = loaders(noise(10), bs=64)
    said = capsys.readouterr().err
    assert "Batch size 64 cut to 9: there are no more training images." in said
    assert "10 images (9 to train, 1 to validate), 3 channels." in said
    assert (dls.train.bs, len(dls.train), len(batches(dls.train)), len(dls.valid)) == (9, 1, 1, 1)


def test_the_last_short_batch_is_dropped_in_training_only():
    dls = loaders(noise(20), bs=4, valid_pct=0.5)
    assert [len(x) for x in batches(dls.train)] == [4, 4]
    assert [len(x) for x in batches(dls.valid)] == [4, 4, 2]


@pytest.mark.parametrize(
    ("n", "valid_pct", "n_valid"), [(100, 0.1, 10), (100, 0, 1), (2, 0.9, 1), (10, 0.99, 9), (7, 0.2, 1), (9, 0.5, 4)]
)
def test_the_split_is_by_seed_alone_and_leaves_nobody_out(n, valid_pct, n_valid):
    train, valid = split(n, valid_pct, 42)
    assert sorted(train + valid) == list(range(n))
    assert len(valid) == n_valid
    set_seed(1)
    assert split(n, valid_pct, 42) == (train, valid)
    if n == 100 and n_valid > 1:
        assert split(n, valid_pct, 43)[1] != valid


def test_the_split_of_loaders_follows_their_seed(color_folder):
    def valid_files(seed):
        return list(loaders(color_folder, seed=seed).valid_ds.items)

    assert valid_files(1) == valid_files(1) != valid_files(2)


def moving():
    """Loaders whose images are cut, flipped and jittered at random: item level by Python's `random`, all of it."""
    compose = A.Compose([A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=1.0)])
    return {"source": noise(40, size=(32, 48)), "size": 32, "bs": 6, "item_tfms": compose, "valid_pct": 0.2}


def epochs_of(num_workers, seed=5, n=2):
    set_seed(seed)
    dls = loaders(num_workers=num_workers, **moving())
    return [batches(dl) for _ in range(n) for dl in dls.loaders]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def test_the_number_of_workers_changes_nothing():
    alone, two = epochs_of(0), epochs_of(2)
    assert all(same(a, b) for a, b in zip(alone, two))


def test_epochs_differ_validation_repeats_and_the_seed_fixes_it_all():
    train, valid, train2, valid2 = epochs_of(0)
    assert same(valid, valid2)
    assert not same(train, train2)
    assert all(same(a, b) for a, b in zip(epochs_of(0), [train, valid, train2, valid2]))
    assert not same(epochs_of(0, seed=6)[0], train)


def test_two_workers_cut_different_windows():
    """The classic fault: workers that share one generator's state repeat each other's draws."""
    one = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (24, 1, 32))  # all alike: row number as brightness
    dls = loaders(one, bs=2, num_workers=2, size=32)
    for _ in range(2):
        tops = [round(float(image[0, 0, 0]) * 255) for x in batches(dls.train) for image in x]
        assert len(tops) == 22
        assert len(set(tops)) > 10
        pairs = [tuple(tops[i : i + 2]) for i in range(0, 22, 2)]
        assert sum(a == b for a, b in zip(pairs[::2], pairs[1::2])) <= 1


def state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("make", [loaders, lambda *a, **k: loaders(*a, **{**k, "batch_tfms": aug_transforms()})])
def test_making_loaders_draws_one_number_each_from_pythons_random_and_nothing_else(make):
    set_seed(7)
    source = noise(12)
    before = state()
    first = make(source, item_tfms=A.HorizontalFlip())
    after = state()
    assert after[1:] == before[1:]
    random.setstate(before[0])
    for _ in first.loaders:
        random.getrandbits(62)
    assert random.getstate() == after[0]
    second = make(source)
    assert first.train.rng.getstate() != second.train.rng.getstate()  # so two learners shuffle differently
    at = random.getstate()
    batches(second.valid)
    assert random.getstate() == at  # seeding items leaves no trace


# ---- other sources


@pytest.mark.parametrize("shape", [(10, 16, 16), (10, 16, 16, 1), (10, 16, 16, 3)])
def test_an_array_comes_out_as_it_went_in(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    dls = loaders(array, size=16, valid_pct=0.3)
    expected = array.reshape(10, 16, 16, -1).transpose(0, 3, 1, 2) / np.float32(255)
    at = dls.items_df["item"][dls.items_df["is_valid"]].tolist()
    np.testing.assert_array_equal(in_order(dls.valid), expected[at])
    (x,) = batches(dls.train)
    rest = [i for i in range(10) if i not in at]
    assert sorted(i for image in x.numpy() for i in rest if np.array_equal(image, expected[i])) == rest


@pytest.mark.parametrize("cache", [True, "ram", False])
def test_pictures_that_are_in_no_file_are_put_in_none(tmp_path, monkeypatch, cache, picture):
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "cache"))
    for dls in loaders(noise(6, size=(40, 48)), cache=cache), crops(picture, cache=cache):
        assert dls.train.is_fast == bool(cache)
        assert not (tmp_path / "cache").exists()


def test_noise_in_the_colors_counts_at_the_scale_that_is_used_with_and_without_kept_pixels(tmp_path):
    """Red and green in turns within blocks of 8 pixels: at an eighth of the scale they are one grey."""
    image = np.full((512, 512, 3), 128, np.uint8)
    image[:, ::2, 0], image[:, 1::2, 0] = 150, 106
    for i in range(2):
        Image.fromarray(image).save(tmp_path / f"{i}.jpg", quality=100, subsampling=0)
    for size in (32, 256, 32):
        found = [loaders(tmp_path, size, cache=cache).valid.one_batch()[0].shape[1] for cache in (True, False)]
        assert found == ([1, 1] if size == 32 else [3, 3])


def test_an_array_of_three_equal_channels_is_grey():
    grey = np.repeat(noise(4, 1)[..., None], 3, axis=-1)
    dls = loaders(grey, valid_pct=0.5)
    expected = grey[dls.items_df["is_valid"], ..., 0][:, None] / np.float32(255)
    np.testing.assert_array_equal(in_order(dls.valid), expected)
    grey[3, 5, 5, 0] ^= 1
    assert in_order(loaders(grey).valid).shape[1] == 3


def test_from_df_and_from_files_read_what_they_are_given(color_folder):
    names = [f"{i:04d}" for i in (5, 9, 2, 40)]
    frame = pd.DataFrame({"age": range(4), "scan": names})
    settings = {"size": 40, "num_workers": 0, "device": "cpu", "valid_pct": 0.5}
    files = [color_folder / f"{name}.png" for name in names]
    expected = as_tensor([Image.open(f) for f in files])
    for fn_col in "scan", 1:
        dls = UnlabeledDataLoaders.from_df(frame, color_folder, fn_col=fn_col, suff=".png", **settings)
        assert dls.items_df["file"].tolist() == files
        assert torch.equal(in_order(dls.valid), expected[dls.items_df["is_valid"].tolist()])
    given = UnlabeledDataLoaders.from_files((str(f) for f in files), **settings)
    assert torch.equal(in_order(given.valid), in_order(dls.valid))


def test_missing_files_of_a_table_are_reported(color_folder):
    frame = pd.DataFrame(["0000.png", "none.png", "0001.png"])
    dls = UnlabeledDataLoaders.from_df(frame, color_folder, size=32, num_workers=0)
    assert dls.report[["file", "code"]].to_numpy().tolist() == [[color_folder / "none.png", "missing"]]
    assert len(dls.items_df) == 2


def test_new_images_go_through_a_test_loader(color_folder):
    dls = loaders(color_folder)
    file = color_folder / "0003.png"
    expected = as_tensor([center(Image.open(file), 32)])
    for source in file, str(file), file.read_bytes(), np.asarray(Image.open(file)), Image.open(file):
        assert torch.equal(in_order(dls.test_dl([source])), expected)


def test_bare_albumentations_and_fastai_transforms_are_taken(tmp_path):
    write_images(tmp_path, 6)
    flip = A.Compose([A.HorizontalFlip(p=1.0)])
    dls = loaders(tmp_path, item_tfms=flip, batch_tfms=Flip(p=1.0), valid_pct=0.5)
    known = {f: as_tensor([Image.open(f)])[0] for f in dls.train_ds.items}
    (x,) = batches(dls.train)  # flipped twice: by each once
    assert all(any((image - k).abs().max() < 1e-4 for k in known.values()) for image in x)
    dls = loaders(tmp_path, item_tfms=[flip], valid_pct=0.5)
    (x,) = batches(dls.train)
    assert all(any(torch.equal(image.flip(-1), k) for k in known.values()) for image in x)
    expected = as_tensor([Image.open(f) for f in dls.valid_ds.items])
    assert torch.equal(in_order(dls.valid), expected)  # training only


def test_without_a_size_the_images_stay_as_they_are(tmp_path):
    write_images(tmp_path, 4, (20, 28))
    dls = loaders(tmp_path, size=None, valid_pct=0.5)
    assert torch.equal(in_order(dls.valid), as_tensor([Image.open(f) for f in dls.valid_ds.items]))


def test_show_batch_draws_deep_and_color_images(tmp_path, color_folder):
    deep_folder(tmp_path)
    for dls in loaders(tmp_path), loaders(color_folder):
        x = batches(dls.train)[0]
        dls.train.show_batch(b=(x,), max_n=4)
        from matplotlib import pyplot as plt

        shown = [np.asarray(ax.get_images()[0].get_array()) for ax in plt.gcf().axes if ax.get_images()]
        assert len(shown) >= 2
        np.testing.assert_allclose(shown[0].reshape(32, 32, -1) / 255, x[0].permute(1, 2, 0), atol=1 / 255)
        plt.close("all")


# ---- one picture


@pytest.fixture(scope="module")
def picture():
    """A picture of 120 x 200 pixels without dark places: 100 to 200."""
    coarse = np.random.default_rng(1).integers(100, 201, (12, 20, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((200, 120), Image.Resampling.BILINEAR)


def crops(picture, n=40, **kwargs):
    return UnlabeledDataLoaders.from_single_image(picture, n=n, size=24, num_workers=0, device="cpu", **kwargs)


def test_crops_of_one_picture_are_fixed_different_and_hold_its_colors_only(picture, tmp_path):
    picture.save(tmp_path / "one.png")
    dls = crops(tmp_path / "one.png", valid_pct=0.5)
    assert len(dls.items_df) == 40
    first = in_order(dls.valid)
    assert first.shape == (20, 3, 24, 24)
    assert torch.equal(in_order(crops(picture, valid_pct=0.5).valid), first)
    assert len({image.numpy().tobytes() for image in first}) == 20
    assert first.min() >= 99 / 255 and first.max() <= 201 / 255  # no black corners, nothing made up
    assert not torch.equal(in_order(crops(picture, valid_pct=0.5, seed=1).valid), first)


def test_crops_are_turned_sheared_and_of_many_sizes():
    """On ramps the matrix of each crop can be read from its slopes: source pixels per crop pixel."""
    ramp = np.stack([*np.meshgrid(np.arange(250), np.arange(250)), np.zeros((250, 250))], axis=-1).astype(np.uint8)
    dls = UnlabeledDataLoaders.from_single_image(Image.fromarray(ramp), n=200, size=96, valid_pct=0.99, device="cpu")
    middle = in_order(dls.valid)[:, :2, 32:64, 32:64] * 255  # the reflected borders are outside
    at = torch.arange(32.0) - 15.5
    scale = (at**2).sum() * 32
    a, d = ((middle * at).sum((2, 3)) / scale).T  # d red / dx, d green / dx
    b, e = ((middle * at[:, None]).sum((2, 3)) / scale).T  # d red / dy, d green / dy
    pixel = (a * e - b * d).clamp(min=0).sqrt()
    share = (pixel * 136 / 125) ** 2  # the larger square of 136 pixels is turned, and 96 of it are kept
    turn = torch.atan2(d, a).rad2deg()
    shear = torch.atan2((b * a + e * d) / (a**2 + d**2).sqrt(), pixel**2 / (a**2 + d**2).sqrt()).rad2deg()
    large = share > 0.1  # slopes of tiny crops are too small to be read from 8 bits
    assert share.min() < 0.05 and 0.95 < share.max() < 1.05
    assert share.mean() == pytest.approx(0.5, abs=0.08)
    for angle in turn[large], shear[large]:
        assert angle.abs().max() < 32
        assert angle.min() < -25 and angle.max() > 25
        assert abs(angle.mean()) < 5
    places = middle.mean((2, 3))
    assert places.min() < 60 and places.max() > 190


def test_crops_are_the_same_in_every_epoch_and_with_workers(picture):
    dls = crops(picture, n=12, bs=11)
    two = UnlabeledDataLoaders.from_single_image(picture, n=12, size=24, bs=11, num_workers=2, device="cpu")
    passes = [batches(dls.train)[0], batches(dls.train)[0], batches(two.train)[0]]
    known = [{image.numpy().tobytes() for image in x} for x in passes]
    assert len(known[0]) == 11
    assert known[0] == known[1] == known[2]


def test_crops_of_a_deep_picture_share_one_scale():
    """A dark crop of a 16-bit picture must stay dark: scales are told from the whole."""
    dark = np.full((80, 80), 100, np.uint16)  # 0.15 % of the range
    dark[0, 0] = 65535
    dls = crops(Image.fromarray(dark), n=30, valid_pct=0.5)
    x = in_order(dls.valid)
    assert x.shape[1] == 1
    assert abs(float(x.median()) - 100 / 65535) < 1e-5
    assert in_order(crops(Image.fromarray(dark), n=4, n_in=3).valid).shape[1] == 3


def test_a_picture_that_is_too_small_or_missing_is_explained(tmp_path, picture):
    with pytest.raises(DataError, match="64 x 63 pixels is too small"):
        crops(Image.new("L", (64, 63)))
    with pytest.raises(DataError, match="does not exist"):
        crops(tmp_path / "none.png")
    with pytest.raises(DataError, match=r"n is the number of crops.*got 1"):
        crops(picture, n=1)


# ---- kept pixels: the same images as from files


def save_all(folder, arrays, suffix=".png"):
    """Arrays or PIL images as files, in order; their folder."""
    folder.mkdir()
    for i, image in enumerate(arrays):
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(folder / f"{i:03d}{suffix}")
    return folder


def of_shapes(*shapes):
    rng = np.random.default_rng(8)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def turned(folder):
    """JPEGs with each EXIF orientation, not square."""
    folder.mkdir()
    for i, image in enumerate(of_shapes(*[(30, 50, 3)] * 16)):
        exif = Image.Exif()
        exif[274] = i % 8 + 1
        Image.fromarray(image).save(folder / f"{i:03d}.jpg", exif=exif, quality=95)
    return folder


def of_depths(folder):
    """Grey of 8 and 16 bits and floats."""
    folder.mkdir()
    rng = np.random.default_rng(8)
    for i in range(12):
        values, shape = rng.random((20 + i, 50), dtype=np.float32), f"{i:03d}"
        deep = {0: (values * 255).astype(np.uint8), 1: (values * 65535).astype(np.uint16)}.get(i % 3, values)
        Image.fromarray(deep).save(folder / f"{shape}.{'tif' if i % 3 == 2 else 'png'}")
    return folder


COLORS = [(40, 40, 3)] * 12
SHAPES = [(30, 60, 3), (60, 30, 3), (10, 100, 3), (100, 10, 3), (24, 40, 3), (32, 32, 3)] * 2
ROADS = {
    "color": (lambda f: save_all(f, of_shapes(*COLORS)), {}),
    "grey": (lambda f: save_all(f, of_shapes(*[(40, 50)] * 12)), {}),
    "grey as color": (lambda f: save_all(f, of_shapes(*[(40, 50)] * 12)), {"n_in": 3}),
    "color as grey": (lambda f: save_all(f, of_shapes(*SHAPES)), {"n_in": 1}),
    "shapes": (lambda f: save_all(f, of_shapes(*SHAPES)), {}),
    "not square": (lambda f: save_all(f, of_shapes(*SHAPES)), {"size": (24, 40)}),
    "grey among color": (lambda f: save_all(f, of_shapes(*[(40, 50), *SHAPES[:2]] * 4)), {}),
    "depths": (of_depths, {}),
    "depths as color": (of_depths, {"n_in": 3}),
    "depths among color": (lambda f: save_all(of_depths(f) / "more", of_shapes(*COLORS)).parent, {}),
    "turned": (turned, {}),
    "array": (lambda f: np.stack(of_shapes(*[(20, 50, 3)] * 12)), {}),
    "grey array": (lambda f: np.stack(of_shapes(*[(50, 20)] * 12)), {}),
}


def two_epochs(dls):
    """All batches of two epochs and of the validation images, as `dls` draws them after a seed."""
    return [b for dl in (dls.train, dls.train, dls.valid) for b in batches(dl)]


def by_road(make, road):
    """What `make(cache=...)` gives by a road: from files, memory, disk, or a device."""
    set_seed(11)
    dls = make(cache=True if road == "device" else road)
    for dl in dls.loaders:
        assert dl.is_fast == (road is not False)
        if road == "device":
            dl.store = dl.store.on_device(torch.device("cpu"))
    return dls


@pytest.mark.parametrize("kind", ROADS)
def test_with_and_without_a_cache_images_order_and_pixels_are_equal(tmp_path, kind):
    fill, settings = ROADS[kind]
    source, settings = fill(tmp_path / "images"), {"size": 16, "bs": 4, "valid_pct": 0.25, **settings}

    def make(**more):
        return loaders(source, **{**settings, **more})

    truth = two_epochs(by_road(make, False))
    n = len(truth[0])
    assert not torch.equal(truth[0], truth[len(truth) // 2]) and n == 4
    for road in True, True, "ram", "device":  # decoded, found again
        found = two_epochs(by_road(make, road))
        assert len(found) == len(truth) and all(torch.equal(a, b) for a, b in zip(found, truth)), road
    set_seed(11)
    assert same(two_epochs(make(cache=False, num_workers=2)), truth)


def test_tables_and_crops_of_one_picture_are_equal_by_both_roads(tmp_path):
    folder = save_all(tmp_path / "images", of_shapes(*SHAPES))
    df = pd.DataFrame({"name": [f.name for f in sorted(folder.iterdir())][::-1]})
    large = Image.fromarray(of_shapes((200, 300, 3))[0])
    kwargs = {"size": 16, "bs": 4, "device": "cpu", "num_workers": 0, "valid_pct": 0.25}
    for make in (
        lambda **k: UnlabeledDataLoaders.from_df(df, folder, **kwargs, **k),
        lambda **k: UnlabeledDataLoaders.from_files(sorted(folder.iterdir()), **kwargs, **k),
        lambda **k: UnlabeledDataLoaders.from_single_image(large, n=24, **kwargs, **k),
    ):
        truth = two_epochs(by_road(make, False))
        for road in True, "ram", "device":
            assert same(two_epochs(by_road(make, road)), truth)


@pytest.mark.parametrize("n_in", [None, 1])
def test_pretext_batches_and_losses_are_equal_by_both_roads(tmp_path, n_in):
    source = save_all(tmp_path / "images", of_shapes(*SHAPES))
    seen = []
    for cache in False, True, "ram":
        set_seed(3)
        dls = loaders(source, size=32, bs=4, valid_pct=0.25, n_in=n_in, cache=cache)
        learn = pretext_learner(dls, "rotation", "resnet10t")
        assert learn.dls.train.is_fast == learn.dls.valid.is_fast == (cache is not False)
        shown = [t.clone() for dl in learn.dls.loaders for b in dl for t in b]
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
        seen.append((shown, learn.recorder.values))
    for shown, values in seen[1:]:
        assert len(shown) == len(seen[0][0]) and all(torch.equal(a, b) for a, b in zip(shown, seen[0][0]))
        assert values == seen[0][1]


def test_random_transforms_of_items_take_the_slow_road_and_that_is_said_once(tmp_path, capsys):
    source = save_all(tmp_path / "images", of_shapes(*COLORS))
    seen = []
    for cache in True, "ram", False:
        set_seed(2)
        dls = loaders(source, size=16, bs=4, cache=cache, item_tfms=A.HorizontalFlip(p=0.5))
        assert not dls.train.is_fast and dls.train.store is None
        assert capsys.readouterr().err.count("decoded anew in every epoch") == (cache is not False)
        seen.append(two_epochs(dls))
    assert same(seen[0], seen[2]) and same(seen[1], seen[2])


def test_batch_transforms_of_the_user_work_on_kept_pixels(tmp_path):
    source = save_all(tmp_path / "images", of_shapes(*COLORS))

    def make(cache):
        return loaders(source, size=16, bs=4, cache=cache, batch_tfms=Flip(p=0.5))

    truth = two_epochs(by_road(make, False))
    assert same(two_epochs(by_road(make, True)), truth)


# ---- files that change while they are used


def test_files_that_change_or_vanish_while_training_do_not_disturb_kept_pixels(tmp_path):
    for cache in True, "ram":
        source = save_all(tmp_path / str(cache), of_shapes(*COLORS))
        dls = loaders(source, size=16, bs=4, valid_pct=0.5, cache=cache)
        before = in_order(dls.valid)
        gone, other, *_ = dls.valid_ds.items
        gone.unlink()
        Image.new("RGB", (9, 9)).save(other)
        assert torch.equal(in_order(dls.valid), before)  # a warning would be an error
        dls = loaders(source, size=16, bs=4, valid_pct=0.5, cache=cache)
        assert dls.items_df["width"].tolist().count(9) == 1 and len(dls.items_df) == 11


def test_a_cache_that_is_removed_while_training_does_not_disturb_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "cache"))
    dls = loaders(save_all(tmp_path / "images", of_shapes(*SHAPES)), size=16, bs=4, valid_pct=0.5)
    before = in_order(dls.valid)
    with PixelCache() as cache:
        assert cache.clear() > 0 and cache.total() == 0
    assert torch.equal(in_order(dls.valid), before)


def test_without_room_images_come_from_the_files_and_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "cache"))
    source = save_all(tmp_path / "images", of_shapes(*SHAPES))

    def make(**kwargs):
        set_seed(11)
        return loaders(source, size=16, bs=4, valid_pct=0.25, **kwargs)

    truth = two_epochs(make(cache=False))
    capsys.readouterr()
    dls = make(max_gb=1e-6)
    assert not dls.train.is_fast and same(two_epochs(dls), truth)
    assert capsys.readouterr().err.count("Images are decoded anew in every epoch.") == 1
    assert not list((tmp_path / "cache" / "pixels-1").iterdir())


def test_a_device_is_named_only_where_there_is_one(color_folder, capsys):
    dls = loaders(color_folder, cache="device")
    assert dls.train.is_fast and "cache='device' is for GPUs" in capsys.readouterr().err


# ---- what happens later, and elsewhere


@pytest.mark.parametrize("n_in", [1, 3])
def test_a_file_that_breaks_later_costs_a_grey_image_and_a_warning(tmp_path, n_in):
    write_images(tmp_path, 4, channels=n_in)
    dls = loaders(tmp_path, valid_pct=0.5, cache=False)
    whole = in_order(dls.valid)
    gone, cut = dls.valid_ds.items
    gone.unlink()
    with pytest.warns(UserWarning, match=r"cannot be read now \(missing\); a grey one stands in") as caught:
        x = in_order(dls.valid)
    assert len(caught) == 1 and gone.name not in str(caught[0].message)
    assert torch.equal(x[0], torch.full((n_in, 32, 32), 128 / 255))
    assert torch.equal(x[1], whole[1])
    cut.write_bytes(cut.read_bytes()[:60])
    with pytest.warns(UserWarning) as caught:
        assert (in_order(dls.valid) == 128 / 255).all()
    assert ["(missing)" in str(w.message) for w in caught] == [True, False]


def test_the_grey_image_fits_where_nothing_resizes(tmp_path):
    write_images(tmp_path, 4, (20, 28))
    dls = loaders(tmp_path, size=None, valid_pct=0.5)
    dls.valid_ds.items[0].unlink()
    with pytest.warns(UserWarning, match="missing"):
        assert in_order(dls.valid).shape == (2, 3, 20, 28)


def listing(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in [folder, *folder.rglob("*")]}


class WithMean(Transform):
    """Makes the mean of each image its target, so that there is something to learn."""

    order = 60

    def __call__(self, b, **kwargs):
        return (b[0], b[0].mean((1, 2, 3)))


def test_nothing_is_written_into_the_folder_of_images(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", 12)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    images.chmod(0o555)
    before = listing(images)
    dls = loaders(images, bs=2, batch_tfms=WithMean())
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 1)), loss_func=MSELossFlat())
    learn.lr_find(num_it=8, show_plot=False, suggest_funcs=None)
    learn.fit(1)
    learn.save("weights")
    learn.export("learner.pkl")
    assert listing(images) == before
    images.chmod(0o755)
    written = {p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()}
    assert written == {"learner.pkl", "models/weights.pth"}


def test_workers_are_used_where_there_is_work_for_them(monkeypatch):
    monkeypatch.setattr("selfsup_fastai.data.images.num_cpus", lambda: 16)
    assert auto_workers(5000, 32 * 32) == 0
    assert auto_workers(50_000, 32 * 32) == 8
    assert auto_workers(984, 214_000) == 0
    assert auto_workers(5000, 214_000) == 8
    monkeypatch.setattr("selfsup_fastai.data.images.num_cpus", lambda: 1)
    assert auto_workers(50_000, 214_000) == 0


# ---- real data


def test_nuclei_in_color_and_in_grey(shared_data):
    folder = shared_data("nuclei_dsb2018") / "nuclei"
    table = pd.read_csv(folder / "metadata.csv")
    settings = {"path": folder / "images", "suff": ".png", "size": 32, "valid_pct": 0.5}
    both = UnlabeledDataLoaders.from_df(table, num_workers=0, device="cpu", **settings)
    assert both.valid.one_batch()[0].shape[1] == 3
    assert (both.items_df["channels"] == table["kind"].map({"gray": 1, "colour": 3})).all()
    assert (both.items_df[["width", "height"]] == table[["width", "height"]]).all(axis=None)
    grey = UnlabeledDataLoaders.from_df(table[table["kind"] == "gray"], num_workers=0, device="cpu", **settings)
    expected = [center(Image.open(f).convert("L"), 32) for f in grey.valid_ds.items]
    assert torch.equal(in_order(grey.valid), as_tensor(expected))


USE_ALL = """
import json, os, resource, sys, warnings
warnings.simplefilter("error")
for kind, limit in (resource.RLIMIT_AS, 12 << 30), (resource.RLIMIT_CORE, 0):
    resource.setrlimit(kind, (limit, limit))
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*pin_memory.*")
from selfsup_fastai.data.images import UnlabeledDataLoaders
dls = UnlabeledDataLoaders.from_folder(sys.argv[1], size=64, num_workers=0, device="cpu")
seen = [sum(len(x) for x, in dl) for _ in range(2) for dl in dls.loaders]
ranges = [(float(x.min()), float(x.max()), x.dtype.is_floating_point) for x, in dls.valid]
status = dict(line.split(":") for line in open("/proc/self/status"))  # ru_maxrss would count those who started us
peaks = [int(status["VmHWM"].split()[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]
out = {"ok": len(dls.items_df), "left_out": len(dls.report), "seen": seen, "ranges": ranges, "peaks": peaks}
print(json.dumps({**out, "sizes": [len(dl.dataset) for dl in dls.loaders]}))
"""


@pytest.mark.slow
def test_a_folder_of_a_thousand_hostile_files_is_trained_on(shared_data):
    index = next(shared_data("odd_images").rglob("index.csv"))
    command = [sys.executable, "-c", USE_ALL, os.fspath(index.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, done.stderr[-3000:]
    out = json.loads(done.stdout)
    table = pd.read_csv(index)
    assert out["ok"] + out["left_out"] == len(table) + 1  # the index itself is no image
    assert out["ok"] > 700
    train, valid = out["sizes"]
    assert train + valid == out["ok"]
    assert out["seen"] == [train // 64 * 64, valid] * 2
    assert all(floating and 0 <= low <= high <= 1 for low, high, floating in out["ranges"])
    assert max(out["peaks"]) < 2 << 20  # KiB
