"""Rows from headers: equal to what pydicom says, and a reason for everything that is no image."""

import gzip
import math
import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from selfsup_fastai.data.dicom_walk import walk
from selfsup_fastai.data.headers import _TAGS, _WANTED, _parsed, plane, read_header
from selfsup_fastai.data.reasons import BadImage
from tests.dicoms import write_dicom

BUNDLED = Path(pydicom.__file__).parent / "data"
GREY = np.arange(24, dtype=np.int16).reshape(4, 6)


def bundled(name: str) -> str:
    return get_testdata_file(name, download=False)


def code(path) -> str:
    with pytest.raises(BadImage) as caught:
        read_header(path)
    return caught.value.code


def rewritten(path: Path, **elements) -> Path:
    """The file with other elements; None: without the element."""
    ds = pydicom.dcmread(path)
    for name, value in elements.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
    ds.save_as(path)
    return path


# ---- elements


def test_stepping_over_elements_finds_what_pydicom_finds():
    """On all files that pydicom brings and that are plain enough."""
    n = 0
    for file in sorted(f for f in BUNDLED.rglob("*") if f.is_file()):
        size = file.stat().st_size
        found = walk(file.read_bytes(), size, _WANTED)
        if found is None:
            continue
        with open(file, "rb") as opened:
            try:
                parsed = _parsed(opened, size)
            except BadImage as err:
                assert err.code == "dicomdir"
                continue
        charset = _TAGS["SpecificCharacterSet"]  # pydicom has made sense of it
        wanted, values = (
            {tag: value.rstrip(b"\0 ") for tag, (_, value) in of.values.items() if tag != charset}
            for of in (parsed, found)
        )
        assert {tag: value for tag, value in values.items() if tag in wanted} == wanted, file.name
        assert found[1:] == parsed[1:], file.name
        n += 1
    assert n > 100


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "image_dfl.dcm"])
def test_values_of_every_byte_order_and_form(name):
    file = bundled(name)
    ds, row = pydicom.dcmread(file), read_header(file)
    assert row["patient_id"] == ds.get("PatientID", "") and row["sop_uid"] == ds.SOPInstanceUID
    assert (row["height"], row["width"], row["bits"]) == (ds.Rows, ds.Columns, ds.BitsStored)
    assert row["modality"] == ds.get("Modality", "") and row["photometric"] == ds.PhotometricInterpretation
    for name, keyword in {"slope": "RescaleSlope", "thickness": "SliceThickness", "echo_time": "EchoTime"}.items():
        assert row[name] == ds.get(keyword)
    assert row["spacing_y"] == (ds.PixelSpacing[0] if "PixelSpacing" in ds else None)
    assert row["position"] == (list(ds.ImagePositionPatient) if "ImagePositionPatient" in ds else None)
    assert row["n_bytes"] == os.path.getsize(file)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_the_same_row_whatever_the_syntax(tmp_path, syntax):
    file = write_dicom(tmp_path / "a", GREY, "MR", PixelSpacing=[0.5, 2], InstanceNumber=7, ViewPosition="PA")
    first = read_header(file)
    ds = pydicom.dcmread(file)
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = GREY.byteswap().tobytes()
    ds.file_meta.TransferSyntaxUID = syntax
    pydicom.dcmwrite(tmp_path / "b", ds, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    second = read_header(tmp_path / "b")
    assert (first["spacing_y"], first["spacing_x"], first["number"], first["view"]) == (0.5, 2, 7, "PA")
    own = {"n_bytes", "syntax"}
    assert {k: v for k, v in first.items() if k not in own} == {k: v for k, v in second.items() if k not in own}


def test_values_that_make_no_sense_are_missing(tmp_path):
    file = write_dicom(tmp_path / "a", GREY, "CT", PixelSpacing=[1, 1], WindowCenter=40, WindowWidth=400)
    data = file.read_bytes()
    for value, other in ((b"40.0", b"many"), (b"400.0 ", b"inf   "), (b"1.0\\1.0 ", b"1.0\\\xff.0 ")):
        assert b"DS" + bytes([len(value), 0]) + value in data
        data = data.replace(b"DS" + bytes([len(value), 0]) + value, b"DS" + bytes([len(value), 0]) + other)
    file.write_bytes(data)
    row = read_header(file)
    assert (row["window_center"], row["window_width"], row["spacing_y"]) == (None, None, None)
    assert (row["slope"], row["height"]) == (1, 4)


def test_numbers_under_another_vr(tmp_path):
    """Rows as text, the rescale slope as a double."""
    file = write_dicom(tmp_path / "a", GREY)
    ds = pydicom.dcmread(file)
    ds["Rows"].VR, ds["Rows"]._value = "IS", "4"
    ds["RescaleSlope"].VR, ds["RescaleSlope"]._value = "FD", 2.5
    ds.save_as(file)
    row = read_header(file)
    assert (row["height"], row["slope"]) == (4, 2.5)


def test_a_side_of_32_is_no_blank(tmp_path):
    """Its bytes are a space and a zero, with which texts are padded."""
    file = write_dicom(tmp_path / "a", np.zeros((32, 8224), np.int16))
    row = read_header(file)
    assert (row["height"], row["width"]) == (32, 8224)


def test_identifiers_without_padding_in_their_own_characters(tmp_path):
    file = write_dicom(tmp_path / "a", GREY, PatientID="  Äß7 ", SpecificCharacterSet="ISO_IR 100")
    row = read_header(file, identifying=True)
    assert row["patient_id"] == "Äß7"
    assert (row["issuer"], row["patient_age"], row["patient_sex"]) == ("", "", "")
    file = write_dicom(tmp_path / "b", GREY, PatientAge="061Y", PatientSex="F", IssuerOfPatientID="X")
    row = read_header(file, identifying=True)
    assert (row["issuer"], row["patient_age"], row["patient_sex"]) == ("X", "061Y", "F")
    assert "patient_age" not in read_header(file)


# ---- what is made of them


@pytest.mark.parametrize(
    ("orientation", "name"),
    [
        ((1, 0, 0, 0, 1, 0), "axial"),
        ((-1, 0, 0, 0, -1, 0), "axial"),
        ((0, 1, 0, 0, 0, -1), "sagittal"),
        ((1, 0, 0, 0, 0, -1), "coronal"),
        ((1, 0, 0, 0, math.cos(math.radians(29)), math.sin(math.radians(29))), "axial"),
        ((1, 0, 0, 0, math.cos(math.radians(31)), math.sin(math.radians(31))), "oblique"),
        ((0, 0, 0, 0, 0, 0), ""),
        (None, ""),
    ],
)
def test_plane(orientation, name):
    assert plane(orientation) == name


def test_frames_of_enhanced_objects(tmp_path):
    """Spacing is shared, place and rescale are per frame: those of the first one."""
    file = write_dicom(tmp_path / "a", np.zeros((2, 4, 6), np.int16), "CT", RescaleSlope=None, RescaleIntercept=None)

    def group(**sequences) -> Dataset:
        item = Dataset()
        for name, elements in sequences.items():
            inner = Dataset()
            for keyword, value in elements.items():
                setattr(inner, keyword, value)
            setattr(item, name, [inner])
        return item

    frames = [
        group(
            PlanePositionSequence={"ImagePositionPatient": [1, 2, 3 + i]},
            PixelValueTransformationSequence={"RescaleSlope": 2 + i, "RescaleIntercept": -1000},
            FrameVOILUTSequence={"WindowCenter": 40, "WindowWidth": 400},
        )
        for i in range(2)
    ]
    shared = group(
        PixelMeasuresSequence={"PixelSpacing": [0.5, 0.25], "SliceThickness": 3},
        PlaneOrientationSequence={"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]},
    )
    rewritten(file, PerFrameFunctionalGroupsSequence=frames, SharedFunctionalGroupsSequence=[shared])
    row = read_header(file)
    assert (row["frames"], row["spacing_y"], row["spacing_x"], row["thickness"]) == (2, 0.5, 0.25, 3)
    assert (row["position"], row["plane"]) == ([1, 2, 3], "sagittal")
    assert (row["slope"], row["intercept"], row["window_center"], row["window_width"]) == (2, -1000, 40, 400)


def test_spacing_at_the_detector_where_there_is_no_other(tmp_path):
    file = write_dicom(tmp_path / "a", GREY, "CR", ImagerPixelSpacing=[0.2, 0.1])
    assert read_header(file)["spacing_y"] == 0.2
    assert read_header(rewritten(file, PixelSpacing=[0.4, 0.3]))["spacing_x"] == 0.3


# ---- what is no image


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MR_truncated.dcm", "truncated"),
        ("DICOMDIR", "dicomdir"),
        ("DICOMDIR-empty.dcm", "dicomdir"),
        ("test-SR.dcm", "excluded"),
        ("rtplan.dcm", "excluded"),
        ("rtstruct.dcm", "excluded"),
        ("rtdose.dcm", "excluded"),
        ("waveform_ecg.dcm", "excluded"),
        ("liver_1frame.dcm", "excluded"),
        ("empty_charset_LEI.dcm", "no_pixels"),
        ("nested_priv_SQ.dcm", "missing_tag"),
        ("zipMR.gz", "not_dicom"),
    ],
)
def test_bundled_files_that_are_no_images(name, reason):
    assert code(bundled(name)) == reason


