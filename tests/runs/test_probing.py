"""`selfsup probe`: what is written, what is said, and what it stands beside."""

import json

import numpy as np
import pandas as pd
import pytest

from selfsup_fastai.errors import DataError, UnknownNameError
from selfsup_fastai.runs.probing import Probes, caution, probe_folder, summary, untrained
from tests.runs.small import an_encoder, classes, saved_encoder

QUICK = dict(num_workers=0, cache=False, valid_pct=0.5)


def test_dark_and_bright_are_told_apart(tmp_path):
    net = saved_encoder(tmp_path / "e.safetensors")
    folder = classes(tmp_path / "secret")
    found = probe_folder(folder, tmp_path / "out", tmp_path / "e.safetensors", net.layer_names[-1], **QUICK)
    assert list(found.layers["start"]) == ["rotation", "untrained"]
    assert (found.layers["score"] == 1).all() and (found.layers["n_test"] == 8).all()
    assert list(summary(found).columns) == ["rotation", "untrained"]
    assert "guessing: 0.500. With 8 test images the best, 1.000, may stand for anything from 0.68" in caution(found)
    written = pd.read_csv(tmp_path / "out" / "layers.csv")
    assert written["score"].tolist() == found.layers["score"].tolist()
    texts = [f.read_text() for f in (tmp_path / "out").iterdir() if f.suffix != ".png"]
    assert not any("secret" in text for text in texts)
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["encoder"]["rounds"] == ["rotation"]
    with pytest.raises(UnknownNameError, match="layer of resnet10t"):
        probe_folder(folder, tmp_path / "o", tmp_path / "e.safetensors", "nowhere", **QUICK)
    with pytest.raises(DataError, match="lies in the folder of images"):
        probe_folder(folder, folder / "o", tmp_path / "e.safetensors", **QUICK)


def test_an_untrained_net_is_of_the_same_kind_with_weights_of_its_own():
    net = an_encoder(channels=1)
    new, again = untrained(net, 3), untrained(net, 3)
    assert (new.arch, new.in_chans, new.input, new.mean, new.std) == (net.arch, 1, net.input, net.mean, net.std)
    pairs = list(zip(net.state_dict().values(), new.state_dict().values(), again.state_dict().values()))
    assert any(not np.allclose(a, b) for a, b, _ in pairs) and all(np.array_equal(b, c) for _, b, c in pairs)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ([0.9, 0.9], []),
        ([0.7, 0.9], ["a linear classifier (0.800, the"]),
        ([0.8, 0.2], ["a linear classifier (0.800", "nearest images (0.800, the encoder 0.200"]),
    ],
)
def test_no_better_than_untrained_is_said(own, said):
    tables = [pd.DataFrame({"start": ["x", "untrained"], "score": [score, 0.8], "n_test": 10}) for score in own]
    tables[0].attrs |= {"chance": 0.5, "untested": ""}
    text = caution(Probes(*tables))
    assert ("The untrained net is at least as good" in text) == bool(said)
    assert all(part in text for part in said) and text.count("the encoder 0.") == len(said)
