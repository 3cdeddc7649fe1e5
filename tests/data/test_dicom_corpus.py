"""Every file of a corpus of odd DICOM files, and three series, beside highdicom and SimpleITK."""

import logging
import re
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from selfsup_fastai.data.dicom_pixels import quantiles_of, read_dicom, values_of
from selfsup_fastai.data.reasons import REASONS, BadImage

CODES = {
    "read": 229,
    "no_pixels": 64,
    "excluded": 57,
    "not_dicom": 12,
    "dicomdir": 11,
    "missing_tag": 3,
    "unreadable": 2,
    "truncated": 1,
}

# Where SimpleITK is wrong: it leaves YCbCr as it is, mixes up the bytes of deep color under RLE, or does without the
# modality table.
NOT_BY_SIMPLEITK = {"GH195.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_16bit_2frame.dcm"}
NOT_BY_SIMPLEITK |= {"SC_rgb_rle_32bit.dcm", "SC_rgb_rle_32bit_2frame.dcm", "mlut_18.dcm"}

# Where highdicom is: the first value of its modality table is signed, which it does not look at.
NOT_BY_HIGHDICOM = {"mlut_18.dcm"}

# highdicom moves windows to stored units, where the halves of the formula count as much as the slope.
NOT_WINDOWED_ALIKE = {"2.dcm", "MR2_JLSN", "MR2_J2KI.dcm", "6154", "6247", "6278"}


@pytest.fixture(scope="module")
def folder(shared_data):
    return next(shared_data("dicom_mixed").rglob("index.csv")).parent


@pytest.fixture(scope="module")
def corpus(folder):
    return [folder / name for name in pd.read_csv(folder / "index.csv")["file"]]


@pytest.fixture(scope="module")
def results(corpus):
    """For each file the record of its last frame, or the code of why not."""
    return {file: _tried(file) for file in corpus}


def _tried(file):
    try:
        array, info = read_dicom(file)
    except BadImage as bad:
        return bad.code
    assert array.dtype == np.float32 and array.min() >= 0 and array.max() <= 1
    return info


@pytest.fixture
def quiet():
    """The other readers warn of every second file."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def test_every_file_reads_or_has_a_reason(results):
    codes = Counter(found if isinstance(found, str) else "read" for found in results.values())
    assert set(codes) - {"read"} <= set(REASONS)
    assert codes == CODES


def readable(results):
    return [(file, info) for file, info in results.items() if not isinstance(info, str)]


def expected(values, info, mask):
    """Another reader's values, cut as ours are."""
    values = np.asarray(values, np.float64)
    if info.hounsfield:
        values = np.clip(np.where(False if mask is None else mask, -1024, values), -1024, 3071)
    return values


def test_values_and_colors_are_highdicoms(results, quiet):
    highdicom = pytest.importorskip("highdicom")
    n = Counter()
    plain = {"apply_voi_transform": False, "apply_presentation_lut": False, "apply_real_world_transform": False}
    for file, info in readable(results):
        last, name = info.frames - 1, file.name
        try:
            image = highdicom.imread(file)
            theirs = image.get_frame(last + 1, apply_modality_transform=None, apply_icc_profile=False, **plain)
        except Exception:  # it reads fewer files than we do
            continue
        if name in NOT_BY_HIGHDICOM:
            continue
        if not info.photometric.startswith("MONOCHROME"):
            top = 255 * 256 if info.photometric == "PALETTE COLOR" and theirs.max() > 255 else 2**info.bits - 1
            np.testing.assert_allclose(read_dicom(file, last, n_in=3)[0], theirs / top, atol=1.01 / 255, err_msg=name)
            n["color"] += 1
            continue
        values, mask, _ = values_of(file, last)
        want = expected(theirs, info, mask)
        np.testing.assert_allclose(values, want, rtol=1e-6, atol=1e-6 * abs(want).max(), err_msg=name)
        n["grey"] += 1
    assert n["grey"] >= 150 and n["color"] >= 50


