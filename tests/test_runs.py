"""runs/: what a folder of classes becomes, and what a run says of itself. Whole runs: test_cli.py, test_demo.py."""

import json

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from selfsup_fastai.callbacks import precision
from selfsup_fastai.callbacks.log import MetricsFile
from selfsup_fastai.cli import training
from selfsup_fastai.encoders.checkpoint import load_encoder, read_card
from selfsup_fastai.errors import DataError, ResumeError, TaskError, UnknownNameError
from selfsup_fastai.pictures import save_picture
from selfsup_fastai.pretext.learner import PretextLearner
from selfsup_fastai.runs import finetuning, folder, pretraining
from selfsup_fastai.runs.finetuning import _plot_confusion, finetune
from selfsup_fastai.runs.folder import check_out, untested
from selfsup_fastai.runs.pretraining import pretrain
from tests.conftest import write_images


def short(out, folder, **kwargs):
    return pretrain(folder, out, epochs=1, arch="resnet10t", size=16, bs=4, num_workers=0, **kwargs)


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", 12, (16, 16))


def test_a_run_never_writes_over_an_encoder_unasked(images, tmp_path):
    out = tmp_path / "out"
    short(out, images)
    kept = (out / "encoder.safetensors").read_bytes()
    with pytest.raises(DataError, match="holds an encoder of an earlier run"):
        short(out, images, seed=1)
    assert (out / "encoder.safetensors").read_bytes() == kept
    short(out, images, seed=1, overwrite=True)
    assert (out / "encoder.safetensors").read_bytes() != kept
    assert json.loads((out / "settings.json").read_text())["seed"] == 1


def test_settings_say_which_precision_was_taken(images, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "fastest", lambda *_: precision.Way("bf16", True))
    taken = []
    for asked in (None, "bf16", "auto"):
        short(tmp_path / str(asked), images, precision=asked)
        taken.append(json.loads((tmp_path / str(asked) / "settings.json").read_text())["precision"])
    assert taken == ["fp32", "bf16", "bf16 with channels last"]


@pytest.mark.parametrize(("word", "asked"), [("fp32", None), ("auto", "auto"), ("bf16", "bf16")])
def test_commands_hand_the_precision_on(word, asked, tmp_path, monkeypatch):
    given = []
    for module, name in ((pretraining, "pretrain"), (finetuning, "finetune")):
        monkeypatch.setattr(module, name, lambda *_, **kwargs: given.append(kwargs["precision"]))
    training.pretrain(tmp_path, out=tmp_path / "out", precision=training.Precision(word))
    training.finetune(tmp_path, "resnet18", out=tmp_path / "out", precision=training.Precision(word))
    assert given == [asked, asked]


class Dying(MetricsFile):
    """The process ends as the second epoch does."""

    def after_epoch(self):
        super().after_epoch()
        if self.rows == 2:
            raise RuntimeError("killed")


