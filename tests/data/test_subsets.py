"""Some images of a loader: the right ones, with their labels, cut as the loader cuts."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.data import WeightedDL
from fastai.data.core import DataLoaders
from fastai.vision.augment import RandomResizedCrop
from fastai.vision.data import ImageDataLoaders
from PIL import Image

from selfsup_fastai.data.labeled import labeled_files, labeled_loaders
from selfsup_fastai.data.subsets import hold_out, labels_of, subset
from selfsup_fastai.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Flat grey images, of which each is as bright as its number."""
    root = tmp_path_factory.mktemp("subsets")
    for i in range(30):
        name = "abc"[i % 3] if i < 24 else "a"
        (root / name).mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16), i * 8, np.uint8)).save(root / name / f"{i:02d}.png")
    return root


def loaders(folder, kind, cache="ram"):
    if kind == "fastai":
        return ImageDataLoaders.from_folder(folder, valid_pct=0.2, seed=1, bs=4, num_workers=0, device="cpu")
    table, _ = labeled_files(folder, 0.2, size=16, cache=cache)
    return labeled_loaders(table, 1, 16, 4, cache=cache)


def seen(dl):
    """(brightness of each image, its class) in the order of one pass."""
    batches = list(dl)
    x = torch.cat([b[0].float().flatten(1).mean(1) for b in batches])
    return [(round(v * 255) // 8, int(y)) for v, y in zip(x.tolist(), torch.cat([b[1] for b in batches]))]


@pytest.mark.parametrize("kind", ["fastai", "ours", "ours, files"])
def test_a_subset_has_these_images_and_their_labels(folder, kind):
    dls = loaders(folder, kind, "ram" if kind == "ours" else False)
    whole = seen(dls.train.new(shuffle=False, drop_last=False))
    part = subset(dls.train, [5, 0, 7], shuffle=False, drop_last=False, bs=2)
    assert seen(part) == [whole[5], whole[0], whole[7]]
    assert len(dls.train.dataset) == len(whole)
    assert labels_of(part) == [whole[5][1], whole[0][1], whole[7][1]]


@pytest.mark.parametrize("kind", ["fastai", "ours"])
def test_hold_out_parts_the_training_images_by_class(folder, kind):
    dls = loaders(folder, kind)
    whole = sorted(seen(dls.train.new(shuffle=False, drop_last=False)))
    parted = hold_out(dls, 0.25, seed=3)
    train, valid = (seen(dl.new(shuffle=False, drop_last=False)) for dl in parted.loaders)
    assert sorted(train + valid) == whole and not set(train) & set(valid)
    counts = pd.Series([y for _, y in whole]).value_counts()
    held = pd.Series([y for _, y in valid]).value_counts()
    assert all(held[y] == max(1, round(0.25 * n)) for y, n in counts.items())
    again = hold_out(dls, 0.25, seed=3)
    assert seen(again.valid) == seen(parted.valid)
    assert parted.train.is_training if hasattr(parted.train, "is_training") else parted.train.split_idx == 0


def test_patients_are_not_parted(folder):
    dls = loaders(folder, "ours")
    n = len(dls.train_ds)
    dls.train.facts = pd.DataFrame({"patient": [f"p{i % 6}" for i in range(n)]})
    parted = hold_out(dls, 0.3)
    sides = [set(dl.facts["patient"]) for dl in parted.loaders]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert sum(len(dl.dataset) for dl in parted.loaders) == n


@pytest.mark.parametrize("kind", ["ours", "ours, files"])
def test_each_class_keeps_a_patient_and_none_is_most_of_the_images(folder, kind):
    """Patient 0 has all images of class 0: held out, nothing of it would be left."""
    dls = loaders(folder, kind, "ram" if kind == "ours" else False)
    labels = labels_of(dls.train)
    patients = ["zero" if y == 0 else f"p{i % 4}" for i, y in enumerate(labels)]
    dls.train.facts = pd.DataFrame({"patient": patients})
    for seed in range(8):
        parted = hold_out(dls, 0.2, seed)
        assert set(map(int, labels_of(parted.train))) == {0, 1, 2}
        assert abs(len(parted.valid_ds) / len(labels) - 0.2) <= 0.1


def test_weights_of_images_come_along(folder):
    dls = loaders(folder, "fastai")
    weights = np.arange(len(dls.train_ds)) ** 2.0
    dls = DataLoaders(dls.train.new(cls=WeightedDL, wgts=weights), dls.valid)
    part = subset(dls.train, [5, 0, 7])
    assert part.wgts.tolist() == pytest.approx([25 / 74, 0, 49 / 74])
    assert set(part.get_idxs()) <= {0, 2}
    assert not hasattr(hold_out(dls, 0.25).valid, "wgts")


def test_without_a_loader_to_validate_with_held_out_images_are_not_changed_at_random(folder):
    dls = ImageDataLoaders.from_folder(
        folder, valid_pct=0.2, seed=1, bs=4, num_workers=0, device="cpu", item_tfms=RandomResizedCrop(8)
    )
    parted = hold_out(DataLoaders(dls.train, device="cpu"), 0.25)
    first, again = (torch.cat([b[0] for b in parted.valid]) for _ in range(2))
    assert torch.equal(first, again)
    assert parted.train.dataset.split_idx == 0 and parted.valid.dataset.split_idx == 1


@pytest.mark.parametrize("share", [0, 1, -0.1, True, "half"])
def test_shares_that_make_no_sense(folder, share):
    with pytest.raises(DataError, match="holdout is the share"):
        hold_out(loaders(folder, "fastai"), share)
