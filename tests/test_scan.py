"""`selfsup scan`: what it prints and writes, and what it never does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image

from selfsup_fastai import pictures
from selfsup_fastai.errors import DataError
from selfsup_fastai.scan import _of_series, _spread, contact_sheet, scan_folder, write_scan
from tests.conftest import write_images
from tests.dicoms import slices, write_dicom

MARK, UID = "QZXMARK", "1.2.826.0.1.999888777"
KEPT = {"Modality", "PhotometricInterpretation", "SpecificCharacterSet", "BurnedInAnnotation"}


def mark(file: Path) -> Path:
    """The mark in every text element, beside values that pixels need; a UID of its own in every UID but two."""
    ds = pydicom.dcmread(file)
    for name in ("PatientName", "BodyPartExamined", "ViewPosition", "StudyDescription", "Laterality", "ImageType"):
        setattr(ds, name, MARK)
    ds.PresentationIntentType = MARK
    for element in ds:
        if element.VR in ("LO", "SH", "PN", "LT", "ST", "UT", "CS") and element.keyword not in KEPT:
            element.value = MARK + ds.PatientID if element.keyword == "PatientID" else MARK
        if element.VR == "UI" and element.keyword != "SOPClassUID":
            element.value = f"{UID}.{abs(hash(str(element.value))) % 10**8}"
    ds.add_new(0x00091001, "LO", MARK)
    ds.save_as(file)
    return file.rename(file.with_name(f"{MARK}_{file.name}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DICOM files of three modalities, one twice, photographs, two of them the same, and files that are no image."""
    home = tmp_path_factory.mktemp("home")
    base = home / "scans" / f"{MARK}_folder"
    made = slices(base / "p1", 5, "P1") + slices(base / "p2", 3, "P2", "MR", seed=1)
    made.append(write_dicom(base / "us", np.full((3, 8, 8, 3), 90, np.uint8)[0], "US"))
    for file in made:
        mark(file)
    again = sorted(base.rglob("*CT000"))[0]
    again.with_name(f"{MARK}_again").write_bytes(again.read_bytes())
    write_images(base / "photos", 3)
    (base / "photos" / "copy.png").write_bytes((base / "photos" / "0000.png").read_bytes())
    (base / f"{MARK}.txt").write_text(MARK)
    (base / f"{MARK}_cut").write_bytes(again.read_bytes()[:-100])
    ds = pydicom.dcmread(again)
    ds.Rows = None
    ds.save_as(base / f"{MARK}_no_rows")
    return home / "scans"


def run(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "selfsup_fastai.cli", "scan", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory, _cache):
    """A finished `selfsup scan --out` and its folder."""
    out = tmp_path_factory.mktemp("out") / "scan"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFSUP_CACHE", str(_cache))
        return run(folder, "--out", out, cwd=folder.parent), out


def test_what_is_printed(done):
    finished, _ = done
    assert finished.returncode == 0, finished.stderr
    said = finished.stdout
    assert said.startswith("17 files\n\n10 DICOM images (10 frames): 3 patients")
    rows = [line.split() for line in said.splitlines()]
    assert ["CT", "6", "6", "1", "24", "x", "24", "6"] in rows  # files, frames, series, size and how often
    assert ["MR", "3", "3", "1", "24", "x", "24", "3"] in rows
    assert ["US", "1", "1", "1", "8", "x", "8", "1"] in rows
    assert "4 images" in said and "1 file: an exact copy" in said
    assert "2 images: the same image" in said and "1 image: text may be burned into" in said
    assert "Cannot be used: 3 files" in said
    assert all(code in said for code in ("truncated", "missing_tag", "not_an_image"))
    assert finished.stderr == ""


