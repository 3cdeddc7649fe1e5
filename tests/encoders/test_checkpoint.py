"""Saved encoders: whole round trips, and every way a file can be wrong."""

import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from selfsup_fastai.encoders.checkpoint import get_encoder, is_fresh, load_encoder, read_card, save_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import EncoderFileError, SelfsupError, UnknownNameError

FIELDS = {
    "task": "rotation",
    "settings": {"turns": 4},
    "epochs": 20,
    "images": 81920,
    "data": {"n": 1024, "sha256": "0123abcd"},
    "metrics": {"accuracy": 0.75},
}


class Own(nn.Module):
    """A small network of one's own, with tied weights."""

    def __init__(self, width=8):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, width, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def tiny(n_in=3, seed=0):
    torch.manual_seed(seed)
    return create_encoder("test_resnet", n_in, size=32)


def images(channels=3, side=64):
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def features(encoder):
    with torch.no_grad():
        return encoder.eval()(images(encoder.in_chans))


@pytest.fixture
def saved(tmp_path):
    return save_encoder(tiny(), tmp_path / "rotation", **FIELDS)


def header_of(file):
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def rewrite(file, change):
    """The same file with another card: what a person with a hex editor, or an enemy, can do."""
    header, rest = header_of(file)
    card = json.loads(header["__metadata__"]["selfsup_fastai"])
    header["__metadata__"]["selfsup_fastai"] = json.dumps(change(card) or card)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return file


@pytest.mark.parametrize(
    "arch, size",
    [
        ("resnet10t", 64),
        ("efficientnet_b0", 64),
        ("convnext_atto", 64),
        ("vit_tiny_patch16_224", 64),
        ("swin_tiny_patch4_window7_224", 64),
    ],
)
@pytest.mark.parametrize("n_in", [1, 3])
def test_round_trip_of_timm_networks(tmp_path, arch, size, n_in):
    encoder = create_encoder(arch, n_in, size=size, drop_path_rate=0.05)
    encoder.mean, encoder.std = (0.25,) * n_in, (0.125,) * n_in
    file = save_encoder(encoder, tmp_path / "folder" / "name", **FIELDS)
    assert file == tmp_path / "folder" / "name.safetensors"
    again = load_encoder(file)
    assert torch.equal(features(again), features(encoder))
    for name in ("arch", "source", "kwargs", "in_chans", "num_features", "size", "fixed_size", "input", "mean", "std"):
        assert getattr(again, name) == getattr(encoder, name), name
    card = read_card(file)
    assert {key: card[key] for key in FIELDS} == FIELDS
    bare = timm.create_model(card["arch"], **card["kwargs"])
    bare.load_state_dict(load_file(file), strict=True)
    with torch.no_grad():
        assert torch.equal(bare.eval()(images(n_in)), features(encoder))


def test_where_and_of_which_type_the_weights_were_is_no_part_of_the_network(tmp_path):
    encoder = create_encoder("test_resnet", size=32, device="cpu", dtype=torch.float64)
    assert next(encoder.parameters()).dtype == torch.float64
    again = load_encoder(save_encoder(encoder, tmp_path / "x"))
    assert again.kwargs == encoder.kwargs == {"num_classes": 0, "in_chans": 3}
    assert next(again.parameters()).dtype == torch.float32


def test_round_trip_of_a_torchvision_network(tmp_path):
    encoder = create_encoder(torchvision.models.mobilenet_v3_small, 1, dropout=0.5)
    again = load_encoder(save_encoder(encoder, tmp_path / "m"))
    assert (again.arch, again.source, again.kwargs) == ("mobilenet_v3_small", "torchvision", {"dropout": 0.5})
    assert torch.equal(features(again), features(encoder))


def test_round_trip_of_a_module_of_ones_own_with_tied_and_channels_last_weights(tmp_path):
    encoder = create_encoder(Own().to(memory_format=torch.channels_last))
    file = save_encoder(encoder, tmp_path / "own")
    again = load_encoder(file, Own())
    assert again.body.b.weight is again.body.a.weight
    assert all(torch.equal(v, encoder.body.state_dict()[k]) for k, v in again.body.state_dict().items())
    assert torch.allclose(features(again), features(encoder), atol=1e-6)  # Other memory format, other rounding
    with pytest.raises(EncoderFileError, match=r"a network of your own \(Own\).*module=Own"):
        load_encoder(file)
    with pytest.raises(EncoderFileError, match=r"do not fit the network: 0 missing, 0 unexpected, 2 of another shape"):
        load_encoder(file, Own(width=9))


