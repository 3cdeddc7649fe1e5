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
from selfsup_fastai.data.labeled import labeled_files
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
    assert "seen in one wide window" in capsys.readouterr().err
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


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cines(tmp_path):
    """Four files of three frames, of four patients."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 250, (4, 3, 24, 24)).astype(np.uint16)
    names = [write_dicom(tmp_path / f"x{i}", frames[i], "US", PatientID=f"P{i}").name for i in range(4)]
    return tmp_path, names


def labels_of(dls) -> dict[tuple, str]:
    """(file, frame) -> label, from what the loaders hand out."""
    found = {}
    for dl in (dls.train.new(shuffle=False, drop_last=False, bs=4), dls.valid):
        items = [dl.dataset.items.iloc[i] for i in range(len(dl.dataset))]
        named = [dls.vocab[int(y)] for _, ys in dl for y in ys]
        found |= {(row["file"].name, row["frame"]): label for row, label in zip(items, named, strict=True)}
    return found


def test_labels_go_with_their_rows_and_frames(cines):
    folder, names = cines
    table = pd.DataFrame({"name": names, "label": list("abab")})
    dls = DicomDataLoaders.from_df(table, folder, size=24, bs=2)
    assert labels_of(dls) == {(f"x{i}", k): "abab"[i] for i in range(4) for k in range(3)}
    rows = [(f"x{i}", k, "abc"[(i + k) % 3]) for i in range(4) for k in range(3)]
    table = pd.DataFrame(rows, columns=["name", "frame", "label"]).sample(frac=1, random_state=0)
    dls = DicomDataLoaders.from_df(table, folder, label_col="label", size=24, bs=2)
    assert labels_of(dls) == {(name, k): label for name, k, label in rows}
    with pytest.raises(DataError, match="8 rows name a file of several frames that"):
        DicomDataLoaders.from_df(table.drop(columns="frame"), folder, label_col="label", size=24)


def test_columns_of_a_table_never_replace_those_of_the_images(cines, capsys):
    folder, names = cines
    about = {"source": list("wxyz"), "channels": 2, "width": 7, "position": 9.0, "hospital": list("aabb")}
    table = pd.DataFrame({"name": names, "label": list("abab"), **about})
    dls = DicomDataLoaders.from_df(table, folder, size=24, bs=2)
    assert dls.one_batch()[0].std() > 0.1 and (dls.items_df["width"] == 24).all()
    assert "not taken from it: source, channels, width, position" in capsys.readouterr().err
    unlabeled = UnlabeledDataLoaders.from_df(table, folder, size=24, bs=2, split_by="hospital")
    assert unlabeled.items_df.groupby("hospital")["is_valid"].nunique().tolist() == [1, 1]
    with pytest.raises(DataError, match="split by 'source': that column is their own"):
        UnlabeledDataLoaders.from_df(table, folder, size=24, bs=2, split_by="source")


def test_columns_that_say_nonsense_are_refused(cines):
    folder, names = cines
    table = pd.DataFrame({"name": names, "label": list("abab"), "v": ["False", "True"] * 2, "all": True})
    for column, said in {"v": "must be true or false", "all": "leaves no image to train"}.items():
        with pytest.raises(DataError, match=said):
            DicomDataLoaders.from_df(table, folder, size=24, bs=2, valid_col=column)
    with pytest.raises(DataError, match="1 of 4 rows have no label"):
        DicomDataLoaders.from_df(table.assign(label=["a", "b", None, "b"]), folder, label_col="label", size=24)
    with pytest.raises(DataError, match="holds the number of a frame"):
        UnlabeledDataLoaders.from_df(table.assign(frame=["first"] * 4), folder, size=24)


def test_whole_numbers_are_classes_and_fractions_are_not(cines):
    folder, names = cines
    for values, n in (([0.0, 1.0] * 2, 2), ([0.5, 1.25, 2.0, 3.0], None)):
        dls = DicomDataLoaders.from_df(pd.DataFrame({"name": names, "y": values}), folder, size=24, bs=2)
        assert (len(dls.vocab) if n else None) == n and dls.one_batch()[1].is_floating_point() == (n is None)


def test_grey_first_or_color_first_makes_no_difference(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        write_dicom(tmp_path / f"{i}", rng.integers(0, 255, (24, 24, 3)).astype(np.uint8), "US", PatientID=f"P{i}")
    assert [loaders(tmp_path, n_in=n).one_batch()[0].shape[1] for n in (None, 1, None, 3, None)] == [3, 1, 3, 3, 3]


def test_three_windows_for_all_or_a_refusal(tmp_path):
    slices(tmp_path / "ct", 3, "A")
    slices(tmp_path / "mr", 3, "B", "MR")
    with pytest.raises(DataError, match="Three windows are three channels"):
        loaders(tmp_path, window=["lung", "bone", "brain"], n_in=1)
    dls = loaders(tmp_path, window=[[1500, -600], "bone", (np.int64(80), 40)])
    assert dls.report.empty and dls.one_batch()[0].shape[1] == 3


def test_air_ties_no_patients(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        for k in range(3):
            array = rng.integers(-500, 500, (24, 24)) if k else np.zeros((24, 24))
            about = {"PatientID": f"P{i}", "StudyInstanceUID": f"1.5.{i + 1}", "SeriesInstanceUID": f"1.6.{i + 1}"}
            write_dicom(tmp_path / f"{i}-{k}", array.astype(np.int16), "CT", **about)
    items = loaders(tmp_path, valid_pct=0.3).items_df
    assert (items.groupby("patient")["is_valid"].nunique() == 1).all() and items["is_valid"].sum() == 6


def test_train_and_valid_folders_that_share_patients_are_named(tmp_path, capsys):
    for part in ("train", "valid"):
        for i in range(4):
            slices(tmp_path / part / "ab"[i % 2], 1, f"P{i}", seed=i)[0].rename(tmp_path / part / "ab"[i % 2] / f"{i}")
    labeled_files(tmp_path)
    assert "4 patients are among the images to train and to validate with" in capsys.readouterr().err


def test_a_class_of_one_patient_is_not_lost_without_a_word(tmp_path, capsys):
    for label, n in (("a", 4), ("b", 1)):
        for i in range(n):
            slices(tmp_path / label / f"p{i}", 3, f"{label}{i}", seed=10 * i + ord(label))
    files = sorted(f for f in tmp_path.rglob("*") if f.is_file())
    table = pd.DataFrame({"file": files, "label": [f.relative_to(tmp_path).parts[0] for f in files]})
    refused = 0
    for seed in range(8):
        try:
            DicomDataLoaders.from_df(table, label_col="label", size=24, bs=4, seed=seed)
            assert "No image of b is among those to validate with" in capsys.readouterr().err
        except DataError as error:
            refused += 1
            assert "All patients with images of b are among those to validate with" in str(error)
    assert 0 < refused < 8
    DicomDataLoaders.from_df(table, label_col="label", size=24, bs=4, split_by="random")
    labeled, _ = labeled_files(tmp_path)  # looks for a split that leaves b to train with
    assert set(labeled["label"][~labeled["is_valid"]]) == {"a", "b"}
    assert labeled_files(tmp_path, split_by="random")[0].groupby("label")["is_valid"].sum().tolist() == [2, 1]


def test_a_modality_to_train_and_another_to_validate_with_is_said(tmp_path, capsys):
    slices(tmp_path / "ct", 4, "A")
    slices(tmp_path / "mr", 4, "B", "MR", seed=1)
    loaders(tmp_path)
    said = capsys.readouterr().err
    assert "Only CT to train and only MR to validate" in said or "Only MR to train and only CT to validate" in said