def test_what_is_written(done):
    _, out = done
    assert {file.name for file in out.iterdir()} == {"scan.csv", "problems.csv", "contact_sheet.png"}
    table = pd.read_csv(out / "scan.csv", index_col="place")
    assert table["format"].value_counts().to_dict() == {"DICOM": 10, "PNG": 4}
    assert table["look_at"].value_counts().to_dict() == {"duplicate": 2, "burned_in": 1}
    assert table["patient"].nunique() == 3 and "file" not in table
    problems = pd.read_csv(out / "problems.csv", index_col="place")
    assert sorted(problems["code"]) == ["missing_tag", "not_an_image", "truncated"]
    assert sorted([*table.index, *problems.index]) == list(range(17))


def test_nothing_names_anybody(done):
    finished, out = done
    written = [file.read_bytes() for file in out.iterdir()]
    for data in (finished.stdout.encode(), finished.stderr.encode(), *written):
        assert not any(mark in data for mark in (MARK.encode(), MARK.lower().encode(), UID.encode()))


def test_paths_only_where_asked_for(folder, tmp_path):
    finished = run(folder, "--out", tmp_path / "out", "--paths", cwd=tmp_path)
    assert MARK not in finished.stdout
    table = pd.read_csv(tmp_path / "out" / "scan.csv")
    assert all(Path(file).is_file() for file in table["file"])
    assert UID not in (tmp_path / "out" / "scan.csv").read_text()
    assert "file names may identify patients" in " ".join(run("--help", cwd=tmp_path).stdout.split())


def test_the_same_pseudonyms_in_the_next_scan(done, folder):
    table = pd.read_csv(done[1] / "scan.csv", index_col="place", keep_default_na=False)
    again = scan_folder(folder).dicoms
    for name in ("patient", "study", "series", "instance"):
        assert list(again[name]) == list(table[name][again.index])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "There is no folder"),
        (["empty"], "There is no file in the folder"),
        (["full", "--out", "full/scan"], "lies in the folder"),
        (["full", "--out", "full/0000.png/scan"], "lies in the folder"),
        (["full", "--out", "taken"], "cannot be made"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("")
    write_images(tmp_path / "full", 1)
    finished = run(*arguments, cwd=tmp_path)
    assert finished.returncode == 1 and said in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1


# ---- the contact sheet


def test_pictures_are_those_of_the_files(tmp_path, monkeypatch):
    """One of each modality and format: titled, and as bright as the file."""
    bright = np.full((20, 30, 3), 200, np.uint8)
    write_dicom(tmp_path / "a", bright, "US", PatientName=MARK)
    Image.new("L", (40, 20), 51).save(tmp_path / "b.png")
    drawn = []
    monkeypatch.setattr(pictures, "draw", lambda ax, image, title: drawn.append((title, image)))
    assert contact_sheet(scan_folder(tmp_path))
    assert [title for title, _ in drawn] == ["US 20 x 30", "PNG 20 x 40"]
    assert [round(float(image.mean()), 3) for _, image in drawn] == [round(200 / 255, 3), 0.2]
    assert drawn[1][1].shape[-1] == 2 * drawn[1][1].shape[-2]  # all of it, not a square of it


def test_without_images_there_is_no_sheet(tmp_path):
    (tmp_path / "in" / "text").parent.mkdir()
    (tmp_path / "in" / "text").write_text("nothing")
    found = scan_folder(tmp_path / "in")
    write_scan(found, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["problems.csv", "scan.csv"]
    assert str(found).startswith("1 file\n") and len(found.dicoms) == len(found.photos) == 0
    with pytest.raises(DataError, match="no file"):
        scan_folder(tmp_path / "nothing", (tmp_path / "nothing").mkdir())


def test_kinds_share_the_sheet():
    kinds = {"CT": [[0, 1, 2], [3, 4, 5], [6]], "MR": [[7]], "PNG": [[8], [9], [10], [11]]}
    chosen = _spread(kinds, 6)
    assert [kind for kind, _ in chosen] == ["CT", "CT", "CT", "MR", "PNG", "PNG"]
    assert [place for _, place in chosen] == [1, 4, 6, 7, 8, 11]
    assert len(_spread(kinds, 50)) == 12
    assert _of_series([[0, 1, 2, 3, 4]], 3) == [0, 2, 4]
    assert _of_series([[0], [1], [2]], 1) == [1]
