"""1,216 odd, damaged and hostile files of image libraries, each opened in a child process with limits only."""

import json
import subprocess
import sys

import pandas as pd
import PIL
import pytest

from selfsup_fastai.data.files import check_files, find_files
from selfsup_fastai.data.opening import MAX_PIXELS, REASONS

pytestmark = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="the index of odd images says what Pillow 13 makes of each file"
)

# Files that the index calls errors, but whose first picture is whole.
READ_ALL_THE_SAME = {
    "pillow/pillow.ico",  # opens as 256 x 256; only loading it a second time fails
    "pillow/psd-oob-write-overflow.psd",  # the flat picture is fine; the list of layers, which we do not use, is not
}

OPEN_EACH = """
import json, sys
import numpy as np
from selfsup_fastai.data import opening
opening._limit_resources()

def tried(path, n_in):
    try:
        image = opening.open_image(path, n_in)
    except opening.BadImage as bad:
        return {"code": bad.code}
    values = np.asarray(image)
    return {"mode": image.mode, "size": image.size, "range": [float(values.min()), float(values.max())]}

for path in json.load(sys.stdin):
    print(json.dumps([tried(path, n_in) for n_in in (None, 1, 3)]), flush=True)
"""


@pytest.fixture(scope="module")
def folder(shared_data):
    return next(shared_data("odd_images").rglob("index.csv")).parent


@pytest.fixture(scope="module")
def index(folder):
    return pd.read_csv(folder / "index.csv").set_index("file")


@pytest.fixture(scope="module")
def checked(folder, index):
    ok, report = check_files([folder / name for name in index.index], n_workers=2)
    for frame in ok, report:
        frame.index = [path.relative_to(folder).as_posix() for path in frame["file"]]
    return ok, report


def test_each_file_is_read_or_reported_and_none_hangs_crashes_or_takes_2_gib(index, checked):
    ok, report = checked
    assert len(index) == 1216
    assert sorted([*ok.index, *report.index]) == sorted(index.index)
    assert set(report["code"]) == {"not_an_image", "truncated", "unreadable", "too_large", "unsupported"}
    assert report["message"].str.len().between(20, 150).all()


def test_all_files_are_found(folder, index):
    assert {path.relative_to(folder).as_posix() for path in find_files(folder)} == {*index.index, "index.csv"}


def test_what_pillow_can_read_is_read_at_its_size_after_orientation(index, checked):
    ok, _report = checked
    whole = index[(index["status"] == "ok") & (index["width"] * index["height"] <= MAX_PIXELS)]
    assert len(whole) > 700
    assert set(whole.index) - set(ok.index) == set()
    assert set(ok.index) - set(whole.index) == READ_ALL_THE_SAME
    found = ok.loc[whole.index]
    assert (found["mode"] == whole["mode"]).all()
    assert (found["frames"] == whole["frames"]).all()
    # Pillow gives the size of a TIFF as it is after its orientation, of other files as it is before.
    turned = (whole["orientation"] >= 5) & (whole["format"] != "TIFF")
    assert turned.sum() > 5
    assert (found["width"] == whole["width"].where(~turned, whole["height"])).all()
    assert (found["height"] == whole["height"].where(~turned, whole["width"])).all()


def test_what_pillow_cannot_read_is_reported_with_the_right_reason(index, checked):
    _ok, report = checked
    bad = index[index["status"] != "ok"]
    assert set(bad.index) - set(report.index) == READ_ALL_THE_SAME
    codes = report["code"].reindex(bad.index).drop(list(READ_ALL_THE_SAME))
    errors = bad["err"].drop(list(READ_ALL_THE_SAME))
    # A known beginning makes an image that Pillow does not identify a damaged one.
    assert set(codes[errors.str.startswith("UnidentifiedImageError")]) == {"not_an_image", "unreadable"}
    assert set(codes[errors.str.startswith("DecompressionBomb")]) == {"too_large"}
    assert set(codes[errors.str.contains("truncated", case=False)]) == {"truncated"}
    assert set(codes[errors.str.contains("broken data stream")]) == {"unreadable"}


def test_opening_agrees_with_the_check_for_every_number_of_channels(folder, index, checked):
    ok, report = checked
    paths = json.dumps([str(folder / name) for name in index.index])
    done = subprocess.run([sys.executable, "-c", OPEN_EACH], input=paths, capture_output=True, text=True, timeout=300)
    answers = dict(zip(index.index, map(json.loads, done.stdout.splitlines())))
    assert len(answers) == len(index), done.stderr
    for name, tries in answers.items():
        if name in report.index:
            assert tries == [{"code": report["code"][name]}] * 3, name
            continue
        own, grey, color = tries
        facts = ok.loc[name]
        assert all(one["size"] == [facts["width"], facts["height"]] for one in tries), name
        assert own["mode"] in ({"F"} if facts["bits"] > 8 or facts["mode"] == "I" else {"L", "RGB"}), name
        assert grey["mode"] in {"L", "F"} and color["mode"] == "RGB", name
        assert all(0 <= one["range"][0] <= one["range"][1] <= 255 for one in tries), name
    assert set(report["code"]) <= set(REASONS)
