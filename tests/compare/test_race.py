"""The race: equal budgets, reasons, the same result after a stop."""

import json
import os
import re

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from selfsup_fastai.callbacks.precision import Way
from selfsup_fastai.compare import halving, planning, preparing
from selfsup_fastai.compare.choosing import _folds, training_score
from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.compare.facts import known_of
from selfsup_fastai.compare.keeping import data_print
from selfsup_fastai.compare.planning import (
    how_to,
    lunch_budget,
    pretraining_seconds,
    rungs_for,
    seeds_for,
    to_shorten,
)
from selfsup_fastai.compare.pretraining import _shorten, entrants, pretrained, speed_of
from selfsup_fastai.compare.published import published_encoder
from selfsup_fastai.compare.race import TASKS, compare_pretexts
from selfsup_fastai.compare.scores import SCORES
from selfsup_fastai.compare.trial import budget_for
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.encoders.checkpoint import read_card
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import DataError, TaskError, UnknownNameError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from tests.compare.labeled_images import stripes, stripes_table
from tests.conftest import write_images


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabeled")
    stripes_table(folder, 40, 0, seed=9)
    return UnlabeledDataLoaders.from_folder(folder, size=32, bs=8, valid_pct=0.2)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    return stripes(tmp_path_factory.mktemp("labeled"), 20, 20)


QUICK = dict(budget=32, seeds=2, labels=[1.0], steps=2, baselines=("scratch",))


def test_rungs_halve_the_tasks_and_double_the_budget():
    assert [tuple(r) for r in rungs_for(10, 3, 3)] == [(10, 0.25, 1), (6, 0.5, 1), (3, 1.0, 3)]
    assert [tuple(r) for r in rungs_for(5, 3, 3)] == [(5, 0.5, 1), (3, 1.0, 3)]
    assert [tuple(r) for r in rungs_for(3, 2, 3)] == [(3, 1.0, 2)]
    assert [tuple(r) for r in rungs_for(8, 2, 3, choose=False)] == [(8, 1.0, 2)]


def test_a_lunch_break_is_kept():
    speeds = dict.fromkeys("abcdefghij", 200.0)  # images a second; ten tasks
    a_second = pretraining_seconds(rungs_for(10, 3, 3), speeds)
    assert a_second == pytest.approx((0.25 * 10 + 0.5 * 6 + 3 * 3) / 200)
    budget = lunch_budget(5_000, a_second, other=600)
    assert 0.9 * 45 * 60 < budget * a_second + 600 <= 45 * 60
    assert lunch_budget(1_000, 1e-6, 0) == 40_000  # forty times each image, no more
    assert lunch_budget(100_000, 1.0, 0) == 100_000  # once each image, no less


@pytest.mark.parametrize(("task", "budget"), [("rotation", 96), ("rotation", 640), ("simclr", 64), ("simclr", 160)])
def test_a_budget_is_images_through_the_encoder(unlabeled, tmp_path, task, budget):
    """32 training images in batches of 8; a turn counts, a view counts."""
    (entrant,) = entrants([task])
    facts = pretrained(unlabeled, entrant, "resnet10t", budget, 0, tmp_path / "x.safetensors")
    assert facts["images"] == read_card(tmp_path / "x.safetensors")["images"] == budget
    epochs = {("rotation", 96): 1, ("rotation", 640): 5, ("simclr", 64): 1, ("simclr", 160): 5}
    assert facts["epochs"] == epochs[task, budget]  # of 3, 4, 4 and 2 steps
    again = pretrained(unlabeled, entrant, "resnet10t", budget, 0, tmp_path / "x.safetensors")
    assert again == facts


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """48 to train with in color: several batches, as a short epoch is not the whole of them."""
    folder = tmp_path_factory.mktemp("photos")
    write_images(folder, 60, size=(48, 48))
    return UnlabeledDataLoaders.from_folder(folder, size=48, bs=8, valid_pct=0.2)


QUICKLY = {"deep_cluster"}  # the others are slow together