def test_windows_and_inversion_are_highdicoms(results, quiet):
    highdicom = pytest.importorskip("highdicom")
    n = inverted = 0
    asked = {"apply_modality_transform": None, "apply_voi_transform": True, "apply_real_world_transform": False}
    for file, info in readable(results):
        last = info.frames - 1
        if not info.photometric.startswith("MONOCHROME") or file.name in NOT_BY_HIGHDICOM:
            continue
        try:
            theirs = highdicom.imread(file).get_frame(last + 1, apply_presentation_lut=True, **asked)
        except Exception:  # there is no window, or it cannot read the file
            continue
        ours, how = read_dicom(file, last, window="file")
        if "bad_window" in how.flags:  # a width of 0, which highdicom takes for a step
            continue
        values, mask, _ = values_of(file, last)
        same = np.ones(ours.shape, bool) if mask is None else ~mask
        if info.hounsfield:  # cut: a window beyond the ends sees other values
            same &= (values > -1024) & (values < 3071)
        tolerance = 2e-3 if file.name in NOT_WINDOWED_ALIKE else 2e-6
        np.testing.assert_allclose(ours[same], theirs[same], atol=tolerance, err_msg=file.name)
        n, inverted = n + 1, inverted + how.inverted
    assert n >= 80 and inverted >= 5


def test_values_and_colors_are_simpleitks(results, quiet):
    sitk = pytest.importorskip("SimpleITK")
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    n = Counter()
    for file, info in readable(results):
        if file.name in NOT_BY_SIMPLEITK:
            continue
        try:
            theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        except RuntimeError:
            continue
        last = info.frames - 1
        if not info.photometric.startswith("MONOCHROME"):
            ours, _ = read_dicom(file, last, n_in=3)
            theirs = theirs[last] if theirs.ndim > 3 else theirs
            top = 255 * 256 if theirs.itemsize == 2 and "PALETTE" in info.photometric else 2**info.bits - 1
            np.testing.assert_allclose(ours, theirs / top, atol=1.01 / 255, err_msg=file.name)
            n["color"] += 1
            continue
        values, mask, _ = values_of(file, last)
        theirs = theirs[last].astype(np.float64)
        if info.photometric == "MONOCHROME1":  # it inverts stored values before it rescales them
            found = re.match(r"slope (\S+), intercept (\S+)", info.rescale)
            slope, intercept = map(float, found.groups()) if found else (1, 0)
            theirs = (2**info.bits - 1 - (theirs - intercept) / slope) * slope + intercept
        want = expected(theirs, info, mask)
        np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-5 * abs(want).max(), err_msg=file.name)
        n["grey"] += 1
    assert n["grey"] >= 150 and n["color"] >= 50


@pytest.mark.parametrize("series", ["ct_series_ge", "mr_series_t1", "mr_series_fmri"])
def test_series_are_simpleitks(series, shared_data, quiet):
    sitk = pytest.importorskip("SimpleITK")
    files = [file for file in sorted(shared_data(series).rglob("*")) if file.is_file()]
    n = 0
    for file in files:
        info = _tried(file)
        if isinstance(info, str):
            continue
        values, mask, _ = values_of(file)
        theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))[0]
        assert (values == expected(theirs, info, mask)).all()
        n += 1
    assert n >= 10


def test_frames_alone_are_those_of_the_stack(results):
    n = 0
    for file, info in readable(results):
        if info.frames == 1:
            continue
        stack, _ = read_dicom(file, limits=(0, 1000), n_in=3)
        assert len(stack) == info.frames
        with open(file, "rb") as opened:  # a file object does as well
            for i in {0, info.frames // 2, info.frames - 1}:
                assert (read_dicom(opened, i, limits=(0, 1000), n_in=3)[0] == stack[i]).all()
        n += 1
    assert n >= 25


def test_quantiles_of_the_corpus(results):
    for file, info in readable(results)[::5]:
        if info.photometric.startswith("MONOCHROME"):
            values, mask, _ = values_of(file)
            chosen = values.astype(np.float64) if mask is None else values[~mask].astype(np.float64)
            want = np.quantile(chosen, np.linspace(0, 1, 9))
            np.testing.assert_allclose(quantiles_of(file, n=9), want, rtol=1e-5, atol=1e-5 * max(abs(chosen).max(), 1))
