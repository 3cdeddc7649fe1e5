"""Signals without labels, and the alarm: provoked collapses raise it, healthy runs do not."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.tracker import SaveModelCallback
from fastai.torch_core import set_seed
from torch import nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.collapse import SIGNALS, CollapseAlarm, Level, Signals, has_collapsed
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.errors import TaskError
from selfsup_fastai.features import alignment, effective_rank, feature_std, uniformity
from selfsup_fastai.losses import units
from selfsup_fastai.pretext.learner import pretext_learner

WEAK = {"strength": 0.3, "scale": [0.5, 1.0]}


def tiny() -> nn.Module:
    convs = [nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32)]
    return nn.Sequential(*convs, nn.ReLU())


def learner(task: str, n: int = 96, **settings):
    set_seed(0, reproducible=True)
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(coarse, (32, 32), mode="bilinear").permute(0, 2, 3, 1)
    dls = UnlabeledDataLoaders.from_array((x.numpy() * 255).astype(np.uint8), size=32, bs=32, valid_pct=0.34, seed=1)
    return pretext_learner(dls, task, tiny, **settings)


def trained(learn, epochs: int, lr: float = 1e-2, cbs=None):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr, cbs=cbs)
    return learn


# --- what the numbers are ---------------------------------------------------------------------------------------------


def test_alignment_and_uniformity_equal_their_definitions():
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    a, b = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    apart = sum(float(((p - q) ** 2).sum()) for p, q in zip(a, b)) / 6
    assert alignment(x, y) == pytest.approx(apart, rel=1e-5)
    pairs = [(i, j) for i in range(6) for j in range(i)]
    near = np.mean([np.exp(-2 * float(((a[i] - a[j]) ** 2).sum())) for i, j in pairs])
    assert uniformity(x) == pytest.approx(np.log(near), rel=1e-5)
    same = torch.ones(5, 3)
    assert uniformity(same) == pytest.approx(0, abs=1e-6) and alignment(same, 7 * same) == pytest.approx(0, abs=1e-6)


def test_deviation_is_one_in_all_directions_and_nought_in_one():
    assert feature_std(torch.randn(4000, 64)) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.randn(1, 64) * torch.rand(50, 1)) == pytest.approx(0, abs=1e-5)  # length is not counted
    with pytest.raises(TaskError, match="at least two"):
        feature_std(torch.randn(1, 3))


# --- signals ----------------------------------------------------------------------------------------------------------


def test_signals_are_columns_of_the_encoder_as_it_is_after_the_epoch():
    learn, signals = learner("rotation"), Signals(40)
    usual = list(learn.metrics)
    trained(learn, 3, cbs=signals)
    assert learn.recorder.metric_names[-5:] == [*SIGNALS, "time"]
    assert list(signals.history.columns) == ["epoch", *SIGNALS] and len(signals.history) == 3
    assert (
        list(signals.history.iloc[-1][1:])
        == list(learn.final_record)[-4:]
        == list(signals.look(learn.encoder).values())
    )
    assert list(learn.metrics) == usual and set(SIGNALS) <= set(learn.last_values)
    assert signals.history.nunique()["rank"] == 3
    # from the images themselves
    images = [learn.dls.valid_ds[i][0] for i in range(33)]
    images += [learn.dls.train_ds[i * 63 // 7][0] for i in range(7)]
    x = torch.stack([torch.as_tensor(np.array(im)).permute(2, 0, 1) for im in images]).float() / 255
    with torch.no_grad():
        z = learn.encoder.eval()(learn.encoder.prepare(x))
    last = signals.history.iloc[-1]
    assert last["rank"] == pytest.approx(effective_rank(z), rel=1e-3)
    assert last["std"] == pytest.approx(feature_std(z), rel=1e-3)
    assert last["uniformity"] == pytest.approx(uniformity(z), rel=1e-3)


def test_signals_change_nothing_in_the_run_and_look_the_same_way_each_time():
    plain, watched = trained(learner("simclr"), 2), trained(learner("simclr"), 2, cbs=Signals(40))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), watched.model.parameters()))
    assert watched.validate()[:2] == plain.validate()[:2]


def test_signals_go_on_over_fits_and_draw_one_picture():
    learn, signals = learner("rotation"), Signals(20)
    with pytest.raises(TaskError, match="no signals yet"):
        signals.plot()
    trained(learn, 2, cbs=signals)
    trained(learn, 1, cbs=signals)
    learn.validate()
    learn.get_preds()
    assert signals.history["epoch"].tolist() == [0, 1, 2]
    axes = signals.plot()
    assert [ax.get_title() for ax in axes] == list(SIGNALS.values())
    assert list(axes[0].lines[0].get_ydata()) == signals.history["rank"].tolist()
    plt.close("all")


def test_fastai_may_keep_the_epoch_of_highest_rank(tmp_path):
    learn, signals = learner("rotation", path=tmp_path), Signals(40)
    trained(learn, 4, cbs=[signals, SaveModelCallback(monitor="rank", comp=np.greater)])  # loads the best in the end
    assert signals.look(learn.encoder)["rank"] == pytest.approx(signals.history["rank"].max(), rel=1e-6)


def test_signals_of_images_that_the_encoder_eats_in_another_form():
    learn, signals = learner("colorization"), Signals(20)
    trained(learn, 1, cbs=signals)
    assert pd.notna(signals.history.iloc[0]).all()


# --- the alarm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "deviations, ranks, alarm",
    [
        ([0.15, 0.3], [5, 9], False),
        ([0.01], [1], False),  # a fresh network; it may rise
        ([0.05, 0.08], [3, 4], False),
        ([0.09, 0.08], [3, 3], True),
        ([0.9, 0.6], [5, 4], False),
        ([0.9, 0.44], [5, 4], True),
        ([0.9, 0.3, 0.4], [5, 4, 4], False),  # on its way back
        ([0.9, 0.95], [8, 3.9], True),
        ([0.9, 0.95, 0.95], [8, 3, 3.9], False),
        ([0.9, float("nan")], [5, 5], True),
    ],
)
def test_when_the_alarm_is_given(deviations, ranks, alarm):
    assert has_collapsed([Level(*values) for values in zip(deviations, ranks)]) == alarm


def test_where_length_counts_a_small_deviation_is_none_yet():
    levels = [Level(0.02, 5), Level(0.02, 5)]
    assert has_collapsed(levels) and not has_collapsed(levels, low=0)


def without_stop_gradient(learn):
    def loss(pred, target, reduction="mean"):
        z, p = pred
        each = 1 - (units(p) * units(z.flip(1))).sum(-1).mean(1)
        return each.mean() if reduction == "mean" else each

    learn.task.loss = loss


def without_predictor(learn):
    learn.model.predictor = nn.Identity()


@pytest.mark.parametrize(
    "task, broken, settings, epochs, said",
    [
        pytest.param(
            *("simsiam", without_stop_gradient, {"dim": 64, "bottleneck": 16}, 60, "one view is held constant"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("simsiam", without_predictor, {"dim": 64, "bottleneck": 16}, 80, "the predictor"),
            marks=pytest.mark.slow,
        ),
        ("byol", without_predictor, {"dim": 32, "hidden": 64}, 30, "raise the momentum"),
        ("vicreg", None, {"dim": 64, "variance": 0.0}, 40, "The variance term"),
    ],
)
def test_provoked_collapses_raise_it(task, broken, settings, epochs, said, capsys):
    learn = learner(task, views=WEAK, **settings)
    if broken:
        broken(learn)
    trained(learn, epochs, 3e-2 if broken is without_predictor else 1e-2)
    alarm = learn.collapse_alarm
    assert alarm.epochs and len(alarm.levels) == epochs
    err = capsys.readouterr().err
    assert err.count("is collapsing") == 1 and said in err


LONG = ("simsiam", "barlow_twins", "nnclr", "mocov3", "swav", "dino")


@pytest.mark.parametrize(
    "task", ["byol", "vicreg", "simclr", "moco", *(pytest.param(task, marks=pytest.mark.slow) for task in LONG)]
)
def test_healthy_runs_do_not(task, capsys):
    small = {"prototypes": 64, "hidden": 64, "dim": 32} if task == "dino" else {}
    learn = trained(learner(task, views=WEAK, **small), 30)
    alarm = learn.collapse_alarm
    assert not alarm.epochs and "collapsing" not in capsys.readouterr().err
    learn.validate()
    learn.get_preds()
    assert len(alarm.levels) == 30


def test_tasks_that_cannot_collapse_are_left_alone():
    assert trained(learner("rotation"), 2).collapse_alarm.levels == []


def test_a_run_that_diverged_is_one_too():
    learn = learner("simclr", views=WEAK)
    alarm = CollapseAlarm()
    alarm.learn = learn
    assert np.isnan(alarm.measure(torch.full((3, 4), float("nan")))).all()