@pytest.mark.parametrize("task", [pytest.param(t, marks=[] if t in QUICKLY else pytest.mark.slow) for t in TASKS])
def test_every_task_of_the_default_race_takes_part(photos, task, tmp_path):
    """Also those that look at all images before an epoch, which is shorter in a race."""
    (entrant,) = entrants([task])
    assert speed_of(photos, entrant, "resnet10t") > 0
    images = 32 * get_task(task).passes
    facts = pretrained(photos, entrant, "resnet10t", images, 0, tmp_path / "x.safetensors")
    assert facts["images"] == pytest.approx(images, rel=0.25)  # whole steps; deep_cluster's pass over all comes on top


def test_a_short_epoch_does_not_shorten_what_is_made_of_its_loader(photos):
    learn = pretext_learner(photos, "rotation", "resnet10t")
    dl = learn.dls.train
    _shorten(dl, 2)
    assert len(dl) == 2 and len(set(dl.get_idxs())) == 16 and dl.get_idxs() != dl.get_idxs()
    assert sorted(dl.new().get_idxs()) == list(range(48)) and len(dl.new()) == 6


def test_precision_is_chosen_once_and_is_that_of_all_runs(photos, labeled, tmp_path, monkeypatch):
    chosen = [Way("bf16", True), Way("fp32", True), Way("fp32")]
    monkeypatch.setattr(planning, "fastest", lambda learn, device, tried: chosen.pop(0))
    racing = entrants(["rotation"])
    assert how_to(photos, racing, "resnet10t", "auto") == {"precision": "bf16", "channels_last": True}
    assert how_to(photos, racing, "resnet10t", "auto") == {"channels_last": True}
    assert how_to(photos, racing, "resnet10t", "auto") == {}
    assert [how_to(photos, racing, "resnet10t", kind) for kind in (None, "fp32", "bf16")] == [
        {},
        {},
        {"precision": "bf16"},
    ]
    chosen.append(Way("bf16"))
    quick = {**QUICK, "budget": 32, "seeds": 1}
    first = compare_pretexts(photos, ["rotation"], labeled, out=tmp_path / "a", precision="auto", **quick)
    again = compare_pretexts(photos, ["rotation"], labeled, out=tmp_path / "a", precision="auto", **quick)  # as it was
    assert not chosen and first.settings["precision"] == again.settings["precision"] == "bf16"
    assert first.runs["run"].tolist() == again.runs["run"].tolist()
    plain = compare_pretexts(photos, ["rotation"], labeled, out=tmp_path / "b", **quick)
    assert plain.settings["precision"] == "fp32"
    assert not set(plain.runs["run"]) & set(first.runs["run"])
    weights = [load_file(found.encoders["rotation"][0])["conv1.0.weight"] for found in (first, plain)]
    assert not weights[0].equal(weights[1])


def test_seeds_where_nothing_is_said():
    break_ = 0.4 * 45 * 60
    assert seeds_for(7, 1e6, hurried=True) == 7
    assert [seeds_for(None, break_ / n, hurried=True) for n in (1.5, 3.2, 4.7, 5.5, 50)] == [3, 3, 4, 5, 5]
    assert seeds_for(None, break_, hurried=False) == 5


