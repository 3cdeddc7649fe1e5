"""A trained model in a file: it predicts what the learner predicts, and every way the file can be wrong is refused."""

import json
import struct

import numpy as np
import pytest
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import RandomSplitter
from fastai.learner import load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, LabelSmoothingCrossEntropyFlat
from fastai.torch_core import set_seed
from fastai.vision.augment import RandomCrop, RandomResizedCrop, Resize, ResizeMethod
from fastai.vision.core import PILMask
from fastai.vision.data import ImageBlock, MaskBlock, PointBlock
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from selfsup_fastai.data.blocks import Cover
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.downstream.saving import load_trained
from selfsup_fastai.encoders.checkpoint import load_encoder, read_card
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.encoders.tensor_files import digest, tensors_of
from selfsup_fastai.errors import EncoderFileError
from tests.conftest import write_images

KEY = "selfsup_fastai_model"
BLOCKS = {
    "category": (CategoryBlock, lambda f: "abc"[int(f.stem) % 3]),
    "multicategory": (MultiCategoryBlock, lambda f: ["x", "yz"[int(f.stem) % 2]]),
    "regression": (RegressionBlock, lambda f: [float(int(f.stem)), 1.0]),
    "points": (PointBlock, lambda f: torch.tensor([[3.0, 4.0 + int(f.stem)], [20.0, 10.0]])),
    "mask": (
        MaskBlock(codes=["dark", "light"]),
        lambda f: PILMask.create((np.asarray(Image.open(f).convert("L")) > 127).astype("uint8")),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """12 images of 36 x 36 pixels, in color and grey."""
    return {
        channels: write_images(tmp_path_factory.mktemp(f"c{channels}"), 12, (36, 36), channels) for channels in (1, 3)
    }


def loaders(folder, kind, item_tfms=None):
    block, get_y = BLOCKS[kind]
    data = DataBlock((ImageBlock, block), get_items=pngs, get_y=get_y, item_tfms=item_tfms)
    data.splitter = RandomSplitter(0.34, seed=1)
    return data.dataloaders(folder, bs=4, num_workers=0, device="cpu")


def pngs(folder):
    return sorted(folder.glob("*.png"))


def learner(folder, kind, encoder="resnet10t", item_tfms=None, **kwargs):
    set_seed(0)
    learn = downstream_learner(loaders(folder, kind, item_tfms=item_tfms), encoder, **kwargs)
    learn.fit(1, 1e-3)
    return learn


def as_seen(learn):
    """Validation images in [0, 1] as the learner sees them, before it standardizes them."""
    encoder = learn.model.encoder
    x = torch.cat([b[0].as_subclass(torch.Tensor) for b in learn.dls.valid])
    mean, std = (torch.tensor(s).view(-1, 1, 1) for s in (encoder.mean, encoder.std))
    return x * std + mean


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_loaded_model_predicts_what_the_learner_does(folders, tmp_path, kind, channels):
    learn = learner(folders[channels], kind)
    model = load_trained(learn.save_model(tmp_path / "model"))
    preds, _, decoded = learn.get_preds(with_decoded=True)
    x = as_seen(learn)
    found = model.predict_batch(x)
    if kind == "points":
        preds = (preds.view(-1, 2, 2) + 1) * 18
    torch.testing.assert_close(found, preds.as_subclass(torch.Tensor), atol=1e-6, rtol=1e-5)
    assert (model.kind, model.size, model.training) == (kind, (36, 36), False)
    assert model.vocab == (tuple(learn.target.vocab) if learn.target.vocab else None)
    assert model.encoder.in_chans == channels
    words = model.decode(found)
    if kind == "category":
        assert words == [learn.dls.vocab[i] for i in decoded]
    if kind == "multicategory":
        assert words == [[name for name, yes in zip(learn.dls.vocab, row) if yes] for row in decoded]
    if kind == "mask":
        assert torch.equal(torch.stack(words).long(), decoded.as_subclass(torch.Tensor))
    if kind in ("regression", "points"):
        assert words == found.tolist()
    files = list(learn.dls.valid_ds.items)
    opened = torch.stack([model.open(file) for file in files])
    torch.testing.assert_close(opened, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "arch", ["convnext_femto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "efficientnet_lite0"]
)
@pytest.mark.parametrize("kind", ["mask", "points"])
def test_every_architecture_comes_back(folders, tmp_path, arch, kind):
    set_seed(0)
    learn = downstream_learner(loaders(folders[1], kind, item_tfms=Resize(32)), arch)
    model = load_trained(learn.save_model(tmp_path / "model"))
    expected = learn.model.eval()
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), expected(model.encoder.prepare(x)))


@pytest.mark.parametrize(
    ("kind", "loss", "activation"),
    [
        ("category", LabelSmoothingCrossEntropyFlat(), "softmax"),
        ("category", nn.CrossEntropyLoss(), "softmax"),  # has none of its own
        ("multicategory", BCEWithLogitsLossFlat(thresh=0.2), "sigmoid"),
        ("mask", DiceLoss(), "softmax"),
    ],
)
def test_predictions_go_through_the_activation_of_the_loss(folders, tmp_path, kind, loss, activation):
    model = load_trained(learner(folders[3], kind, loss_func=loss).save_model(tmp_path / "model"))
    assert model.facts.activation == activation
    preds = model.predict_batch(torch.rand(2, 3, 36, 36))
    if activation == "softmax":
        torch.testing.assert_close(preds.sum(1), torch.ones_like(preds.sum(1)))
    else:
        assert model.threshold == pytest.approx(0.2)
        assert model.decode(torch.tensor([[0.3, 0.1, 0.25]])) == [["x", "z"]]


def test_a_loss_with_an_activation_of_its_own_is_refused(folders, tmp_path):
    class Own(CrossEntropyLossFlat):
        def activation(self, x):
            return x.tanh()

    learn = learner(folders[3], "category", loss_func=Own())
    with pytest.raises(EncoderFileError, match="activation of Own is none of softmax, sigmoid, none"):
        learn.save_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("tfm", "name"),
    [
        (Resize(24), "crop"),
        (Resize((24, 40), ResizeMethod.Squish), "squish"),
        (Resize(24, ResizeMethod.Pad, pad_mode="zeros"), "pad zeros"),
        (Cover((24, 24)), "cover"),
        (RandomResizedCrop(24), "random crop"),
        (RandomResizedCrop((30, 50)), "random crop"),
    ],
)
def test_images_are_opened_as_validation_opened_them(tmp_path, tfm, name):
    folder = write_images(tmp_path / "wide", 8, (30, 50))
    learn = learner(folder, "category", item_tfms=tfm)
    model = load_trained(learn.save_model(tmp_path / "model"))
    assert model.facts.resize == name
    opened = torch.stack([model.open(file) for file in learn.dls.valid_ds.items])
    torch.testing.assert_close(opened, as_seen(learn), atol=1e-5, rtol=0)


