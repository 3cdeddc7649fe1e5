"""Loaders derived from fastai's: what changes, what must not, and that the pixels are the files' own."""

import os
import pickle
import random
import threading
from collections import Counter
from copy import deepcopy

import albumentations as A
import fastai.callback.progress  # noqa: F401  (brings no_bar)
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import DataLoaders, Datasets, TfmdDL, TfmdLists
from fastai.data.transforms import IntToFloatTensor, Normalize, RandomSplitter, ToTensor
from fastai.learner import Learner, load_learner
from fastai.losses import MSELossFlat
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.augment import Flip, RandomResizedCrop, Resize, ResizeMethod, aug_transforms
from fastai.vision.core import PILImage, PILImageBW, imagenet_stats
from fastai.vision.data import ImageBlock, ImageDataLoaders
from fastcore.foundation import L
from fasttransform import Pipeline, Transform
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

from selfsup_fastai.data.albumentations import AlbumentationsTransform
from selfsup_fastai.data.blocks import Cover, OpenCovered, OpenImage
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.data.loader import (
    IndexedDL,
    Standardize,
    TensorIndex,
    check_dls,
    derive_loaders,
    fit_batch_size,
    float_images,
    measure_stats,
    n_in_of,
    needs_resize,
)
from selfsup_fastai.data.opening import decode, image_size
from selfsup_fastai.data.pixelstore import PixelStore
from selfsup_fastai.errors import DataError
from tests.conftest import write_images


def labeled(folder, bs=8, valid_pct=0.25, num_workers=0, **kwargs):
    """Labeled by whether the number in the file's name is even."""
    files = sorted(folder.glob("*.*"))
    settings = {"valid_pct": valid_pct, "seed": 1, "bs": bs, "num_workers": num_workers, "device": "cpu"}
    return ImageDataLoaders.from_name_func(folder, files, lambda f: str(int(f[:4]) % 2), **settings, **kwargs)


