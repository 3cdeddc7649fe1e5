"""selfsup embed: what is in the file is what `embed` gives, in the order of the files, and no pickle is in it."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from selfsup_fastai.data.opening import open_image
from selfsup_fastai.encoders.checkpoint import read_card
from selfsup_fastai.errors import DataError, EncoderFileError, UnknownNameError
from selfsup_fastai.runs.embedding import embed_folder
from tests.dicoms import slices
from tests.runs.small import photos, saved_encoder

SMALL = {"num_workers": 0, "cache": False, "bs": 3}


def by_hand(encoder, file, side: int = 24) -> torch.Tensor:
    """The middle square of an image, resized by Pillow itself, through the network."""
    image = open_image(file, n_in=encoder.image_channels)
    square = min(image.size)
    left, top = (image.width - square) // 2, (image.height - square) // 2
    image = image.crop((left, top, left + square, top + square)).resize((side, side), 2, reducing_gap=None)
    x = torch.from_numpy(np.asarray(image, np.float32)).view(side, side, -1).permute(2, 0, 1) / 255
    with torch.no_grad():
        return encoder(encoder.prepare(x[None]))[0]


def test_features_are_the_encoders_of_each_file_in_order(tmp_path):
    folder, encoder = photos(tmp_path / "photos"), saved_encoder(tmp_path / "encoder.safetensors")
    out = embed_folder(folder, tmp_path / "out" / "emb.npz", tmp_path / "encoder.safetensors", **SMALL)
    with np.load(out, allow_pickle=False) as found:
        assert set(found) == {"embeddings", "place", "file", "about"}
        assert list(found["file"]) == [f"{i:04d}.png" for i in range(3)] + [f"b/{i:04d}.png" for i in range(4)]
        assert list(found["place"]) == [0, 1, 2, 3, 4, 5, 6]  # broken.png and notes.txt come last
        assert found["embeddings"].dtype == np.float32 and found["embeddings"].shape == (7, 512)
        for name, row in zip(found["file"], found["embeddings"]):
            expected = by_hand(encoder, folder / str(name))
            near = torch.nn.functional.cosine_similarity(torch.from_numpy(row), expected, dim=0)
            assert near > 0.999  # our resizing rounds otherwise than Pillow's
        about = json.loads(str(found["about"]))
    assert about["encoder"]["digest"] == read_card(tmp_path / "encoder.safetensors")["digest"]
    assert (about["size"], about["layer"], about["images"], about["left_out"]) == (24, "output", 7, 2)


def test_with_kept_pixels_and_without_the_same_comes_out(tmp_path):
    folder = photos(tmp_path / "photos")
    saved_encoder(tmp_path / "encoder.safetensors")
    made = []
    for i, cache in enumerate((True, "ram", False)):
        settings = {**SMALL, "cache": cache, "bs": i + 2}
        out = embed_folder(folder, tmp_path / f"{i}.npz", tmp_path / "encoder.safetensors", **settings)
        made.append(np.load(out)["embeddings"])
    assert np.allclose(made[0], made[1], atol=1e-5) and np.allclose(made[0], made[2], atol=1e-5)


def test_parquet_equals_npz(tmp_path):
    pytest.importorskip("pyarrow")
    folder = photos(tmp_path / "photos")
    saved_encoder(tmp_path / "encoder.safetensors")
    file = tmp_path / "encoder.safetensors"
    one = np.load(embed_folder(folder, tmp_path / "emb.npz", file, layer="layer2", **SMALL))
    two = pd.read_parquet(embed_folder(folder, tmp_path / "emb.parquet", file, layer="layer2", **SMALL))
    assert np.array_equal(np.stack(two["embeddings"]), one["embeddings"]) and one["embeddings"].shape[1] == 128
    assert list(two["file"]) == list(one["file"]) and list(two["place"]) == list(one["place"])
    from pyarrow import parquet

    metadata = parquet.read_schema(tmp_path / "emb.parquet").metadata
    assert json.loads(metadata[b"selfsup_fastai"]) == json.loads(str(one["about"]))


def test_without_pyarrow_the_sentence_comes_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        embed_folder(tmp_path, tmp_path.parent / "emb.parquet", tmp_path / "no encoder is looked at")


def test_what_is_left_out_is_listed_and_the_list_goes_with_its_cause(tmp_path, capsys):
    folder = photos(tmp_path / "photos")
    saved_encoder(tmp_path / "encoder.safetensors")
    args = folder, tmp_path / "emb.npz", tmp_path / "encoder.safetensors"
    embed_folder(*args, **SMALL)
    said = capsys.readouterr().err
    assert "2 of 9 files left out" in said and f"({tmp_path / 'emb.left_out.csv'} lists them)" in said
    listed = pd.read_csv(tmp_path / "emb.left_out.csv")
    assert list(listed["file"]) == ["broken.png", "notes.txt"] and list(listed["place"]) == [7, 8]
    assert list(listed["code"]) == ["truncated", "not_an_image"]
    (folder / "broken.png").unlink()
    (folder / "notes.txt").unlink()
    embed_folder(*args, **SMALL)
    assert not (tmp_path / "emb.left_out.csv").exists()


def test_scans_are_numbered_and_named_only_if_asked(tmp_path):
    slices(tmp_path / "scans" / "Doe^Jane", 3, "P1")
    saved_encoder(tmp_path / "encoder.safetensors", channels=1)
    args = tmp_path / "scans", tmp_path / "emb.npz", tmp_path / "encoder.safetensors"
    found = np.load(embed_folder(*args, **SMALL))
    assert list(found["place"]) == [0, 1, 2] and "file" not in found
    assert len(set(found["patient"])) == 1 and len(set(found["instance"])) == 3
    assert b"Doe" not in (tmp_path / "emb.npz").read_bytes()
    named = np.load(embed_folder(*args, paths=True, **SMALL))
    assert all("Doe^Jane" in name for name in named["file"])
    assert np.array_equal(named["embeddings"], found["embeddings"])


def test_photographs_beside_scans(tmp_path):
    slices(tmp_path / "both", 2, "P1")
    photos(tmp_path / "both" / "photos", 4)
    saved_encoder(tmp_path / "encoder.safetensors")
    found = np.load(embed_folder(tmp_path / "both", tmp_path / "e.npz", tmp_path / "encoder.safetensors", **SMALL))
    assert len(found["embeddings"]) == 6 and "file" not in found  # a folder's name may be a patient's
    assert found["frame"].dtype.kind == "i" and sorted(found["patient"] == "") == [False] * 2 + [True] * 4


@pytest.mark.parametrize(
    ("out", "said"), [("emb.csv", "ends in .npz or .parquet"), ("photos/emb.npz", "in the folder of images")]
)
def test_where_the_file_cannot_go(tmp_path, out, said):
    folder = photos(tmp_path / "photos")
    with pytest.raises(DataError, match=said):
        embed_folder(folder, tmp_path / out, tmp_path / "encoder.safetensors", **SMALL)


def test_unknown_layers_and_files(tmp_path):
    folder = photos(tmp_path / "photos")
    saved_encoder(tmp_path / "encoder.safetensors")
    with pytest.raises(UnknownNameError, match="Did you mean 'layer3'"):
        embed_folder(folder, tmp_path / "e.npz", tmp_path / "encoder.safetensors", layer="layr3", **SMALL)
    with pytest.raises(EncoderFileError, match=r"Did you mean 'encoder\.safetensors'"):
        embed_folder(folder, tmp_path / "e.npz", tmp_path / "encodr.safetensors", **SMALL)
    with pytest.raises(DataError, match=r"None of the 1 files can be read as an image; e\.left_out\.csv"):
        (tmp_path / "none").mkdir()
        (tmp_path / "none" / "notes.txt").write_text("")
        embed_folder(tmp_path / "none", tmp_path / "e.npz", tmp_path / "encoder.safetensors", **SMALL)
    assert not (tmp_path / "e.npz").exists()