def test_a_run_takes_as_many_steps_over_fewer_images():
    """200 steps where nothing is said; batches of 16 until there are many labels, which are passed five times."""
    for n, bs, images in ((10, 8, 1600), (40, 10, 2000), (200, 16, 3200), (640, 16, 3200), (2560, 64, 12800)):
        budget = budget_for(n, 64)
        assert budget.bs == bs
        assert budget.epochs * (n * budget.repeats // bs) * bs == pytest.approx(images, rel=0.1)


def test_entrants_have_names_of_their_own():
    named = entrants(["rotation", ("rotation", {"turns": "one"}), "rotation+simclr"])
    assert [e.name for e in named] == ["rotation", "rotation (2)", "rotation+simclr"]
    assert named[0].about() != named[1].about()
    with pytest.raises(UnknownNameError, match="Did you mean 'rotation'"):
        entrants(["rotaton"])
    with pytest.raises(TaskError, match="no setting 'turn'"):
        entrants([("rotation", {"turn": 1})])


def test_a_race_with_a_task_that_fails(unlabeled, labeled, tmp_path, capsys):
    tasks = ["rotation", "colorization", ("autoencoder", {})]
    found = compare_pretexts(unlabeled, tasks, labeled, out=tmp_path, finalists=1, **QUICK)
    race = found.race
    assert race[race["task"] == "colorization"]["reason"].str.contains("works on images of 3 channels").all()
    assert sorted(race[(race["rung"] == 0) & (race["images"] > 0)]["images"].unique()) == [
        16,
        32,
    ]  # half, in whole batches
    last = race[race["rung"] == 1]
    assert len(last) == 1 and last["kept"].all()
    out = race[(race["rung"] == 0) & ~race["kept"] & (race["task"] != "colorization")]
    assert out["reason"].tolist() == ["number 2 of 2; 1 went on"]
    assert list(found.encoders) == last["task"].tolist()
    assert all(len(files) == 2 and all(f.exists() for f in files) for files in found.encoders.values())
    assert set(found.summary["start"]) == {"scratch", *found.encoders}
    assert set(found.probes["start"]) == set(found.summary["start"])
    assert found.signals["task"].tolist() == list(found.encoders)
    assert found.verdict.endswith("Of 3 tasks 2 fell out before the end; the table of the race says why.")
    assert found.data["n_test"] == 20 and found.data["classes"] == {"a": 10, "b": 10}
    said = capsys.readouterr().err
    assert said.index("Timing a few steps of 3 tasks and of fine-tuning, to plan") < said.index("does not take part")
    assert "Shorter with" not in said  # seconds
    assert re.search(r"2 tasks, 2 rungs, 2 seeds, up to 32 images through the encoder a run. It will take about", said)
    assert str(tmp_path) not in json.dumps({**found.data, **found.leaks, **found.settings}, default=str)
    assert Comparison.load(tmp_path).verdict == found.verdict


def test_after_a_stop_the_same_comes_out(unlabeled, labeled, tmp_path, monkeypatch):
    whole = compare_pretexts(unlabeled, ["rotation", "autoencoder"], labeled, out=tmp_path / "a", **QUICK)
    true, n = halving.pretrained, []

    def stopped(*args):
        n.append(args)
        if len(n) == 3:
            raise KeyboardInterrupt
        return true(*args)

    monkeypatch.setattr(halving, "pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare_pretexts(unlabeled, ["rotation", "autoencoder"], labeled, out=tmp_path / "b", **QUICK)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "b/encoders").glob("*.safetensors")}
    assert len(kept) == 2
    resumed = compare_pretexts(unlabeled, ["rotation", "autoencoder"], labeled, out=tmp_path / "b", **QUICK)
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    same = list(whole.summary.columns)
    pd.testing.assert_frame_equal(whole.summary[same], resumed.summary[same])
    assert whole.verdict == resumed.verdict


def test_what_makes_a_long_race_shorter_is_what_most_of_it_is():
    assert to_shorten(1800, 1800, "budget", "steps", 10, 5) == ""  # an hour
    pretraining = to_shorten(3000, 1000, "seconds", "steps", 10, 5)
    assert "Most of it is pretraining" in pretraining
    assert "fewer `tasks` (10 now), a smaller `seconds`, fewer `seeds` (5 now)" in pretraining
    assert "steps" not in pretraining
    tuning = to_shorten(1000, 3000, "budget", "epochs", 10, 5)
    assert "Most of it is fine-tuning" in tuning and "budget" not in tuning
    assert "fewer `seeds` (5 now), fewer or smaller `labels`, fewer `epochs`" in tuning
    assert "`tasks`" not in to_shorten(9000, 0, "budget", "steps", 1, 5)


def test_the_plan_of_other_labels_is_another(monkeypatch, tmp_path, labeled):
    """What was timed of pretraining stays; how long the curves take, and so the seeds, is found anew."""
    monkeypatch.setattr(preparing, "how_to", lambda *args: {"precision": None, "channels_last": False})
    monkeypatch.setattr(preparing, "add_speeds", lambda plan, *args: plan.update(speeds={"rotation": 9.0}, failed={}))
    seconds = iter([1000.0, 10.0])
    monkeypatch.setattr(preparing, "_curve_seconds", lambda *args: next(seconds))
    monkeypatch.setattr(preparing, "seeds_for", lambda asked, a_seed, hurried: 3 if a_seed > 100 else 5)
    asked, racing = preparing.Asked("resnet10t", None, 3, None, None, None), entrants(["rotation"])
    few, file, found = stripes(tmp_path / "few", 6, 4), tmp_path / "plan.json", []
    for images in (labeled, labeled, few, few):
        known = known_of(images, [1.0], None, None, None, None)
        plan = preparing._plan(None, racing, asked, known, [], file, "images") | {"grants": {}}
        preparing._keep(plan, file)
        found.append((plan["seeds"], plan["curves"]))
    assert found == [(3, 3000.0), (3, 3000.0), (5, 50.0), (5, 50.0)]


def test_a_stop_while_steps_are_timed_keeps_the_speeds(unlabeled, labeled, tmp_path, monkeypatch):
    true, timed = planning.speed_of, []

    def stopped(dls, entrant, arch):
        timed.append(entrant.name)
        if len(timed) == 2:
            raise KeyboardInterrupt
        return true(dls, entrant, arch)

    monkeypatch.setattr(planning, "speed_of", stopped)
    tasks = ["rotation", "autoencoder"]
    with pytest.raises(KeyboardInterrupt):
        compare_pretexts(unlabeled, tasks, labeled, out=tmp_path, **QUICK)
    kept = json.loads((tmp_path / "plan.json").read_text())["speeds"]
    assert list(kept) == ["rotation"]
    compare_pretexts(unlabeled, tasks, labeled, out=tmp_path, **QUICK)
    assert timed == ["rotation", "autoencoder", "autoencoder"]
    whole = json.loads((tmp_path / "plan.json").read_text())
    assert whole["speeds"]["rotation"] == kept["rotation"] and set(whole["grants"]) == set(tasks)


def test_a_task_that_breaks_in_the_middle_is_told_without_what_it_said(unlabeled, labeled, tmp_path, monkeypatch):
    true = halving.pretrained

    def broken(dls, entrant, *args):
        if entrant.name == "autoencoder":
            raise RuntimeError("/home/jane/scan.dcm")
        return true(dls, entrant, *args)

    monkeypatch.setattr(halving, "pretrained", broken)
    found = compare_pretexts(unlabeled, ["rotation", "autoencoder"], labeled, out=tmp_path, **QUICK)
    row = found.race[found.race["task"] == "autoencoder"].iloc[0]
    assert row["reason"].startswith("failed with RuntimeError;") and not row["kept"]
    assert list(found.encoders) == ["rotation"]


def test_without_labels_no_winner_is_declared(unlabeled, tmp_path):
    found = compare_pretexts(unlabeled, ["rotation", "autoencoder"], budget=32, out=tmp_path)
    assert found.runs is None and found.summary is None
    assert found.verdict.startswith("Without labels nobody can say which task helps.")
    assert "hardly agree with how useful encoders are" in found.verdict
    assert found.signals["task"].tolist() == ["rotation", "autoencoder"]
    assert np.isfinite(found.signals["effective rank"]).all()


def test_test_images_among_the_unlabeled(labeled, tmp_path):
    files = list(labeled.train_ds.tls[0].items) + list(labeled.valid_ds.tls[0].items)[:4]
    dls = UnlabeledDataLoaders.from_files(files, size=32, bs=8, valid_pct=0.1)
    with pytest.raises(DataError, match="Pretraining would see the test set"):
        compare_pretexts(dls, ["rotation"], labeled, out=tmp_path, **QUICK)
    found = compare_pretexts(dls, ["rotation"], labeled, out=tmp_path, leaks="exclude", **QUICK)
    assert found.leaks["left out of pretraining"] >= 1


def test_tasks_are_chosen_by_training_labels_alone(tmp_path):
    """Other test labels, or other test images, change nothing; other training labels do."""
    table = stripes_table(tmp_path, 30, 10)
    encoder = create_encoder("resnet10t", n_in=1, size=32)

    def judged(table: pd.DataFrame) -> float:
        return training_score(encoder, labeled_loaders(table, 1, 32, 8), "category", SCORES["accuracy"])

    true = judged(table)
    assert true > 0.9
    assert judged(table.assign(label=["a" if v else lab for lab, v in zip(table["label"], table["is_valid"])])) == true
    shuffled = np.random.default_rng(0).permutation(table["label"][:30])
    assert 0.2 < judged(table.assign(label=[*shuffled, *table["label"][30:]])) < 0.8


@pytest.mark.parametrize("patients", [2, 3, 7])
def test_a_patient_is_in_one_fold(patients):
    groups, y = np.arange(30) % patients, np.arange(30) // patients % 2
    folds = _folds(np.zeros((30, 2)), y, "category", groups)
    assert len(folds) == min(5, patients)
    assert not any(set(groups[fit]) & set(groups[rest]) for fit, rest in folds)


def test_where_nothing_can_choose_no_task_falls_out(unlabeled, tmp_path):
    """Of eight labeled images no score can be had: the order in which tasks were named must not decide."""
    few = stripes(tmp_path / "few", 8, 8)
    found = compare_pretexts(unlabeled, ["rotation", "autoencoder"], few, out=tmp_path / "out", finalists=1, **QUICK)
    assert list(found.encoders) == ["rotation", "autoencoder"]
    assert found.race["kept"].all() and (found.race["rung"] == 0).all()


def test_another_image_is_another_run(tmp_path):
    """Also one that is not among those whose pixels are looked at."""
    table = stripes_table(tmp_path, 60, 6)
    before = data_print(labeled_loaders(table, 1, 32, 4))
    for file in table["file"].iloc[[5, 6, 7]]:
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert data_print(labeled_loaders(table, 1, 32, 4)) != before


def test_another_batch_size_is_another_run(tmp_path):
    table = stripes_table(tmp_path, 12, 6)
    assert data_print(labeled_loaders(table, 1, 32, 4)) == data_print(labeled_loaders(table, 1, 32, 4))
    assert data_print(labeled_loaders(table, 1, 32, 4)) != data_print(labeled_loaders(table, 1, 32, 6))


def test_what_the_curves_cannot_do_is_said_before_anything_is_pretrained(unlabeled, labeled, tmp_path, monkeypatch):
    def pretrains(*args):
        raise AssertionError("hours went by")

    monkeypatch.setattr("selfsup_fastai.compare.race.planned", pretrains)
    with pytest.raises(TaskError, match="steps and epochs both"):
        compare_pretexts(unlabeled, ["rotation"], labeled, steps=2, epochs=2, out=tmp_path)
    untested = labeled_loaders(stripes_table(tmp_path / "u", 12, 0), 1, 32, 4)
    with pytest.raises(DataError, match="There are no test images"):
        compare_pretexts(unlabeled, ["rotation"], untested, out=tmp_path)


def test_nothing_is_downloaded_unasked(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("selfsup_fastai.compare.published.create_encoder", refuse)
    monkeypatch.setattr("selfsup_fastai.compare.published.at_hand", lambda arch: False)
    assert published_encoder("resnet10t", 3, None) is None
    assert (
        "not on this machine and are left out; pretrained=True (in the shell --pretrained) downloads"
        in capsys.readouterr().err
    )
    assert published_encoder("resnet10t", 3, None, download=False) is None


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"seeds": 0}, "seeds"),
        ({"budget": 5, "seconds": 5.0}, "give one of them"),
        ({"baselines": ("imagenet",)}, "baselines is 'scratch', 'consistency' or 'published'"),
        ({"leaks": "ignore"}, "leaks is 'raise' or 'exclude'"),
        ({"tasks": []}, "tasks is empty"),
    ],
)
def test_arguments_that_make_no_sense(unlabeled, kwargs, said):
    with pytest.raises(TaskError, match=said):
        compare_pretexts(unlabeled, **kwargs)