def pixels(files, mode="RGB"):
    """(N, C, H, W) in [0, 1], by PIL and NumPy."""
    arrays = [np.atleast_3d(np.asarray(Image.open(f).convert(mode), dtype=np.float32)) for f in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def images_of(dl):
    """One pass, the images only, as one plain tensor."""
    return torch.cat([(b[0] if isinstance(b, (tuple, list)) else b).as_subclass(torch.Tensor) for b in dl])


def names(pipeline):
    return [type(t).__name__ for t in pipeline.fs]


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """16 grey PNGs of 16 bits."""
    folder = tmp_path_factory.mktemp("deep")
    values = np.random.default_rng(0).integers(0, 65536, (16, 24, 24)).astype(np.uint16)
    for i, image in enumerate(values):
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    return folder, values / 65535


# ---- the source stays as it is


def snapshot(dls):
    """All that loaders, datasets and transforms hold, as text."""
    pipelines = [getattr(dl, name) for dl in dls.loaders for name in ("after_item", "before_batch", "after_batch")]
    pipelines += [tl.tfms for dl in dls.loaders for tl in dl.dataset.tls]
    tfms = [(id(t), type(t).__name__, {k: repr(v) for k, v in vars(t).items()}) for p in pipelines for t in p.fs]
    attributes = [{k: repr(v) for k, v in vars(dl).items() if k != "rng"} for dl in dls.loaders]
    return tfms, attributes, [dl.rng.getstate() for dl in dls.loaders], [p.split_idx for p in pipelines], repr(dls.path)


ALL = {
    "n_in": 1,
    "stats": ((0.5,), (0.2,)),
    "resize": 16,
    "inputs_only": True,
    "dl_type": IndexedDL,
    "drop": (Flip,),
    "add": [Flip()],
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", [{}, ALL])
def test_deriving_leaves_the_source_exactly_as_it_was(color_folder, how, used):
    dls = labeled(color_folder, item_tfms=RandomResizedCrop(24), batch_tfms=[*aug_transforms(), Normalize()])
    if used:
        dls.train.one_batch()
    rng = [dl.rng.getstate() for dl in dls.loaders]
    before = snapshot(dls)
    new = derive_loaders(dls, **how)
    n_in_of(dls)
    needs_resize(dls)
    assert snapshot(dls) == before
    held = {id(t) for dl in new.loaders for t in (*dl.after_item.fs, *dl.after_batch.fs)}
    assert not held & {id(t) for dl in dls.loaders for t in (*dl.after_item.fs, *dl.after_batch.fs)}
    set_seed(3)
    first = dls.train.one_batch()
    for dl, state in zip(dls.loaders, rng):
        dl.rng.setstate(state)
    images_of(new.train), images_of(new.valid)
    measure_stats(new)
    set_seed(3)
    again = dls.train.one_batch()
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_measuring_and_counting_leave_no_trace_in_the_source(color_folder):
    tensors = [(torch.rand(3, 8, 8), i) for i in range(12)]
    for dls in labeled(color_folder), DataLoaders.from_dsets(tensors, tensors, bs=4, num_workers=0, device="cpu"):
        set_seed(0)
        state = [dl.rng.getstate() for dl in dls.loaders]
        kept = [set(vars(dl)) for dl in dls.loaders]
        globally = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        measure_stats(dls)
        n_in_of(dls)
        needs_resize(dls)
        assert [dl.rng.getstate() for dl in dls.loaders] == state
        assert [set(vars(dl)) for dl in dls.loaders] == kept
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == globally


def test_deriving_draws_one_number_for_each_loader_from_pythons_random_only(color_folder):
    dls = labeled(color_folder, item_tfms=RandomResizedCrop(24), batch_tfms=aug_transforms())
    set_seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = derive_loaders(dls)
    after = random.getstate()
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    random.seed(1)
    [random.getrandbits(62) for _ in dls.loaders]
    assert random.getstate() == after
    second = derive_loaders(dls)
    set_seed(1)
    again = derive_loaders(dls)
    orders = [d.train.get_idxs() for d in (first, second, again)]
    assert orders[0] != orders[1] and orders[0] == orders[2]


# ---- what is derived


def test_deep_files_are_not_white_any_more(deep_folder):
    folder, truth = deep_folder
    dls = labeled(folder)
    assert images_of(dls.valid).mean() > 0.95  # fastai's own: clipped, nearly all white
    new = derive_loaders(dls, n_in=1)
    expected = np.stack([truth[int(f.stem)] for f in dls.valid_ds.items])[:, None]
    np.testing.assert_allclose(images_of(new.valid), expected, atol=1e-6)
    color = images_of(derive_loaders(dls, n_in=3).valid)
    np.testing.assert_allclose(color, np.repeat(expected, 3, 1), atol=0.5 / 255 + 1e-6)
    again = derive_loaders(derive_loaders(dls, n_in=3), n_in=1)
    np.testing.assert_allclose(images_of(again.valid), expected, atol=1e-6)


def test_labels_stay_with_their_images_or_go(color_folder):
    dls = labeled(color_folder)
    new = derive_loaders(dls, n_in=3)
    x, y = new.valid.one_batch()
    files = list(dls.valid_ds.items)[: len(x)]
    assert torch.equal(x.as_subclass(torch.Tensor), pixels(files))
    assert y.tolist() == [int(f.stem) % 2 for f in files]
    assert new.vocab == dls.vocab and new.path == dls.path and new.device == dls.device
    (x,) = derive_loaders(dls, n_in=3, inputs_only=True).valid.one_batch()
    assert torch.equal(x.as_subclass(torch.Tensor), pixels(files))


def test_without_n_in_images_are_opened_as_before(grey_folder):
    dls = labeled(grey_folder)
    new = derive_loaders(dls)
    assert [t.name for t in new.train_ds.tls[0].tfms.fs] == [t.name for t in dls.train_ds.tls[0].tfms.fs]
    assert torch.equal(images_of(new.valid), images_of(dls.valid))
    assert images_of(new.valid).shape[1] == 3


def test_normalize_is_replaced_and_the_users_transforms_stay(color_folder):
    jitter = AlbumentationsTransform(A.RandomBrightnessContrast(p=1.0))
    kwargs = {"item_tfms": [Resize(20), jitter], "batch_tfms": [Flip(p=1.0), Normalize.from_stats(*imagenet_stats)]}
    dls = labeled(color_folder, **kwargs)
    new = derive_loaders(dls, n_in=3, stats=((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    assert names(new.train.after_item) == ["Resize", "AlbumentationsTransform", "ToTensor"]
    assert names(new.train.after_batch) == ["IntToFloatTensor", "Flip", "Standardize"]
    assert new.train.after_batch.fs[-1].mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    plain = images_of(derive_loaders(dls, n_in=3).valid)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    assert torch.allclose(images_of(new.valid), (plain - mean) / std, atol=1e-5)
    assert plain.min() >= 0 and plain.max() <= 1
    bare = derive_loaders(dls, drop=(Flip,), add=[Flip(p=0.0)])
    assert [t.p for t in bare.train.after_batch.fs if isinstance(t, Flip)] == [0.0]


def test_standardizing_is_normalizing_to_the_bit_and_back():
    x = TensorImage(torch.rand(2, 3, 9, 8))
    before, ours, fastais = x.clone(), *(t.from_stats(*imagenet_stats, cuda=False) for t in (Standardize, Normalize))
    assert torch.equal(ours(x), fastais(x)) and torch.equal(x, before) and type(ours(x)) is TensorImage
    torch.testing.assert_close(ours.decode(ours(x)), x)
    plain = torch.rand(2, 3, 9, 8)
    assert torch.equal(ours(plain), plain)  # no image


def test_the_batch_is_cut_to_the_images_once_and_training_then_has_steps(color_folder, capsys):
    dls = labeled(color_folder, bs=64)
    assert len(dls.train) == 0  # the trap: fastai would train nothing, without a word
    new = derive_loaders(derive_loaders(dls))
    assert (new.train.bs, len(new.train), new.valid.bs) == (48, 1, 64)
    assert capsys.readouterr().err == "Batch size 64 cut to 48: there are no more training images.\n"
    assert (fit_batch_size(8, 8), fit_batch_size(8, 9), fit_batch_size(8, 3)) == (8, 8, 3)
    assert (fit_batch_size(64, 113), fit_batch_size(56, 113), fit_batch_size(32, 36), fit_batch_size(4, 11)) == (
        56,
        56,
        32,
        3,
    )


def test_loaders_from_a_table(grey_folder, color_folder):
    for folder, mode in (grey_folder, "L"), (color_folder, "RGB"):
        frame = pd.DataFrame({"name": [f.name for f in sorted(folder.glob("*.png"))]})
        frame["label"] = [int(name[:4]) % 2 for name in frame["name"]]
        frame["is_valid"] = [i % 4 == 0 for i in range(len(frame))]
        dls = ImageDataLoaders.from_df(frame, folder, valid_col="is_valid", bs=4, num_workers=0, device="cpu")
        n_in = n_in_of(dls)
        assert n_in == len(mode)
        new = derive_loaders(dls, n_in=n_in)
        files = [folder / name for name in frame["name"][frame["is_valid"]]]
        assert torch.equal(images_of(new.valid), pixels(files, mode))
        assert torch.cat([y for _, y in new.valid]).tolist() == frame["label"][frame["is_valid"]].tolist()


def test_a_checked_opener_stays_one(color_folder):
    dls = UnlabeledDataLoaders.from_folder(color_folder, size=16, num_workers=0, device="cpu")
    opener = derive_loaders(dls, n_in=1).train_ds.tls[0].tfms[0]
    assert type(opener) is OpenCovered
    assert vars(opener).items() >= {"n_in": 1, "size": (16, 16), "blank": (16, 16)}.items()
    assert dls.train_ds.tls[0].tfms[0].n_in == 3


def test_a_list_of_transforms_without_a_tuple_around_works_too(deep_folder):
    folder, truth = deep_folder
    files = sorted(folder.glob("*.png"))
    lists = TfmdLists(files, PILImage.create, splits=[list(range(12)), list(range(12, 16))])
    dls = lists.dataloaders(bs=4, num_workers=0, device="cpu", after_item=ToTensor, after_batch=IntToFloatTensor)
    assert n_in_of(dls) == 1
    np.testing.assert_allclose(images_of(derive_loaders(dls, n_in=1).valid), truth[12:, None], atol=1e-6)


@pytest.mark.parametrize("n_in", [1, 3])
def test_images_that_no_opener_opens_are_made_to_fit_as_tensors(n_in):
    for channels in 1, 3:
        items = [(torch.rand(channels, 6, 6), i) for i in range(8)]
        dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device="cpu")
        assert n_in_of(dls) == channels
        x = torch.stack([x for x, _ in items])
        grey = (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None] if channels == 3 else x
        expected = x if channels == n_in else grey if n_in == 1 else x.repeat(1, 3, 1, 1)
        new = derive_loaders(dls, n_in=n_in)
        assert torch.allclose(images_of(new.valid), expected)
        assert torch.cat([y for _, y in new.valid]).tolist() == list(range(8))


@pytest.mark.parametrize("channels, n_in", [(4, 3), (4, 1), (2, 1), (2, 3), (3, 4)])
def test_channels_whose_meaning_is_unknown_are_not_guessed(channels, n_in):
    items = [(torch.rand(channels, 6, 6), i) for i in range(8)]
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device="cpu")
    with pytest.raises(DataError, match=f"Images of {channels} channels cannot be turned into {n_in}"):
        derive_loaders(dls, n_in=n_in).valid.one_batch()
    assert images_of(derive_loaders(dls, n_in=channels).valid).shape == (8, channels, 6, 6)


# ---- loaders of other classes


def test_weights_of_a_weighted_loader_are_kept(color_folder):
    files = sorted(color_folder.glob("*.png"))[:20]
    sets = Datasets(files, [[PILImage.create], [lambda f: int(f.stem)]], splits=[list(range(15)), list(range(15, 20))])
    wgts = np.array([1.0 if i in (3, 7) else 0.0 for i in range(15)])
    tfms = {"after_item": [ToTensor()], "after_batch": [IntToFloatTensor()]}
    dls = sets.weighted_dataloaders(wgts, bs=5, num_workers=0, device="cpu", **tfms)
    new = derive_loaders(dls, n_in=3)
    assert type(new.train) is WeightedDL
    drawn = Counter(int(y) for _, ys in new.train for y in ys)
    assert set(drawn) == {3, 7} and drawn.total() == 15
    assert [int(y) for _, ys in new.valid for y in ys] == list(range(15, 20))
    uniform = derive_loaders(dls, dl_type=IndexedDL)
    assert sorted(int(y) for _, ys in uniform.train for y in ys) == list(range(15))


def test_a_partial_loader_stays_partial(color_folder):
    block = DataBlock((ImageBlock, CategoryBlock), get_items=lambda p: sorted(p.glob("*.png")), get_y=lambda f: f.stem)
    dls = block.datasets(color_folder).partial_dataloaders(
        12, bs=4, num_workers=0, device="cpu", after_item=[ToTensor()], after_batch=[IntToFloatTensor()]
    )
    new = derive_loaders(dls, n_in=3)
    assert type(new.train) is PartialDL
    assert len(new.train) == 3 and len(images_of(new.train)) == 12


def test_a_loader_over_the_first_images_only_stays_one(color_folder):
    files = sorted(color_folder.glob("*.png"))
    sets = Datasets(files, [[PILImage.create]], splits=[list(range(40)), list(range(40, 64))])
    tfms = {"after_item": [ToTensor()], "after_batch": [IntToFloatTensor()]}
    dls = sets.dataloaders(bs=5, n=10, shuffle=False, num_workers=0, device="cpu", **tfms)
    assert torch.equal(images_of(derive_loaders(dls, n_in=3).train), pixels(files[:10]))


class Doubled(TfmdDL):
    """A user's own loader: each image twice."""

    def get_idxs(self):
        return [i for i in super().get_idxs() for _ in range(2)]


def test_a_users_own_loader_class_is_kept_or_replaced(color_folder):
    dls = labeled(color_folder, dl_type=Doubled)
    assert type(dls.valid) is Doubled
    new = derive_loaders(dls, n_in=3)
    assert torch.equal(images_of(new.valid), pixels(dls.valid_ds.items).repeat_interleave(2, 0))
    assert torch.equal(images_of(derive_loaders(dls, n_in=3, dl_type=IndexedDL).valid), pixels(dls.valid_ds.items))


# ---- channels


def test_grey_files_need_one_channel_though_fastai_opens_three(grey_folder, color_folder, tmp_path):
    assert labeled(grey_folder).one_batch()[0].shape[1] == 3
    assert n_in_of(labeled(grey_folder)) == 1
    assert n_in_of(labeled(color_folder)) == 3
    for i, file in enumerate(sorted(grey_folder.glob("*.png"))[:10]):
        Image.open(file).convert(("L", "RGB", "RGBA", "P")[i % 4]).save(tmp_path / file.name)
    assert n_in_of(labeled(tmp_path)) == 1
    color = pixels([color_folder / "0000.png"])
    Image.open(color_folder / "0000.png").save(tmp_path / "0004.png")
    assert color.std(1).max() > 0.1
    dls = labeled(tmp_path)
    assert dls.train_ds.items[0].name != "0004.png"
    assert n_in_of(dls) == 3
    assert n_in_of(dls, n=1) == 1  # only the first is asked


def test_a_grey_class_before_a_color_class_does_not_hide_it(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (90, 8, 8), dtype=np.uint8)
    for i, image in enumerate(grey):
        Image.fromarray(image).save(tmp_path / f"{i:04d}.png")
    for i in range(90, 100):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{i:04d}.png")
    files = sorted(tmp_path.glob("*.png"))
    tfms = {"after_item": [ToTensor()], "after_batch": [IntToFloatTensor()], "bs": 8, "num_workers": 0}
    for splits, n_in in [((range(100), range(2)), 3), ((range(90), range(2)), 1)]:
        dls = Datasets(files, [[PILImage.create]], splits=list(map(list, splits))).dataloaders(**tfms)
        assert n_in_of(dls) == n_in


def test_what_the_user_chose_to_open_is_what_counts(color_folder):
    for n_in in 1, 3:
        dls = UnlabeledDataLoaders.from_folder(color_folder, size=16, n_in=n_in, num_workers=0)
        assert n_in_of(dls) == n_in
    parts = {"get_items": lambda p: sorted(p.glob("*.png")), "get_y": lambda f: f.stem[-1]}
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), splitter=RandomSplitter(0.5, seed=1), **parts)
    assert n_in_of(block.dataloaders(color_folder, num_workers=0, bs=4)) == 1
    assert n_in_of(derive_loaders(labeled(color_folder), n_in=1)) == 1


# ---- sizes


@pytest.fixture
def mixed_sizes(tmp_path):
    for i in range(12):
        folder = write_images(tmp_path / "one", 1, (20 + i, 31), seed=i)
        (folder / "0000.png").rename(tmp_path / f"{i:04d}.png")
    return tmp_path


def test_items_of_different_sizes_are_resized_where_nothing_else_does(mixed_sizes, color_folder):
    dls = labeled(mixed_sizes)
    assert needs_resize(dls)
    new = derive_loaders(dls, n_in=3, resize=16)
    assert not needs_resize(new)

    def center(file):
        image = Image.open(file)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        small = image.crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1)

    assert torch.equal(images_of(new.valid), torch.stack([center(f) for f in dls.valid_ds.items]))
    for tfms in Resize(24), Resize(24, ResizeMethod.Squish), RandomResizedCrop(24), [Resize(40), RandomResizedCrop(24)]:
        dls = labeled(mixed_sizes, item_tfms=tfms)
        assert not needs_resize(dls)
        assert images_of(derive_loaders(dls, n_in=3, resize=16).valid).shape[-2:] == (24, 24)
    assert not needs_resize(labeled(color_folder))
    assert not needs_resize(labeled(color_folder), n=1)


