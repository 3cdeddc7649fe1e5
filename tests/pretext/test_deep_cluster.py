"""DeepCluster: training images are asked for the group they were sorted into, others for what the whole image is."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from torch.nn import functional as F

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from tests.pretext.small_runs import blots, learner, pictures, seeded, small_net


def test_loss_is_cross_entropy_with_the_groups_of_training_images():
    learn = learner("deep_cluster", n=60, bs=15, clusters=4)
    net = learn.model.eval()
    net.clusters.labels.copy_(torch.arange(45) % 4)
    x, idx, target = learn.dls.train.one_batch()
    assert x.shape == (15, 1, 2, 24, 24) and target.tolist() == list(range(15))
    pred = net(x, idx)
    clusters = pred[1]
    assert torch.equal(clusters, idx % 4)
    expected = -torch.stack([row.log_softmax(0)[i % 4] for row, i in zip(net.head(net.encoder(x[:, 0])), idx)])
    torch.testing.assert_close(learn.task.loss(pred, target, reduction="none"), expected)
    torch.testing.assert_close(learn.task.loss(pred, target), expected.mean())
    logits = pred[0].detach().requires_grad_()
    learn.task.loss((logits, clusters), target).backward()
    wanted = pred[0].detach().softmax(1)
    for i, cluster in enumerate(idx.tolist()):
        wanted[i, cluster % 4] -= 1
    torch.testing.assert_close(logits.grad, wanted / 15)  # worked out by hand


def test_new_images_are_asked_what_the_whole_of_them_is():
    learn = learner("deep_cluster", n=60, clusters=4)
    net = learn.model.eval()
    images = next(iter(learn.dls.valid.plain))[0]
    x, idx, _ = learn.dls.valid.one_batch()
    whole = learn.encoder.prepare(images.as_subclass(torch.Tensor))  # what it will be given downstream
    torch.testing.assert_close(x[:, 1].as_subclass(torch.Tensor), whole, atol=1e-4, rtol=0)
    logits, clusters = net(x, idx)
    torch.testing.assert_close(logits, net.head(net.encoder(x[:, 0])))
    assert torch.equal(clusters, net.head(net.encoder(x[:, 1])).argmax(1))
    accuracy = learn.validate()[1]
    said, named = learn.get_preds()[0][0].argmax(1), learn.get_preds()[0][1]
    assert accuracy == pytest.approx((said == named).float().mean().item())


@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_sees_edges(channels):
    task, x = get_task("deep_cluster"), blots(2, channels=channels)
    (views, _), _ = task.make_batch(x, generator=seeded(), train=True, idx=torch.arange(2))
    assert views.shape == (2, 1, 2, 36, 36)
    (flat, _), _ = task.make_batch(torch.full_like(x, 0.3), generator=seeded(), train=True, idx=torch.arange(2))
    torch.testing.assert_close(flat, torch.full_like(flat, 0.5))  # no edge anywhere, at the borders neither
    plain = get_task("deep_cluster", sobel=False)
    (views, _), _ = plain.make_batch(x, generator=seeded(), train=True, idx=torch.arange(2))
    assert views.shape == (2, 1, channels, 36, 36)


def test_one_cluster_for_a_hundred_images_and_clusters_for_thirty_steps(capsys):
    learn = learner("deep_cluster", n=60)  # 45 in 3 batches of 15
    assert "10 clusters for 45 images, anew every 10 epochs" in capsys.readouterr().err
    assert learn.model.head[1].out_features == 10 and learn.task.settings()["clusters"] is None

    task = get_task("deep_cluster")
    train = type("Loader", (), {"bs": 20, "__len__": lambda _: 250})()
    dls = type("Loaders", (), {"train_ds": range(5_000), "loaders": [], "train": train})
    task.views = "photo"  # else the images would be looked at
    task.setup(dls, learn.encoder)
    assert (task.n_clusters, task.lasts, task.passes) == (50, 1, 2)


def test_more_clusters_than_images_are_refused():
    with pytest.raises(TaskError, match=r"sort 45 images into 46 clusters"):
        learner("deep_cluster", n=60, clusters=46)


@pytest.mark.parametrize("settings", [{"clusters": 1}, {"every": 0}, {"dim": 0}, {"sobel": 1}])
def test_settings_out_of_range(settings):
    with pytest.raises(TaskError, match=next(iter(settings))):
        get_task("deep_cluster", **settings)


def test_groups_that_are_evident_are_found_and_named():
    """Stripes this way, stripes that way, none: three groups by edges, in any color."""
    rng = np.random.default_rng(0)
    x = np.zeros((120, 24, 24, 3), np.uint8)
    kinds = np.arange(120) % 3
    for i, kind in enumerate(kinds):
        wave = np.sin(np.arange(24) * 1.5 + rng.uniform(0, 6)) * 60 if kind < 2 else np.zeros(24)
        x[i] = 120 + (wave[:, None, None] if kind == 0 else wave[None, :, None]) + rng.integers(-40, 40, 3)
    set_seed(0)
    dls = UnlabeledDataLoaders.from_array(x, size=None, bs=16, valid_pct=0.25, num_workers=0)
    learn = pretext_learner(dls, "deep_cluster", small_net, clusters=6, every=4, views={"scale": [0.5, 1]})
    learn.remove_cb(ProgressCallback)
    with learn.no_logging():
        learn.fit(12, 1e-2)
    # which image is which: the grey level does not tell, the edges do
    pixels = torch.stack(
        [
            b
            for batch in learn.dls.train.plain.new(shuffle=False, drop_last=False)
            for b in batch[0].as_subclass(torch.Tensor)
        ]
    )
    across, down = pixels.std(3).mean((1, 2)) > 0.05, pixels.std(2).mean((1, 2)) > 0.05
    truth = across.long() + 2 * down.long()
    assert truth.unique().numel() == 3
    labels = learn.model.clusters.labels
    mixed = torch.stack([truth[labels == i].bincount(minlength=3) for i in labels.unique()])
    assert mixed.amax(1).sum() > 0.9 * len(truth)  # hardly a group with images of two kinds
    assert learn.validate()[1] > 0.6 and learn.model.clusters.agreement > 0.6


def test_pictures_tell_the_cluster_and_what_was_named():
    learn = learner("deep_cluster", n=60, clusters=4)
    plt.close("all")
    learn.show_batch(max_n=4)
    assert [ax.get_title() for ax in plt.gcf().axes] == [f"one view of image {i}" for i in range(4)]
    learn.show_results(max_n=4)
    titles = [ax.get_title() for ax in plt.gcf().axes]
    assert len(titles) == 4 and all("cluster" in title and "named" in title for title in titles)
    answer = learn.predict(pictures(1, seed=5)[0])
    assert answer.decoded.shape == (1, 2)
    plt.close("all")


def test_gradients_reach_encoder_and_head():
    learn = learner("deep_cluster", n=60, clusters=4)
    x, idx, _ = learn.dls.train.one_batch()
    loss = F.cross_entropy(*learn.model(x, idx))
    grads = torch.autograd.grad(loss, [learn.encoder.body[0].weight, learn.model.head[1].weight])
    assert all(g.abs().sum() > 0 for g in grads)
