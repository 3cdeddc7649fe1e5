"""When clusters are made anew, of what, and how often an epoch then draws each image."""

from collections import Counter
from functools import partial
from random import Random

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import OptimWrapper

from selfsup_fastai.callbacks.clusters import EqualShares
from selfsup_fastai.callbacks.collapse import Signals
from selfsup_fastai.encoders.clusters import Clusters
from selfsup_fastai.errors import TaskError
from selfsup_fastai.features import embed
from tests.pretext.small_runs import learner


class Watch(Callback):
    """What an epoch began with."""

    order = 70  # after clusters are made

    def __init__(self):
        self.labels, self.heads, self.states, self.decays, self.drawn = [], [], [], [], []

    def before_train(self):
        self.labels.append(self.model.clusters.labels.clone())
        self.heads.append(self.model.head[1].weight.detach().clone())
        states = [self.opt.state[p] for p in self.model.head.parameters() if p in self.opt.state]
        self.states.append(["step" in state for state in states])
        self.decays.append([state.get("do_wd", True) for state in states])

    def before_batch(self):
        if self.training:
            self.drawn.append(self.xb[1].clone())


def fit(epochs: int, **settings):
    learn, watch = learner("deep_cluster", n=100, valid_pct=0.2, clusters=5, **settings), Watch()
    with learn.no_logging():
        learn.fit(epochs, 1e-2, cbs=watch)
    return learn, watch


def test_groups_are_drawn_from_equally_often():
    labels = torch.tensor([0] * 30 + [1] * 6 + [3] * 4)
    drawn = EqualShares(labels, Random(0))(list(range(40)))
    assert len(drawn) == 40
    counts = Counter(labels[i].item() for i in drawn)
    assert max(counts.values()) == 14 and min(counts.values()) >= 12  # 14 each, of which two are left over
    times = Counter(drawn)
    assert max(times[i] for i in range(30)) == 1  # a large group's come once at most
    assert all(times[i] in (1, 2, 3) for i in range(30, 36)) and all(times[i] in (2, 3, 4) for i in range(36, 40))
    assert drawn == EqualShares(labels, Random(0))(list(range(40))) != EqualShares(labels, Random(1))(list(range(40)))
    assert drawn != sorted(drawn)


@pytest.mark.parametrize("every", [1, 2])
def test_clusters_and_head_are_made_anew_when_it_is_time(every):
    learn, watch = fit(4, every=every)
    for i in range(1, 4):
        anew = i % every == 0
        assert len(watch.states[i]) == 2 and all(known is not anew for known in watch.states[i])
        assert anew or torch.equal(watch.labels[i], watch.labels[i - 1])
        assert not anew or 0.005 < watch.heads[i].std() < 0.015
        assert watch.decays[i] == [True, False]  # no decay of the bias, as fastai has it
    assert learn.model.clusters.made_at == (3 if every == 1 else 2)
    assert learn.task.passes == 1 + 1 / every


def test_they_are_those_of_the_images_without_augmentation():
    learn, watch = learner("deep_cluster", n=100, valid_pct=0.2, clusters=5), Watch()
    x, again = embed(learn.encoder, learn.dls.train.plain).x, Clusters(80, 5, 8)
    again.seed.copy_(learn.model.clusters.seed)
    again.renew(x, epoch=0)
    with learn.no_logging():
        learn.fit(1, 1e-2, cbs=watch)
    assert torch.equal(watch.labels[0], again.labels) and again.n_used == 5


def test_the_columns_tell_how_many_there_are_and_what_stayed():
    learn, _ = fit(3, every=1)
    last = list(learn.final_record[1:])
    assert list(learn.validate()) == pytest.approx(last)
    assert len(learn.cluster_columns.rows) == 3
    learn, _ = fit(3, every=1)
    names = learn.recorder.metric_names
    values = [dict(zip(names[1:], row)) for row in learn.recorder.values]
    assert values[0]["nmi"] == 0 and all(0 < row["nmi"] <= 1 for row in values[1:])
    assert all(row["clusters"] == 5 for row in values)