def test_one_odd_image_is_found_wherever_it_is_if_all_are_asked(color_folder, tmp_path):
    for at in 0, 9, 19:
        folder = write_images(tmp_path / str(at), 20)
        Image.new("RGB", (32, 33)).save(folder / f"{at:04d}.png")
        assert needs_resize(labeled(folder))


def test_tensors_are_never_resized():
    items = [(torch.rand(3, 6, 6), i) for i in range(4)]
    assert not needs_resize(DataLoaders.from_dsets(items, items, bs=2, num_workers=0))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_in_the_header_is_that_of_the_opened_image(tmp_path, form, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a", form, exif=exif)
    assert image_size(tmp_path / "a") == OpenImage()(tmp_path / "a").size == ((30, 20), (20, 30))[orientation >= 5]
    assert image_size(np.zeros((5, 7, 3), np.uint8)) == (7, 5)


# ---- statistics


@pytest.mark.parametrize("n_in", [1, 3])
def test_statistics_are_those_of_all_pixels(color_folder, n_in):
    dls = derive_loaders(labeled(color_folder, bs=7), n_in=n_in, stats=((9.0,) * n_in, (9.0,) * n_in))
    x = pixels(dls.train_ds.items, "L" if n_in == 1 else "RGB").double().transpose(0, 1).flatten(1).numpy()
    assert len(dls.train_ds) == 48 and x.shape[1] == 48 * 40 * 40
    mean, std = measure_stats(dls)
    np.testing.assert_allclose(mean, x.mean(1), atol=1e-6)
    np.testing.assert_allclose(std, x.std(1), atol=1e-6)
    assert measure_stats(dls) == (mean, std)


def test_statistics_stop_at_enough_images():
    array = np.random.default_rng(0).integers(0, 256, (400, 8, 8), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=8, bs=10, num_workers=0, device="cpu", valid_pct=0.01)
    opened = []
    encodes = dls.train_ds.tls[0].tfms[0]
    dls.train_ds.tls[0].tfms = type(dls.train_ds.tls[0].tfms)([lambda item: opened.append(1) or encodes(item)])
    mean, _ = measure_stats(dls, n=95)
    assert 100 <= len(opened) <= 101  # ten batches, and the one that fastai tries
    assert mean[0] == pytest.approx(array.mean() / 255, abs=0.02)


def test_statistics_are_computed_on_the_cpu(color_folder, monkeypatch):
    class OnMetal(torch.Tensor):
        """A tensor of a device without float64, as Apple's MPS."""

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    dls = derive_loaders(labeled(color_folder), n_in=3)
    expected = measure_stats(dls)
    monkeypatch.setattr("selfsup_fastai.data.loader._batch_images", lambda b: b[0].as_subclass(OnMetal))
    assert measure_stats(dls) == expected


def test_a_flat_color_has_a_spread_that_can_be_divided_by():
    flat = np.full((8, 5, 5), 51, np.uint8)
    assert measure_stats(UnlabeledDataLoaders.from_array(flat, size=8, num_workers=0, device="cpu")) == (
        (pytest.approx(0.2),),
        (1e-3,),
    )


def test_statistics_of_integers_are_refused(color_folder):
    files = sorted(color_folder.glob("*.png"))
    sets = Datasets(files, [[PILImage.create]], splits=[list(range(40)), list(range(40, 64))])
    dls = sets.dataloaders(bs=8, num_workers=0, device="cpu", after_item=[ToTensor()])
    with pytest.raises(DataError, match=r"got torch\.uint8\. Add IntToFloatTensor"):
        measure_stats(dls)
    with pytest.raises(DataError, match=r"batch of images \(B, C, H, W\), got \(3, 8, 8\)"):
        float_images(torch.rand(3, 8, 8))
    with pytest.raises(DataError, match="got list"):
        float_images([1.0])
    float_images(torch.rand(2, 3, 8, 8))


# ---- IndexedDL


class Counted(IndexedDL):
    with_index = True


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_index_is_the_place_in_the_dataset(num_workers):
    array = np.arange(20, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    dls = UnlabeledDataLoaders.from_array(array, size=8, bs=6, num_workers=num_workers, device="cpu", valid_pct=0.3)
    new = derive_loaders(dls, dl_type=Counted)
    for dl in new.loaders:
        truth = [int(a[0, 0]) for a in dl.dataset.items]
        seen = []
        for x, idx in dl:
            assert type(idx) is TensorIndex and idx.dtype == torch.int64
            values = (x[:, 0, 0, 0] * 255).round().int().tolist()
            assert values == [truth[i] for i in idx.tolist()]
            seen += idx.tolist()
        assert len(seen) == len(set(seen)) == (12 if dl is new.train else 6)
    assert seen == list(range(6))


def test_an_unshuffled_pass_over_training_images_repeats(color_folder):
    dls = derive_loaders(labeled(color_folder, item_tfms=RandomResizedCrop(16)), dl_type=IndexedDL)
    assert dls.train.is_training and not dls.valid.is_training
    still = dls.train.new(shuffle=False)
    assert torch.equal(images_of(still), images_of(still))
    assert not torch.equal(images_of(dls.train), images_of(dls.train))


# ---- the fast road


SHAPES = [(20, 30, 3), (30, 20, 3), (16, 16, 3), (40, 16, 3)] * 4


@pytest.fixture
def colors(tmp_path):
    """16 color PNGs of several shapes."""
    rng = np.random.default_rng(4)
    folder = tmp_path / "colors"
    folder.mkdir()
    for i, shape in enumerate(SHAPES):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:04d}.png")
    return folder


def both(source, **kwargs):
    """The same loaders with kept pixels and without."""
    made = []
    for cache in True, False:
        set_seed(6)
        settings = {"size": 16, "bs": 4, "num_workers": 0, "device": "cpu", "valid_pct": 0.25, **kwargs}
        made.append(UnlabeledDataLoaders.from_folder(source, cache=cache, **settings))
    return made


def all_of(dls):
    """Two passes over the training images and one over the others."""
    return [images_of(dl) for dl in (dls.train, dls.train, dls.valid)]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


class Plain(Transform):
    """Changes nothing, but might."""

    def encodes(self, x: PILImage):
        return x


def test_a_transform_that_is_added_later_takes_the_slow_road_to_the_same_images(colors):
    fast, slow = both(colors)
    assert fast.train.is_fast and not slow.train.is_fast
    for dl in fast.train, fast.valid:
        dl.after_item.add(Plain())
        assert not dl.is_fast
    assert equal(all_of(fast), all_of(slow))
    fast, slow = both(colors)
    fast.train.before_batch.add(Plain())
    assert not fast.train.is_fast and fast.valid.is_fast


def test_another_size_or_opener_takes_the_slow_road(colors):
    fast, _ = both(colors)
    cover = next(t for t in fast.train.after_item.fs if isinstance(t, Cover))
    cover.size = (8, 8)
    assert not fast.train.is_fast and images_of(fast.train).shape[2:] == (8, 8)
    fast, _ = both(colors)
    fast.valid_ds.tls[0].tfms = Pipeline([OpenImage(3)])
    assert not fast.valid.is_fast


def test_new_images_come_from_their_files(colors, tmp_path):
    fast, slow = both(colors)
    new = sorted(write_images(tmp_path / "new", 5, (24, 24), seed=7).iterdir())
    for items in new, list(reversed(fast.valid_ds.items)):
        dl = fast.test_dl(items)
        assert not dl.is_fast
        assert torch.equal(images_of(dl), images_of(slow.test_dl(items)))


def test_new_loaders_over_the_same_images_keep_their_pixels(colors):
    fast, slow = both(colors)
    for how in {"bs": 3}, {"shuffle": False}, {"drop_last": False, "bs": 5}, {"num_workers": 2}:
        pair = []
        for dls in fast, slow:
            set_seed(1)
            dl = dls.train.new(**how)
            dl.rng.seed(8)
            pair.append([b[0].as_subclass(torch.Tensor) for b in dl])
            assert dl.is_fast == (dls is fast)
        assert equal(*pair)
    assert len(pair[0]) == 3


@pytest.mark.parametrize("drop_last", [False, True])
def test_short_last_batches_come_or_do_not_by_both_roads(colors, drop_last):
    lengths = [[len(b[0]) for b in dls.train.new(bs=5, drop_last=drop_last)] for dls in both(colors)]
    assert lengths[0] == lengths[1] == ([5, 5] if drop_last else [5, 5, 2])


def test_three_channels_of_grey_are_fast_and_every_other_change_is_slow(colors, grey_folder):
    grey, color = both(grey_folder), both(colors)
    color_as_grey = both(colors, n_in=1)
    for (fast, slow), n_in, is_fast in (grey, 3, True), (color, 1, False), (color_as_grey, 3, False), (color, 3, True):
        pair = []
        for dls in fast, slow:
            set_seed(4)
            pair.append(derive_loaders(dls, n_in=n_in))
        assert pair[0].train.is_fast == pair[0].valid.is_fast == is_fast
        assert equal(*map(all_of, pair))
        assert images_of(pair[0].valid).shape[1] == n_in
    x = images_of(derive_loaders(color_as_grey[0], n_in=3).valid)
    assert not torch.equal(x[:, 0], x[:, 1])  # the colors are there again


def test_depths_become_color_by_both_roads(deep_folder):
    pair = []
    for dls in both(deep_folder[0]):
        set_seed(4)
        pair.append(derive_loaders(dls, n_in=3))
    assert pair[0].train.is_fast and equal(*map(all_of, pair))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labels_and_places_stay_with_their_images_by_both_roads(colors, num_workers):
    files = sorted(colors.iterdir())
    table = pd.DataFrame({"file": files, "label": [f"c{i % 3}" for i in range(16)]})
    table["is_valid"] = [i % 4 == 0 for i in range(16)]
    seen = []
    for cache in True, "ram", False:
        set_seed(5)
        dls = labeled_loaders(table, 3, 16, bs=4, num_workers=num_workers, cache=cache)
        for dl in dls.loaders:
            assert dl.is_fast == (cache is not False)
            dl.with_index = True
        batches = [b for dl in (dls.train, dls.valid) for b in dl]
        for part, n in (batches[:3], 12), (batches[3:], 4):
            ds = dls.train_ds if n == 12 else dls.valid_ds
            places = [i for b in part for i in b[2].tolist()]
            labels = [dls.vocab[y] for b in part for y in b[1].tolist()]
            names = [table["label"][files.index(ds.items[i] if n else 0)] for i in places]
            assert labels == names and sorted(places) == list(range(n))
        seen.append([t.as_subclass(torch.Tensor) for b in batches for t in b])
        x, _, places = batches[3]
        truth = [decode(dls.valid_ds.items[i], (16, 16))[1] for i in places.tolist()]
        for image, whole in zip(x, truth):
            top, left = (whole.shape[1] - 16) // 2, (whole.shape[2] - 16) // 2
            window = whole[:, top : top + 16, left : left + 16]
            assert np.array_equal((image * 255).round().byte().cpu().numpy(), window)
    assert equal(seen[0], seen[2]) and equal(seen[1], seen[2])


def test_images_that_change_places_in_the_dataset_take_their_labels_along(colors):
    files = sorted(colors.iterdir())
    table = pd.DataFrame(
        {"file": files, "label": [f"c{i % 3}" for i in range(16)], "is_valid": [i > 7 for i in range(16)]}
    )
    dls = labeled_loaders(table, 3, 16, bs=8)
    x, y = next(iter(dls.valid))
    for tl in dls.valid_ds.tls:
        tl.items = L(list(tl.items)[::-1])
    assert dls.valid.is_fast
    turned_x, turned_y = next(iter(dls.valid))
    assert torch.equal(turned_x, x.flip(0)) and torch.equal(turned_y, y.flip(0)) and not torch.equal(x, turned_x)


@pytest.mark.parametrize("name", ["create_item", "create_batch", "do_batch", "retain"])
def test_what_a_user_replaces_in_a_loader_is_called(colors, name):
    dls, _ = both(colors)
    calls = []

    def mine(*args):
        calls.append(name)
        return getattr(IndexedDL, name)(new, *args)

    new = dls.valid.new(**{name: mine})
    assert dls.valid.is_fast and not new.is_fast
    assert equal(images_of(new), images_of(dls.valid)) and calls


@pytest.fixture
def ahead(monkeypatch):
    """The road to a GPU, walked to the CPU; for each gather, whether it was in the main thread."""
    threads, gather = [], PixelStore.gather

    def unpinned(self, rows, corners, size, pin):
        threads.append(threading.current_thread() is threading.main_thread())
        assert pin
        return gather(self, rows, corners, size)

    monkeypatch.setattr(IndexedDL, "_pins", True)
    monkeypatch.setattr(PixelStore, "gather", unpinned)
    return threads


def test_batches_that_are_made_ahead_are_the_same_in_the_same_order(colors, ahead):
    dls, slow = both(colors)
    assert all(equal(a, b) for a, b in zip(all_of(dls), all_of(slow)))
    assert ahead and not any(ahead)


def test_an_error_on_the_way_arrives(colors, ahead, monkeypatch, tmp_path):
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "cache"))
    dls, _ = both(colors)
    os.truncate(next((tmp_path / "cache").glob("pixels-1/*")), 0)
    with pytest.raises(DataError, match="changed while it was in use"):
        list(dls.valid)


