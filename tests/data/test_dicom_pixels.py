"""DICOM files, made here so that each pixel is known, to arrays and records."""

import io
import logging
import pickle
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from selfsup_fastai.data.dicom import quiet_pydicom
from selfsup_fastai.data.dicom_info import FLAGS
from selfsup_fastai.data.dicom_pixels import DicomImage, quantiles_of, read_dicom, values_of
from selfsup_fastai.data.reasons import REASONS, BadImage
from selfsup_fastai.data.windows import WINDOWS
from selfsup_fastai.errors import DataError
from tests.data.dicom_files import dataset, dicom, item, written

RAMP = np.arange(64, dtype=np.int16).reshape(8, 8)
HU = (np.arange(4096, dtype=np.int16) - 1024).reshape(64, 64)
HU_TAGS = {"RescaleSlope": 1, "RescaleIntercept": 0}


def bundled(name: str) -> str:
    return get_testdata_file(name, download=False)


def linear(values: np.ndarray, width: float, center: float) -> np.ndarray:
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def code_of(source, **kwargs) -> str:
    with pytest.raises(BadImage) as caught:
        read_dicom(source, **kwargs)
    assert caught.value.code in REASONS
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return caught.value.code


# --- windows by modality ------------------------------------------------------------------------------------------


def test_ct_becomes_three_windows():
    array, info = read_dicom(dicom(HU, "CT", **HU_TAGS))
    want = np.stack([linear(HU, *WINDOWS[name]) for name in ("lung", "mediastinum", "bone")], -1)
    np.testing.assert_allclose(array, want, atol=1e-6)
    assert array.dtype == np.float32
    assert info.window == "lung (1500, -600), mediastinum (400, 40), bone (1800, 400)"
    assert info.hounsfield and not info.flags


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"n_in": 1}, linear(HU, 2000, 0)),
        ({"window": "brain"}, linear(HU, 80, 40)),
        ({"window": (350, 50)}, linear(HU, 350, 50)),
        ({"window": "full"}, (HU + 1024) / 4095),
        ({"limits": (0, 100)}, np.clip(HU / 100, 0, 1)),
    ],
)
def test_one_window(settings, want):
    array, _ = read_dicom(dicom(HU, "CT", **HU_TAGS), **settings)
    np.testing.assert_allclose(array, want, atol=1e-6)
    if "n_in" not in settings:
        three, _ = read_dicom(dicom(HU, "CT", **HU_TAGS), n_in=3, **settings)
        assert three.shape == (64, 64, 3)
        assert (three == array[..., None]).all()


def test_three_windows_of_the_users_choice():
    array, _ = read_dicom(dicom(HU, "CT", **HU_TAGS), window=["brain", (200, 75), "bone"])
    want = np.stack([linear(HU, 80, 40), linear(HU, 200, 75), linear(HU, 1800, 400)], -1)
    np.testing.assert_allclose(array, want, atol=1e-6)


@pytest.mark.parametrize(("modality", "low", "high"), [("MR", 1, 99), ("CR", 0.5, 99.5), ("DX", 0.5, 99.5)])
def test_percentiles_by_modality(modality, low, high):
    pixels = np.random.default_rng(0).integers(0, 4096, (32, 32)).astype(np.uint16)
    array, info = read_dicom(dicom(pixels, modality))
    first, last = np.percentile(pixels, [low, high])
    np.testing.assert_allclose(array, np.clip((pixels - first) / (last - first), 0, 1), atol=1e-6)
    assert f"percentile {low:g} to percentile {high:g}" in info.window


def test_pet_begins_at_zero():
    pixels = np.random.default_rng(0).integers(100, 4096, (32, 32)).astype(np.uint16)
    array, _ = read_dicom(dicom(pixels, "PT", RescaleSlope=0.5, RescaleIntercept=0))
    np.testing.assert_allclose(array, np.clip(pixels / np.percentile(pixels, 99.9), 0, 1), atol=1e-6)