def test_training_state_and_statistics_of_norms_travel(tmp_path):
    encoder = tiny()
    encoder.train()(images())
    again = load_encoder(save_encoder(encoder, tmp_path / "bn"))
    assert torch.equal(again.body.bn1.running_mean, encoder.body.bn1.running_mean)
    assert again.body.bn1.num_batches_tracked == 1


def test_the_lineage_lists_every_round_once(tmp_path):
    first = save_encoder(tiny(), tmp_path / "a", **FIELDS)
    encoder = load_encoder(first)
    assert encoder.lineage == [{key: FIELDS[key] for key in ("task", "settings", "epochs", "images", "data")}]
    save_encoder(encoder, tmp_path / "b", task="simclr", epochs=5)
    second = save_encoder(encoder, tmp_path / "b", task="simclr", epochs=5)
    assert [entry["task"] for entry in read_card(second)["lineage"]] == ["rotation", "simclr"]
    untrained = save_encoder(load_encoder(second), tmp_path / "c")
    assert [entry["task"] for entry in load_encoder(untrained).lineage] == ["rotation", "simclr"]


def test_the_card_is_plain_json_and_says_what_made_it(saved):
    card = read_card(saved)
    assert card["format"] == 1 and set(card["versions"]) == {"selfsup_fastai", "torch", "timm", "fastai"}
    assert card["versions"]["timm"] == timm.__version__
    raw = header_of(saved)[0]["__metadata__"]["selfsup_fastai"]
    assert raw == json.dumps(card, sort_keys=True) and str(saved.parent) not in raw


def test_numbers_from_numpy_and_torch_become_json_and_nan_becomes_null(tmp_path):
    metrics = {"a": np.float32(0.5), "b": torch.tensor(2), "c": float("nan"), "d": (1, np.bool_(True)), "e": np.inf}
    card = read_card(save_encoder(tiny(), tmp_path / "x", metrics=metrics))
    assert card["metrics"] == {"a": 0.5, "b": 2, "c": None, "d": [1, True], "e": None}


@pytest.mark.parametrize("bad", [object(), {1: 2}, {"deep": [nn.GELU]}, torch.zeros(3), {3}])
def test_fields_that_are_no_json_are_refused(tmp_path, bad):
    with pytest.raises(EncoderFileError, match=r"card\.settings.* holds"):
        save_encoder(tiny(), tmp_path / "x", settings=bad)
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    encoder = tiny()
    encoder.mean, encoder.std = (0.5,), (0.5,)
    with pytest.raises(EncoderFileError, match=r"cannot be saved.*mean, std"):
        save_encoder(encoder, tmp_path / "x")
    with pytest.raises(EncoderFileError, match=r"The card fills in arch itself"):
        save_encoder(tiny(), tmp_path / "x", arch="other")
    with pytest.raises(EncoderFileError, match="names no file"):
        save_encoder(tiny(), "")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv1.0.weight", "bn1.running_var"])
def test_a_diverged_encoder_is_not_saved_and_the_old_file_stays(saved, name, value):
    before, encoder = saved.read_bytes(), tiny(seed=1)
    encoder.body.state_dict()[name].flatten()[0] = value
    for file in (saved, saved.parent / "new" / "x"):
        with pytest.raises(EncoderFileError, match=r"the weights are not finite: the run diverged; lower"):
            save_encoder(encoder, file, task="simclr")
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_a_mask_may_be_infinite(tmp_path):
    net = Own()
    net.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    encoder = create_encoder(net)
    assert load_encoder(save_encoder(encoder, tmp_path / "x"), net).body.mask.tolist() == [0.0, -float("inf")]
    encoder.body.mask[0] = float("nan")
    with pytest.raises(EncoderFileError, match="weights are not finite"):
        save_encoder(encoder, tmp_path / "y")


def test_a_kill_before_the_rename_leaves_the_old_file_whole(saved, monkeypatch):
    before = saved.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_encoder(tiny(seed=1), saved, task="simclr")
    monkeypatch.undo()
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]
    save_encoder(tiny(seed=1), saved, task="simclr")
    assert read_card(saved)["task"] == "simclr" and list(saved.parent.iterdir()) == [saved]