def test_files_that_are_none(tmp_path):
    files = {"empty": b"", "not_dicom": b"some text\n" * 50}
    for reason, data in files.items():
        (tmp_path / reason).write_bytes(data)
        assert code(tmp_path / reason) == reason
    (tmp_path / "packed.dcm").write_bytes(gzip.compress(Path(bundled("CT_small.dcm")).read_bytes()))
    assert code(tmp_path / "packed.dcm") == "not_dicom"
    os.mkfifo(tmp_path / "pipe")
    assert code(tmp_path / "pipe") == code(tmp_path) == "not_a_file"
    (tmp_path / "cut").write_bytes(Path(bundled("CT_small.dcm")).read_bytes()[:2000])
    assert code(tmp_path / "cut") in ("no_pixels", "missing_tag")
    (tmp_path / "image.dcm").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    assert read_header(tmp_path / "image.dcm") == {"image": True}


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"Rows": None}, "missing_tag"),
        ({"PhotometricInterpretation": None}, "missing_tag"),
        ({"BitsAllocated": None}, "missing_tag"),
        ({"Rows": 0}, "bad_tag"),
        ({"SamplesPerPixel": 7}, "bad_tag"),
        ({"PixelData": b""}, "no_pixels"),
        ({"PixelData": None}, "no_pixels"),
        ({"NumberOfFrames": 1_000_000}, "bad_frames"),
        ({"NumberOfFrames": -1}, "bad_frames"),
        ({"Rows": 60_000, "Columns": 60_000}, "too_large"),
        ({"Rows": 5}, "truncated"),
        ({"Modality": "SEG"}, "excluded"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1"}, "excluded"),  # encapsulated PDF
    ],
)
def test_elements_that_tell_that_pixels_cannot_be_read(tmp_path, elements, reason):
    assert code(rewritten(write_dicom(tmp_path / "a", GREY), **elements)) == reason


