"""runs.py: what a folder of classes becomes, and what a run says of itself. Whole runs: test_cli.py, test_demo.py."""

import numpy as np
import pytest

from selfsup_fastai.errors import DataError
from selfsup_fastai.runs import labeled_files, pretrain, wilson
from tests.conftest import write_images


def test_labels_are_folder_names_and_the_split_takes_some_of_each(tmp_path):
    for label, n in (("a", 10), ("b", 5), ("c", 2)):
        write_images(tmp_path / label, n, (8, 8))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    table, report = labeled_files(tmp_path, valid_pct=0.2, seed=3)
    assert table["label"].tolist() == [f.parent.name for f in table["file"]]
    assert table.groupby("label")["is_valid"].sum().to_dict() == {"a": 2, "b": 1, "c": 1}
    assert report["code"].tolist() == ["not_an_image"]
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


def test_wilson_covers_as_it_says():
    """The true share lies in 95 % intervals about 95 % of the time, also with few images and near 1."""
    rng = np.random.default_rng(0)
    for share, n in ((0.9, 20), (0.5, 30), (0.97, 60)):
        inside = [low <= share <= high for low, high in (wilson(int(k), n) for k in rng.binomial(n, share, 4000))]
        assert 0.92 < np.mean(inside) < 0.985
    assert wilson(5, 5)[1] == pytest.approx(1) and wilson(5, 5)[0] < 0.6


def test_a_file_where_the_run_folder_should_be(tmp_path):
    write_images(tmp_path / "images", 3, (32, 32))
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="is a file"):
        pretrain(tmp_path / "images", tmp_path / "out")
