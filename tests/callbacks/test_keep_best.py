"""The best epoch's weights, over all stages of a run; and that the test images are not asked."""

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.data import ImageDataLoaders
from PIL import Image

from selfsup_fastai.callbacks.keep_best import KeepBest
from selfsup_fastai.callbacks.whole_run import WholeRun
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.errors import TaskError, UnknownNameError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("best"), np.random.default_rng(0)
    for i in range(40):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = rng.normal(100 + 40 * (i % 2), 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "ab"[i % 2] / f"{i:02d}.png")
    return root


def make(folder, **kwargs):
    set_seed(0)
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.25, seed=1, bs=8, num_workers=0, device="cpu")
    return downstream_learner(dls, "resnet10t", metrics=accuracy, **kwargs)


class EachEpoch(Callback):
    """The weights at the end of each epoch, and which images were validated."""

    order = 70

    def __init__(self):
        self.kept, self.validated = [], set()

    def after_epoch(self):
        self.kept.append({k: v.clone() for k, v in self.learn.model.state_dict().items()})

    def after_batch(self):
        if not self.training:
            self.validated |= {round(float(m), 4) for m in self.learn.xb[0].flatten(1).mean(1)}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("by", ["valid_loss", "accuracy"])
def test_the_weights_are_those_of_the_best_epoch_of_all_stages(folder, by):
    learn, weights = make(folder), EachEpoch()
    learn.fine_tune(5, 2e-2, best=by, cbs=weights)
    values = learn.fine_tune_log[by]
    best = int(values.argmin() if by == "valid_loss" else values.argmax())
    assert len(values) == 6 and values.nunique() > 1
    assert same(learn.model.state_dict(), weights.kept[best])
    assert sum(same(learn.model.state_dict(), kept) for kept in weights.kept) == 1


def test_the_best_epoch_is_chosen_by_held_out_training_images(folder):
    learn, weights = make(folder), EachEpoch()
    tested = learn.dls.valid
    means = {round(float(m), 4) for b in tested for m in b[0].flatten(1).mean(1)}
    train = {
        round(float(m), 4) for b in learn.dls.train.new(shuffle=False, drop_last=False) for m in b[0].flatten(1).mean(1)
    }
    learn.fine_tune(1, best="valid_loss", holdout=0.25, cbs=weights)
    assert not weights.validated & means and weights.validated <= train
    classes = [f.parent.name for f in learn.dls.train_ds.items]
    assert len(weights.validated) == sum(round(0.25 * classes.count(name)) for name in "ab")
    assert learn.dls.valid is tested  # given back
    learn.fine_tune(1, best="valid_loss", holdout=0, cbs=(weights := EachEpoch()))
    assert weights.validated == means


def test_patience_stops_the_whole_run(folder):
    learn = make(folder)
    learn.fine_tune(12, 1e-9, best="accuracy", patience=2)  # at such a rate nothing gets better
    assert len(learn.fine_tune_log) == 3
    with pytest.raises(TaskError, match="patience goes with best"):
        learn.fine_tune(1, patience=2)


def test_a_metric_that_is_not_there_is_named(folder):
    with pytest.raises(UnknownNameError, match="accuracy"):
        make(folder).fine_tune(1, best="acuracy")


def test_alone_its_run_is_one_fit(folder):
    learn, weights = make(folder), EachEpoch()
    learn.fit(4, 5e-2, cbs=[KeepBest("valid_loss"), weights])
    values = [v[1] for v in learn.recorder.values]
    assert same(learn.model.state_dict(), weights.kept[int(np.argmin(values))])


class Progress(WholeRun):
    def begin(self):
        self.seen, self.ended = [], 0

    def after_batch(self):
        if self.training:
            self.seen.append(self.progress)

    def end(self):
        self.ended += 1


def test_progress_runs_over_all_stages(folder):
    learn, watch = make(folder), Progress()
    learn.fine_tune(4, cbs=watch)
    steps = 5 * len(learn.dls.train)
    assert watch.seen == pytest.approx([(i + 1) / steps for i in range(steps)])  # after the step it belongs to
    assert watch.ended == 1
    learn.fit(1, cbs=watch)
    assert watch.seen == pytest.approx([(i + 1) / (steps / 5) for i in range(steps // 5)])


class Stop(Callback):
    """Ctrl-C after so many steps."""

    order = 99

    def __init__(self, steps):
        self.left = steps

    def after_step(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("by", "sign"), [("mae", -1), ("_rmse", -1), ("error_rate", -1), ("valid_loss", -1), ("accuracy", 1), ("dice", 1)]
)
def test_errors_are_better_when_less(by, sign):
    assert KeepBest(by).sign == sign
    with pytest.raises(TaskError, match="got True"):
        KeepBest(True)


def test_validating_predicting_and_looking_for_a_rate_are_no_run(folder, tmp_path, capsys):
    keep, watch = KeepBest("valid_loss"), Progress()
    learn = make(folder, cbs=[keep, watch], path=tmp_path)
    learn.fine_tune(1)
    capsys.readouterr()
    begun = watch.seen
    assert len(learn.validate()) == 2
    learn.get_preds()
    learn.lr_find(num_it=12, show_plot=False, suggest_funcs=None)
    assert "Kept" not in capsys.readouterr().err and watch.seen is begun and watch.ended == 1


def test_patience_of_the_learners_own_stops_all_stages(folder):
    learn = make(folder, cbs=KeepBest("accuracy", patience=2))
    learn.fine_tune(12, 1e-9)
    assert learn.fine_tune_log["stage"].tolist() == [1, 2, 3]


def test_after_a_broken_fit_the_next_one_begins_anew(folder):
    learn, keep = make(folder), KeepBest("valid_loss")
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, 1e-2, cbs=[keep, Stop(len(learn.dls.train) + 1)])
    weights = EachEpoch()
    learn.fit(2, 1e-2, cbs=[keep, weights])
    assert keep.seen == 2
    assert same(learn.model.state_dict(), weights.kept[int(np.argmin([v[1] for v in learn.recorder.values]))])


def test_whoever_keeps_the_best_weights_has_the_last_word(folder):
    """Also where Ctrl-C came in the middle of an epoch, and it was named before what changes weights at the end."""

    class Zero(WholeRun):
        order = 5

        def end(self):
            with torch.no_grad():
                self.learn.model.head[-1].weight.zero_()

    learn, weights = make(folder), EachEpoch()
    with pytest.raises(KeyboardInterrupt):
        learn.fine_tune(3, 1e-2, cbs=[KeepBest("valid_loss"), Zero(), weights, Stop(len(learn.dls.train) + 1)])
    assert same(learn.model.state_dict(), weights.kept[0])