def test_a_file_cut_anywhere_is_refused(saved):
    data = saved.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    points = [0, 1, 4, 7, 8, 9, 100, header - 1, header, header + 1, len(data) // 2, len(data) - 4, len(data) - 1]
    for n in points:
        saved.write_bytes(data[:n])
        for read in (read_card, load_encoder):
            with pytest.raises(EncoderFileError, match=r"is empty" if n == 0 else r"is damaged"):
                read(saved)
    saved.write_bytes(data + b"more")
    with pytest.raises(EncoderFileError, match="is damaged"):
        load_encoder(saved)


def test_a_flipped_byte_anywhere_is_refused(saved):
    data = bytearray(saved.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    rng = np.random.default_rng(0)
    places = [*range(8), *rng.integers(8, header, 250), *rng.integers(header, len(data), 20)]
    blank = [i for i in places if i >= header - 8 and data[i] == 0x20]  # Padding after the header means nothing
    for place in (int(i) for i in places if i not in blank):
        hurt = bytearray(data)
        hurt[place] ^= 1 << int(rng.integers(0, 7))
        saved.write_bytes(hurt)
        with pytest.raises(EncoderFileError):
            load_encoder(saved)


class Bomb:
    """A pickle that would create a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("kind", ["torch zip", "torch legacy", "pickle"])
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_pickle_is_named_and_never_opened(tmp_path, kind, name):
    file, trace = tmp_path / name, tmp_path / "trace"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb(trace)))
    else:
        torch.save(Bomb(trace), file, _use_new_zipfile_serialization=kind == "torch zip")
    assert zipfile.is_zipfile(file) == (kind == "torch zip")
    for read in (read_card, load_encoder):
        with pytest.raises(EncoderFileError, match=r"is a pickle.*can run code"):
            read(file)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace))).close()  # The bomb is live: opened, it leaves its trace
    assert trace.exists()


def test_missing_files_name_the_nearest(saved):
    assert torch.equal(features(load_encoder(saved.with_suffix(""))), features(load_encoder(saved)))
    with pytest.raises(EncoderFileError, match=r"no saved encoder.*Did you mean 'rotation.safetensors'"):
        load_encoder(saved.with_name("rotatoin.safetensors"))
    with pytest.raises(EncoderFileError, match=r"no saved encoder.*save_encoder"):
        load_encoder(saved.parent / "elsewhere" / "x.safetensors")
    with pytest.raises(EncoderFileError, match=r"is a folder; name a file in it: rotation.safetensors"):
        load_encoder(saved.parent)


def test_foreign_safetensors_say_how_to_wrap_them(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(EncoderFileError, match=r"without our card.*create_encoder\(net\)"):
        load_encoder(tmp_path / "other.safetensors")


def test_newer_formats_are_named(saved):
    rewrite(saved, lambda card: card.update(format=2))
    with pytest.raises(EncoderFileError, match=r"newer selfsup_fastai \(format 2; this one reads 1\)"):
        read_card(saved)


def kwargs(**changes):
    return lambda card: card["kwargs"].update(changes)


HOSTILE = {
    "list": lambda card: [1, 2],
    "no format": lambda card: card.pop("format") and None,
    "format text": lambda card: card.update(format="1"),
    "format true": lambda card: card.update(format=True),
    "in_chans": lambda card: card.update(in_chans=10**9),
    "in_chans text": lambda card: card.update(in_chans="3"),
    "in_chans list": lambda card: card.update(in_chans=[3]),
    "in_chans differs": lambda card: card.update(in_chans=1),
    "arch none": lambda card: card.update(arch=None),
    "arch hub": lambda card: card.update(arch="hf-hub:someone/net"),
    "arch hub 2": lambda card: card.update(arch="hf_hub:someone/net"),
    "arch folder": lambda card: card.update(arch="local-dir:/somewhere"),
    "arch dotted": lambda card: card.update(arch="test_resnet.x:y"),
    "arch other": lambda card: card.update(arch="resnet10t"),
    "arch unknown": lambda card: card.update(arch="resnet9000"),
    "source": lambda card: card.update(source="eval"),
    "source list": lambda card: card.update(source=["timm"]),
    "source other": lambda card: card.update(source="torchvision"),
    "detector": lambda card: card.update(source="torchvision", arch="fasterrcnn_resnet50_fpn", kwargs={}),
    "kwargs list": lambda card: card.update(kwargs=[]),
    "pretrained": kwargs(pretrained=True),
    "pretrained_cfg": kwargs(pretrained_cfg={"file": "/etc/passwd"}),
    "overlay": kwargs(pretrained_cfg_overlay={"url": "http://x"}),
    "checkpoint_path": kwargs(checkpoint_path="/etc/passwd"),
    "cache_dir": kwargs(cache_dir="/"),
    "features_only": kwargs(features_only=True),
    "huge": kwargs(in_chans=10**9),
    "huge in list": kwargs(layers=[10**9, 1, 1, 1]),
    "large": kwargs(channels=[60000, 60000, 60000, 60000]),  # Terabytes, were it built
    "unknown kwarg": kwargs(foo=1),
    "wrong kwarg": kwargs(layers="many"),
    "no mean": lambda card: card.pop("mean"),
    "mean short": lambda card: card.update(mean=[0.5]),
    "mean text": lambda card: card.update(mean="abc"),
    "mean infinite": lambda card: card.update(mean=[float("inf")] * 3),
    "std zero": lambda card: card.update(std=[0, 0, 0]),
    "size": lambda card: card.update(size=-1),
    "size huge": lambda card: card.update(size=10**12),
    "lineage": lambda card: card.update(lineage="rotation"),
    "lineage items": lambda card: card.update(lineage=["rotation"]),
    "input": lambda card: card.update(input=3),
    "other epochs": lambda card: card.update(epochs=999),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_cards_are_refused_in_one_sentence(saved, change, monkeypatch):
    def forbidden(*_, **__):
        raise SystemExit("something was fetched or unpickled")

    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", forbidden)
    monkeypatch.setattr(timm.models._hub, "hf_hub_download", forbidden)
    rewrite(saved, change)
    with pytest.raises(EncoderFileError, match=r"damaged|do not fit|unknown to the installed"):
        load_encoder(saved)


def test_cards_that_are_no_json(saved):
    header, rest = header_of(saved)
    for text in ("{", "[" * 100_000, "9" * 10_000, ""):
        header["__metadata__"]["selfsup_fastai"] = text
        raw = json.dumps(header).encode()
        saved.write_bytes(struct.pack("<Q", len(raw)) + raw + rest)
        with pytest.raises(EncoderFileError, match=r"is damaged"):
            read_card(saved)


def test_missing_and_unexpected_tensors_are_counted(saved):
    tensors = load_file(saved)
    card = json.dumps(read_card(saved))
    tensors.pop("conv1.0.weight")
    save_file({**tensors, "extra": torch.zeros(1), "more": torch.zeros(1)}, saved, {"selfsup_fastai": card})
    with pytest.raises(EncoderFileError, match=r"1 missing, 2 unexpected, 0 of another shape .e\.g\. conv1\.0"):
        load_encoder(saved)


def test_get_encoder_finds_files(saved, monkeypatch):
    want = features(load_encoder(saved))
    monkeypatch.chdir(saved.parent)
    for source in (saved, str(saved), "rotation.safetensors", "rotation", "./rotation"):
        assert torch.equal(features(get_encoder(source, n_in=1)), want)
    (saved.parent / "resnet10t").mkdir()  # A folder of that name does not hide the network
    assert get_encoder("resnet10t").arch == "resnet10t"


def test_get_encoder_names_both_things_a_word_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match=r"architecture called 'rotation'.*no saved encoder 'rotation'"):
        get_encoder("rotation")
    for source in ("runs/rotation", "rotation.safetensors", tmp_path / "rotation"):
        with pytest.raises(EncoderFileError, match=r"no saved encoder"):
            get_encoder(source)


def test_get_encoder_refuses_arguments_for_a_saved_encoder(saved):
    with pytest.raises(SelfsupError, match=r"comes as it is; drop_rate would need a fresh network"):
        get_encoder(saved, drop_rate=0.1)


def test_what_makes_a_new_network_and_what_exists(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    learner = type("Learner", (), {"model": nn.Linear(2, 2), "__call__": lambda self: None})()
    for source in (
        "resnet18",
        "resnet18.a1_in1k",
        timm.models.resnet18,
        torchvision.models.resnet18,
        Own,
        lambda: Own(),
    ):
        assert is_fresh(source) is True, source
    for source in (
        saved,
        str(saved),
        "rotation",
        "rotation.safetensors",
        "resnet18.safetensors",
        "./resnet18",
        "rotatoin",
    ):
        assert is_fresh(source) is False, source
    for source in (tiny(), Own(), learner, None, 7):
        assert is_fresh(source) is False, source


@pytest.mark.parametrize("name", ["resnet10t", "resnet10t.safetensors"])
def test_a_name_that_a_network_and_a_file_have_is_refused(saved, name, monkeypatch):
    monkeypatch.chdir(saved.parent)
    want = features(load_encoder(saved))
    saved.rename(name)
    for ask in (is_fresh, get_encoder):
        with pytest.raises(
            SelfsupError, match=rf"'resnet10t' is a timm network and a file.*'\./{name}'.*models\.resnet10t"
        ):
            ask("resnet10t")
    assert torch.equal(features(get_encoder(f"./{name}")), want)
    assert get_encoder(timm.models.resnet10t).arch == "resnet10t"