def test_grey_of_eight_bits_without_a_modality_of_its_own_is_like_a_photograph():
    pixels = np.arange(100, 164, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_allclose(read_dicom(dicom(pixels, "US"))[0], pixels / 255, atol=1e-6)


def test_mammogram_is_seen_as_its_file_says():
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    window = {"WindowCenter": 2000, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"}
    array, info = read_dicom(dicom(pixels, "MG", **window))
    np.testing.assert_allclose(array, 1 / (1 + np.exp(-4 * (pixels - 2000.0) / 1000)), atol=1e-6)
    assert info.window == "the file's (1000, 2000), sigmoid"
    array, info = read_dicom(dicom(pixels, "MG"))
    assert "percentile" in info.window and not info.flags


def test_windows_of_the_file():
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    several = {"WindowCenter": [2000, 100], "WindowWidth": [1000, 50]}
    np.testing.assert_allclose(
        read_dicom(dicom(pixels, **several), window="file")[0], linear(pixels, 1000, 2000), atol=1e-6
    )
    exact = {**several, "VOILUTFunction": "LINEAR_EXACT"}
    want = np.clip((pixels - 1500.0) / 1000, 0, 1)
    np.testing.assert_allclose(read_dicom(dicom(pixels, **exact), window="file")[0], want, atol=1e-6)


@pytest.mark.parametrize("tags", [{}, {"WindowCenter": 5, "WindowWidth": 0}, {"WindowCenter": "", "WindowWidth": ""}])
def test_file_without_a_window_that_makes_sense_says_so(tags):
    _, info = read_dicom(dicom(RAMP, "MR", **tags), window="file")
    assert info.flags == ["bad_window"] and "percentile 1" in info.window


def test_voi_table_comes_before_the_window():
    lut = item(LUTDescriptor=[4, 10, 16], LUTData=[100, 300, 200, 500])
    ds = dataset(RAMP.astype(np.uint16), WindowCenter=1, WindowWidth=2, VOILUTSequence=lut)
    ds.VOILUTSequence[0]["LUTDescriptor"].VR = "US"
    ds.VOILUTSequence[0]["LUTData"].VR = "US"
    array, info = read_dicom(written(ds), window="file")
    want = np.interp(RAMP, [9, 10, 11, 12, 13, 14], [0, 0, 0.5, 0.25, 1, 1])
    np.testing.assert_allclose(array, want, atol=1e-6)
    assert info.window == "the file's table"


# --- values -------------------------------------------------------------------------------------------------------


def test_rescale_of_each_frame():
    frames = np.stack([RAMP, RAMP])
    groups = [
        item(PixelValueTransformationSequence=item(RescaleSlope=s, RescaleIntercept=i, RescaleType="US"))
        for s, i in ((2, 1), (3, -5))
    ]
    ds = dataset(frames, "MR", RescaleSlope=100, RescaleIntercept=100)
    ds.PerFrameFunctionalGroupsSequence = pydicom.Sequence(groups)
    for frame, want in enumerate((RAMP * 2 + 1, RAMP * 3 - 5)):
        values, mask, info = values_of(written(ds), frame)
        assert (values == want).all() and mask is None
        assert info.rescale == f"slope {(2, 3)[frame]}, intercept {(1, -5)[frame]}"
    stack, info = read_dicom(written(ds), limits=(0, 100))
    np.testing.assert_allclose(stack, np.clip(np.stack([RAMP * 2 + 1, RAMP * 3 - 5]) / 100, 0, 1), atol=1e-6)
    assert info.rescale == "each frame's own slope and intercept"


def test_rescale_and_window_that_frames_share():
    shared = item(
        PixelValueTransformationSequence=item(RescaleSlope=2, RescaleIntercept=-10, RescaleType="HU"),
        FrameVOILUTSequence=item(WindowCenter=40, WindowWidth=60),
    )
    ds = dataset(np.stack([RAMP, RAMP + 1]), "CT", SharedFunctionalGroupsSequence=shared)
    array, _ = read_dicom(written(ds), frame=1, window="file")
    np.testing.assert_allclose(array, linear((RAMP + 1) * 2 - 10, 60, 40), atol=1e-6)


def test_stack_has_one_scale_and_a_frame_its_own():
    frames = np.stack([RAMP, RAMP * 10])
    stack, info = read_dicom(dicom(frames, "MR"))
    low, high = np.percentile(frames, [1, 99])
    np.testing.assert_allclose(stack, np.clip((frames - low) / (high - low), 0, 1), atol=1e-6)
    assert info.frame is None and info.frames == 2
    one, _ = read_dicom(dicom(frames, "MR"), frame=0)
    low, high = np.percentile(RAMP, [1, 99])
    np.testing.assert_allclose(one, np.clip((RAMP - low) / (high - low), 0, 1), atol=1e-6)


def test_modality_table():
    lut = item(LUTDescriptor=[3, -1, 16], LUTData=[7, 1000, 50], ModalityLUTType="US")
    ds = dataset(RAMP - 3, "OT", ModalityLUTSequence=lut)
    ds.ModalityLUTSequence[0]["LUTDescriptor"].VR = "SS"
    ds.ModalityLUTSequence[0]["LUTData"].VR = "US"
    values, _, info = values_of(written(ds))
    assert (values == np.where(RAMP - 3 <= -1, 7, np.where(RAMP - 3 == 0, 1000, 50))).all()
    assert info.rescale == "a table"


@pytest.mark.parametrize(
    "tags",
    [{"RescaleSlope": "", "RescaleIntercept": ""}, {"RescaleSlope": 2}, {"RescaleSlope": 0, "RescaleIntercept": 4}],
)
def test_half_a_rescale_counts_as_none(tags):
    values, _, info = values_of(dicom(RAMP, "MR", **tags))
    assert (values == RAMP).all()
    assert info.flags == ["bad_rescale"] and not info.rescale


def test_padding_of_a_ct_is_air_and_values_are_cut():
    pixels = np.int16([[-2000, -1500, 0], [100, 3071, 5000]])
    values, mask, info = values_of(dicom(pixels, "CT", **HU_TAGS, PixelPaddingValue=-2000))
    assert values.tolist() == [[-1024, -1024, 0], [100, 3071, 3071]]
    assert mask.tolist() == [[True, False, False], [False, False, False]]
    assert info.padding == pytest.approx(1 / 6)
    ranged = dicom(pixels, "CT", **HU_TAGS, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500)
    assert values_of(ranged)[1].sum() == 2


def test_padding_does_not_count_and_is_black_also_where_inverted():
    pixels = np.random.default_rng(0).integers(100, 200, (32, 32)).astype(np.uint16)
    pixels[:8] = 4095
    array, info = read_dicom(dicom(pixels, "DX", PixelPaddingValue=4095, PhotometricInterpretation="MONOCHROME1"))
    low, high = np.percentile(pixels[8:], [0.5, 99.5])
    np.testing.assert_allclose(array[8:], 1 - np.clip((pixels[8:] - low) / (high - low), 0, 1), atol=1e-6)
    assert not array[:8].any() and info.inverted
    assert quantiles_of(dicom(pixels, "DX", PixelPaddingValue=4095), n=3).tolist() == [100, np.median(pixels[8:]), 199]


def test_padding_with_the_wrong_sign_and_padding_everywhere():
    pixels = np.int16([[-2000, 5], [6, 7]])
    ds = dataset(pixels, "MR", PixelPaddingValue=63536)
    ds["PixelPaddingValue"].VR = "US"
    assert values_of(written(ds))[1].tolist() == [[True, False], [False, False]]
    values, mask, info = values_of(dicom(np.zeros((4, 4), np.uint16), "MR", PixelPaddingValue=0))
    assert mask is None and info.flags == ["all_padding"] and not values.any()


@pytest.mark.parametrize(
    ("tags", "shape", "inverted"),
    [
        ("MONOCHROME2", None, False),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME1", None, True),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
    ],
)
def test_inverted_once(tags, shape, inverted):
    more = {"PresentationLUTShape": shape} if shape else {}
    array, info = read_dicom(dicom(RAMP, "CR", PhotometricInterpretation=tags, **more), limits=(0, 63))
    np.testing.assert_allclose(array, 1 - RAMP / 63 if inverted else RAMP / 63, atol=1e-6)
    assert info.inverted == inverted
    assert ("presentation" in info.flags) == (tags == "MONOCHROME1" and shape == "IDENTITY")
    assert (values_of(dicom(RAMP, "CR", PhotometricInterpretation=tags, **more))[0] == RAMP).all()


def test_ct_in_doubtful_units_is_flagged():
    raw = (HU + 1024).astype(np.uint16)
    array, info = read_dicom(dicom(raw, "CT"))
    assert info.flags == ["no_rescale", "suspicious_range"] and not info.hounsfield
    assert array.ndim == 2 and "percentile" in info.window
    _, info = read_dicom(dicom(raw, "CT", **HU_TAGS))
    assert info.flags == ["suspicious_range"] and info.hounsfield
    _, info = read_dicom(dicom(HU, "CT"))  # without rescale, but as if it were in HU
    assert info.flags == ["no_rescale"] and info.hounsfield
    assert read_dicom(dicom(RAMP, "MR"), window="lung")[1].flags == ["not_ct"]


def test_constant_and_sparse_images():
    array, info = read_dicom(dicom(np.full((8, 8), 7, np.uint16), "MR"))
    assert not array.any() and info.flags == ["constant"]
    dots = np.zeros((64, 64), np.uint16)
    dots[3, 4] = 1000
    assert read_dicom(dicom(dots, "NM"))[0].max() == 1


def test_float_pixels_and_what_is_no_number():
    pixels = np.float32([[0, 0.25], [np.nan, 1], [np.inf, -np.inf]])
    ds = dataset(None, "MR", Rows=3, Columns=2, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2")
    ds.BitsAllocated, ds.FloatPixelData = 32, pixels.tobytes()
    values, mask, _ = values_of(written(ds))
    assert values.tolist() == [[0, 0.25], [0, 1], [1, 0]]
    assert (mask == ~np.isfinite(pixels)).all()
    del ds.FloatPixelData
    ds.BitsAllocated, ds.DoubleFloatPixelData = 64, np.float64([[1, 2], [3, 4], [5, 6]]).tobytes()
    array, info = read_dicom(written(ds), window="full")
    np.testing.assert_allclose(array, [[0, 0.2], [0.4, 0.6], [0.8, 1]], atol=1e-6)
    assert info.bits == 64


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "i4"])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, "1.2.840.10008.1.2.1.99"])
def test_depths_and_syntaxes(dtype, syntax):
    pixels = RAMP.astype(dtype)
    assert (values_of(dicom(pixels, "MR", syntax=syntax))[0] == pixels).all()


