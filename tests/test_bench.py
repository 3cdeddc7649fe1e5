"""What the benchmarks of training report: their tables, from figures that are known. No time is measured here."""

from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext.learner import pretext_learner
from tests.conftest import ROOT
from tests.pretext.small_runs import pictures, small_net

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


@pytest.fixture
def train():
    """The benchmark's modules; without the extra `bench` there is nothing to test."""
    pytest.importorskip("lightly")
    pytest.importorskip("kornia")
    import train

    return train


def cells(text: str) -> dict[str, list[str]]:
    """The rows of all Markdown tables in a text, by their first cell."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.split("\n") if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def learner(task: str = "rotation", n: int = 17):
    with quiet():
        dls = UnlabeledDataLoaders.from_array(pictures(n), size=None, bs=4, valid_pct=0.0, num_workers=0)
        return pretext_learner(dls, task, small_net)


def test_cases_take_turns_there_and_back():
    from measure import timed

    calls, worth = [], {"a": 3.0, "b": 5.0, "c": 7.0}
    cases = {name: (lambda name=name: calls.append(name) or worth[name]) for name in worth}
    seconds = timed(cases, 3, lambda case: case())
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert seconds.to_dict("list") == {name: [value] * 3 for name, value in worth.items()}


def test_a_bare_step_is_forward_loss_backward_and_adamw():
    from steps import Bare

    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(4, 5), torch.randint(3, (4,))
    alike = deepcopy(model)
    bare = Bare(model, F.cross_entropy, (x,), (y,))
    assert bare.steps(3) == 12  # images
    opt = torch.optim.AdamW(alike.parameters(), 1e-3)
    for _ in range(3):
        opt.zero_grad()
        F.cross_entropy(alike(x), y).backward()
        opt.step()
    for got, expected in zip(model.parameters(), alike.parameters()):
        torch.testing.assert_close(got, expected)


def test_the_bare_step_of_a_learner_trains_a_copy_on_one_of_its_batches():
    from steps import Bare

    learn = learner()
    before = [p.detach().clone() for p in learn.model.parameters()]
    bare = Bare.of(learn)
    assert bare.inputs[0].shape == (4, 4, 3, 24, 24) and bare.targets[0].tolist() == [[0, 1, 2, 3]] * 4
    assert bare.steps(2) == 8
    assert all(torch.equal(p, q) for p, q in zip(learn.model.parameters(), before))
    assert any(not torch.equal(p, q) for p, q in zip(bare.model.parameters(), before))


def test_an_epoch_trains_on_every_batch_and_validates_none():
    from steps import epoch

    learn = learner()
    assert epoch(learn) == 16
    assert learn.images_seen == 16 * 4  # four turns of each
    assert list(learn.last_values) == ["train_loss"]


def test_photographs_are_used_again_where_there_are_not_enough(tmp_path, color_folder):
    from steps import photographs

    files = sorted(color_folder.iterdir())
    found = sorted(photographs(tmp_path, 70, color_folder).iterdir())
    assert [file.read_bytes() for file in found] == [files[i % 64].read_bytes() for i in range(70)]


def test_the_command_that_finds_figures_again(train):
    assert train.command("growth", train.arguments([])) == "python bench/train.py --parts growth"
    args = train.arguments(["--quick", "--size", "40", "--tasks", "rotation"])
    assert train.command("tasks", args) == "python bench/train.py --parts tasks --quick --size 40 --tasks rotation"
    assert train.arguments(train.command("tasks", args).split()[2:]).size == 40


def test_ratios_and_shares_of_peers(train):
    from train_peers import BARE, BARE_HALF, COLD, HALF, OURS, text

    medians = {OURS: 0.10, HALF: 0.05, COLD: 0.11, BARE: 0.09, BARE_HALF: 0.04, "lightly, 0 workers": 0.25}
    medians |= {"lightly, 2 workers": 0.20, "fastai and a callback, 0 workers": 0.40}
    said = text("simclr", pd.DataFrame([medians, medians]))
    rows = cells(said)
    assert rows[OURS] == ["10.0", "10.0", "10.0", "1.00"]
    assert rows["lightly, 0 workers"] == ["4.0", "4.0", "4.0", "2.50"]
    assert "ours has 0.90 of the speed" in said and f"{HALF} has 0.80 of the speed" in said
    for name, best, ratio in [
        (OURS, "lightly, 2 workers", "2.0"),
        (HALF, "lightly, 2 workers", "4.0"),
        (OURS, "fastai and a callback, 0 workers", "4.0"),
        (HALF, "fastai and a callback, 0 workers", "8.0"),
    ]:
        assert f"{name} : the best of the others ({best}) = {ratio} : 1" in said


def test_the_row_of_a_task():
    pytest.importorskip("lightly")
    from train_tasks import row

    found = row(learner(), pd.DataFrame({"ours": [0.02, 0.02, 9], "bare": [0.012] * 3, "batches": [0.005] * 3}))
    assert found == {
        "net": "Sequential",
        "images/s": "50.0",
        "bare step": "83.3",
        "share": "0.60",
        "batches": "0.25",
        "the rest": "+0.15",
    }


def test_facts_that_tasks_can_ask_about():
    pytest.importorskip("lightly")
    from train_tasks import facts

    found = facts(24)
    assert (found.groupby("patient").size() == 4).all() and (found.groupby("volume").size() == 8).all()
    assert (found.groupby("patient")[["modality", "view"]].nunique() == 1).all(axis=None)
    assert found.drop_duplicates(["modality", "view"]).shape[0] == 4


def test_memory_by_the_number_of_images(train, tmp_path, color_folder, monkeypatch):
    import train_memory

    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train").symlink_to(color_folder)
    monkeypatch.setattr(train_memory, "data_set", lambda name, work: tmp_path)
    asked = []

    def measured(cases, rounds):
        n_files = [sum(1 for _ in folder.iterdir()) for folder, *_ in cases.values()]
        asked.append((n_files, rounds))
        return pd.DataFrame([dict(zip(cases, [500.0, 512.0]))] * rounds)

    monkeypatch.setattr(train_memory, "measured", measured)
    args = train.arguments(["--few", "16", "--many", "64", "--rounds", "2"])
    text = train_memory.by_images(tmp_path, args)
    assert asked == [([16, 64], 1), ([16, 64], 2)]
    assert cells(text)["64 images"] == ["512", "512", "512", "1.02"]
    assert text.count("250.00 KB an image more") == 2  # 12 MB for 48 images


def test_what_starts_cost_is_in_both_runs(train, monkeypatch):
    import train_processes

    args = train.arguments(["--images", "100", "--bs", "32"])
    took = {1: 40.0 + 96 * 0.5, 3: 40.0 + 3 * 96 * 0.5}  # 96 images an epoch
    monkeypatch.setattr(train_processes, "run", lambda *call: took[call[-1]])
    assert train_processes.seconds_an_image(None, None, args, 1, 1) == pytest.approx(0.5)


def test_parts_say_why_they_are_left_out(train, tmp_path, monkeypatch):
    import train_processes

    monkeypatch.setattr(train_processes, "output", lambda *command, **_: "--task --epochs")
    text = train.part("processes", tmp_path, train.arguments(["--quick"]))
    assert "--parts processes --quick" in text and "has no --nproc here" in text
    if not torch.cuda.is_available():
        assert "There is no GPU here." in train.part("gpu", tmp_path, train.arguments(["--quick"]))


@pytest.mark.slow
def test_small_runs(train, tmp_path, color_folder, monkeypatch):
    import train_growth
    import train_peers

    monkeypatch.setattr(train_peers, "WORKERS", (0,))
    monkeypatch.setattr(train_growth, "STEPS", 1)
    args = train.arguments(["--quick", "--folder", str(color_folder), "--tasks", "simclr", "slice_order"])
    args.methods = ["byol", "rotation"]
    args.trace = tmp_path / "trace.json"
    peers = cells(train.part("peers", tmp_path, args))
    assert len(peers) == 2 + 1 + 7  # heads, rules, cases of which rotation has fewer
    assert all(float(row[0].replace(",", "")) > 0 for name, row in peers.items() if name.startswith(("ours", "bare")))
    assert args.trace.stat().st_size > 0
    tasks = cells(train.part("tasks", tmp_path, args))
    assert list(tasks)[2:] == ["simclr", "slice_order"]
    for *_, share, batches, rest in (tasks[name] for name in list(tasks)[2:]):
        assert float(share) + float(batches) + float(rest) == pytest.approx(1, abs=0.02)
    growth = cells(train.part("growth", tmp_path, args))
    assert {"ten times the images", "twice the side", "6 photographs, cache empty", "imports", "all"} <= set(growth)
    parts = [float(growth[stage][0]) for stage in ("imports", "loaders made", "learner made", "first batch")]
    assert float(growth["all"][0]) == pytest.approx(np.sum(parts), abs=0.03)


@pytest.mark.slow
def test_memory_of_processes(train, tmp_path, color_folder):
    from train_memory import beside_bare

    args = train.arguments(["--quick", "--folder", str(color_folder), "--methods", "rotation"])
    rows = cells(beside_bare(tmp_path, args))
    bare, ours = (float(rows[f"rotation: {kind}"][0].replace(",", "")) for kind in ("bare step", "ours"))
    assert bare > 100 and 100 < ours < 10 * bare
    assert float(rows["rotation: ours"][-1]) == pytest.approx(ours / bare, abs=0.011)  # these are of whole megabytes
