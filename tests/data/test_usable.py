"""DICOM files beside photographs: which items, which channels, which side of the split, and the very pixels."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from selfsup_fastai.data import usable
from selfsup_fastai.data.dicom_loaders import DicomDataLoaders
from selfsup_fastai.data.dicom_pixels import DicomImage, read_dicom
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.opening import open_image
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.errors import DataError, TaskError, UnknownNameError
from selfsup_fastai.pretext.learner import pretext_learner
from tests.conftest import write_images
from tests.dicoms import slices, write_dicom


@pytest.fixture
def export(tmp_path):
    """Four patients with a CT series of three slices each, at odd depths and without suffixes; and what is no image."""
    for i in range(4):
        slices(tmp_path / f"{i % 2}" / f"p{i}", 3, f"P{i}", seed=i)
    (tmp_path / "notes.dcm").write_text("no image")
    (tmp_path / "half").write_bytes((tmp_path / "0" / "p0" / "CT000").read_bytes()[:-200])
    return tmp_path


def loaders(folder, **kwargs):
    return UnlabeledDataLoaders.from_folder(
        folder, **{"size": 24, "bs": 4, "valid_pct": 0.25, "num_workers": 0, **kwargs}
    )


def test_a_folder_of_cts_gives_windows_a_report_and_a_split_by_patient(export, capsys):
    dls = loaders(export)
    assert sorted(dls.report["code"]) == ["not_an_image", "truncated"]
    assert len(dls.items_df) == 12 and dls.items_df["patient"].nunique() == 4
    sides = dls.items_df.groupby("patient")["is_valid"].nunique()
    assert (sides == 1).all() and dls.items_df["is_valid"].sum() == 3
    said = capsys.readouterr().err
    assert "CT: three windows (lung, mediastinum, bone)" in said and "2 of 14 files left out" in said
    (x,) = dls.valid.one_batch()
    assert x.shape == (3, 3, 24, 24)
    for image, file in zip(x, dls.items_df["file"][dls.items_df["is_valid"]]):
        expected = np.rint(read_dicom(file)[0] * 255).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(image.cpu().numpy(), expected, atol=1e-6)


def test_one_channel_keeps_16_bits(export):
    dls = loaders(export, n_in=1)
    (x,) = dls.valid.one_batch()
    assert x.shape == (3, 1, 24, 24)
    for image, file in zip(x, dls.items_df["file"][dls.items_df["is_valid"]]):
        np.testing.assert_allclose(image[0].cpu().numpy(), read_dicom(file, n_in=1)[0], atol=1 / 65535)
        assert np.abs(image[0].cpu().numpy() * 255 - np.rint(image[0].cpu().numpy() * 255)).max() > 1e-4


def test_mixed_folders_get_one_wide_channel_and_colors_three(tmp_path, capsys):
    slices(tmp_path / "ct", 3, "A")
    slices(tmp_path / "mr", 3, "B", "MR")
    dls = loaders(tmp_path)
    assert dls.valid.one_batch()[0].shape[1] == 1
    assert "one wide window and one channel for all" in capsys.readouterr().err
    first = dls.items_df.index[dls.items_df["modality"] == "CT"][0]
    item = (dls.train_ds if not dls.items_df["is_valid"][first] else dls.valid_ds).items[0]
    assert isinstance(item, DicomImage) and item.n_in in (1, None)
    write_images(tmp_path / "photos", 3, (24, 24))
    dls = loaders(tmp_path)
    assert dls.valid.one_batch()[0].shape[1] == 3
    photos = dls.items_df[dls.items_df["modality"] == ""]
    assert len(photos) == 3 and (photos["patient"] == "").all()


def test_slices_of_an_mr_series_share_one_scale(tmp_path):
    files = slices(tmp_path / "mr", 5, "A", "MR")
    table = usable.usable_items(files).info
    (limits,) = {item.limits for item in table["source"]}
    from pydicom import dcmread

    values = np.concatenate([dcmread(f).pixel_array.ravel() for f in files])
    np.testing.assert_allclose(limits, np.quantile(values, [0.01, 0.99]), rtol=0.02)
    brightest = [np.asarray(open_image(item)).max() for item in table["source"]]
    assert brightest[0] < 0.5 * brightest[-1]  # each slice by itself would reach 255


def test_each_frame_is_an_image(tmp_path):
    frames = np.random.default_rng(0).integers(0, 4000, (5, 24, 24)).astype(np.uint16)
    write_dicom(tmp_path / "cine", frames, "US")
    info, report = usable.usable_items([tmp_path / "cine"])
    assert info["frame"].tolist() == [0, 1, 2, 3, 4] and report.empty
    for i, item in enumerate(info["source"]):
        np.testing.assert_allclose(np.asarray(open_image(item)) / 255, read_dicom(tmp_path / "cine", i)[0], atol=1e-5)


def test_the_second_epoch_and_later_runs_decode_nothing(export, monkeypatch):
    dls = loaders(export)
    first = [x.clone() for (x,) in dls.valid]
    again = loaders(export)  # fastai tries one item
    for room in ("keeping", "blocks"):
        monkeypatch.setattr(f"selfsup_fastai.data.{room}.decode", None)
    monkeypatch.setattr("selfsup_fastai.data.opening.decode", None)
    for later in (dls, again):
        assert later.train.is_fast
        torch.testing.assert_close([x for (x,) in later.valid], first, rtol=0, atol=0)
    assert dls.train.store.chunks[0].file and len(list(dls.train)) == 2


@pytest.mark.parametrize("n_in", [1, 3])
def test_without_kept_pixels_batches_are_the_same(export, n_in):
    kept, anew = loaders(export, n_in=n_in), loaders(export, n_in=n_in, cache=False)
    for (x,), (y,) in zip(kept.valid, anew.valid, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_another_window_is_other_pixels(export):
    wide, lung = (loaders(export, n_in=1, window=w).valid.one_batch()[0] for w in (None, "lung"))
    assert (wide != lung).any()
    file = loaders(export, n_in=1).items_df["file"][0]
    with pytest.raises(UnknownNameError, match="Did you mean 'lung'"):
        loaders(export, window="lnug")
    np.testing.assert_array_equal(
        np.asarray(open_image(DicomImage(str(file), window="lung"))),
        read_dicom(file, window="lung", n_in=1)[0] * np.float32(255),
    )


def test_one_patient_is_split_at_random_and_it_is_said(tmp_path, capsys):
    slices(tmp_path, 6, "A")
    dls = loaders(tmp_path)
    assert dls.items_df["is_valid"].sum() == 2
    assert "All images are of one patient" in capsys.readouterr().err


def test_columns_of_a_table_split_photographs_of_one_person_together(color_folder):
    files = sorted(color_folder.glob("*.png"))
    df = pd.DataFrame({"name": [f.name for f in files], "person": [f"p{i // 8}" for i in range(len(files))]})
    dls = UnlabeledDataLoaders.from_df(df, color_folder, size=24, bs=8, split_by="person", valid_pct=0.25)
    sides = dls.items_df.groupby("person")["is_valid"].nunique()
    assert (sides == 1).all() and dls.items_df["is_valid"].sum() == 16
    with pytest.raises(DataError, match="'patient': nothing is known of it"):
        UnlabeledDataLoaders.from_df(df, color_folder, size=24, bs=8, split_by="patient")


def test_scans_are_not_mirrored_and_have_no_colors_to_ask_about(export, capsys):
    dls = loaders(export)
    learn = pretext_learner(dls, "rotation", arch="resnet10t")
    assert learn.task.flip == 0 and "scans are not mirrored" in capsys.readouterr().err
    assert pretext_learner(dls, "rotation", arch="resnet10t", flip=0.5).task.flip == 0.5
    with pytest.raises(TaskError, match="asks about colors, and these are scans"):
        pretext_learner(dls, "colorization", arch="resnet10t")
    views = pretext_learner(dls, "simclr", arch="resnet10t").task.recipe(0, 3, 24)
    assert views.hue == 0 and views.flip == 0 and views.window > 0
    assert pretext_learner(dls, "simclr", arch="resnet10t", views="photo").task.recipe(0, 3, 24).hue > 0


def test_photographs_alone_are_as_before(color_folder):
    dls = loaders(color_folder, bs=16)
    assert not {"patient", "frame", "source"} & set(dls.items_df)
    assert pretext_learner(dls, "rotation", arch="resnet10t").task.flip == 0.5


def test_a_picture_opened_by_itself(tmp_path):
    file = write_dicom(tmp_path / "x", np.arange(576, dtype=np.int16).reshape(24, 24) - 288, "CT")
    assert open_image(file).mode == "RGB" and open_image(file, n_in=1).mode == "F"
    with open(file, "rb") as opened:
        assert (
            Image.Image.tobytes(open_image(opened))
            == open_image(file).tobytes()
            == open_image(file.read_bytes()).tobytes()
        )


def test_the_same_picture_under_two_patients_stays_on_one_side(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        array = rng.integers(-500, 500, (24, 24)).astype(np.int16)
        for side in (0, 1):  # exported twice, each time under other ids
            study, series = (f"1.{n}.{side + 1}{i}" for n in (5, 6))
            about = {"PatientID": f"P{side}{i}", "StudyInstanceUID": study, "SeriesInstanceUID": series}
            write_dicom(tmp_path / f"{i}-{side}", array, "CT", **about)
    for seed in range(4):
        items = loaders(tmp_path, seed=seed, valid_pct=0.5).items_df
        assert items["patient"].nunique() == 12 and items["is_valid"].sum() == 6
        assert (items.groupby("pixel_hash")["is_valid"].nunique() == 1).all() and items["pixel_hash"].nunique() == 6


def test_other_windows_than_in_pretraining_are_said(export, tmp_path, capsys):
    learn = pretext_learner(loaders(export), "rotation", arch="resnet10t")
    encoder = learn.save_encoder(tmp_path.parent / "windows")
    assert learn.this_round()["data"]["scans"] == "by modality, CT in three windows"
    table = pd.DataFrame({"file": loaders(export).items_df["file"]})
    table["label"] = ["ab"[int(f.parent.name[1:]) % 2] for f in table["file"]]
    for window, said in ((None, False), ("lung", True)):
        labeled = DicomDataLoaders.from_df(table, label_col="label", size=24, bs=4, window=window)
        capsys.readouterr()
        downstream_learner(labeled, encoder)
        assert ("these are seen window lung" in capsys.readouterr().err) == said


def test_a_ct_that_nobody_rescaled_is_said_aloud(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(4):
        array = rng.integers(0, 3000, (24, 24)).astype(np.int16)
        rescale = {} if i else {"RescaleSlope": None, "RescaleIntercept": None}
        write_dicom(tmp_path / f"{i}", array, "CT", PatientID=f"P{i}", **rescale)
    for _ in range(2):  # read, and remembered
        dls = loaders(tmp_path)
        said = capsys.readouterr().err
        assert "1 of 4 images: a CT without rescale: the values may not be Hounsfield units" in said
        assert "4 of 4 images: a CT whose values lie within 0..4095" in said
    assert sorted(dls.items_df["flags"]) == ["no_rescale, suspicious_range"] + ["suspicious_range"] * 3