def test_big_endian_becomes_native():
    ds = dataset(RAMP, "MR", syntax=ExplicitVRBigEndian)
    ds.PixelData = RAMP.astype(">i2").tobytes()
    values, _, _ = values_of(written(ds))
    assert values.dtype.isnative and (values == RAMP).all()


def test_garbage_in_unused_bits_and_twelve_signed_bits():
    high = (RAMP.astype(np.uint16) | 0xA000).astype(np.uint16)
    assert (values_of(dicom(high, "MR", BitsStored=12, HighBit=11))[0] == RAMP).all()
    signed = np.uint16([[0x0FFF, 0x0800], [0x07FF, 0xF001]])
    values, _, _ = values_of(dicom(signed, "MR", BitsStored=12, HighBit=11, PixelRepresentation=1))
    assert values.tolist() == [[-1, -2048], [2047, 1]]


def test_single_bits():
    bits = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(np.uint8)
    ds = dataset(bits, "OT", BitsAllocated=1, BitsStored=1, HighBit=0)
    ds.PixelData = np.packbits(bits, bitorder="little").tobytes()
    assert (read_dicom(written(ds))[0] == bits).all()


def test_32_bits_keep_their_small_differences():
    pixels = np.uint32([[4_000_000_000, 4_000_000_001], [4_000_000_002, 4_000_000_004]])
    array, _ = read_dicom(dicom(pixels, "MR"), window="full")
    np.testing.assert_allclose(array, [[0, 0.25], [0.5, 1]])