def test_frames_that_compressed_data_has_no_room_for(tmp_path):
    file = write_dicom(tmp_path / "a", GREY, "US")
    rewritten(file, NumberOfFrames=100)
    data = file.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0")
    file.write_bytes(data)
    assert code(file) == "bad_frames"


def test_a_bomb_of_an_rle_file_is_refused_by_its_header(tmp_path):
    file = write_dicom(tmp_path / "a", GREY)
    rewritten(file, Rows=65535, Columns=65535)
    file.write_bytes(file.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))
    assert code(file) == "too_large"


def test_huge_private_elements_are_stepped_over(tmp_path):
    file = write_dicom(tmp_path / "a", GREY)
    ds = pydicom.dcmread(file)
    ds.add_new(0x00090010, "LO", "SOMEBODY")
    ds.add_new(0x00091001, "OB", bytes(5_000_000))
    ds.save_as(file)
    row = read_header(file)
    assert (row["height"], row["n_bytes"]) == (4, file.stat().st_size)


@pytest.mark.parametrize("implicit", [False, True])
def test_sequences_of_undefined_length_are_stepped_over(tmp_path, implicit):
    file = write_dicom(tmp_path / "a", GREY)
    ds = pydicom.dcmread(file)
    inner, item = Dataset(), Dataset()
    inner.Rows, inner.PatientID = 99, "other"
    inner.is_undefined_length_sequence_item = item.is_undefined_length_sequence_item = True
    item.ReferencedImageSequence = [inner, inner]
    item["ReferencedImageSequence"].is_undefined_length = True
    ds.ReferencedStudySequence = [item, item]
    ds["ReferencedStudySequence"].is_undefined_length = True
    if implicit:
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    pydicom.dcmwrite(file, ds, implicit_vr=implicit, little_endian=True)
    assert walk(file.read_bytes(), file.stat().st_size, _WANTED) is not None
    row = read_header(file)
    assert (row["height"], row["patient_id"]) == (4, "P0")


def test_damage_never_gives_anything_but_a_row_or_a_reason(tmp_path):
    """Every byte of a header changed, one at a time; and what is read then is what pydicom reads."""
    whole = write_dicom(tmp_path / "a", GREY, PixelSpacing=[1, 1]).read_bytes()
    rng = np.random.default_rng(0)
    codes, file = set(), tmp_path / "damaged"
    for place in range(128, len(whole) - GREY.nbytes):
        data = bytearray(whole)
        data[place] = rng.integers(256)
        file.write_bytes(data)
        try:
            row = read_header(file)
            assert isinstance(row["height"], int) or row == {"image": True}
        except (BadImage, OSError, MemoryError) as err:
            codes.add(getattr(err, "code", ""))
        except Exception as err:  # what reading raises is `opening`'s to report
            codes.add(type(err).__name__)
    assert "missing_tag" in codes


def test_a_deflated_file_without_pixels(tmp_path):
    file = write_dicom(tmp_path / "a", GREY)
    ds = pydicom.dcmread(file)
    del ds.PixelData
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    ds.save_as(file)
    assert code(file) == "no_pixels"


def test_all_keywords_are_of_the_standard():
    assert pydicom.datadict.tag_for_keyword("PatientID") == _TAGS["PatientID"]
    assert all(_TAGS.values())
