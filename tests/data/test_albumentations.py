"""albumentations inside fastai loaders: the same pixels as called directly, ruled by Python's `random`."""

import os
import random
import subprocess
import sys

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from fastai.data.core import Datasets, TfmdDL
from fastai.data.transforms import ToTensor
from fastai.torch_core import set_seed
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage, PILImageBW, PILMask, TensorPoint
from fastcore.foundation import L
from fasttransform import Pipeline, Transform
from PIL import Image

from selfsup_fastai.data.albumentations import AlbumentationsTransform, is_albumentations, wrap_albumentations
from selfsup_fastai.errors import DataError

RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (24, 30, 3), dtype=np.uint8)
GREY = COLOR[..., 0]
DEEP = (RNG.random((24, 30)) * 255).astype(np.float32)


class PILMine(PILImage):
    """Somebody's own image type."""


def noisy() -> A.Compose:
    return A.Compose([A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=0.9), A.GaussNoise(p=0.9)])


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def train_call(tfm: Transform, x, seed: int | None = None):
    if seed is not None:
        random.seed(seed)
    return tfm(x, split_idx=0)


@pytest.mark.parametrize(
    "image", [PILImage.create(COLOR), PILImageBW.create(GREY), PILMine.create(COLOR), Image.fromarray(COLOR)]
)
def test_equals_calling_albumentations_directly_under_the_same_seed(image):
    random.seed(5)
    direct = noisy()
    seed = random.getrandbits(32)
    direct.set_random_state(np.random.default_rng(seed), random.Random(seed))
    expected = direct(image=np.array(image))["image"]
    out = train_call(AlbumentationsTransform(noisy()), image, seed=5)
    assert np.array_equal(pixels(out), expected) and not np.array_equal(expected, pixels(image))
    assert type(out) is type(image) and out.mode == image.mode


def test_the_seed_of_python_rules_the_draw():
    tfm, image = AlbumentationsTransform(noisy()), PILImage.create(COLOR)
    first, again, other = (pixels(train_call(tfm, image, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    random.seed(3)
    many = [pixels(train_call(tfm, image)).tobytes() for _ in range(10)]
    assert len(set(many)) == 10
    assert np.array_equal(pixels(image), COLOR)


def test_transforms_in_a_compose_draw_independently_of_each_other():
    tfm, image = (
        AlbumentationsTransform(A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])),
        Image.fromarray(GREY),
    )
    random.seed(0)
    draws = [pixels(train_call(tfm, image)).tobytes() for _ in range(400)]
    for flipped in (GREY, GREY[:, ::-1], GREY[::-1], GREY[::-1, ::-1]):
        assert draws.count(flipped.tobytes()) == pytest.approx(100, abs=35)  # 4 standard deviations


def test_one_transform_and_nested_ones_work():
    for one in (A.Transpose(p=1), A.OneOf([A.Transpose()], p=1), A.Sequential([A.Transpose(p=1)], p=1)):
        out = train_call(AlbumentationsTransform(one), PILImage.create(COLOR))
        assert np.array_equal(pixels(out), COLOR.transpose(1, 0, 2))


def test_validation_is_left_alone_unless_asked_for():
    image = PILImage.create(COLOR)
    flip = A.HorizontalFlip(p=1)
    assert AlbumentationsTransform(flip)(image, split_idx=1) is image
    for tfm, split_idx in [
        (AlbumentationsTransform(flip, split_idx=1), 1),
        (AlbumentationsTransform(flip, split_idx=None), 0),
        (AlbumentationsTransform(flip, split_idx=None), 1),
    ]:
        assert np.array_equal(pixels(tfm(image, split_idx=split_idx)), COLOR[:, ::-1])


def test_deep_grey_images_keep_their_range_and_precision():
    image = PILImageBW(Image.fromarray(DEEP))
    assert image.mode == "F"
    flipped = train_call(AlbumentationsTransform(A.HorizontalFlip(p=1)), image)
    assert type(flipped) is PILImageBW and flipped.mode == "F"
    np.testing.assert_allclose(pixels(flipped), DEEP[:, ::-1], rtol=1e-6)
    darker = A.RandomBrightnessContrast(brightness_limit=(-0.2, -0.2), contrast_limit=(0, 0), p=1)
    np.testing.assert_allclose(
        pixels(train_call(AlbumentationsTransform(darker), image)), np.clip(DEEP - 0.2 * 255, 0, 255), atol=1e-3
    )


@pytest.mark.parametrize("array", [COLOR, GREY, DEEP])
def test_sizes_may_change(array):
    out = train_call(AlbumentationsTransform(A.RandomCrop(7, 9, p=1)), PILImage(Image.fromarray(array)))
    assert out.size == (9, 7)
    windows = np.lib.stride_tricks.sliding_window_view(array, (7, 9, *array.shape[2:])).reshape(-1, *pixels(out).shape)
    assert np.isclose(windows, pixels(out), rtol=1e-6).reshape(len(windows), -1).all(1).sum() == 1


def test_masks_and_points_are_not_left_behind_silently():
    item = (PILImage.create(COLOR), PILMask.create(GREY))
    colors = AlbumentationsTransform(A.Compose([A.RandomGamma(p=1)]))
    image, mask = train_call(colors, item)
    assert mask is item[1] and not np.array_equal(pixels(image), COLOR)
    moving = AlbumentationsTransform(A.Compose([A.OneOf([A.RandomGamma(), A.HorizontalFlip()])]))
    for target in (item[1], TensorPoint.create([[1.0, 2.0]])):
        with pytest.raises(DataError, match=type(target).__name__):
            train_call(moving, (item[0], target))
        assert moving((item[0], target), split_idx=1)[1] is target
    assert train_call(moving, (item[0], 3))[1] == 3


# --- in loaders -----------------------------------------------------------------------------------------------------


def loaders(tfms, num_workers: int = 0, n: int = 12):
    """Every image is the same, so that only the draws differ."""
    dataset = Datasets(range(n), [[lambda _: PILImage.create(COLOR)]], splits=[range(n - 4), range(n - 4, n)])
    return dataset.dataloaders(
        bs=4, after_item=[*tfms, ToTensor()], num_workers=num_workers, shuffle=False, drop_last=False, device="cpu"
    )


def epoch(dl: TfmdDL) -> torch.Tensor:
    return torch.cat([b[0] if isinstance(b, tuple) else b for b in dl]).as_subclass(torch.Tensor)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_draws_differ_over_items_and_epochs_and_set_seed_repeats_them(num_workers):
    runs = []
    for _ in range(2):
        set_seed(7)
        dls = loaders([AlbumentationsTransform(noisy())], num_workers)
        runs.append(torch.cat([epoch(dls.train), epoch(dls.train)]))
    assert torch.equal(*runs)
    assert len({tuple(image.flatten().tolist()) for image in runs[0]}) == 16  # 8 items, 2 epochs, all distinct


def test_the_validation_loader_gives_the_images_as_they_are():
    dls = loaders([AlbumentationsTransform(noisy())])
    plain = torch.from_numpy(COLOR).permute(2, 0, 1).expand(4, -1, -1, -1)
    assert torch.equal(epoch(dls.valid), plain) and not torch.equal(epoch(dls.train)[:4], plain)


def test_it_runs_where_it_stands_among_the_resizing_transforms():
    crop = AlbumentationsTransform(A.CenterCrop(8, 8, p=1), split_idx=None)
    for tfms, shape in [([Resize(16), crop], (8, 8)), ([crop, Resize(16)], (16, 16))]:
        assert epoch(loaders(tfms).train).shape[-2:] == shape


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, "flip", A.HorizontalFlip, [A.HorizontalFlip()], Resize(8)])
def test_only_albumentations_objects_are_taken(wrong):
    with pytest.raises(DataError, match="albumentations transform such as"):
        AlbumentationsTransform(wrong)