# --- color --------------------------------------------------------------------------------------------------------

COLORS = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)


def test_color_planes_and_depths():
    np.testing.assert_allclose(read_dicom(dicom(COLORS))[0], COLORS / 255, atol=1e-6)
    planes = dataset(COLORS, PlanarConfiguration=1)
    planes.PixelData = np.moveaxis(COLORS, -1, 0).tobytes()
    np.testing.assert_allclose(read_dicom(written(planes))[0], COLORS / 255, atol=1e-6)
    deep = COLORS.astype(np.uint16) * 16
    np.testing.assert_allclose(read_dicom(dicom(deep, BitsStored=12, HighBit=11))[0], deep / 4095, atol=1e-6)
    frames = np.stack([COLORS, COLORS[::-1]])
    np.testing.assert_allclose(read_dicom(dicom(frames))[0], frames / 255, atol=1e-6)
    np.testing.assert_allclose(read_dicom(dicom(frames), frame=1)[0], COLORS[::-1] / 255, atol=1e-6)


def test_color_to_grey():
    grey, info = read_dicom(dicom(COLORS), n_in=1)
    np.testing.assert_allclose(grey, COLORS / 255 @ [0.299, 0.587, 0.114], atol=1e-6)
    assert info.color == "luma of RGB"
    same = np.repeat(COLORS[..., :1], 3, -1)
    array, info = read_dicom(dicom(same))
    np.testing.assert_allclose(array, same[..., 0] / 255, atol=1e-6)
    assert info.color == "one of three equal channels"
    assert read_dicom(dicom(same), n_in=3)[0].shape == (6, 8, 3)


def ycbcr(rgb: np.ndarray) -> np.ndarray:
    """PS3.3 C.7.6.3.1.2."""
    turn = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    return rgb @ turn.T + [0, 128, 128]


def test_ybr_is_converted_once():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 254
    ybr = np.rint(ycbcr(red)).clip(0, 255).astype(np.uint8)
    array, info = read_dicom(dicom(ybr, PhotometricInterpretation="YBR_FULL"))
    np.testing.assert_allclose(array, red / 255, atol=1.5 / 255)
    assert info.color == "YBR to RGB"
    half = dataset(ybr, PhotometricInterpretation="YBR_FULL_422")
    pairs = ybr.reshape(-1, 2, 3)
    half.PixelData = np.stack([pairs[:, 0, 0], pairs[:, 1, 0], pairs[:, 0, 1], pairs[:, 0, 2]], -1).tobytes()
    np.testing.assert_allclose(read_dicom(written(half))[0], red / 255, atol=1.5 / 255)
    whole = dicom(ybr, PhotometricInterpretation="YBR_FULL_422")  # says so, but is not subsampled
    array, info = read_dicom(whole)
    np.testing.assert_allclose(array, red / 255, atol=1.5 / 255)
    assert "not_subsampled" in info.flags


def jpeg(rgb: np.ndarray, marker: str) -> bytes:
    """A JPEG of YCbCr that says so by JFIF's marker, by Adobe's, or not at all."""
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=98)
    data = file.getvalue()
    if marker == "JFIF":
        return data
    at = data.index(b"\xff\xe0")
    plain = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"
    return plain if marker == "none" else plain[:2] + adobe + plain[2:]


