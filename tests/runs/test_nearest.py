"""selfsup neighbors: which rows are nearest, by hand; which may be; the table says what the picture shows."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from selfsup_fastai.errors import DataError
from selfsup_fastai.runs import nearest
from selfsup_fastai.runs.nearest import nearest_to, neighbors_of_folder
from tests.runs.small import classes, saved_encoder

SMALL = {"num_workers": 0, "cache": "ram", "bs": 4}


def test_nearest_by_hand():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.1], [0.0, 2.0], [1.0, 1.0], [-1.0, 0.0]])
    found = nearest_to(x, [0, 2], torch.ones(5, dtype=bool), 2)
    assert found.rows.tolist() == [[1, 3], [3, 1]]
    assert np.allclose(found.cosines[0], [3 / np.hypot(3, 0.1), 0.5**0.5])
    only = nearest_to(x, [0], torch.tensor([True, False, False, True, True]), 9)  # fewer than asked for, never itself
    assert only.rows.tolist() == [[3, 4]]


def test_queries_from_in_and_outside_of_the_folder(tmp_path, monkeypatch):
    folder = classes(tmp_path / "images", 4)
    saved_encoder(tmp_path / "encoder.safetensors")
    Image.new("RGB", (32, 32), (36, 30, 24)).save(tmp_path / "mine.png")
    drawn = []
    real = nearest.draw
    monkeypatch.setattr(
        nearest, "draw", lambda ax, image, title: drawn.append((title, image)) or real(ax, image, title)
    )
    args = folder, tmp_path / "out" / "n.png", tmp_path / "encoder.safetensors"
    out = neighbors_of_folder(*args, queries=[folder / "bright" / "3.png", tmp_path / "mine.png"], k=3, **SMALL)
    assert out.read_bytes()[:4] == b"\x89PNG" and plt.get_fignums() == []
    table = pd.read_csv(out.with_suffix(".csv"))
    assert list(table["query_place"]) == [3] * 3 + [8] * 3 and list(table["rank"]) == [1, 2, 3] * 2
    assert all(name.startswith("images/bright/") or "/bright/" in name for name in table["file"][:3])
    assert all("/dark/" in name for name in table["file"][3:]) and (table["cosine"].diff()[[1, 2, 4, 5]] <= 0).all()
    assert [title for title, _ in drawn][:2] == ["query: 3", f"{table['place'][0]}: {table['cosine'][0]:.2f}"]
    assert drawn[0][1].mean() > 0.8 and drawn[4][1].mean() < 0.2  # the very images
    with pytest.raises(DataError, match=r"There is no image 'gone\.png'"):
        neighbors_of_folder(*args, queries=["gone.png"], **SMALL)


def test_without_queries_some_of_the_folder_are_asked_about(tmp_path):
    folder = classes(tmp_path / "images", 4)
    saved_encoder(tmp_path / "encoder.safetensors")
    out = neighbors_of_folder(folder, tmp_path / "n.png", tmp_path / "encoder.safetensors", k=2, **SMALL)
    table = pd.read_csv(out.with_suffix(".csv"))
    assert sorted(set(table["query_place"])) == [0, 1, 2, 4, 5, 7] and len(table) == 12
    assert table["query_file"][0] == "bright/0.png" and (table["file"] != table["query_file"]).all()
