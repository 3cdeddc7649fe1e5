"""Test images among those to pretrain on: found, refused, left out."""

import shutil

import numpy as np
import pandas as pd
import pytest
from fastai.data.core import DataLoaders
from fastai.vision.data import ImageDataLoaders
from PIL import Image

from selfsup_fastai.compare.leaks import check_unseen
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.errors import DataError
from tests.compare.labeled_images import stripes_table
from tests.conftest import write_images, write_scans


@pytest.fixture
def labeled(tmp_path):
    return labeled_loaders(stripes_table(tmp_path / "labeled", 12, 6), 1, 32, 4)


def unlabeled(folder, n: int = 20, copies=()):
    """Images of their own, and copies of others under other names, as grey and as color PNGs."""
    write_images(folder, n, channels=1, seed=5)
    for i, file in enumerate(copies):
        Image.open(file).convert("RGB" if i % 2 else "L").save(folder / f"copy{i}.png")
    return folder


def test_images_of_one_s_own_are_no_leak(tmp_path, labeled):
    dls = UnlabeledDataLoaders.from_folder(unlabeled(tmp_path / "u"), size=32, bs=4)
    checked = check_unseen(dls, labeled)
    assert checked.dls is dls
    assert checked.found["test images seen in pretraining"] == 0
    assert checked.found["checked"] == "the pixels of all images"
    assert (checked.found["pretraining images"], checked.found["test images"]) == (len(dls.train_ds), 6)


def test_copies_of_test_images_are_found_and_left_out(tmp_path, labeled, capsys):
    files = list(labeled.valid_ds.tls[0].items)[:3]
    files += list(labeled.train_ds.tls[0].items)[:2]  # these may be seen
    folder = unlabeled(tmp_path / "u", copies=files)
    dls = UnlabeledDataLoaders.from_folder(folder, size=32, bs=4, valid_pct=0.1)
    copies = sum("copy" in str(item) and int(item.stem[4:]) < 3 for item in dls.train_ds.tls[0].items)
    with pytest.raises(DataError, match=f"{copies} of 6 test images are among those to pretrain on") as raised:
        check_unseen(dls, labeled)
    assert str(tmp_path) not in str(raised.value) and "copy" not in str(raised.value)
    assert "in the shell with --exclude-tested" in str(raised.value)
    capsys.readouterr()
    checked = check_unseen(dls, labeled, exclude=True)
    n = len(dls.train_ds)
    said = f"{copies} of {n} images are left out of pretraining, because they are tested on; {n - copies} remain."
    assert said in capsys.readouterr().err  # of patients nothing is known
    kept = checked.dls.train_ds.tls[0].items
    assert len(kept) == len(dls.train_ds) - copies
    assert not any("copy" in str(item) and int(item.stem[4:]) < 3 for item in kept)
    assert checked.found["left out of pretraining"] == copies
    assert check_unseen(checked.dls, labeled).found["test images seen in pretraining"] == 0
    assert checked.dls.train.one_batch()[0].shape[1:] == (1, 32, 32)


def test_train_and_test_with_the_same_image(tmp_path, capsys):
    table = stripes_table(tmp_path / "labeled", 12, 6)
    shutil.copy(table["file"].iloc[0], table["file"].iloc[13])
    dls = UnlabeledDataLoaders.from_folder(unlabeled(tmp_path / "u"), size=32, bs=4)
    found = check_unseen(dls, labeled_loaders(table, 1, 32, 4)).found
    assert found["test images that are also labeled training images"] == 1
    assert "1 of 6 test images are among the labeled training images" in capsys.readouterr().err


def test_another_column_tells_whose_an_image_is(tmp_path, capsys):
    table = stripes_table(tmp_path / "labeled", 12, 6).assign(owner=[f"o{i // 3}" for i in range(18)])
    labeled = labeled_loaders(table, 1, 32, 4)
    files = sorted(unlabeled(tmp_path / "u").glob("*.png"))
    df = pd.DataFrame({"file": [str(f) for f in files], "owner": [f"o{i % 10}" for i in range(20)]})
    dls = UnlabeledDataLoaders.from_df(df, size=32, bs=4)
    with pytest.raises(DataError, match="on both sides: 2 owner"):
        check_unseen(dls, labeled, groups="owner")
    rest = check_unseen(dls, labeled, exclude=True, groups="owner").dls
    assert not set(rest.train.facts["owner"]) & {"o4", "o5"}
    assert "because they are tested on, or share their owner with test images;" in capsys.readouterr().err
    assert check_unseen(dls, labeled).found["left out of pretraining"] == 0  # nobody said that owners matter


def test_people_in_labeled_training_and_test_are_said(tmp_path, capsys):
    owners = [f"o{i // 3}" for i in range(14)] + ["o0", "", "o8", "o8"]
    owners[12:14] = ["o7", "o7"]
    labeled = labeled_loaders(stripes_table(tmp_path / "labeled", 12, 6).assign(owner=owners), 1, 32, 4)
    dls = UnlabeledDataLoaders.from_folder(unlabeled(tmp_path / "u"), size=32, bs=4)
    said = "test images of patients or groups that are in labeled training"
    assert said not in check_unseen(dls, labeled).found  # nobody said that owners matter
    assert check_unseen(dls, labeled, groups="owner").found[said] == 1
    err = capsys.readouterr().err
    assert "1 of 6 test images share their owner with labeled training images" in err
    assert str(tmp_path) not in err and "o0" not in err


def test_patients_of_scans(tmp_path):
    write_scans(tmp_path / "scans", 6)
    dls = UnlabeledDataLoaders.from_folder(tmp_path / "scans", size=32, bs=4)
    from selfsup_fastai.data.labeled import labeled_files

    table, _ = labeled_files(tmp_path / "scans", split_by="random", size=32)
    labeled = labeled_loaders(table.assign(is_valid=table["label"].isin(["p0", "p1"])), 1, 32, 4)
    with pytest.raises(DataError, match=r"on both sides: \d patients") as raised:
        check_unseen(dls, labeled)
    assert not any(name in str(raised.value) for name in [*table["patient"], "patient0", str(tmp_path)])


def test_plain_fastai_loaders_are_checked_too(tmp_path):
    for label, seed in (("a", 1), ("b", 2)):
        write_images(tmp_path / "l" / label, 8, seed=seed)
    labeled = ImageDataLoaders.from_folder(tmp_path / "l", valid_pct=0.5, bs=4, seed=0)
    dls = ImageDataLoaders.from_folder(tmp_path / "l", valid_pct=0.2, bs=4, seed=1)
    with pytest.raises(DataError, match="Pretraining would see the test set"):
        check_unseen(dls, labeled)


def test_what_cannot_be_checked_is_said(labeled, capsys):
    images = [(np.zeros(3), 0)] * 8
    dls = DataLoaders.from_dsets(images, images, bs=2)
    assert check_unseen(dls, labeled).found["checked"] == "nothing could be checked"
    assert "nobody can check whether pretraining sees the test images" in capsys.readouterr().err
