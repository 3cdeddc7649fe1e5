"""Where pretraining cannot help, nobody is told that it does; where it must, it is found."""

import numpy as np
import pytest
from PIL import Image

from selfsup_fastai.compare.curves import label_curve
from selfsup_fastai.compare.pretraining import entrants, pretrained
from selfsup_fastai.compare.sentence import whole_verdict
from selfsup_fastai.compare.starts import Start
from selfsup_fastai.compare.summary import summarize
from selfsup_fastai.compare.trial import Budget, fine_tuned
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.checkpoint import save_encoder
from tests.compare.labeled_images import stripes

SEEDS = 3


def by_rotation(folder, out) -> list:
    """An encoder for each seed."""
    dls = UnlabeledDataLoaders.from_folder(folder, size=32, bs=16, valid_pct=0.1)
    (entrant,) = entrants(["rotation"])
    files = [out / f"{seed}.safetensors" for seed in range(SEEDS)]
    for seed, file in enumerate(files):
        pretrained(dls, entrant, "resnet10t", 1500, seed, file)
    return files


@pytest.mark.slow
def test_random_labels_are_not_learned_by_pretraining(tmp_path):
    labeled = stripes(tmp_path / "labeled", 60, 80, labels="random")
    stripes(tmp_path / "unlabeled", 80, 4, seed=3)
    files = by_rotation(tmp_path / "unlabeled", tmp_path)
    for method in ("fine_tune", "linear"):
        table = summarize(label_curve({"rotation": files}, labeled, [5, 1.0], SEEDS, method, steps=40))
        assert set(table["verdict"]) == {"", "not distinguishable"}, table
        assert whole_verdict(table).startswith("On your data, rotation is not distinguishable from")
        assert (table["low"] < 0.5).all() and (table["high"] > 0.5).all()


@pytest.mark.slow
def test_pretraining_on_noise_does_not_help(tmp_path):
    labeled = stripes(tmp_path / "labeled", 60, 80)
    rng = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for i in range(80):
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / "noise" / f"{i}.png")
    files = by_rotation(tmp_path / "noise", tmp_path)
    table = summarize(label_curve({"rotation": files}, labeled, [5], SEEDS, steps=40))
    assert "better" not in set(table["verdict"]), table
    assert "helped" not in whole_verdict(table)


@pytest.mark.slow
def test_a_start_that_knows_the_answer_is_found(tmp_path):
    """Planted: encoders that were trained on 200 labels of other images of the same two kinds."""
    taught, labeled = stripes(tmp_path / "taught", 200, 4, seed=3, bs=16), stripes(tmp_path / "labeled", 40, 80)
    files = []
    for seed in range(SEEDS):
        learn = fine_tuned(taught, Start("scratch", ("resnet10t",), fresh=True), seed, Budget(16, 4, 1))
        files.append(save_encoder(learn.model.encoder, tmp_path / f"{seed}"))
    table = summarize(label_curve({"taught": files}, labeled, [2], SEEDS, steps=20))
    assert table["verdict"].tolist() == ["", "better"], table
    assert whole_verdict(table).startswith(
        "On your data pretraining helped: taught, with 4 labeled images (2 a class) "
    )
