"""`open_image` and `describe` against pixels made and computed with NumPy alone."""

import io
import json
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from selfsup_fastai.data import opening
from selfsup_fastai.data.opening import REASONS, BadImage, describe, open_image
from selfsup_fastai.errors import DataError

RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEEP = np.linspace(0, 65535, 35).astype(np.uint16).reshape(5, 7)
TWELVE_BITS = (DEEP >> 4).astype(np.uint16)


def luma(color):
    """ITU-R 601, in float64."""
    return color.astype(float) @ [0.299, 0.587, 0.114]


def encoded(image, form, **how):
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def pixels(source, *args, **kwargs):
    return np.asarray(open_image(source, *args, **kwargs))


def code_of(source):
    with pytest.raises(BadImage) as caught:
        open_image(source)
    assert str(caught.value).startswith(REASONS[caught.value.code])
    with pytest.raises(BadImage) as again:
        describe(source)
    assert again.value.code == caught.value.code
    return caught.value.code


# ---- the modes of 8 bits


def test_grey_and_color_files_keep_their_pixels_and_follow_n_in():
    grey, color = encoded(Image.fromarray(GREY), "PNG"), encoded(Image.fromarray(COLOR), "PNG")
    assert (open_image(grey).mode, open_image(color).mode) == ("L", "RGB")
    np.testing.assert_array_equal(pixels(grey), GREY)
    np.testing.assert_array_equal(pixels(color), COLOR)
    np.testing.assert_array_equal(pixels(grey, n_in=3), np.stack([GREY] * 3, axis=-1))
    np.testing.assert_allclose(pixels(color, n_in=1), luma(COLOR), atol=1)


def test_a_palette_becomes_its_colors_also_where_one_of_them_is_transparent():
    indices = (np.arange(35) % 4).astype(np.uint8).reshape(5, 7)
    table = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 80, 200]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(table.tobytes())
    for how in {}, {"transparency": 1}, {"transparency": bytes([0, 50, 100, 255])}:
        file = encoded(image, "PNG", **how)
        assert Image.open(io.BytesIO(file)).mode == "P"
        np.testing.assert_array_equal(pixels(file), table[indices])
        np.testing.assert_allclose(pixels(file, n_in=1), luma(table[indices]), atol=1)


def test_alpha_is_dropped_not_blended():
    alpha = np.full((5, 7, 1), 10, np.uint8)
    rgba = encoded(Image.fromarray(np.concatenate([COLOR, alpha], axis=-1)), "PNG")
    la = encoded(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha[..., 0])]), "PNG")
    np.testing.assert_array_equal(pixels(rgba), COLOR)
    np.testing.assert_array_equal(pixels(la), GREY)
    assert open_image(la, n_in=3).mode == "RGB"


def test_premultiplied_alpha_is_divided_out():
    alpha = Image.new("L", (7, 5), 128)
    half = Image.merge("LA", [Image.new("L", (7, 5), 200), alpha])
    np.testing.assert_allclose(pixels(half.convert("La")), 200, atol=1)
    rgba = Image.merge("RGBA", [Image.new("L", (7, 5), v) for v in (200, 100, 20)] + [alpha])
    np.testing.assert_allclose(pixels(rgba.convert("RGBa")), np.broadcast_to([200, 100, 20], (5, 7, 3)), atol=1)


def test_one_bit_is_black_and_white():
    bits = GREY > 127
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(bits), "PNG")), bits * 255)
    assert open_image(encoded(Image.fromarray(bits), "PNG")).mode == "L"


def test_cmyk_is_ink_on_white():
    ink = RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    file = encoded(Image.fromarray(ink, "CMYK"), "TIFF")
    expected = (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:].astype(float)) / 255
    np.testing.assert_allclose(pixels(file), expected, atol=1)


def test_hsv_and_palette_with_alpha_are_color():
    wheel = Image.merge("HSV", [Image.new("L", (2, 2), v) for v in (85, 255, 255)])
    np.testing.assert_array_equal(pixels(wheel), np.broadcast_to([0, 255, 0], (2, 2, 3)))
    spot = Image.new("PA", (2, 2), (1, 255))
    spot.putpalette([0, 0, 0, 10, 20, 30])
    np.testing.assert_array_equal(pixels(spot), np.broadcast_to([10, 20, 30], (2, 2, 3)))


