"""Resume: killed anywhere, a run ends with the very weights it would have ended with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientAccumulation
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn

from selfsup_fastai.callbacks import resume as module
from selfsup_fastai.callbacks import state as state_module
from selfsup_fastai.callbacks.consistency import Consistency
from selfsup_fastai.callbacks.log import MetricsFile
from selfsup_fastai.callbacks.resume import Resume
from selfsup_fastai.callbacks.state import StateFolder, drawn_state, restore_drawn
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.errors import ResumeError
from selfsup_fastai.pretext.learner import pretext_learner

TASKS = {
    "rotation": {},
    "simclr": {},
    "rotation+relative_position": {},
    "dino": {"prototypes": 16, "n_small": 1, "hidden": 16, "dim": 8, "warm_up": 1.0, "first_temperature": 0.1},
    "jigsaw": {"consistency": ("nce", 8)},  # with a bank
    "deep_cluster": {"clusters": 3, "every": 1},  # draws by what it found before the epoch
    "nat": {"dim": 8, "every": 2},
}


@pytest.fixture(autouse=True)
def every_step_is_kept(monkeypatch):
    monkeypatch.setattr(module, "SHARE", float("inf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (40, 44, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 16, 3, 2))


def learner(folder: Path | None = None, task: str = "rotation", workers: int = 0, cache: bool = False, **kwargs):
    set_seed(3, reproducible=True)
    settings = dict(size=40, bs=4, valid_pct=0.2, num_workers=workers, seed=1)
    if folder is None:
        array = np.random.default_rng(0).integers(0, 256, (20, 40, 44, 3), dtype=np.uint8)
        dls = UnlabeledDataLoaders.from_array(array, **settings)
    else:
        dls = UnlabeledDataLoaders.from_folder(folder, **settings, cache=cache)
    kwargs = {**TASKS[task], **kwargs}
    if "consistency" in kwargs:
        term, dim = kwargs["consistency"]
        kwargs["consistency"] = Consistency(0.5, term, dim)
    return pretext_learner(dls, task.split("+") if "+" in task else task, tiny, **kwargs)


def fit(learn, cbs, epochs: int = 3):
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, 1e-2, cbs=cbs)
    return learn


class Killed(Exception):
    pass


def killer(step: int):
    """A run that dies after so many steps, without a word to anybody."""
    from fastai.callback.core import Callback

    class Killer(Callback):
        order = 95

        def before_fit(self):
            self.steps = 0

        def after_batch(self):
            if self.training:
                self.steps += 1
                if self.steps == step:
                    raise Killed("killed")

    return Killer()


def same(a, b) -> bool:
    first, second = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def records(learn) -> list:
    recorder = learn.recorder
    return [
        [float(v) for v in recorder.losses],
        [float(v) for v in recorder.lrs],
        list(recorder.iters),
        [[None if v is None else float(v) for v in row] for row in recorder.values],
        (learn.epochs_done, learn.images_seen, learn.last_values),
    ]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("step, every", [(1, 0), (4, 0), (6, 0), (6, 1e9)])  # 4 steps an epoch; from its beginning
def test_a_killed_run_ends_as_if_nothing_had_happened(task, step, every, tmp_path):
    whole = fit(learner(task=task), [MetricsFile(tmp_path / "whole.csv")])
    with pytest.raises(Killed):
        fit(learner(task=task), [Resume(tmp_path / "state", every), killer(step), MetricsFile(tmp_path / "again.csv")])
    torch.rand(7)  # generators are somewhere else in the new process
    again = fit(learner(task=task), [Resume(tmp_path / "state", 0), MetricsFile(tmp_path / "again.csv")])
    assert same(whole, again) and records(whole) == records(again)
    assert (tmp_path / "whole.csv").read_text() == (tmp_path / "again.csv").read_text()


@pytest.mark.parametrize("workers, cache", [(2, False), (0, True)])
def test_it_does_with_workers_and_with_kept_pixels_too(workers, cache, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SELFSUP_CACHE", str(tmp_path / "cache"))
    whole = fit(learner(folder, workers=workers, cache=cache), [], epochs=2)
    for step in (3, 2):  # killed, gone on with, killed again
        with pytest.raises(Killed):
            cbs = [Resume(tmp_path / "state", 0), killer(step + 4 * (step == 2))]
            fit(learner(folder, workers=workers, cache=cache), cbs, epochs=2)
    assert same(whole, fit(learner(folder, workers=workers, cache=cache), [Resume(tmp_path / "state", 0)], epochs=2))


def test_accumulated_gradients_are_never_cut_in_two(tmp_path):
    whole = fit(learner(), [GradientAccumulation(8)])
    for step in (1, 3):
        state = tmp_path / str(step)
        with pytest.raises(Killed):
            fit(learner(), [Resume(state, 0), GradientAccumulation(8), killer(step)])
        assert same(whole, fit(learner(), [Resume(state, 0), GradientAccumulation(8)]))


@pytest.mark.parametrize("kill_at", [4, 5, 6, 8, 9, 10, 11])
def test_a_step_that_spans_two_epochs_is_not_cut_either(kill_at, tmp_path):
    """4 batches an epoch and 3 a step: the first two epochs end within one."""
    whole = fit(learner(), [GradientAccumulation(12)])
    with pytest.raises(Killed):
        fit(learner(), [Resume(tmp_path, 0), GradientAccumulation(12), killer(kill_at)])
    assert same(whole, fit(learner(), [Resume(tmp_path, 0), GradientAccumulation(12)]))


def test_a_fit_that_ends_within_a_step_leaves_nothing_to_the_next(tmp_path):
    def program(*killers):
        learn, resume = learner(), Resume(tmp_path / "state", 0)
        for killers_of_fit in killers:
            fit(learn, [resume, GradientAccumulation(12), *killers_of_fit], epochs=1)
        return learn

    whole = learner()
    for _ in range(2):
        fit(whole, [GradientAccumulation(12)], epochs=1)
    with pytest.raises(Killed):
        program([], [killer(2)])
    assert same(whole, program([], []))


def test_a_run_that_was_finished_is_not_trained_again(tmp_path, capsys):
    whole = fit(learner(), [Resume(tmp_path / "state")])
    learn = learner()
    again = fit(learn, [Resume(tmp_path / "state"), killer(1_000)])
    assert "finished already" in capsys.readouterr().err
    assert same(whole, again) and records(whole) == records(again)


def test_several_fits_one_after_the_other(tmp_path):
    def program(*killers):
        learn, resume = learner(), Resume(tmp_path / "state", 0)
        for killers_of_fit in killers:
            fit(learn, [resume, *killers_of_fit], epochs=1)
        return learn

    whole = learner()
    for _ in range(2):
        fit(whole, [], epochs=1)
    with pytest.raises(Killed):
        program([], [killer(2)])
    assert same(whole, program([], []))


def test_what_watches_a_metric_counts_no_epoch_twice(tmp_path):
    def patience():
        return EarlyStoppingCallback("train_loss", patience=2, min_delta=100.0)

    stopped = fit(learner(), [patience()], epochs=6)
    assert len(stopped.recorder.values) == 3
    with pytest.raises(Killed):
        fit(learner(), [Resume(tmp_path / "state", 0), patience(), killer(6)], epochs=6)
    again = fit(learner(), [Resume(tmp_path / "state", 0), patience()], epochs=6)
    assert len(again.recorder.values) == 3 and same(stopped, again)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"epochs": 4}, r"differs from this one in epochs \(3 there, 4 here\)"),
        ({"task": "simclr"}, r"task \('rotation' there, 'simclr' here\), settings of the task, network"),
    ],
)
def test_another_run_is_refused_and_nothing_is_lost(change, said, tmp_path):
    with pytest.raises(Killed):
        fit(learner(), [Resume(tmp_path, 0), killer(2)])
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(ResumeError, match=said):
        fit(learner(None, change.get("task", "rotation")), [Resume(tmp_path)], change.get("epochs", 3))
    assert (tmp_path / "state.safetensors").read_bytes() == before
    other = Resume(tmp_path, about={"seed": 7})
    with pytest.raises(ResumeError, match=r"seed \(None there, 7 here\)"):
        fit(learner(), [other])


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path):
    whole = fit(learner(), [])
    with pytest.raises(Killed):
        fit(learner(), [Resume(tmp_path, 0), killer(3)])
    last, before = tmp_path / "state.safetensors", tmp_path / "state-before.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    assert same(whole, fit(learner(), [Resume(tmp_path, 0)]))
    for file in (last, before):
        file.write_bytes(b"half")
    with pytest.raises(ResumeError, match=r"is damaged\. Remove the folder to begin the run anew"):
        fit(learner(), [Resume(tmp_path, 0)])


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    whole = fit(learner(), [])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfsup_fastai.callbacks.state.write_whole", full)
    learn = fit(learner(), [Resume(tmp_path / "state", 0)])
    said = capsys.readouterr().err
    assert said.count("could not be written (No space left on device); there is none yet. The run goes on.") == 1
    assert same(whole, learn) and not list((tmp_path / "state").iterdir())


def test_looking_and_searching_a_rate_leave_the_state_alone(tmp_path):
    with pytest.raises(Killed):
        fit(learner(), [Resume(tmp_path, 0), killer(2)])
    before = (tmp_path / "state.safetensors").read_bytes()
    learn = learner(cbs=Resume(tmp_path, 0))
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.get_preds()
        learn.lr_find(num_it=3, show_plot=False, suggest_funcs=())
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_the_state_names_no_file_and_is_cleared_whole(tmp_path):
    with pytest.raises(Killed):
        fit(learner(), [Resume(tmp_path / "state", 0), killer(3)])
    kept = StateFolder(tmp_path / "state")
    assert ".png" not in json.dumps(kept.read().facts)
    (tmp_path / "state" / ".state-fresh.safetensors.1.part").write_bytes(b"half")
    kept.clear()
    assert not (tmp_path / "state").exists() and kept.read() is None


PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.callbacks import test_resume as t
t.module.SHARE = float("inf")
learn = t.learner(Path(sys.argv[2]), workers=int(sys.argv[4]))
t.fit(learn, [t.Resume(sys.argv[3], 0)], epochs=8)
torch.save(learn.model.state_dict(), sys.argv[3] + ".pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_at_any_moment(workers, folder, tmp_path):
    """A real process, killed while it trains, validates and writes, again and again."""
    root, rng = str(Path(__file__).parents[2]), np.random.default_rng(workers)
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, root, str(folder)]
    subprocess.run([*command, str(tmp_path / "whole"), str(workers)], check=True, env=env, timeout=300)
    state, kills = tmp_path / "state", 0
    while kills < 6:
        run = subprocess.Popen([*command, str(state), str(workers)], env=env, start_new_session=True)
        before = [f.stat().st_mtime_ns for f in state.glob("state.safetensors")]
        while run.poll() is None and [f.stat().st_mtime_ns for f in state.glob("state.safetensors")] == before:
            time.sleep(0.01)  # until it has gone on
        time.sleep(rng.uniform(0, 0.2))  # a quiet machine is done with all epochs in a second
        if run.poll() is not None:
            break
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        kills += 1
    assert kills >= 2
    subprocess.run([*command, str(state), str(workers)], check=True, env=env, timeout=300)
    whole, again = (torch.load(f"{path}.pt", weights_only=True) for path in (tmp_path / "whole", state))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_generators_of_many_gpus_come_back_in_their_order(monkeypatch):
    learn, put_back = SimpleNamespace(dls=[]), []
    state = drawn_state(learn)
    state.tensors.update({f"rng/cuda/{i}": torch.tensor([i]) for i in sorted(range(12), key=str)})
    monkeypatch.setattr(state_module, "set_rng_state", put_back.append)
    restore_drawn(learn, state)
    assert [int(value) for value in put_back[0]["cuda"]] == list(range(12))