@pytest.mark.parametrize("tfm", [A.Normalize(), ToTensorV2(), A.Compose([A.OneOf([A.ToFloat()])])])
def test_transforms_that_make_tensors_or_change_the_scale_are_refused(tfm):
    with pytest.raises(DataError, match="Leave out"):
        AlbumentationsTransform(tfm)


def test_failures_and_changed_types_are_explained():
    with pytest.raises(DataError, match="could not change uint8 pixels of shape"):
        train_call(AlbumentationsTransform(A.RandomCrop(100, 100, p=1)), PILImage.create(COLOR))

    def widen(image, **_):
        return image.astype(np.float64)

    with pytest.raises(DataError, match="float64"):
        train_call(AlbumentationsTransform(A.Lambda(image=widen, p=1)), PILImage.create(COLOR))
    with pytest.raises(DataError, match="RGBA"):
        train_call(AlbumentationsTransform(A.HorizontalFlip()), Image.new("RGBA", (4, 4)))


# --- wrapping -------------------------------------------------------------------------------------------------------


class Mine(A.HorizontalFlip):
    pass


def test_bare_albumentations_objects_are_wrapped_and_others_left_alone():
    resize, own, compose = Resize(8), AlbumentationsTransform(A.HorizontalFlip()), noisy()

    def function(x):
        return x

    for kind in (list, tuple, L):
        wrapped = wrap_albumentations(kind([resize, compose, own, function, Mine()]))
        assert [wrapped[0], wrapped[2], wrapped[3]] == [resize, own, function]
        assert type(wrapped[1]) is type(wrapped[4]) is AlbumentationsTransform and wrapped[1].compose is compose
        assert wrapped[1].split_idx == 0
    assert wrap_albumentations(None) is None and wrap_albumentations(resize) is resize
    assert type(wrap_albumentations(compose)) is AlbumentationsTransform
    assert wrap_albumentations([]) == []
    pipeline = Pipeline(wrap_albumentations([A.HorizontalFlip(p=1)]), split_idx=0)
    assert np.array_equal(pixels(pipeline(PILImage.create(COLOR))), COLOR[:, ::-1])


def test_what_counts_as_albumentations():
    assert all(map(is_albumentations, (noisy(), A.HorizontalFlip(), Mine(), A.OneOf([A.HorizontalFlip()]))))
    assert not any(map(is_albumentations, (None, Resize(8), len, AlbumentationsTransform(A.HorizontalFlip()))))


def test_importing_it_does_not_ask_the_internet_for_a_newer_version():
    code = (
        "import socket, sys\n"
        "def refuse(*_): print('connected')\n"
        "socket.getaddrinfo = refuse\n"
        "import selfsup_fastai.data.albumentations\n"
        "print('albumentations' in sys.modules)\n"  # it takes most of a second: only those wait who use it
        "import albumentations"
    )
    env = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    child = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(child, env=env, capture_output=True, text=True, check=True).stdout.strip() == "False"