def test_single_batches_and_pictures_of_them_are_equal_by_both_roads(colors):
    shown = []
    for dls in both(colors):
        set_seed(2)
        first = dls.train.one_batch()[0]
        dls.show_batch(max_n=2)
        dls.valid.show_batch(max_n=3, unique=True)
        drawn = [np.asarray(ax.images[0].get_array()) for ax in plt.gcf().axes if ax.images]
        assert len(drawn) == 3 and all(np.array_equal(drawn[0], d) for d in drawn)
        shown.append([first.as_subclass(torch.Tensor), torch.tensor(drawn[0]), images_of(dls.train)])
    assert equal(*shown)


def test_copies_carry_no_pixels_and_give_the_same_images(colors):
    fast, slow = both(colors)
    truth = images_of(slow.valid)
    for copied in deepcopy(fast.valid), pickle.loads(pickle.dumps(fast.valid)):
        assert copied.store is None and not copied.is_fast and torch.equal(images_of(copied), truth)
    assert fast.valid.is_fast and torch.equal(images_of(fast.valid), truth)
    assert len(pickle.dumps(fast.valid)) < len(pickle.dumps(slow.valid)) + 1000 < fast.valid.store.nbytes


def test_an_exported_learner_predicts_as_before(colors, tmp_path):
    fast, _ = both(colors)
    learn = Learner(fast, nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1)), loss_func=MSELossFlat())
    learn.dls.n_inp = 1
    files = fast.valid_ds.items
    with learn.no_bar():
        before = learn.get_preds(dl=fast.test_dl(files))[0]
        learn.export(tmp_path / "learner.pkl")
        again = load_learner(tmp_path / "learner.pkl")
        with again.no_bar():
            assert torch.equal(again.get_preds(dl=again.dls.test_dl(files))[0], before)
    assert fast.valid.is_fast