def test_an_epoch_draws_from_all_clusters_and_later_ones_from_all_images():
    learn, watch = fit(1)
    drawn = torch.cat(watch.drawn)
    assert len(drawn) == 80  # whole batches of 16
    counts = watch.labels[0][drawn].bincount(minlength=5)
    assert (counts == 16).all()
    assert sorted(learn.dls.train.get_idxs()) == list(range(80))  # as before


def test_looking_does_not_sort():
    learn = learner("deep_cluster", n=60)
    learn.validate()
    learn.get_preds(ds_idx=0)
    learn.show_batch()
    assert learn.model.clusters.made_at == -1


def test_the_same_seed_gives_the_same_run():
    first, second = (fit(2)[0] for _ in range(2))
    assert torch.equal(first.model.clusters.labels, second.model.clusters.labels)
    for a, b in zip(first.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)


def test_what_torchs_optimizers_remember_of_the_head_is_forgotten_too():
    class Steps(Callback):
        order = 70

        def __init__(self):
            self.seen = []

        def before_train(self):
            state = self.opt.opt.state
            self.seen.append([p in state for p in (self.model.head[1].weight, self.model.encoder.body[0].weight)])

    opt, steps = partial(OptimWrapper, opt=torch.optim.Adam), Steps()
    learn = learner("deep_cluster", n=100, valid_pct=0.2, clusters=5, every=1, opt_func=opt)
    with learn.no_logging():
        learn.fit(2, 1e-3, cbs=steps)
    assert steps.seen == [[False, False], [False, True]]


def test_a_head_drawn_anew_has_no_gradient_of_the_one_before():
    """Of a step that began with the clusters of the epoch before."""

    class Look(Callback):
        order = 70

        def __init__(self):
            self.seen = []

        def before_train(self):
            head, first = self.model.head[1].weight.grad, self.model.encoder.body[0].weight.grad
            self.seen.append([grad is not None and bool(grad.any()) for grad in (head, first)])

    learn, look = learner("deep_cluster", n=100, valid_pct=0.2, clusters=5, every=1), Look()
    with learn.no_logging():
        learn.fit(2, 1e-3, cbs=[look, GradientAccumulation(1000)])
    assert look.seen == [[False, False], [False, True]]


def test_columns_of_two_callbacks_stand_once_however_often_one_trains():
    learn = learner("deep_cluster", n=100, valid_pct=0.2, clusters=5)
    once = ["epoch", "train_loss", "valid_loss", "accuracy", "nmi", "clusters", *Signals.names, "time"]
    with learn.no_logging():
        for _ in range(2):
            learn.fit(1, 1e-2, cbs=Signals(16))
            assert sorted(learn.recorder.metric_names) == sorted(once)
    assert len(learn.validate()) == 4


def test_a_net_that_has_diverged_is_named():
    learn = learner("deep_cluster", n=100, valid_pct=0.2, clusters=5)
    torch.nn.init.constant_(learn.encoder.body[0].weight, torch.nan)
    with pytest.raises(TaskError, match="the encoder has diverged"):
        learn.fit(1)


def test_the_learning_rate_finder_asks_for_clusters_too():
    learn, watch = learner("deep_cluster", n=100, valid_pct=0.2, clusters=5), Watch()
    learn.add_cb(watch)
    learn.lr_find(num_it=6, show_plot=False)
    assert all(labels.unique().numel() == 5 for labels in watch.labels) and watch.labels
    assert learn.model.clusters.made_at == -1  # and leaves nothing behind
    assert sorted(learn.dls.train.get_idxs()) == list(range(80))


def test_a_fit_that_was_broken_off_leaves_a_loader_that_goes_on():
    class Stop(Callback):
        def after_batch(self):
            if self.training:
                raise KeyboardInterrupt

    learn = learner("deep_cluster", n=100, valid_pct=0.2, clusters=5)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, 1e-2, cbs=Stop())
    learn.remove_cb(Stop)
    with learn.no_logging():
        learn.fit(1, 1e-2)
    assert learn.recorder.metric_names.count("nmi") == 1
    assert sorted(learn.dls.train.get_idxs()) == list(range(80))