@pytest.mark.parametrize(
    ("marker", "says"),
    [("JFIF", "YBR_FULL_422"), ("JFIF", "RGB"), ("none", "YBR_FULL_422"), ("Adobe", "YBR_FULL_422"), ("Adobe", "RGB")],
)
def test_red_stays_red_through_jpeg(marker, says):
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 254
    frames = [jpeg(red, marker)]
    array, info = read_dicom(dicom(red, syntax=JPEGBaseline8Bit, frames=frames, PhotometricInterpretation=says))
    np.testing.assert_allclose(array, red / 255, atol=3 / 255)
    assert info.decoder == "pillow" and "lossy" in info.flags


@pytest.mark.parametrize(("bits", "scale"), [(8, 1), (16, 257), (16, 256)])
def test_palette(bits, scale):
    numbers = np.arange(4, dtype=np.uint8).reshape(2, 2)
    tables = {"Red": [0, 85, 170, 255], "Green": [255, 0, 0, 0], "Blue": [0, 0, 255, 255]}
    ds = dataset(numbers, "US", PhotometricInterpretation="PALETTE COLOR")
    for color, entries in tables.items():
        setattr(ds, f"{color}PaletteColorLookupTableDescriptor", [4, 0, bits])
        ds[f"{color}PaletteColorLookupTableDescriptor"].VR = "US"
        data = (np.array(entries) * scale).astype(f"<u{bits // 8}").tobytes()
        setattr(ds, f"{color}PaletteColorLookupTableData", data)
    array, info = read_dicom(written(ds))
    want = np.stack([np.array(tables[c]).reshape(2, 2) for c in ("Red", "Green", "Blue")], -1) / 255
    np.testing.assert_allclose(array, want, atol=1e-6)
    assert info.color == "palette to RGB"


def test_palette_of_too_many_numbers_or_without_its_table():
    says = {"PhotometricInterpretation": "PALETTE COLOR"}
    assert code_of(dicom(np.uint32([[0, 4_000_000_000]]), **says)) == "bad_tag"
    assert code_of(dicom(np.uint8([[0, 1]]), **says)) == "missing_tag"


def test_palette_in_segments():
    ds = dataset(np.uint8([[0, 1, 2, 5]]), "US", PhotometricInterpretation="PALETTE COLOR")
    segments = np.array([0, 2, 0, 100, 1, 4, 300], "<u2").tobytes()  # 0, 100; then in four steps to 300
    for color in "Red", "Green", "Blue":
        setattr(ds, f"{color}PaletteColorLookupTableDescriptor", [6, 0, 16])
        ds[f"{color}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(ds, f"Segmented{color}PaletteColorLookupTableData", segments)
    array, _ = read_dicom(written(ds), n_in=1)
    np.testing.assert_allclose(array * 65535, [[0, 100, 150, 300]], atol=0.01)


# --- compressed ---------------------------------------------------------------------------------------------------


def j2k(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG2000", irreversible=False, no_jp2=True)
    return file.getvalue()


SMOOTH = np.add.outer(np.arange(32), np.arange(32)).astype(np.uint8) * 4


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGLSLossless, RLELossless])
def test_bytes_of_another_compression_than_claimed(syntax):
    array, info = read_dicom(dicom(SMOOTH, syntax=syntax, frames=[j2k(SMOOTH)]))
    np.testing.assert_allclose(array, SMOOTH / 255, atol=1e-6)
    assert "wrong_syntax" in info.flags and info.decoder == "pylibjpeg"


def test_jpeg_under_jpeg_2000_and_where_native_pixels_should_be():
    file = io.BytesIO()
    Image.fromarray(SMOOTH).save(file, "JPEG", quality=98)
    array, info = read_dicom(dicom(SMOOTH, syntax=JPEG2000Lossless, frames=[file.getvalue()]))
    np.testing.assert_allclose(array, SMOOTH / 255, atol=3 / 255)
    assert "wrong_syntax" in info.flags and info.decoder == "pillow"
    ds = dataset(SMOOTH)
    ds.PixelData = file.getvalue() + b"\0" * (len(file.getvalue()) % 2)
    array, info = read_dicom(written(ds))
    np.testing.assert_allclose(array, SMOOTH / 255, atol=3 / 255)
    assert "wrong_syntax" in info.flags


def test_native_pixels_under_a_compressed_syntax():
    raw = dataset(SMOOTH)
    file = io.BytesIO()
    raw.save_as(file, enforce_file_format=True)
    data = file.getvalue().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0")
    array, info = read_dicom(io.BytesIO(data))
    np.testing.assert_allclose(array, SMOOTH / 255, atol=1e-6)
    assert "wrong_syntax" in info.flags


def test_frames_of_a_compressed_file():
    frames = np.stack([SMOOTH, SMOOTH.T[::-1], 255 - SMOOTH])
    file = dicom(frames, syntax=JPEG2000Lossless, frames=[j2k(np.ascontiguousarray(f)) for f in frames])
    np.testing.assert_allclose(read_dicom(file)[0], frames / 255, atol=1e-6)
    for i, frame in enumerate(frames):
        np.testing.assert_allclose(read_dicom(file, frame=i)[0], frame / 255, atol=1e-6)