def started(monkeypatch):
    """The processes that loaders start from now on."""
    seen = []
    start = torch.multiprocessing.Process.start
    monkeypatch.setattr(torch.multiprocessing.Process, "start", lambda p: seen.append(p) or start(p))
    return seen


def test_no_process_is_started_for_pixels_that_are_kept(colors, monkeypatch):
    fast, slow = both(colors, num_workers=2)
    seen = started(monkeypatch)
    assert equal([images_of(fast.valid)], [images_of(slow.valid)]) and len(seen) == 2
    images_of(fast.train), fast.one_batch()
    assert len(seen) == 2


def test_a_single_batch_from_files_starts_no_process(colors, monkeypatch):
    _, slow = both(colors, num_workers=2)
    seen = started(monkeypatch)
    slow.train.one_batch()
    assert not seen
    images_of(slow.valid)
    assert len(seen) == 2


# ---- mistakes


def test_what_is_no_dataloaders_is_refused(color_folder, tmp_path):
    dls = labeled(color_folder)
    for wrong, message in (
        (color_folder, r"got PosixPath\. Make them with UnlabeledDataLoaders\.from_folder\(path\)"),
        (str(color_folder), r"got str\. Make them"),
        (None, r"got NoneType\. Make them"),
        (dls.train, r"got TfmdDL\.$"),
    ):
        for call in check_dls, derive_loaders:
            with pytest.raises(DataError, match=message):
                call(wrong)
    with pytest.raises(DataError, match="no training images"):
        check_dls(DataLoaders())
    with pytest.raises(DataError, match="no training images"):
        check_dls(dls.new_empty())


def test_statistics_do_not_depend_on_the_global_generators(tmp_path):
    """fastai's batch transforms draw from them."""
    write_images(tmp_path / "a", 20)
    found = []
    for seed in (0, 1):
        set_seed(seed)
        dls = ImageDataLoaders.from_folder(
            tmp_path, valid_pct=0.2, seed=0, bs=4, item_tfms=Resize(32), batch_tfms=aug_transforms()
        )
        state = torch.get_rng_state()
        found.append(measure_stats(dls))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]
