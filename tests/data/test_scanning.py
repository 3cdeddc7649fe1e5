"""The table of a folder's headers, from child processes; beside an index, and on files that want to stop a scan."""

import math
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from selfsup_fastai.data import files, scanning
from selfsup_fastai.data.auditing import about_dicoms, about_photos, about_problems, same_contents, suspects
from selfsup_fastai.data.files import check_files
from selfsup_fastai.data.pseudonyms import pseudonym
from selfsup_fastai.data.reasons import REASONS
from selfsup_fastai.data.scanning import COLUMNS, IDENTIFYING, scan_dicoms, scan_files
from selfsup_fastai.errors import DataError
from tests.dicoms import slices, write_dicom

TREE = Path(pydicom.__file__).parent / "data" / "test_files" / "dicomdirtests"
GREY = np.arange(24, dtype=np.int16).reshape(4, 6)


@pytest.fixture(scope="module")
def tree(_cache):
    """pydicom's folder of two patients in three folders, and one whose files have no pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFSUP_CACHE", str(_cache))
        return scan_dicoms(TREE)


def in_folder(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return table[[name in file.parts for file in table["file"]]]


# ---- the table


def test_columns_and_types(tree):
    table, problems = tree
    assert list(table.columns) == list(COLUMNS)
    assert all(table[name].dtype == kind for name, kind in COLUMNS.items())
    assert list(problems.columns) == ["file", "code", "message"]
    assert set(problems["code"]) <= set(REASONS)
    assert len(table) + len(problems) == problems.attrs["checked"]
    empty, none = scan_files([])
    assert list(empty.columns) == list(COLUMNS) and len(none) == 0
    assert all(empty[name].dtype == kind for name, kind in COLUMNS.items())


def test_one_patient_in_two_folders_and_another_one(tree):
    table, _ = tree
    first, second, other = (in_folder(table, name) for name in ("98892001", "98892003", "77654033"))
    assert set(first["patient"]) == set(second["patient"]) and first["patient"].nunique() == 1
    assert not set(first["study"]) & set(second["study"])
    assert other["patient"].nunique() == 1 and set(other["patient"]) != set(first["patient"])
    assert table["instance"].is_unique and (table["instance"] != "").all()


def test_headers_as_pydicom_reads_them(tree):
    table, _ = tree
    for row in table.itertuples():
        ds = pydicom.dcmread(row.file, stop_before_pixels=True)
        assert row.patient == pseudonym("patient", str(ds.PatientID), "")
        assert row.series == pseudonym("series", ds.SeriesInstanceUID)
        assert (row.modality, row.height, row.width, row.bits) == (ds.Modality, ds.Rows, ds.Columns, ds.BitsStored)
        assert row.number == ds.InstanceNumber
        assert row.syntax == UID(ds.file_meta.TransferSyntaxUID).name and row.kind == UID(ds.SOPClassUID).name
        if "ImagePositionPatient" in ds:
            assert row.position == tuple(ds.ImagePositionPatient)
            assert row.orientation == tuple(ds.ImageOrientationPatient)
        else:
            assert row.position is None and row.plane == ""
        assert row.slope == ds.RescaleSlope if "RescaleSlope" in ds else math.isnan(row.slope)


def test_a_corpus_beside_its_index(shared_data):
    """What pydicom and others have bundled over the years: every file has a row that is right, or a reason."""
    folder = shared_data("dicom_mixed") / "dicom"
    index = pd.read_csv(folder / "index.csv", dtype=str, keep_default_na=False).to_dict("records")
    table, problems = scan_files([folder / row["file"] for row in index])
    assert len(table) + len(problems) == len(index) and len(table) > 220
    for place, row in table.iterrows():
        told = index[place]
        if told["rows"]:  # the index has none where pydicom gave up on a private syntax
            assert (str(row["height"]), str(row["width"])) == (told["rows"], told["cols"])
            assert (str(row["bits"]), str(row["samples"])) == (told["bits"], told["spp"])
            assert (row["photometric"], row["modality"]) == (told["pi"], told["modality"])
            assert str(row["frames"]) == (told["frames"] or "1")
        if told["tsyntax"]:
            assert row["syntax"] in (UID(told["tsyntax"]).name, "private")
    left_out = {place for place in range(len(index)) if place not in table.index}
    with_pixels = [p for p in left_out if index[p]["pixels"] == "1" and index[p]["modality"] not in ("SEG", "RTDOSE")]
    assert len(with_pixels) < 10


def test_the_index_is_the_place_in_the_list(tmp_path):
    good = slices(tmp_path / "a", 3, "P1")
    (tmp_path / "text").write_text("nothing")
    table, problems = scan_files([good[2], tmp_path / "text", str(good[0]), tmp_path / "gone"])
    assert list(table.index) == [0, 2] and list(table["file"]) == [good[2], good[0]]
    assert list(table["number"]) == [3, 1]
    assert list(problems["code"]) == ["not_dicom", "missing"]
    assert list(problems["file"]) == [tmp_path / "text", tmp_path / "gone"]


def test_images_of_other_formats_are_counted_and_no_problem(tmp_path):
    write_dicom(tmp_path / "b" / "c" / "no suffix", GREY)
    for form in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        Image.new("L", (5, 5)).save(tmp_path / f"x{form}", form)
    table, problems = scan_dicoms(tmp_path)
    assert len(table) == 1 and problems.empty
    assert problems.attrs == {"checked": 7, "images": 6}
    assert len(scan_dicoms(tmp_path, recurse=False)[0]) == 0


def test_blank_ids_stay_blank_and_issuers_part_patients(tmp_path):
    ids = [{"PatientID": ""}, {"PatientID": None}, {"PatientID": "  "}, {"PatientID": "7"}]
    ids += [{"PatientID": "7 "}, {"PatientID": "7", "IssuerOfPatientID": "A"}]
    made = [write_dicom(tmp_path / str(i), GREY, StudyInstanceUID="", **more) for i, more in enumerate(ids)]
    table, _ = scan_files(made)
    assert list(table["patient"][:3]) == ["", "", ""] and set(table["study"]) == {""}
    assert table["patient"][3] == table["patient"][4] != table["patient"][5]


def test_identifying_columns_only_where_asked_for(tmp_path):
    file = write_dicom(tmp_path / "a", GREY, PatientAge="061Y", PatientSex="F")
    assert not set(IDENTIFYING) & set(scan_files([file])[0])
    row = scan_files([file], identifying=True)[0].iloc[0]
    assert (row["patient_id"], row["patient_age"], row["patient_sex"]) == ("P0", "061Y", "F")
    ds = pydicom.dcmread(file)
    uids = (ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID)
    assert (row["study_uid"], row["series_uid"], row["sop_uid"]) == uids


def test_words_that_are_none_of_the_standard(tmp_path):
    """Nothing keeps people from writing names into code strings."""
    odd = {"BodyPartExamined": "SMITH", "ViewPosition": "JANE", "Laterality": "SMITH"}
    made = [write_dicom(tmp_path / "a", GREY, "CR", ImageType=["DERIVED", "SMITH", "AXIAL"], **odd)]
    made.append(write_dicom(tmp_path / "b", GREY, "CR", BodyPartExamined="SMITH", PresentationIntentType="JANE"))
    made.append(write_dicom(tmp_path / "c", GREY, "CR", BodyPartExamined="HEAD AND NECK", ViewPosition="PA"))
    table, _ = scan_files(made)
    assert "SMITH" not in table.drop(columns="file").to_string() and "JANE" not in table.to_string()
    assert table["body_part"][0] == table["body_part"][1] != table["view"][0]
    assert table["body_part"].str.match(r"OTHER-[0-9A-F]{6}$").tolist() == [True, True, False]
    assert (table["body_part"][2], table["view"][2], table["laterality"][0]) == ("HEAD AND NECK", "PA", "")
    assert (table["image_type"][0], table["intent"][1]) == ("DERIVED\\\\AXIAL", "")


def test_wrong_arguments():
    with pytest.raises(DataError, match="n_workers"):
        scan_files(["a"], n_workers=0)
    with pytest.raises(DataError, match="list of paths"):
        scan_files("a")


# ---- decoders


def test_a_syntax_without_its_decoder(tmp_path, monkeypatch):
    rle = write_dicom(tmp_path / "rle", GREY)
    rle.write_bytes(rle.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))
    assert scan_files([rle])[1].empty
    scanning._missing_decoder.cache_clear()
    monkeypatch.setattr("selfsup_fastai.data.dicom.missing_decoder", lambda uid: "no_decoder" if uid[-1] == "5" else "")
    problems = scan_files([rle])[1]
    scanning._missing_decoder.cache_clear()
    assert list(problems["code"]) == ["no_decoder"]
    assert "RLE Lossless" in problems["message"][0] and "selfsup_fastai[dicom]" in problems["message"][0]


@pytest.mark.parametrize(
    ("uid", "code"),
    [
        ("1.2.840.10008.1.2.1", ""),
        ("1.2.840.10008.1.2.5", ""),
        ("1.2.840.10008.1.2.4.102", "unsupported_syntax"),
        ("1.2.3.4", "unsupported_syntax"),
    ],
)
def test_which_syntaxes_are_decoded(uid, code):
    assert scanning._missing_decoder(uid) == code


# ---- hostile files


def deflate_bomb(file: Path, gib: int = 3) -> Path:
    """A deflated file of a few MB that claims to be many GiB."""
    write_dicom(file, GREY)
    ds = pydicom.dcmread(file)
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(file)
    data = file.read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    elements = zlib.decompress(data[start:], -zlib.MAX_WBITS) + b"\xfc\xff\xfc\xffOB\0\0\xf0\xff\xff\xff"
    first = packer.compress(elements) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(64 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    file.write_bytes(data[:start] + first + zeros * (16 * gib) + packer.flush())
    return file


def test_a_bomb_costs_its_own_file_only(tmp_path):
    good = slices(tmp_path / "good", 4, "P1")
    table, problems = scan_files([*good[:2], deflate_bomb(tmp_path / "bomb"), *good[2:]])
    assert list(table.index) == [0, 1, 3, 4]
    assert problems["code"].iloc[0] in ("too_large", "out_of_memory")


CHILD = """
import sys, os, time
from selfsup_fastai.data import headers, opening
read = headers.read_header
def read_header(path, identifying=False):
    if "hang" in os.path.basename(path):
        time.sleep(60)
    if "crash" in os.path.basename(path):
        os._exit(3)
    return read(path, identifying)
