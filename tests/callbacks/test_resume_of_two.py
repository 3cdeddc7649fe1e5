"""Two processes that are killed, at once or one of them; tests/two_processes.py starts this file as a program."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback

from selfsup_fastai.callbacks import resume as module
from selfsup_fastai.callbacks.log import MetricsFile
from selfsup_fastai.callbacks.resume import Resume
from selfsup_fastai.callbacks.state import StateFolder
from selfsup_fastai.errors import LostProcessError, ResumeError
from selfsup_fastai.processes import is_first, join
from tests.callbacks.test_resume import Killed, fit, killer, learner, records, same
from tests.two_processes import of_two, run, started


def killed_and_resumed(folder: Path) -> dict:
    """Whether a run that died in both processes after some step ends as one that did not."""
    module.SHARE, module.TOGETHER = float("inf"), 1
    join()
    found = {}
    for task, step in (("rotation", 3), ("rotation", 6), ("jigsaw", 5), ("nat", 5)):
        whole = fit(learner(task=task), [MetricsFile(folder / "whole.csv")])
        state = folder / f"{task}-{step}"
        try:
            fit(learner(task=task), [Resume(state, 0), killer(step), MetricsFile(folder / "again.csv")])
        except Killed:
            torch.rand(7)
        facts = StateFolder(state).read().facts
        again = fit(learner(task=task), [Resume(state, 0), MetricsFile(folder / "again.csv")])
        tables = [(folder / f"{name}.csv").read_text() for name in ("whole", "again")] if is_first() else ["", ""]
        equal = same(whole, again) and records(whole) == records(again) and tables[0] == tables[1]
        found[f"{task} {step}"] = torch.tensor(equal)
        found[f"{task} {step} at"] = torch.tensor(facts["epoch"] * len(whole.dls.train) + facts["batch"])
    return found


@pytest.mark.slow
def test_both_killed_they_end_as_if_nothing_had_happened(tmp_path):
    first, second = of_two(__file__, "killed_and_resumed", tmp_path)
    assert all(first[name].all() and second[name].all() for name in first if not name.endswith(" at"))
    places = {name: int(value) for name, value in first.items() if name.endswith(" at")}
    assert places == {"rotation 3 at": 3, "rotation 6 at": 6, "jigsaw 5 at": 5, "nat 5 at": 5}
    with pytest.raises(ResumeError, match=r"processes \(2 there, 1 here\)"):
        fit(learner(), [Resume(tmp_path / "rotation-3")])


class Dies(Callback):
    """The second process is gone in the middle of the second epoch."""

    order = 95

    def after_batch(self):
        if self.training and self.epoch == 1 and not is_first():
            os.kill(os.getpid(), signal.SIGKILL)


def one_dies(folder: Path) -> dict:
    join()
    begun = time.monotonic()
    try:
        fit(learner(), [Resume(folder / "state"), Dies()])
    except LostProcessError as error:
        return {"said": torch.tensor(list(str(error).encode())), "seconds": torch.tensor(time.monotonic() - begun)}
    return {}


def test_one_killed_the_other_says_so_at_once(tmp_path):
    runs = started(__file__, "one_dies", tmp_path)
    said = [each.communicate(timeout=600)[1] for each in runs]
    assert [each.returncode for each in runs] == [0, -signal.SIGKILL], said
    found = torch.load(tmp_path / "one_dies-0.pt", weights_only=True)
    line = bytes(found["said"].tolist()).decode()
    assert "Another process of this run has ended or cannot be reached, so process 0 stops, too." in line
    assert StateFolder(tmp_path / "state").read().facts["epoch"] == 1


if __name__ == "__main__":
    run(globals())