def test_the_encoder_is_that_of_the_learner_and_knows_its_rounds(folders, tmp_path):
    learn = learner(folders[3], "category")
    model = load_trained(learn.save_model(tmp_path / "model"))
    state = learn.model.encoder.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.encoder.state_dict().items())
    assert model.encoder.lineage == [learn.this_round()]
    assert (model.encoder.mean, model.encoder.std) == (learn.model.encoder.mean, learn.model.encoder.std)
    again = downstream_learner(loaders(folders[3], "category"), model.encoder)
    assert torch.equal(again.model.encoder.body.conv1[0].weight, model.encoder.body.conv1[0].weight)


def test_an_exported_learner_can_save_its_model(folders, tmp_path):
    learn = learner(folders[3], "category", path=tmp_path)
    learn.dls.train_ds.tls[1].tfms  # the labeling function is a lambda: it stays behind
    before = load_trained(learn.save_model(tmp_path / "a")).predict_batch(torch.ones(1, 3, 36, 36))
    learn.dls = learn.dls.new_empty()
    model = load_trained(learn.save_model(tmp_path / "b"))
    assert model.size is None
    assert torch.equal(model.predict_batch(torch.ones(1, 3, 36, 36)), before)


def test_names_of_classes_may_be_numbers(folders, tmp_path):
    data = DataBlock((ImageBlock, CategoryBlock), get_items=pngs, get_y=lambda f: np.int64(int(f.stem) % 2))
    dls = data.dataloaders(folders[3], bs=4, num_workers=0, device="cpu")
    model = load_trained(downstream_learner(dls, "resnet10t").save_model(tmp_path / "model"))
    assert model.vocab == (0, 1) and all(type(v) is int for v in model.vocab)