headers.read_header = read_header
opening.main()
"""


def test_files_that_hang_or_crash_get_a_line_and_the_others_their_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_COMMAND", [sys.executable, "-c", CHILD])
    good = slices(tmp_path / "good", 3, "P1")
    hang, crash = write_dicom(tmp_path / "hang", GREY), write_dicom(tmp_path / "crash", GREY)
    table, problems = scan_files([good[0], hang, good[1], crash, good[2]], timeout=2)
    assert list(table.index) == [0, 2, 4]
    assert list(zip(problems["file"], problems["code"])) == [(hang, "timeout"), (crash, "crashed")]


def test_without_child_processes(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(files, "_COMMAND", [os.fspath(tmp_path / "no such program")])
    table, problems = scan_files([*slices(tmp_path / "good", 3, "P1"), tmp_path / "gone"])
    assert len(table) == 3 and list(problems["code"]) == ["missing"]
    said = capfd.readouterr()
    assert "Child processes cannot be started here" in said.err and said.out == ""


# ---- what is suspicious, and the summary


def row(**values) -> dict:
    plain = {"modality": "MR", "image_type": "ORIGINAL\\PRIMARY", "burned_in": "", "instance": "", "intent": ""}
    numbers = dict.fromkeys(("window_center", "window_width", "slope", "intercept"), math.nan)
    return {**plain, **numbers, **values}


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, []),
        ({"burned_in": "YES"}, ["burned_in"]),
        ({"modality": "US"}, ["burned_in"]),
        ({"modality": "US", "burned_in": "NO"}, []),
        ({"image_type": "DERIVED\\SECONDARY\\SCREEN SAVE"}, ["burned_in"]),
        ({"modality": "CT"}, ["no_rescale"]),
        ({"modality": "CT", "slope": 1.0, "intercept": -1024.0}, []),
        (
            {"modality": "CT", "slope": 1.0, "intercept": 0.0, "window_center": 1064.0, "window_width": 400.0},
            ["odd_window"],
        ),
        ({"modality": "CT", "slope": 1.0, "intercept": 0.0, "window_center": 500.0, "window_width": 2000.0}, []),
        ({"intent": "FOR PROCESSING"}, ["for_processing"]),
    ],
)
def test_suspicions(values, found):
    flags = suspects(pd.DataFrame([row(**values)]))
    assert [name for name in flags if flags[name].iloc[0]] == found


def test_duplicates_are_found_and_missing_ids_are_none():
    table = pd.DataFrame([row(instance=name) for name in ("a", "b", "a", "", "")], index=[3, 5, 7, 8, 9])
    assert list(suspects(table).query("duplicate").index) == [3, 7]
    assert suspects(table.iloc[:0]).empty


def test_the_summary_counts(tree):
    table, problems = tree
    said = about_dicoms(table)
    assert f"{len(table)} DICOM images ({len(table)} frames): 2 patients, 6 studies" in said
    for name, part in table.groupby("modality"):
        line = next(line.split() for line in said.splitlines() if line.startswith(f"  {name} "))
        assert line[1:4] == [str(len(part)), str(len(part)), str(part["series"].nunique())]
    assert f"{len(problems)} files" in about_problems(problems)
    assert about_problems(problems.iloc[:0]) == ""


def test_photographs_that_are_copies(tmp_path):
    for i, color in enumerate((10, 20, 10, 30)):
        Image.new("RGB", (8, 6), (color, 5, 5)).save(tmp_path / f"{i}.png")
    assert same_contents(sorted(tmp_path.iterdir())) == [[tmp_path / "0.png", tmp_path / "2.png"]]
    said = about_photos(check_files(sorted(tmp_path.iterdir()))[0])
    assert said.startswith("4 images") and "PNG 4" in said and "6 x 8 4" in said and "color 4" in said
    assert "1 file: an exact copy of another one" in said
