"""selfsup predict: the table says what the learner says; what cannot be read is counted, and costs nothing else."""

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.metrics import accuracy
from fastai.vision.augment import Resize, ResizeMethod
from fastai.vision.data import ImageDataLoaders

from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.errors import DataError, EncoderFileError
from selfsup_fastai.runs.finetuning import finetune
from selfsup_fastai.runs.predicting import predict_images
from tests.dicoms import slices
from tests.runs.small import an_encoder, classes

SMALL = {"num_workers": 0, "cache": "ram", "bs": 3}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run folder of `finetune`, its learner and the folder of classes."""
    home = tmp_path_factory.mktemp("tuned")
    labeled = classes(home / "labeled")
    learn = finetune(labeled, home / "run", "resnet10t", epochs=2, size=24, bs=4, num_workers=0, cache=False)
    return home / "run", learn, labeled


def test_the_table_says_what_the_learner_says(tuned, tmp_path):
    run, learn, labeled = tuned
    done = predict_images([labeled], tmp_path / "p.csv", run / "model.safetensors", **SMALL)
    table = pd.read_csv(done.out)
    assert list(table.columns) == ["place", "file", "predicted", "p_bright", "p_dark"] and len(table) == 16
    assert (done.n, done.n_unreadable) == (16, 0) and not done.listed.exists()
    validated = pd.read_csv(run / "predictions.csv")
    rows = table.set_index("file").loc[[f"{f.split('labeled/')[1]}" for f in validated["file"]]]
    assert list(rows["predicted"]) == list(validated["predicted"])
    assert np.allclose(rows[["p_bright", "p_dark"]].max(axis=1), validated["probability"], atol=1e-5)
    probabilities = learn.get_preds()[0].numpy()
    assert np.allclose(rows[["p_bright", "p_dark"]], probabilities, atol=1e-5)


def test_files_and_folders_what_cannot_be_read_and_what_nobody_meant(tuned, tmp_path):
    run, _, labeled = tuned
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.png").write_bytes((labeled / "dark" / "0.png").read_bytes()[:40])
    (tmp_path / "in" / ".DS_Store").write_text("of the system")
    inputs = [labeled / "dark" / "1.png", tmp_path / "in", labeled / "bright" / "2.png"]
    done = predict_images(inputs, tmp_path / "p.csv", run / "model.safetensors", **SMALL)
    table, listed = pd.read_csv(done.out), pd.read_csv(done.listed)
    assert list(table["file"]) == [str(inputs[0]), str(inputs[2])] and list(table["place"]) == [0, 3]
    assert done.n_unreadable == 1 and list(listed["code"]) == ["not_an_image", "unreadable"]
    none = predict_images([tmp_path / "in"], tmp_path / "n.csv", run / "model.safetensors", **SMALL)
    assert (none.n, none.n_unreadable) == (0, 1)
    assert list(pd.read_csv(none.out).columns) == list(table.columns)  # no rows, the same columns


def test_scans_are_not_named_unless_asked(tuned, tmp_path):
    slices(tmp_path / "scans" / "Doe^Jane", 2, "P1")
    args = [tmp_path / "scans"], tmp_path / "p.csv", tuned[0] / "model.safetensors"
    table = pd.read_csv(predict_images(*args, **SMALL).out)
    assert list(table["place"]) == [0, 1] and {"patient", "instance", "frame"} < set(table) and "file" not in table
    assert "Doe" not in (tmp_path / "p.csv").read_text()
    named = pd.read_csv(predict_images(*args, paths=True, **SMALL).out)
    assert all("Doe^Jane" in file for file in named["file"])
    assert np.allclose(named["p_dark"], table["p_dark"])


@pytest.mark.parametrize("method", [ResizeMethod.Squish, ResizeMethod.Crop])
def test_images_are_resized_as_they_were_in_training(tmp_path, method):
    """A model of fastai's own loaders: ours are cut from the middle, fastai may squeeze."""
    from tests.conftest import write_images

    for label in "ab":
        write_images(tmp_path / "l" / label, 5, (24, 60), seed=ord(label))
    dls = ImageDataLoaders.from_folder(tmp_path / "l", valid_pct=0.5, item_tfms=Resize(24, method), bs=2, num_workers=0)
    learn = downstream_learner(dls, an_encoder(), metrics=accuracy)
    with torch.no_grad():
        learn.model.head[-1].weight.mul_(20)  # answers that differ
    file = learn.save_model(tmp_path / "model")
    table = pd.read_csv(predict_images([tmp_path / "l"], tmp_path / "p.csv", file, **SMALL).out)
    with learn.no_bar():
        expected = learn.get_preds(dl=learn.dls.test_dl([tmp_path / "l" / f for f in table["file"]]))[0]
    assert np.allclose(table[["p_a", "p_b"]], expected.numpy(), atol=1e-4)
    assert expected.std() > 0.05


def test_several_labels_and_numbers(tmp_path):
    from tests.conftest import write_images

    folder = write_images(tmp_path / "images", 6, (24, 24))
    names = [f"{i:04d}.png" for i in range(6)]
    several = pd.DataFrame({"name": names, "label": ["x y", "x", "y", "z", "x z", "y z"]})
    numbers = pd.DataFrame({"name": names, "label": [0.1, 0.5, 0.9, 0.3, 0.2, 0.7]})
    settings = dict(path=folder, valid_pct=0.4, bs=2, num_workers=0, item_tfms=Resize(24))
    learn = downstream_learner(ImageDataLoaders.from_df(several, label_delim=" ", **settings), an_encoder())
    args = [folder], tmp_path / "p.csv"
    table = pd.read_csv(predict_images(*args, learn.save_model(tmp_path / "m"), **SMALL).out, keep_default_na=False)
    probabilities = table[["p_x", "p_y", "p_z"]].to_numpy()
    said = [";".join(n for n, p in zip("xyz", row) if p > 0.5) for row in probabilities]
    assert list(table["predicted"]) == said and not np.allclose(probabilities.sum(axis=1), 1)
    from fastai.data.block import RegressionBlock

    learn = downstream_learner(ImageDataLoaders.from_df(numbers, y_block=RegressionBlock(), **settings), an_encoder())
    table = pd.read_csv(predict_images(*args, learn.save_model(tmp_path / "m"), **SMALL).out)
    assert list(table.columns) == ["place", "file", "value"]


def test_a_damaged_model_and_no_inputs_leave_nothing(tuned, tmp_path):
    run, _, labeled = tuned
    bad = tmp_path / "bad.safetensors"
    whole = (run / "model.safetensors").read_bytes()
    bad.write_bytes(whole[:-100] + bytes(100))
    with pytest.raises(EncoderFileError, match="damaged"):
        predict_images([labeled], tmp_path / "p.csv", bad, **SMALL)
    with pytest.raises(EncoderFileError, match="holds an encoder without a head"):
        predict_images([labeled], tmp_path / "p.csv", run / "encoder.safetensors", **SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="There is no file in the folder"):
        predict_images([tmp_path / "empty"], tmp_path / "p.csv", run / "model.safetensors", **SMALL)
    with pytest.raises(DataError, match="There is no folder or file 'nothing'"):
        predict_images(["nothing"], tmp_path / "p.csv", run / "model.safetensors", **SMALL)
    assert not (tmp_path / "p.csv").exists()
