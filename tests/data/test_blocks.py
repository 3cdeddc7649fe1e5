"""Openers in fastai pipelines: the right pixels, types and errors, one image at a time."""

import io
import pickle

import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.core import TfmdLists
from fastai.data.transforms import IntToFloatTensor, RandomSplitter, ToTensor
from fastai.torch_core import TensorImage
from fastai.vision.core import PILImage
from PIL import Image

from selfsup_fastai.data.blocks import OpenChecked, OpenImage, PILGrey, TensorGrey, UnlabeledBlock
from selfsup_fastai.data.opening import BadImage
from selfsup_fastai.errors import DataError

RNG = np.random.default_rng(11)
GREY = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 8)).astype(np.uint16)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def tensor_of(opener, source):
    return IntToFloatTensor()(ToTensor()(opener(source))[None])[0]


@pytest.mark.parametrize(
    ("array", "n_in", "kind", "mode"),
    [
        (GREY, None, PILGrey, "L"),
        (GREY, 1, PILGrey, "L"),
        (GREY, 3, PILImage, "RGB"),
        (COLOR, None, PILImage, "RGB"),
        (COLOR, 3, PILImage, "RGB"),
        (COLOR, 1, PILGrey, "L"),
        (DEEP, None, PILGrey, "F"),
        (DEEP, 1, PILGrey, "F"),
        (DEEP, 3, PILImage, "RGB"),
    ],
)
def test_every_depth_becomes_the_right_tensor(tmp_path, array, n_in, kind, mode):
    (tmp_path / "a.png").write_bytes(png(array))
    truth = array / (65535 if array is DEEP else 255)
    if n_in == 1 and array is COLOR:
        truth = truth @ [0.299, 0.587, 0.114]
    if n_in == 3 and array is not COLOR:
        truth = np.stack([truth] * 3, axis=-1)
    expected = np.atleast_3d(truth).transpose(2, 0, 1)
    rounded = (n_in == 3 and array is DEEP) or (n_in == 1 and array is COLOR)
    opener = OpenImage(n_in)
    for source in tmp_path / "a.png", str(tmp_path / "a.png"), png(array), array, Image.fromarray(array), lambda: array:
        image = opener(source)
        assert (type(image), image.mode) == (kind, mode)
        x = tensor_of(opener, source)
        assert isinstance(x, TensorGrey if kind is PILGrey else TensorImage)
        np.testing.assert_allclose(x, expected, atol=1 / 255 if rounded else 1e-6)


def test_grey_tensors_are_floats_and_color_ones_bytes():
    """Workers stack only tensors of one type, and grey images of 8 and of 16 bits meet in one batch."""
    tensors = [ToTensor()(OpenImage(1)(array)) for array in (GREY, DEEP)]
    assert [t.dtype for t in tensors] == [torch.float32] * 2
    assert torch.equal(tensors[0][0].as_subclass(torch.Tensor), torch.from_numpy(GREY).float())
    assert ToTensor()(OpenImage(3)(GREY)).dtype == torch.uint8


def test_an_opener_raises_where_a_checked_one_warns(tmp_path):
    missing = tmp_path / "none.png"
    with pytest.raises(BadImage) as caught:
        OpenImage(3)(missing)
    assert caught.value.code == "missing" and "none" not in str(caught.value)
    for n_in, mode, value in (3, "RGB", (128, 128, 128)), (1, "L", 128), (None, "L", 128):
        with pytest.warns(UserWarning, match=r"\(missing\)") as warned:
            image = OpenChecked(n_in, min_side=16, blank=(30, 20))(missing)
        assert (image.mode, image.size) == (mode, (30, 20))
        assert image.getcolors() == [(600, value)]
        assert str(tmp_path) not in str(warned[0].message)


def test_a_mistake_in_the_argument_is_no_broken_file():
    for opener in OpenImage(3), OpenChecked(3):
        with pytest.raises(DataError, match="got Tensor"):
            opener(torch.zeros(3, 4, 4))
    with pytest.raises(DataError, match="n_in is the number of channels"):
        OpenImage(2)(GREY)


def test_openers_survive_pickling():
    for opener in OpenImage(1, 32), OpenChecked(1, 32, (9, 5)):
        again = pickle.loads(pickle.dumps(opener))
        assert vars(again).items() >= {"n_in": 1, "min_side": 32}.items()
        assert np.array_equal(np.asarray(again(COLOR)), np.asarray(opener(COLOR)))
    assert again.blank == (9, 5)


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        Image.fromarray(DEEP // (i + 1)).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("n_in", [1, 3])
def test_a_data_block_without_and_with_labels(folder, n_in):
    def files(path):
        return sorted(path.glob("*.png"))

    def truth(file):
        deep = (DEEP // (int(file.stem) + 1)) / 65535
        return np.stack([deep if n_in == 1 else np.rint(deep * 255) / 255] * n_in)

    parts = {"get_items": files, "splitter": RandomSplitter(0.5, seed=1)}
    settings = {"bs": 4, "num_workers": 0, "device": "cpu"}
    plain = DataBlock(UnlabeledBlock(n_in), **parts).dataloaders(folder, **settings)
    b = plain.valid.one_batch()
    assert len(b) == 1
    np.testing.assert_allclose(b[0], np.stack([truth(f) for f in plain.valid_ds.items]), atol=1e-6)
    block = DataBlock((UnlabeledBlock(n_in), CategoryBlock), get_y=lambda f: "ab"[int(f.stem) % 2], **parts)
    x, y = block.dataloaders(folder, **settings).valid.one_batch()
    np.testing.assert_allclose(x, b[0], atol=1e-6)
    assert y.tolist() == [int(f.stem) % 2 for f in plain.valid_ds.items]


def test_the_default_block_is_color(folder):
    dls = DataBlock(UnlabeledBlock, get_items=lambda p: sorted(p.glob("*.png"))).dataloaders(
        folder, bs=2, num_workers=0, device="cpu"
    )
    assert dls.one_batch()[0].shape == (2, 3, 6, 8)


def test_a_pipeline_finds_where_a_new_source_enters(folder):
    images = TfmdLists(sorted(folder.glob("*.png")), OpenImage(3))
    for source in str(folder / "0.png"), png(GREY), GREY, Image.fromarray(GREY), lambda: GREY, images[0]:
        assert images.infer_idx(source) == 0
    with pytest.raises(AssertionError, match="Expected an input of type"):
        images.infer_idx(torch.zeros(3, 4, 4))