MR_SMALL = "MR_small_RLE", "MR_small_implicit", "MR_small_expb", "MR_small_bigendian", "MR_small_padded"
MR_SMALL += "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless"


@pytest.mark.parametrize("name", MR_SMALL)
def test_eight_encodings_of_one_image_are_the_same(name):
    want, _, _ = values_of(bundled("MR_small.dcm"))
    assert (values_of(bundled(f"{name}.dcm"))[0] == want).all()
    assert (want.min(), want.max()) == (127, 2145)


def test_fastest_decoders_come_first():
    assert read_dicom(bundled("MR_small_jpeg_ls_lossless.dcm"))[1].decoder == "pyjpegls"
    assert read_dicom(bundled("MR_small_RLE.dcm"))[1].decoder == "pylibjpeg"
    assert read_dicom(bundled("MR_small_jp2klossless.dcm"))[1].decoder == "pylibjpeg"


def test_decoder_that_fails_is_followed_by_the_next(monkeypatch):
    import openjpeg

    def fails(*args, **kwargs):
        raise RuntimeError

    want, _ = read_dicom(bundled("MR_small_jp2klossless.dcm"))
    monkeypatch.setattr("pylibjpeg.utils.get_pixel_data_decoders", fails)
    monkeypatch.setattr("pydicom.pixels.decoders.pylibjpeg._DECODERS", {})
    array, info = read_dicom(bundled("MR_small_jp2klossless.dcm"))
    assert openjpeg and info.decoder == "pillow"
    assert (array == want).all()


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "code", "names"),
    [
        ({"Rows": None}, "missing_tag", "(Rows)"),
        ({"PhotometricInterpretation": None}, "missing_tag", "(PhotometricInterpretation)"),
        ({"BitsAllocated": None}, "missing_tag", "(BitsAllocated)"),
        ({"Columns": 0}, "bad_tag", "(Columns)"),
        ({"BitsStored": 17}, "bad_tag", "(BitsStored)"),
        ({"SamplesPerPixel": 2}, "bad_tag", "(SamplesPerPixel)"),
        ({"PhotometricInterpretation": "CMYK"}, "bad_tag", "(PhotometricInterpretation)"),
        ({"NumberOfFrames": 1_000_000}, "bad_frames", ""),
        ({"NumberOfFrames": -3}, "bad_frames", ""),
        ({"Rows": 9}, "truncated", ""),
        ({"PixelData": None}, "no_pixels", ""),
        ({"PixelData": b""}, "no_pixels", ""),
    ],
)
def test_elements_that_pixels_need(tags, code, names):
    with pytest.raises(BadImage) as caught:
        read_dicom(dicom(RAMP, **tags))
    assert caught.value.code == code and names in str(caught.value)


def test_elements_that_can_do_without():
    array, info = read_dicom(dicom(RAMP.astype(np.uint16), BitsStored=None, PixelRepresentation=None), limits=(0, 63))
    np.testing.assert_allclose(array, RAMP / 63, atol=1e-6)
    assert info.flags == ["assumed"]


@pytest.mark.parametrize(
    ("kind", "modality"),
    [
        ("1.2.840.10008.5.1.4.1.1.66.4", "OT"),
        ("1.2.840.10008.5.1.4.1.1.481.2", "OT"),
        ("1.2.840.10008.5.1.4.1.1.11.1", "OT"),
        ("1.2.840.10008.5.1.4.1.1.88.11", "OT"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "OT"),
        ("1.2.840.10008.5.1.4.1.1.9.1.1", "OT"),
        ("1.2.840.10008.5.1.4.1.1.7", "SEG"),
        ("1.2.840.10008.5.1.4.1.1.7", "RTDOSE"),
    ],
)
def test_objects_that_are_no_images(kind, modality):
    assert code_of(dicom(RAMP, modality, SOPClassUID=kind)) == "excluded"


def test_radiotherapy_images_are_images():
    assert read_dicom(dicom(RAMP, "RTIMAGE", SOPClassUID="1.2.840.10008.5.1.4.1.1.481.1"))[0].shape == (8, 8)


def test_files_that_are_none_or_end_early(tmp_path):
    whole = dicom(RAMP, "MR").getvalue()
    assert code_of(io.BytesIO()) == "empty"
    assert code_of(io.BytesIO(b"%PDF-1.4 " * 50)) == "not_dicom"
    assert code_of(io.BytesIO(whole[:-10])) == "truncated"
    assert code_of(tmp_path) == "not_a_file"
    assert code_of(tmp_path / "gone") == "missing"
    assert code_of(bundled("MR_truncated.dcm")) == "truncated"
    assert code_of(bundled("DICOMDIR-empty.dcm")) == "dicomdir"
    with open(bundled("CT_small.dcm"), "rb") as file:
        assert code_of(io.BytesIO(file.read(2000))) == "no_pixels"


