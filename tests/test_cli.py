"""The command `selfsup`, run as a user runs it: in a process of its own."""

import json
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from selfsup_fastai.cli import app
from selfsup_fastai.cli.options import Consistency, Schedule, parsed_amounts, parsed_settings
from selfsup_fastai.encoders.checkpoint import read_card
from selfsup_fastai.errors import DataError
from selfsup_fastai.runs import comparing
from tests.conftest import write_images

QUICK = ["--epochs", "2", "--size", "32", "--bs", "8", "--arch", "resnet10t", "--workers", "0"]


def selfsup(*args, cwd, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "selfsup_fastai.cli", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, **kwargs)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images without labels, one broken file and one that is no image."""
    folder = write_images(tmp_path_factory.mktemp("images"), 24, (32, 32))
    (folder / "broken.png").write_bytes((folder / "0000.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def pretrained(images, tmp_path_factory):
    """A finished `selfsup pretrain` and its run folder."""
    out = tmp_path_factory.mktemp("out") / "run"
    return selfsup("pretrain", images, "--out", out, *QUICK, cwd=images), out


def test_help_is_quick_to_load(tmp_path):
    code = "import sys, selfsup_fastai.cli; print(sorted({'torch', 'fastai', 'numpy', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
    done = selfsup("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("tasks", "pretrain", "finetune", "demo"))


def test_pretrain_leaves_a_whole_run_folder(pretrained):
    done, out = pretrained
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out / "encoder.safetensors")  # the result, alone, for a pipe
    names = {file.name for file in out.iterdir()}
    pictures = {"batch.png", "history.png", "results.png", "neighbors.png"}
    assert names == {"settings.json", "metrics.csv", "left_out.csv", "encoder.safetensors", *pictures}
    metrics = pd.read_csv(out / "metrics.csv")
    assert list(metrics.columns) == ["epoch", "train_loss", "valid_loss", "accuracy"]
    assert list(metrics["epoch"]) == [0, 1]
    assert sorted(pd.read_csv(out / "left_out.csv")["code"]) == ["not_an_image", "truncated"]
    assert json.loads((out / "settings.json").read_text())["epochs"] == 2


def test_pretrain_says_what_it_did_on_stderr(pretrained):
    done, _ = pretrained
    assert "2 of 26 files left out" in done.stderr
    assert "24 images" in done.stderr
    assert "\r" not in done.stderr  # no progress bar in a pipe
    rows = [line.split() for line in done.stderr.splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert [len(row) for row in rows] == [5, 5]  # epoch, two losses, accuracy, time


def test_the_encoder_knows_its_cost(pretrained):
    card = read_card(pretrained[1] / "encoder.safetensors")
    assert (card["task"], card["epochs"], card["in_chans"], card["size"]) == ("rotation", 2, 3, 32)
    assert card["images"] == 2 * 21 * 4  # 22 to train, in whole batches of 7; four turns each


def test_same_seed_same_encoder(pretrained, images, tmp_path):
    done = selfsup("pretrain", images, "--out", tmp_path / "again", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = (pretrained[1] / "encoder.safetensors").read_bytes()
    assert (tmp_path / "again" / "encoder.safetensors").read_bytes() == first


def test_finetune(pretrained, tmp_path):
    for label, seed in (("cats", 1), ("dogs", 2)):
        write_images(tmp_path / "labeled" / label, 10, (32, 32), seed=seed)
    encoder = pretrained[1] / "encoder.safetensors"
    args = ["--encoder", encoder, "--epochs", 3, "--bs", 4, "--out", tmp_path / "tuned", "--workers", 0]
    done = selfsup("finetune", tmp_path / "labeled", *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "tuned")
    assert "head" in done.stderr  # the plan
    assert "of 4 validation images right" in done.stderr
    predictions = pd.read_csv(tmp_path / "tuned" / "predictions.csv")
    assert len(predictions) == 4 and set(predictions["label"]) == {"cats", "dogs"}
    assert predictions["probability"].between(0.5, 1).all()
    assert len(pd.read_csv(tmp_path / "tuned" / "metrics.csv")) == 4  # three epochs and the head's own
    rounds = [entry["task"] for entry in read_card(tmp_path / "tuned" / "encoder.safetensors")["lineage"]]
    assert rounds == ["rotation", "fine_tune"]
    model = tmp_path / "tuned" / "model.safetensors"
    done = selfsup("predict", tmp_path / "labeled", "--model", model, "--workers", 0, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "predictions.csv"), done.stderr
    (tmp_path / "labeled" / "zero.png").write_text("")
    done = selfsup("predict", "labeled", "--model", model, "--workers", 0, cwd=tmp_path)
    assert done.returncode == 3 and done.stdout.strip() == "predictions.csv"
    last = done.stderr.strip().splitlines()[-1]
    assert last == "selfsup: 1 file could not be read; predictions.left_out.csv says which and why."
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 20


@pytest.mark.parametrize(
    ("args", "said", "code"),
    [
        (["pretrain", "missing"], "missing", 1),
        (["pretrain", ".", "--task", "rotaton"], "Did you mean 'rotation'", 1),
        (["pretrain", ".", "--task", "jigsaw+rotaton"], "Did you mean 'rotation'", 1),
        (["pretrain", ".", "--size", "0"], "--size", 2),
        (["pretrain", ".", "--set", "turns"], "NAME=VALUE", 2),
        (
            ["finetune", "empty", "--encoder", "nothing.safetensors"],
            "saved encoder 'nothing.safetensors'. Check the spelling; `selfsup pretrain`",
            1,
        ),
        (["finetune", "empty", "--encoder", "resnet18"], "found 0 such folders", 1),
        (["finetune", ".", "--encoder", "resnet18", "--valid-pct", "20"], "--valid-pct", 2),
        (["finetune", "."], "--encoder", 2),
        (["prtrain"], "prtrain", 2),
        (["finetune", ".", "--encoder", "resnet18", "--schedule", "gradul"], "gradual", 2),
        (["predict", "empty", "--model", "nothing.safetensors"], "no saved model 'nothing.safetensors'", 1),
        (["embed", "empty", "--encoder", "e", "--out", "e.csv"], "ends in .npz or .parquet", 1),
        (["export", "e", "--to", "onx", "--out", "e.onnx"], "onnx", 2),
        (["export", "e.safetensors", "--to", "onnx", "--out", "e.onnx"], "no saved encoder 'e.safetensors'", 1),
        (["compare", "empty", "--tasks", "rotaton"], "Did you mean 'rotation'", 1),
        (["compare", "empty", "--labels", "many"], "--labels takes numbers", 2),
    ],
)
def test_errors_are_one_line_without_a_traceback(args, said, code, tmp_path):
    (tmp_path / "empty").mkdir()
    done = selfsup(*args, cwd=tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if code == 1:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_debug_shows_where(tmp_path):
    done = selfsup("--debug", "pretrain", "missing", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_an_encoder_is_not_overwritten_unasked(pretrained, images):
    done = selfsup("pretrain", images, "--out", pretrained[1], *QUICK, cwd=images)
    assert done.returncode == 1 and "holds an encoder of an earlier run" in done.stderr
    assert "--overwrite" in done.stderr


def test_wrong_setting_of_a_task(images, tmp_path):
    done = selfsup("pretrain", images, "--set", "trns=one", *QUICK, cwd=tmp_path)
    assert done.returncode == 1
    assert "rotation has no setting 'trns'; it has turns" in done.stderr


def test_settings_of_one_task_and_of_several():
    assert parsed_settings(["turns=one", "crop=0.25"]) == {"turns": "one", "crop": 0.25}
    assert parsed_settings(["views.flip=0", "views.scale=0.3,1"]) == {"views": {"flip": 0, "scale": [0.3, 1]}}
    assert parsed_settings(["simclr.views.kind=scan", "a=b,c"]) == {"simclr": {"views": {"kind": "scan"}}, "a": "b,c"}
    several = ["weights=uncertainty", "rotation.turns=one", "rotation.flip=0", "jigsaw.gap=false"]
    own = {"rotation": {"turns": "one", "flip": 0}, "jigsaw": {"gap": False}}
    assert parsed_settings(several) == {"weights": "uncertainty", **own}


def test_amounts_of_labels():
    assert parsed_amounts("5, 20") == [5, 20] and parsed_amounts("0.1,1.0") == [0.1, 1.0]
    assert [type(n) for n in parsed_amounts("1,1.0")] == [int, float]  # one a class; all of them


def test_choices_are_those_of_the_library():
    from selfsup_fastai.callbacks.consistency_loss import KINDS
    from selfsup_fastai.downstream.schedule import SCHEDULES

    assert [choice.value for choice in Schedule] == list(SCHEDULES)
    assert {choice.value for choice in Consistency} == set(KINDS)


def test_compare_hands_the_length_of_fine_tuning_on(tmp_path, monkeypatch):
    seen = []

    def compared(*args, **asked):
        seen.append((asked["steps"], asked["epochs"]))
        raise DataError("enough")

    monkeypatch.setattr(comparing, "compare_folders", compared)
    for words in (["--steps", "40"], ["--epochs", "3"], []):
        assert CliRunner().invoke(app, ["compare", str(tmp_path), *words]).exit_code == 1
    assert seen == [(40, None), (None, 3), (None, None)]


def test_closed_pipe_is_quiet(tmp_path):
    command = f"{sys.executable} -m selfsup_fastai.cli --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in done.stderr and done.stdout.startswith("Usage")


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(images, tmp_path):
    words = ["pretrain", images, *("6" if word == "2" else word for word in QUICK), "--resume"]
    (tmp_path / "one").mkdir()
    done = selfsup(*words, cwd=tmp_path / "one")
    assert done.returncode == 0, done.stderr
    run = subprocess.Popen([sys.executable, "-m", "selfsup_fastai.cli", *map(str, words)], cwd=tmp_path)
    state, deadline = tmp_path / "runs" / "rotation" / "resume" / "state.safetensors", time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    run.kill()
    run.wait()
    again = selfsup(*words, cwd=tmp_path)
    assert again.returncode == 0 and "The run goes on in epoch" in again.stderr, again.stderr
    assert again.stdout.strip() == "runs/rotation/encoder.safetensors"
    first, second = (load_file(at / again.stdout.strip()) for at in (tmp_path / "one", tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_runs_save_what_there_is(images, tmp_path, sent, code):
    endless = ["100000" if word == "2" else word for word in QUICK]
    command = [sys.executable, "-m", "selfsup_fastai.cli", "pretrain", str(images), "--out", "run", *endless]
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell's background jobs ignore it
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, **heard)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    run.send_signal(sent)
    _, said = run.communicate(timeout=60)
    assert run.returncode == code, said
    assert "Traceback" not in said and "selfsup: stopped" in said
    assert read_card(tmp_path / "run" / "encoder.safetensors")["epochs"] >= 1
    assert (tmp_path / "run" / "history.png").exists()