def test_a_killed_run_goes_on_where_it_was_and_nowhere_else(images, tmp_path, monkeypatch, capsys):
    args = dict(arch="resnet10t", size=16, bs=4, num_workers=0, epochs=3)
    pretrain(images, tmp_path / "whole", **args)
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(pretraining, "MetricsFile", Dying)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain(images, out, **args)
    with pytest.raises(DataError, match="holds a run that was stopped"):
        pretrain(images, out, **args)
    for other, said in (({"epochs": 4}, r"epochs \(3 there, 4 here\)"), ({"seed": 1}, "seed"), ({"lr": 1e-4}, "lr")):
        with pytest.raises(ResumeError, match=f"differs from this one in {said}"):
            pretrain(images, out, **{**args, **other}, resume=True)
    assert len((out / "metrics.csv").read_text().splitlines()) == 3  # nothing was touched
    capsys.readouterr()
    pretrain(images, out, **args, resume=True)
    assert "The run goes on in epoch 2 of 3." in capsys.readouterr().err
    first, second = (load_encoder(tmp_path / name / "encoder").state_dict() for name in ("whole", "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (out / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert read_card(out / "encoder.safetensors")["epochs"] == 3
    assert not (out / "resume").exists() and not (tmp_path / "whole" / "resume").exists()


def test_with_nothing_to_go_on_from_a_run_begins(images, tmp_path):
    short(tmp_path / "out", images, resume=True)
    with pytest.raises(DataError, match="holds an encoder of an earlier run, which is finished: nothing is left to"):
        short(tmp_path / "out", images, resume=True)


def test_a_failed_run_saves_no_encoder(images, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PretextLearner, "fit_one_cycle", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        short(tmp_path / "out", images)
    assert not (tmp_path / "out" / "encoder.safetensors").exists()


def test_where_a_run_may_not_write(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        check_out(tmp_path / "file", images)
    with pytest.raises(DataError, match="lies in the folder of images"):
        check_out(images / "runs" / "rotation", images)
    check_out(tmp_path / "images2", images)  # beside it is fine


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": float("nan")}, {"lr": -1}])
def test_numbers_are_checked_before_anything_is_made(images, tmp_path, wrong):
    with pytest.raises(TaskError, match=next(iter(wrong))):
        pretrain(images, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_finetune_from_scratch_trains_all_layers_and_says_so(tmp_path, capsys):
    for label, seed in (("a", 1), ("b", 2)):
        write_images(tmp_path / "labeled" / label, 8, (16, 16), channels=1, seed=seed)
    out = tmp_path / "out"
    args = dict(epochs=2, size=32, bs=4, num_workers=0)
    learn = finetune(tmp_path / "labeled", out, "resnet10t", **args)
    assert "all layers train from the start" in capsys.readouterr().err
    assert learn.model.encoder.in_chans == 1  # grey files
    settings = json.loads((out / "settings.json").read_text())
    assert settings["from_scratch"] and settings["classes"] == 2 and settings["arch"] == "resnet10t"
    assert len(pd.read_csv(out / "metrics.csv")) == 3
    assert b"0000.png" not in (out / "model.safetensors").read_bytes()  # no file name leaves with the model


def test_finetune_learns_from_unlabeled_images_too_and_lists_what_it_could_not_read(tmp_path, capsys):
    for label, seed in (("a", 1), ("b", 2)):
        write_images(tmp_path / "labeled" / label, 6, (16, 16), seed=seed)
    write_images(tmp_path / "more", 8, (16, 16), seed=3)
    (tmp_path / "labeled" / "a" / "notes.txt").write_text("")
    (tmp_path / "more" / "zero.png").write_text("")
    out, args = tmp_path / "out", dict(epochs=2, size=16, bs=4, num_workers=0, schedule="lp_ft")
    encoder = short(tmp_path / "pre", tmp_path / "more").save_encoder(tmp_path / "encoder")
    finetune(tmp_path / "labeled", out, encoder, consistency=tmp_path / "more", consistency_kind="pi", **args)
    assert "consistency" in pd.read_csv(out / "metrics.csv").columns
    assert f"({out / 'left_out.csv'} lists them)" in capsys.readouterr().err
    left_out = pd.read_csv(out / "left_out.csv")
    assert list(left_out["place"]) == [6, 13 + 8] and list(left_out["code"]) == ["empty", "empty"]
    settings = json.loads((out / "settings.json").read_text())
    assert settings["schedule"] == "lp_ft" and settings["consistency"] == "pi"
    with pytest.raises(UnknownNameError, match="Did you mean 'gradual'"):
        finetune(tmp_path / "labeled", tmp_path / "other", encoder, schedule="gradul")


def test_a_run_of_several_tasks_pictures_all_of_them(images, tmp_path, monkeypatch):
    figures = {}

    def keep(file):
        figures[file.name] = plt.gcf()
        save_picture(file)

    for module in (pretraining, folder):
        monkeypatch.setattr(module, "save_picture", keep)
    short(tmp_path / "out", images, task=["rotation", "autoencoder"])
    for name in ("batch.png", "results.png"):
        assert [block.get_suptitle() for block in figures[name].subfigs] == ["rotation", "autoencoder"]
    labels = [ax.get_ylabel() for ax in figures["history.png"].axes]
    assert labels == ["loss", "rotation accuracy", "autoencoder explained variance"]


def test_figures_say_nothing_of_classes_without_a_test_image():
    table = pd.DataFrame({"label": list("aabbc"), "is_valid": [False, True, False, True, False]})
    assert untested(table) == " 1 of 3 classes has no image to test on: all this says nothing of it."
    assert untested(table.iloc[:4]) == ""


def test_confusion_has_a_number_in_every_cell():
    _plot_confusion(pd.DataFrame([[3, 0], [1, 2]], index=["a", "b"], columns=["a", "b"]))
    assert [text.get_text() for text in plt.gca().texts] == ["3", "0", "1", "2"]