def test_compressed_frames_that_end_early_or_are_too_few():
    whole = dicom(SMOOTH, syntax=RLELossless, frames=[b"\1\0\0\0\x40" + b"\0" * 59 + b"\x7f" * 200]).getvalue()
    assert code_of(io.BytesIO(whole[:-60])) == "truncated"
    frames = np.stack([SMOOTH] * 3)
    for frame in None, 2:
        assert code_of(dicom(frames, syntax=JPEG2000Lossless, frames=[j2k(SMOOTH)]), frame=frame) == "bad_frames"
    assert code_of(dicom(SMOOTH, syntax=JPEG2000Lossless, frames=[b"\0" * 80])) == "unreadable"


def test_video_is_told_by_the_standards_name():
    with pytest.raises(BadImage, match="MPEG-4") as caught:
        read_dicom(dicom(np.zeros((50, 8, 8, 3), np.uint8), syntax="1.2.840.10008.1.2.4.102", frames=[b"\0" * 600]))
    assert caught.value.code == "unsupported_syntax"
    private = dicom(RAMP, syntax=JPEG2000Lossless, frames=[b"\0" * 600]).getvalue()
    private = io.BytesIO(private.replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.99999.1.2.4.90"))
    assert code_of(private) == "unsupported_syntax"


def test_missing_decoder_says_what_to_install(monkeypatch):
    monkeypatch.setattr("selfsup_fastai.data.dicom_decoders.plugins", lambda syntax: [])
    with pytest.raises(BadImage, match=r'JPEG-LS Lossless.*pip install "selfsup_fastai\[dicom\]"') as caught:
        read_dicom(bundled("MR_small_jpeg_ls_lossless.dcm"))
    assert caught.value.code == "no_decoder"


def peak_of(source) -> tuple[str, int]:
    tracemalloc.start()
    code = code_of(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return code, peak


def test_bombs_are_refused_before_anything_is_allocated():
    rle = b"\1\0\0\0\x40" + b"\0" * 59 + b"\x81\0" * 20
    for syntax, frames in ((RLELossless, [rle]), (JPEG2000Lossless, [j2k(SMOOTH)])):
        code, peak = peak_of(dicom(SMOOTH, syntax=syntax, frames=frames, Rows=65535, Columns=65535))
        assert code == "too_large" and peak < 2e6
    stream = bytearray(j2k(SMOOTH))
    stream[8:16] = (65535).to_bytes(4, "big") * 2  # the size within the compressed data
    code, peak = peak_of(dicom(SMOOTH, syntax=JPEG2000Lossless, frames=[bytes(stream)]))
    assert code == "unreadable" and peak < 2e6


def test_deflation_bomb_is_refused_while_it_is_counted(monkeypatch):
    monkeypatch.setattr("selfsup_fastai.data.dicom.MAX_PIXELS", 1 << 20)
    file = dicom(np.zeros((5000, 5000), np.uint16), "MR", syntax="1.2.840.10008.1.2.1.99")
    code, peak = peak_of(file)
    assert code == "too_large" and peak < 1e7


def test_many_large_frames_are_read_one_by_one(monkeypatch):
    monkeypatch.setattr("selfsup_fastai.data.dicom_decoding.MAX_PIXELS", 100)
    file = dicom(np.stack([RAMP] * 2), "MR")
    with pytest.raises(BadImage, match="one by one") as caught:
        read_dicom(file)
    assert caught.value.code == "too_large"
    assert read_dicom(file, frame=1)[0].shape == (8, 8)


@pytest.mark.parametrize("frame", [-1, 2, 1.0, "0", True])
def test_frame_that_is_not_there_names_those_that_are(frame):
    with pytest.raises(DataError, match="count from 0 to 1"):
        read_dicom(dicom(np.stack([RAMP] * 2), "MR"), frame=frame)
    with pytest.raises(DataError, match="there is one, frame 0"):
        values_of(dicom(RAMP, "MR"), 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"n_in": 2},
        {"window": "lung", "limits": (0, 1)},
        {"window": ["lung", "bone", "brain"], "n_in": 1},
        {"limits": (1, 0)},
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(DataError):
        read_dicom(dicom(RAMP, "CT"), **settings)
    with pytest.raises(DataError, match="path or a binary file"):
        read_dicom(RAMP)


# --- what is told -------------------------------------------------------------------------------------------------

MARKER = b"Planted^Marker"


def planted(name: str) -> bytes:
    """A bundled file in which every element of text says the marker, but for those that pixels need."""
    needed = {"PhotometricInterpretation", "NumberOfFrames"}
    text = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "UI", "DA", "TM", "AS", "DT", "DS", "IS"}
    ds = pydicom.dcmread(bundled(name))
    for tag in list(ds.keys()):
        raw = ds.get_item(tag)
        if raw.is_raw and raw.VR in text and pydicom.datadict.keyword_for_tag(tag) not in needed:
            ds[tag] = raw._replace(value=MARKER, length=len(MARKER))
    file = io.BytesIO()
    ds.save_as(file)
    assert file.getvalue().count(MARKER) > 20
    return file.getvalue()


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "examples_palette.dcm", "examples_ybr_color.dcm", "examples_overlay.dcm"]
)
def test_nothing_that_a_file_says_gets_out(name, caplog, capfd):
    whole = planted(name)
    caplog.set_level(logging.DEBUG)
    told = []
    for data in whole, whole[:-2000], whole.replace(b"(\0\x10\0US", b"(\0\x10\0LO"):  # Rows as text
        for settings in {}, {"window": "file"}, {"frame": 99}:
            try:
                _, info = read_dicom(io.BytesIO(data), **settings)
                told += [str(info), repr(info)]
            except DataError as err:
                told += [str(err), repr(err), str(err.__context__), str(err.__cause__)]
    everything = "\n".join([*told, *capfd.readouterr(), caplog.text])
    assert "bits" in everything and "(Rows)" in everything
    assert "planted" not in everything.lower()


