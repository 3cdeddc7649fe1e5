"""data/labeled.py: a folder of classes as a table."""

import pytest
import torch

from selfsup_fastai.data import files as files_room
from selfsup_fastai.data import keeping as keeping_room
from selfsup_fastai.data import labeled
from selfsup_fastai.data.labeled import labeled_files, labeled_loaders
from selfsup_fastai.data.pixelstore import DeviceStore
from selfsup_fastai.errors import DataError
from tests.conftest import write_images


def test_labels_are_folder_names_and_the_split_takes_some_of_each(tmp_path):
    for label, n in (("a", 10), ("b", 5), ("c", 2)):
        write_images(tmp_path / label, n, (8, 8))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    write_images(tmp_path / "a" / "2020", 5, (8, 8))  # belongs to a
    write_images(tmp_path, 1, (8, 8))  # belongs to no class
    table, report = labeled_files(tmp_path, valid_pct=0.2, seed=3)
    assert table["label"].tolist() == [f.relative_to(tmp_path).parts[0] for f in table["file"]]
    assert table.groupby("label")["is_valid"].sum().to_dict() == {"a": 3, "b": 1, "c": 1}
    assert report["code"].tolist() == ["not_an_image", "no_class"]
    again, _ = labeled_files(tmp_path, valid_pct=0.2, seed=3)
    assert table.equals(again)
    other, _ = labeled_files(tmp_path, valid_pct=0.2, seed=4)
    assert not table["is_valid"].equals(other["is_valid"])


def test_train_and_valid_folders_are_the_split(tmp_path):
    for part, n in (("train", 4), ("val", 3), ("unused", 2)):
        for label in "ab":
            write_images(tmp_path / part / label, n, (8, 8))
    table, _ = labeled_files(tmp_path)
    assert len(table) == 14  # 'unused' stays out
    assert all((f.parts[-3] == "val") == valid for f, valid in zip(table["file"], table["is_valid"]))
    assert sorted(table["label"].unique()) == ["a", "b"]


@pytest.mark.parametrize("layout", ["flat", "one class", "class only in valid"])
def test_folders_without_classes_are_refused_in_one_sentence(tmp_path, layout):
    if layout == "flat":
        write_images(tmp_path, 4, (8, 8))
    elif layout == "one class":
        write_images(tmp_path / "a", 4, (8, 8))
    else:
        for folder in ("train/a", "valid/a", "valid/b"):
            write_images(tmp_path / folder, 2, (8, 8))
    with pytest.raises(DataError, match="a folder of images for each class"):
        labeled_files(tmp_path)


def classes_of(folder):
    for label in "ab":
        write_images(folder / label, 6, (20, 24), seed=ord(label))
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_is_decoded_once_from_the_check_to_the_batch_and_never_again(tmp_path, monkeypatch, channels):
    for label in "ab":
        write_images(tmp_path / label, 6, (20, 24), channels, seed=ord(label))
    table, _ = labeled_files(tmp_path, size=16)
    monkeypatch.setattr(files_room, "_all_done", None)  # whoever calls it fails
    monkeypatch.setattr(keeping_room, "decode", None)
    dls = labeled_loaders(table, channels, 16, bs=4)
    assert dls.train.is_fast and dls.train.one_batch()[0].shape == (4, channels, 16, 16)
    again, _ = labeled_files(tmp_path, size=16)
    assert again.equals(table)


def test_labeled_pixels_may_lie_on_a_device_or_nowhere(tmp_path, monkeypatch, capsys):
    table, _ = labeled_files(classes_of(tmp_path), size=16)
    labeled_loaders(table, 3, 16, bs=4, cache="device")
    assert "cache='device' is for GPUs" in capsys.readouterr().err
    monkeypatch.setattr(keeping_room.PixelStore, "on_device", lambda self, _: DeviceStore(self, torch.device("cpu")))
    monkeypatch.setattr(labeled, "stored", lambda kept, rows, n_in, device: kept.store(rows, n_in).on_device(device))
    dls = labeled_loaders(table, 3, 16, bs=4, cache="device")
    assert isinstance(dls.train.store, DeviceStore) and dls.train.is_fast
    for wrong in {"cache": "disk"}, {"max_gb": 0}:
        with pytest.raises(DataError, match=f"{next(iter(wrong))} is"):
            labeled_loaders(table, 3, 16, bs=4, **wrong)


def test_labeled_files_that_broke_since_are_refused(tmp_path):
    table, _ = labeled_files(classes_of(tmp_path), size=16)
    table["file"][3].write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(DataError, match="Labeled images that cannot be read: 1 unreadable"):
        labeled_loaders(table, 3, 16, bs=4)