def test_a_jpeg_in_ycbcr_has_the_colors_it_was_made_of():
    flat = np.broadcast_to(np.array([200, 60, 30], np.uint8), (16, 16, 3))
    file = encoded(Image.fromarray(flat), "JPEG", quality=100, subsampling=0)
    np.testing.assert_allclose(pixels(file), flat, atol=2)
    ycbcr = Image.merge("YCbCr", [Image.new("L", (2, 2), v) for v in (100, 90, 180)])
    expected = [100 + 1.402 * 52, 100 - 0.344136 * -38 - 0.714136 * 52, 100 + 1.772 * -38]
    np.testing.assert_allclose(pixels(encoded(ycbcr, "TIFF"))[0, 0], expected, atol=1.5)


def lab_to_srgb(lab):
    """CIE L*a*b* (D50) to sRGB in 0..255, from the formulas: CIE 15, Bradford to D65, IEC 61966-2-1."""
    fy = (lab[:, 0] + 16) / 116
    f = np.stack([fy + lab[:, 1] / 500, fy, fy - lab[:, 2] / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    from_d50 = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = np.clip(xyz @ np.array(from_d50).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_a_lab_tiff_becomes_srgb():
    lab = np.array([[0, 0, 0], [60, 20, -30], [50, -20, 30], [80, 5, 60], [100, 0, 0]], float)
    stored = np.stack([lab[:, 0] * 255 / 100, lab[:, 1] + 128, lab[:, 2] + 128], axis=-1).round().astype(np.uint8)
    image = Image.merge("LAB", [Image.fromarray(stored[None, :, c].copy()) for c in range(3)])
    file = encoded(image, "TIFF")
    assert Image.open(io.BytesIO(file)).mode == "LAB"
    np.testing.assert_allclose(pixels(file)[0], lab_to_srgb(lab), atol=3)
    np.testing.assert_allclose(pixels(file, n_in=1)[0], luma(lab_to_srgb(lab)), atol=3)


# ---- more than 8 bits


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("values", [DEEP, TWELVE_BITS], ids=["full range", "12 bits"])
def test_16_bits_are_scaled_not_clipped(form, values):
    file = encoded(Image.fromarray(values), form)
    assert Image.open(io.BytesIO(file)).mode == "I;16"
    assert open_image(file).mode == "F"
    np.testing.assert_allclose(pixels(file), values / 65535 * 255, rtol=1e-6)
    np.testing.assert_array_equal(pixels(file, n_in=1), pixels(file))
    np.testing.assert_array_equal(pixels(file, n_in=3)[..., 2], np.rint(values / 65535 * 255))
    assert open_image(file, n_in=3).mode == "RGB"


def test_big_endian_16_bits():
    header = Image.new("I;16B", (7, 5))
    header.frombytes(DEEP.astype(">u2").tobytes())
    np.testing.assert_allclose(pixels(encoded(header, "TIFF")), DEEP / 65535 * 255, rtol=1e-6)


def test_32_bit_integers_count_as_16_bits_where_they_fit_and_are_stretched_where_not():
    def tiff(values):
        return encoded(Image.fromarray(values.astype(np.int32)), "TIFF")

    np.testing.assert_allclose(pixels(tiff(DEEP)), DEEP / 65535 * 255, rtol=1e-6)
    hounsfield = np.linspace(-1000, 3000, 35).round().reshape(5, 7)
    np.testing.assert_allclose(pixels(tiff(hounsfield)), (hounsfield + 1000) / 4000 * 255, rtol=1e-5)
    close_and_large = 2_000_000_000 + np.arange(35).reshape(5, 7)
    np.testing.assert_allclose(pixels(tiff(close_and_large)), np.arange(35).reshape(5, 7) / 34 * 255, rtol=1e-5)
    assert (pixels(tiff(np.full((5, 7), -3))) == 0).all()


UNIT = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (UNIT, UNIT * 255),
        (UNIT * 200, UNIT * 200),
        (UNIT * 60000, UNIT * 60000 / 65535 * 255),
        (UNIT * 1e6, UNIT * 255),
        (UNIT * 2 - 1, UNIT * 255),
        ((UNIT * 2 - 1) * np.float32(3e38), UNIT * 255),
        (UNIT * 0 + 7e9, UNIT * 0),
    ],
    ids=["unit", "8 bits", "16 bits", "more", "signed", "whole float range", "flat"],
)
def test_floats_by_their_range(values, expected):
    file = encoded(Image.fromarray(values.astype(np.float32)), "TIFF")
    np.testing.assert_allclose(pixels(file), expected, rtol=1e-5, atol=1e-4)
    assert open_image(file).mode == "F"


def test_nan_and_infinity_become_the_ends_of_what_is_finite():
    values = np.array([[np.nan, -np.inf, np.inf, 0.2, 0.6]], np.float32)
    file = encoded(Image.fromarray(values), "TIFF")
    np.testing.assert_allclose(pixels(file), np.array([[0.2, 0.2, 0.6, 0.2, 0.6]]) * 255, rtol=1e-6)
    assert describe(file)["max"] == pytest.approx(0.6)
    assert (pixels(np.full((3, 3), np.nan)) == 0).all()


# ---- arrays and PIL images


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GREY, GREY),
        (GREY[..., None], GREY),
        (COLOR, COLOR),
        (np.dstack([COLOR, GREY]), COLOR),
        (COLOR[:, ::-1], COLOR[:, ::-1]),
        (GREY > 127, (GREY > 127) * 255),
        (DEEP, DEEP / 65535 * 255),
        (DEEP.astype(">u2"), DEEP / 65535 * 255),
        (UNIT.astype(np.float64), UNIT * 255),
        (UNIT.astype(np.float16), UNIT.astype(np.float16).astype(float) * 255),
        (GREY.astype(np.int64), GREY),
        (COLOR / 255, COLOR),
        (COLOR.astype(np.uint16) * 257, COLOR),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_arrays_follow_the_rules_of_files(array, expected):
    before = array.copy()
    np.testing.assert_allclose(pixels(array), expected, rtol=1e-5)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(
    "array",
    [np.zeros((3, 8, 8)), np.zeros((8, 8, 2)), np.zeros(9), np.zeros((0, 4)), np.zeros((4, 4), complex)],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_arrays_that_are_no_image_are_refused_with_their_shape(array):
    with pytest.raises(BadImage) as caught:
        open_image(array)
    assert caught.value.code == "unsupported"
    assert str(array.shape) in str(caught.value)


def test_a_pil_image_is_neither_changed_nor_handed_out():
    image = Image.fromarray(COLOR)
    image.info["comment"] = "a name"
    opened = open_image(image)
    np.testing.assert_array_equal(np.asarray(opened), COLOR)
    opened.paste(0, (0, 0, 7, 5))
    np.testing.assert_array_equal(np.asarray(image), COLOR)
    assert (opened.info, image.info) == ({}, {"comment": "a name"})


def test_paths_bytes_and_file_objects_are_the_same_picture(tmp_path):
    path = tmp_path / "no suffix"
    path.write_bytes(encoded(Image.fromarray(COLOR), "PNG"))
    reader, writer = os.pipe()
    os.write(writer, path.read_bytes())
    os.close(writer)
    with path.open("rb") as file, os.fdopen(reader, "rb") as pipe:
        file.seek(20)
        for source in path, str(path), path.read_bytes(), file, pipe:
            np.testing.assert_array_equal(pixels(source), COLOR)
        assert not file.closed


def test_other_types_and_channel_counts_are_explained():
    with pytest.raises(DataError, match=r"got list"):
        open_image([1, 2])
    with pytest.raises(DataError, match=r"number of channels, 1 .* got 4"):
        open_image(GREY, n_in=4)


# ---- frames, orientation, reduced decoding


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP"])
def test_the_first_frame_counts(form):
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime", "blue")]
    how = {"lossless": True} if form == "WEBP" else {}
    file = encoded(frames[0], form, save_all=True, append_images=frames[1:], **how)
    np.testing.assert_array_equal(pixels(file), np.broadcast_to([255, 0, 0], (4, 6, 3)))
    assert describe(file)["frames"] == 3


# What a viewer has to do for each EXIF value, from the standard's names of the 0th row and column.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(a[::-1, ::-1], 0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("value", UPRIGHT)
@pytest.mark.parametrize("array", [GREY, COLOR, DEEP], ids=["grey", "color", "16 bits"])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_orientation_is_applied_once(form, array, value):
    exif = Image.Exif()
    exif[0x0112] = value
    file = encoded(Image.fromarray(array), form, exif=exif)
    expected = UPRIGHT[value](array / 257 if array is DEEP else array)
    np.testing.assert_allclose(pixels(file), expected, rtol=1e-6)
    again = open_image(open_image(file))
    np.testing.assert_allclose(np.asarray(again), expected, rtol=1e-6)
    facts = describe(file)
    assert (facts["height"], facts["width"]) == expected.shape[:2]


def test_broken_exif_costs_the_turn_not_the_image():
    good = encoded(Image.fromarray(COLOR), "PNG")
    for exif in b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff":
        file = encoded(Image.fromarray(COLOR), "PNG", exif=exif)
        assert file != good
        np.testing.assert_array_equal(pixels(file), COLOR)


def photo(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 / width, y * 255 / height, (x + y) % 256 / 4], axis=-1).astype(np.uint8)