def test_other_peoples_logging_and_warnings_are_as_they_were():
    logger = logging.getLogger("pydicom")
    before = logger.handlers, logger.propagate, logger.disabled
    with quiet_pydicom():
        with quiet_pydicom():
            pass
        assert not logger.propagate
    assert (logger.handlers, logger.propagate, logger.disabled) == before


def test_threads_leave_the_filters_of_warnings_alone():
    file, filters, results = dicom(HU, "CT", **HU_TAGS).getvalue(), list(warnings.filters), []
    want, _ = read_dicom(io.BytesIO(file))

    def work():
        results.extend((read_dicom(io.BytesIO(file))[0] == want).all() for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    with quiet_pydicom():
        during = list(warnings.filters)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == during
    assert warnings.filters == filters
    assert len(results) == 80 and all(results)


def test_record_is_one_line():
    array, info = read_dicom(bundled("693_J2KI.dcm"))
    line = str(info)
    assert "\n" not in line and line.startswith("CT, 512 x 512, 14 bits; MONOCHROME2, JPEG 2000")
    assert "rescaled by slope 1, intercept -1024 to HU" in line or "slope" in line
    assert FLAGS["lossy"] in line and "padding" in line
    assert array.shape == (512, 512, 3)


def test_flags_of_what_a_file_says_of_itself():
    def flags(**tags):
        return read_dicom(dicom(RAMP, tags.pop("modality", "MR"), **tags))[1].flags

    assert flags(PresentationIntentType="FOR PROCESSING") == ["for_processing"]
    assert flags(BurnedInAnnotation="YES") == ["burned_in"]
    assert flags(modality="US") == ["burned_in_risk"]
    assert flags(modality="US", BurnedInAnnotation="NO") == []
    assert flags(LossyImageCompression="01") == ["lossy"]
    assert flags(modality="US", SequenceOfUltrasoundRegions=item(RegionFlags=0)) == ["burned_in_risk", "regions"]


# --- items --------------------------------------------------------------------------------------------------------


def test_dicom_image_is_a_path_with_settings(tmp_path):
    (tmp_path / "a").write_bytes(dicom(np.stack([RAMP, RAMP + 5]), "MR").getvalue())
    image = DicomImage(tmp_path / "a", 1, limits=[5, 68], n_in=3)
    assert Path(image).read_bytes()[128:132] == b"DICM"
    np.testing.assert_allclose(image.read()[0], np.repeat(RAMP[..., None], 3, -1) / 63, atol=1e-6)
    assert image == pickle.loads(pickle.dumps(image)) and len({image, DicomImage(image, 1, None, (5, 68), 3)}) == 1
    assert str(tmp_path).encode() not in image.identity


def test_identity_tells_settings_apart_and_equal_ones_not():
    images = [
        DicomImage("a"),
        DicomImage("a", 1),
        DicomImage("a", window="lung"),
        DicomImage("a", window="bone"),
        DicomImage("a", window=["lung", "bone", (80, 40)]),
        DicomImage("a", limits=(0, 1)),
        DicomImage("a", limits=(0, 2)),
        DicomImage("a", n_in=1),
    ]
    assert len({image.identity for image in images}) == len(images)
    assert DicomImage("b", window="lung").identity == DicomImage("a", window=(1500, -600)).identity


def test_quantiles_are_those_of_the_values():
    values, mask, _ = values_of(bundled("CT_small.dcm"))
    found = quantiles_of(bundled("CT_small.dcm"))
    chosen = values if mask is None else values[~mask]
    assert found.shape == (1025,)
    np.testing.assert_allclose(found, np.quantile(chosen.astype(np.float64), np.linspace(0, 1, 1025)), atol=1e-3)
    down = quantiles_of(dicom(RAMP, "MR", RescaleSlope=-2, RescaleIntercept=1), n=5)
    np.testing.assert_allclose(down, np.quantile(RAMP * -2.0 + 1, [0, 0.25, 0.5, 0.75, 1]))
    with pytest.raises(DataError, match="n is the number"):
        quantiles_of(dicom(RAMP), n=1)