def test_an_own_network_must_be_given(folders, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3))
    learn = learner(folders[3], "mask", encoder=net)
    file = learn.save_model(tmp_path / "own")
    with pytest.raises(EncoderFileError, match="a network of your own"):
        load_trained(file)
    torch.testing.assert_close(
        load_trained(file, net).predict_batch(as_seen(learn)), learn.get_preds()[0].as_subclass(torch.Tensor)
    )


@pytest.fixture(scope="module")
def saved_bytes(folders, tmp_path_factory):
    return {
        kind: learner(folders[3], kind, encoder=create_encoder("test_resnet", 3, size=36))
        .save_model(tmp_path_factory.mktemp("saved") / "model")
        .read_bytes()
        for kind in ("category", "mask", "points")
    }


@pytest.fixture
def saved(saved_bytes, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(saved_bytes["mask"])
    return file


def test_it_is_said_that_another_cut_is_not_kept(tmp_path, capsys):
    learn = learner(write_images(tmp_path / "wide", 8, (30, 50)), "category", item_tfms=RandomCrop(24))
    learn.save_model(tmp_path / "model")
    assert "does not keep that images were cut by RandomCrop" in capsys.readouterr().err


def rewrite(file, change, summed=True):
    """The same file with another card, whose sum is right: what is refused is the card."""
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + n]), data[8 + n :]
    card = json.loads(header["__metadata__"][KEY])
    card = change(card) or card
    if summed and isinstance(card, dict):
        card["digest"] = digest(card, tensors_of(file))
    header["__metadata__"][KEY] = json.dumps(card)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def model(**changes):
    return lambda card: card["model"].update(changes)


