"""The demo, whole but short; and its data."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from selfsup_fastai.demo import lesson, run_demo, write_digits


def test_digits_are_written_as_they_are(tmp_path):
    train, test = write_digits(tmp_path)
    assert (len(train), len(test)) == (1297, 500)
    assert not set(train["file"]) & set(test["file"])
    digits = load_digits()
    for row in (*train.iloc[::200].itertuples(), *test.iloc[::100].itertuples()):
        number = int(row.file.stem)
        assert row.label == str(digits.target[number])
        assert np.abs(np.asarray(Image.open(row.file), dtype=float) * 16 / 255 - digits.images[number]).max() < 0.04
        assert ("test" in row.file.parts) == (number >= 1297)


def test_the_lesson_follows_the_table():
    table = pd.DataFrame(
        {
            "verdict": ["", "not distinguishable", "better"],
            "gain": [None, -0.01, 0.1],
            "gain_low": [None, -0.06, 0.06],
            "gain_high": [None, 0.04, 0.14],
        },
        index=["scratch", "rotation", "simclr"],
    )
    said = lesson(table).strip().splitlines()[0]
    assert said.startswith("rotation: not distinguishable from scratch (-1.0%, -6.0% to +4.0%); ")
    assert said.endswith("; simclr: clearly better than scratch (+10.0%, +6.0% to +14.0%).")


@pytest.mark.slow
def test_demo_leaves_tables_pictures_and_encoders(tmp_path):
    table, layers = run_demo(tmp_path, draws=2, pretrain_epochs=1, epochs=3)
    assert list(table.index) == ["scratch", "rotation", "simclr"]
    assert table["score"].between(0.05, 1).all()
    assert list(layers.columns) == ["act1", "layer1", "layer2", "layer3", "layer4", "effective rank"]
    assert layers.drop(columns="effective rank").stack().between(0.3, 1).all()  # chance is 0.1
    assert layers["effective rank"].between(1, 512).all()
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert len(runs) == 6
    assert table.loc["simclr", "gain"] == pytest.approx(
        runs[runs.start == "simclr"]["score"].mean() - runs[runs.start == "scratch"]["score"].mean(), abs=1e-6
    )
    for task in ("rotation", "simclr"):
        for name in ("batch.png", "history.png", "neighbors.png", "encoder.safetensors"):
            assert (tmp_path / task / name).stat().st_size > 1000