def test_min_side_reads_a_jpeg_smaller_but_never_below_twice_the_side():
    array = photo(600, 900)
    file = encoded(Image.fromarray(array), "JPEG", quality=95)
    assert open_image(file).size == (900, 600)
    assert open_image(file, min_side=64).size == (225, 150)
    assert open_image(file, min_side=75).size == (225, 150)
    assert open_image(file, min_side=76).size == (450, 300)
    assert open_image(file, min_side=200).size == (900, 600)
    means = array.reshape(150, 4, 225, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(pixels(file, min_side=64)[2:-2, 2:-2], means[2:-2, 2:-2], atol=6)
    np.testing.assert_allclose(pixels(file, n_in=1, min_side=64)[2:-2, 2:-2], luma(means)[2:-2, 2:-2], atol=6)
    assert open_image(encoded(Image.fromarray(array), "PNG"), min_side=64).size == (900, 600)


def test_a_turned_jpeg_is_described_at_full_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encoded(Image.fromarray(photo(600, 2000)), "JPEG", exif=exif)
    facts = describe(file)
    assert (facts["width"], facts["height"]) == (600, 2000)
    assert open_image(file, min_side=64).size == (150, 500)


# ---- describe


def test_describe_tells_what_a_file_holds():
    color = encoded(Image.fromarray(COLOR), "PNG")
    expected = {"width": 7, "height": 5, "mode": "RGB", "format": "PNG", "frames": 1}
    assert describe(color) == {**expected, "channels": 3, "bits": 8, "max": None}
    deep = encoded(Image.fromarray(TWELVE_BITS), "PNG")
    assert describe(deep) == {**expected, "mode": "I;16", "channels": 1, "bits": 16, "max": 4095}
    floats = describe(encoded(Image.fromarray(UNIT * 70000), "TIFF"))
    assert (floats["mode"], floats["bits"], floats["max"]) == ("F", 32, 70000)
    wide = describe(encoded(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"))
    assert (wide["mode"], wide["bits"], wide["max"]) == ("I", 32, 70000)


def test_grey_is_told_from_color_by_every_pixel():
    grey = np.stack([photo(70, 50)[..., 0]] * 3, axis=-1)
    assert describe(grey)["channels"] == 1
    assert describe(encoded(Image.fromarray(grey), "JPEG"))["channels"] == 1
    one_spot = grey.copy()
    one_spot[37, 11, 2] ^= 1
    assert describe(encoded(Image.fromarray(one_spot), "PNG"))["channels"] == 3
    assert describe(Image.fromarray(GREY).quantize(8))["channels"] == 1


def test_a_later_frame_that_is_damaged_does_not_cost_the_image():
    frames = [Image.fromarray(RNG.integers(0, 256, (40, 40), dtype=np.uint8)) for _ in range(3)]
    whole = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    cut = whole[: len(whole) * 2 // 3]
    np.testing.assert_array_equal(pixels(cut), np.asarray(frames[0]))
    assert describe(cut)["frames"] == 1


# ---- what cannot be opened


def test_every_reason_that_a_file_can_give(tmp_path):
    png = encoded(Image.fromarray(photo(90, 80)), "PNG")
    jpeg = encoded(Image.fromarray(photo(90, 80)), "JPEG")
    damaged = bytearray(png)
    damaged[len(png) // 2 : len(png) // 2 + 40] = bytes(40)
    for content, code in {
        b"": "empty",
        b"no image at all": "not_an_image",
        bytes(128) + b"DICM" + bytes(100): "no_pixels",
        png[: len(png) // 2]: "truncated",
        jpeg[: len(jpeg) // 2]: "truncated",
        bytes(damaged): "unreadable",
        png[:20]: "truncated",
        png[:16] + bytes(40): "unreadable",
        b"P5 100000 100000 255\n" + bytes(100): "too_large",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n": "unsupported",
    }.items():
        file = tmp_path / "a secret name"
        file.write_bytes(content)
        assert code_of(file) == code_of(content) == code
    assert code_of(tmp_path / "nothing") == "missing"
    assert code_of(file / "below a file") == "missing"
    assert code_of(tmp_path) == "not_a_file"


def test_the_limit_is_on_the_pixels_that_the_header_claims():
    just_too_large = b"P5 89478486 1 255\n" + bytes(10)
    assert code_of(just_too_large) == "too_large"
    within = b"P5 89478485 1 255\n" + bytes(10)
    assert code_of(within) == "truncated"


def test_a_pipe_is_not_waited_for(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    program = f"from selfsup_fastai.data.opening import open_image\ntry: open_image({os.fspath(fifo)!r})\n"
    program += "except ValueError as err: print(err.code)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout == "not_a_file\n"


def test_links_to_nothing_or_to_themselves_are_missing(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert code_of(tmp_path / "dangling") == code_of(tmp_path / "self") == "missing"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError(13, "Permission denied", "a secret name"), "no_permission"),
        (MemoryError(), "out_of_memory"),
        (SystemError("a secret name"), "unreadable"),
        (RecursionError(), "unreadable"),
        (NotImplementedError("a secret name"), "unsupported"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_plugin_raises_becomes_a_reason_that_tells_no_name(monkeypatch, error, code):
    def failing(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", failing)
    try:
        open_image(encoded(Image.fromarray(GREY), "PNG"))
    except BadImage as bad:
        assert bad.code == code
        assert bad.__context__ is None
        assert "secret" not in "".join(traceback.format_exception(bad))
    else:
        pytest.fail("no error")


def test_no_path_in_the_message_or_the_chain_behind_it(tmp_path):
    secret = tmp_path / "Doe_Jane_1970.png"
    for content in None, b"", b"text", b"\x89PNG\r\n\x1a\n damaged":
        if content is not None:
            secret.write_bytes(content)
        with pytest.raises(BadImage) as caught:
            open_image(secret)
        assert "Doe" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None


def test_a_bad_image_survives_a_worker_process():
    error = BadImage("message", "truncated")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code) == ("message", "truncated")
    assert str(type(error)("message")) == "message"  # as torch re-raises it


# ---- manners


def test_warnings_of_plugins_are_kept_quiet(recwarn):
    image = Image.fromarray(GREY).quantize(8)
    open_image(encoded(image, "PNG", transparency=bytes(range(8))))
    open_image(encoded(Image.fromarray(COLOR), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"))
    assert not recwarn.list


def test_importing_is_light_and_leaves_pil_as_it_was():
    program = (
        "from PIL import Image, ImageFile\n"
        "before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, sorted(Image.OPEN)\n"
        "import selfsup_fastai.data.opening, sys\n"
        "assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, sorted(Image.OPEN)) == before\n"
        "heavy = {'torch', 'fastai', 'pandas', 'matplotlib', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_child_answers_line_by_line_and_keeps_its_output_clean(tmp_path):
    Image.fromarray(COLOR).save(tmp_path / "a.png")
    requests = '{"path": "a.png", "size": null}\n{"path": "none.png", "size": null}\n'
    noisy = (
        "print('codec says hello', flush=True); os.write(1, b'hello'); os.write(2, b'hello'); return describe(*args)"
    )
    program = (
        f"import os; from selfsup_fastai.data import opening; describe = opening.describe\ndef loud(*args): {noisy}\n"
    )
    command = [sys.executable, "-c", program + "opening.describe = loud; opening.main()"]
    env = {**os.environ, "PYTHONPATH": os.fspath(Path(opening.__file__).parents[2])}
    done = subprocess.run(command, input=requests, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60)
    ready, good, bad = map(json.loads, done.stdout.splitlines())
    assert ready == {"ready": True}
    assert (good["width"], good["height"], good["channels"]) == (7, 5, 3)
    assert bad == {"code": "missing", "message": REASONS["missing"]}
    assert done.stderr == ""