HOSTILE = {
    "list": lambda card: [1],
    "no format": lambda card: card.pop("format") and None,
    "format true": lambda card: card.update(format=True),
    "no model": lambda card: card.pop("model") and None,
    "model list": lambda card: card.update(model=[1]),
    "no encoder": lambda card: card.pop("encoder") and None,
    "encoder text": lambda card: card.update(encoder="x"),
    "encoder arch": lambda card: card["encoder"].update(arch="hf-hub:someone/net"),
    "encoder huge": lambda card: card["encoder"]["kwargs"].update(in_chans=10**9),
    "kind": model(kind="boxes"),
    "kind list": model(kind=["mask"]),
    "kind other": model(kind="category", layers=None),
    "kind points": model(kind="points", layers=None),
    "n_out": model(n_out=3),
    "n_out huge": model(n_out=60_000),
    "n_out more": model(n_out=10**12),
    "n_out text": model(n_out="2"),
    "n_out true": model(n_out=True),
    "vocab": model(vocab="ab"),
    "vocab dicts": model(vocab=[{}, {}]),
    "size": model(size=[10**9, 1]),
    "size one": model(size=[32]),
    "resize": model(resize="eval"),
    "resize list": model(resize=["crop"]),
    "activation": model(activation="__import__"),
    "threshold": model(threshold="x"),
    "threshold infinite": model(threshold=float("inf")),
    "layers": model(layers=["__class__"]),
    "layers text": model(layers="act1"),
    "layers none": model(layers=[]),
    "size gone": lambda card: card["model"].pop("size") and None,
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_cards_are_refused_in_one_sentence(saved, change, monkeypatch):
    def forbidden(*_, **__):
        raise SystemExit("something was unpickled")

    monkeypatch.setattr(torch, "load", forbidden)
    rewrite(saved, change)
    with pytest.raises(EncoderFileError, match=r"damaged|do not fit|unknown to the installed") as caught:
        load_trained(saved)
    assert "checksum" not in str(caught.value)


def test_other_names_of_classes_do_not_add_up(saved):
    rewrite(saved, model(vocab=["light", "dark"]), summed=False)
    with pytest.raises(EncoderFileError, match="do not add up to its checksum"):
        load_trained(saved)


@pytest.mark.parametrize("kind", ["category", "mask", "points"])
def test_a_file_cut_or_flipped_anywhere_is_refused(saved_bytes, tmp_path, kind):
    data, file = saved_bytes[kind], tmp_path / "hurt.safetensors"
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for n in (0, 1, 8, 100, header, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:n])
        with pytest.raises(EncoderFileError, match="is empty" if n == 0 else "is damaged"):
            load_trained(file)
    rng = np.random.default_rng(0)
    for place in [*rng.integers(8, header, 60).tolist(), *rng.integers(header, len(data), 10).tolist()]:
        if place >= header - 8 and data[place] == 0x20:
            continue  # padding after the header means nothing
        hurt = bytearray(data)
        hurt[place] ^= 1 << int(rng.integers(0, 7))
        file.write_bytes(hurt)
        with pytest.raises(EncoderFileError):
            load_trained(file)


def test_foreign_files_are_named(saved, folders, tmp_path):
    with pytest.raises(EncoderFileError, match=r"holds a whole model.*load_trained\(file\)"):
        load_encoder(saved)
    with pytest.raises(EncoderFileError, match="holds a whole model"):
        read_card(saved)
    learn = learner(folders[3], "category")
    with pytest.raises(EncoderFileError, match=r"an encoder without a head.*load_encoder\(file\)"):
        load_trained(learn.save_encoder(tmp_path / "encoder"))
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(EncoderFileError, match=r"without our card.*save_model"):
        load_trained(tmp_path / "other.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "pickle.pth")
    with pytest.raises(EncoderFileError, match="is a pickle"):
        load_trained(tmp_path / "pickle.pth")
    with pytest.raises(EncoderFileError, match=r"no saved model.*Did you mean 'model.safetensors'"):
        load_trained(tmp_path / "modl.safetensors")
    rewrite(saved, lambda card: card.update(format=2))
    with pytest.raises(EncoderFileError, match=r"newer selfsup_fastai \(model format 2; this one reads 1\)"):
        load_trained(saved)


def test_missing_and_foreign_tensors_are_refused(saved):
    tensors, card = load_file(saved), None
    data = saved.read_bytes()
    card = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    save_file({**tensors, "extra": torch.zeros(1)}, saved, card)
    with pytest.raises(EncoderFileError, match="tensors of neither encoder nor head"):
        load_trained(saved)
    save_file({**tensors, "head.extra": torch.zeros(1)}, saved, card)
    with pytest.raises(EncoderFileError, match="do not add up"):
        load_trained(saved)


def test_a_diverged_model_is_not_saved_and_the_old_file_stays(folders, tmp_path):
    learn = learner(folders[3], "category")
    file = learn.save_model(tmp_path / "model")
    before = file.read_bytes()
    learn.model.head[1].weight.data[0] = float("nan")
    with pytest.raises(EncoderFileError, match="The model cannot be saved, because the weights are not finite"):
        learn.save_model(file)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir() if f.is_file()] == ["model.safetensors"]


def test_no_file_name_is_written(folders, tmp_path):
    data = learner(folders[3], "mask").save_model(tmp_path / "model").read_bytes()
    assert b".png" not in data and str(folders[3]).encode() not in data and str(tmp_path).encode() not in data
    assert load_learner  # what this file is instead of
