"""SwAV: its codes are balanced as the authors' are, its queue enters when it should, its prototypes are tended."""

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.clustering.swav import sinkhorn
from selfsup_fastai.pretext.joint import found_pair
from selfsup_fastai.pretext.learner import pretext_learner

EASY = {"n_small": 2, "border": 0.5, "views": {"strength": 0.2}}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny() -> nn.Module:
    first = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())


def learner(n: int = 40, bs: int = 8, valid_pct: float = 0.2, **settings):
    coarse = torch.rand(n, 3, 4, 4, generator=seeded(1))
    x = F.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
    array = (x.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=bs, num_workers=0, valid_pct=valid_pct)
    set_seed(0)
    return pretext_learner(dls, "swav", tiny, **{**EASY, **settings})


def fit(learn, epochs: int, lr: float = 1e-2, **kwargs) -> None:
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr, **kwargs)


# --- codes ------------------------------------------------------------------------------------------------------------


def authors_sinkhorn(scores: np.ndarray, epsilon: float, rounds: int) -> np.ndarray:
    """In plain loops: prototypes by rows, all scaled to sum 1; rows to 1 / K, columns to 1 / B; at last times B."""
    q = np.exp(scores / epsilon).T
    k, b = q.shape
    q /= q.sum()
    for _ in range(rounds):
        for row in range(k):
            q[row] /= q[row].sum() * k
        for column in range(b):
            q[:, column] /= q[:, column].sum() * b
    return (q * b).T


@pytest.mark.parametrize("rounds", [1, 3, 10])
@pytest.mark.parametrize("n, k", [(12, 5), (4, 9)])
def test_codes_are_the_authors(n, k, rounds):
    cosines = torch.rand(n, k, generator=seeded(), dtype=torch.float64) * 2 - 1
    found = sinkhorn(cosines, 0.05, rounds)
    np.testing.assert_allclose(found, authors_sinkhorn(cosines.numpy(), 0.05, rounds), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.sum(1), torch.ones(n, dtype=torch.float64))


def test_many_rounds_use_all_prototypes_equally():
    cosines = torch.rand(40, 5, generator=seeded()) * 0.4
    cosines[:, 0] += 0.5  # everybody's favorite
    assert (sinkhorn(cosines, 0.05, 100).sum(0) - 8).abs().max() < 0.05
    assert (cosines / 0.05).softmax(1).sum(0)[0] > 35


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_are_balanced_in_float32_and_finite_at_the_rims(dtype):
    cosines = torch.ones(4, 6, dtype=dtype)
    cosines[:, 1:] = -1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sinkhorn(cosines, 0.03, 3)
    assert codes.dtype == torch.float32 and torch.isfinite(codes).all()
    torch.testing.assert_close(codes, torch.full((4, 6), 1 / 6))  # all images alike: each prototype gets its share
    assert torch.isfinite(sinkhorn(torch.rand(1, 6, dtype=dtype), 0.05, 3)).all()  # one image


def test_codes_have_no_gradient():
    assert not sinkhorn(torch.rand(4, 3, requires_grad=True), 0.05, 3).requires_grad


# --- the network ------------------------------------------------------------------------------------------------------


def test_a_prediction_is_embeddings_cosines_and_codes_of_the_large_crops():
    learn = learner(prototypes=10, queue=0, dim=12)
    large, small, _ = learn.dls.one_batch()
    net = learn.model
    net.eval()  # so that crops can be run one by one
    z, cosines, codes = net(large, small)
    assert z.shape == (8, 4, 12) and cosines.shape == (8, 4, 10) and codes.shape == (8, 2, 10)
    alone = F.normalize(net.projector(net.encoder(small[:, 1])), dim=1)
    torch.testing.assert_close(z[:, 3], alone)
    torch.testing.assert_close(cosines[:, 3], alone @ net.prototypes.weight.T)
    for crop in range(2):  # each large crop is balanced by itself
        torch.testing.assert_close(codes[:, crop], sinkhorn(cosines[:, crop], 0.05, 3))
    assert not codes.requires_grad and cosines.requires_grad
    kinds = [type(m).__name__ for m in net.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_the_loss_is_the_papers_swapped_prediction():
    cosines = (torch.rand(6, 4, 5, generator=seeded(), dtype=torch.float64) * 2 - 1).requires_grad_()
    task = get_task("swav", temperature=0.2)
    codes = torch.stack([sinkhorn(cosines[:, crop], 0.05, 3) for crop in range(2)], 1)
    plain, total = cosines.detach().clone().requires_grad_(), 0
    for i in range(6):
        for code in range(2):
            q = authors_sinkhorn(plain.detach()[:, code].numpy(), 0.05, 3)[i]
            for crop in range(4):
                if crop != code:
                    scores = [plain[i, crop, k] / 0.2 for k in range(5)]
                    log_sum = torch.logsumexp(torch.stack(scores), 0)
                    total = total - sum(q[k] * (scores[k] - log_sum) for k in range(5)) / 3 / 2 / 6
    loss = task.loss((None, cosines, codes), torch.arange(6))
    loss.backward()
    total.backward()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(cosines.grad, plain.grad)
    assert task.loss((None, cosines, codes), torch.arange(6), reduction="none").shape == (6,)


# --- order of events --------------------------------------------------------------------------------------------------


class Watch(Callback):
    """What was in the queues and prototypes when a batch was predicted, and what came out."""

    order = 8

    def __init__(self):
        self.seen = []

    def before_batch(self):
        if self.training:
            net = self.learn.model
            rows = [queue.rows.clone() for queue in net.queues]
            self.before = rows, net.prototypes.weight.detach().clone(), net.queues[0].is_full if rows else False

    def after_pred(self):
        if self.training:
            self.seen.append((*self.before, *(t.detach() for t in self.learn.pred)))


def test_embeddings_enter_after_the_step_and_are_balanced_along_once_the_queue_is_full_and_its_time_has_come():
    learn = learner(prototypes=6, queue=16, queue_epochs=1, frozen_epochs=0)  # 32 images: four batches an epoch
    watch = Watch()
    fit(learn, 10, cbs=watch)  # 15 % of the run are six steps, one epoch is less
    for step, (rows, weight, full, _, cosines, codes) in enumerate(watch.seen):
        assert full == (step >= 2)
        for crop in range(2):
            if step >= 2:  # the last two batches, and nothing of this one
                earlier = torch.cat([watch.seen[step - 2][3][:, crop], watch.seen[step - 1][3][:, crop]])
                at = torch.cdist(earlier, rows[crop]).argmin(1)
                torch.testing.assert_close(rows[crop][at], earlier)
                assert len(at.unique()) == 16
            together = cosines[:, crop]
            if step >= 4:  # an epoch is over
                together = torch.cat([together, rows[crop] @ weight.T])
            torch.testing.assert_close(codes[:, crop], sinkhorn(together, 0.05, 3)[:8])
    queue = learn.model.queues[0].rows.clone()
    with learn.no_bar():
        first = learn.validate()
        learn.get_preds()
        assert learn.validate() == first
    assert torch.equal(queue, learn.model.queues[0].rows)


def test_prototypes_are_frozen_for_an_epoch_and_of_length_1():
    learn = learner(prototypes=6, queue=0)
    watch = Watch()
    fit(learn, 10, cbs=watch)
    weights = [seen[1] for seen in watch.seen]
    assert all(torch.equal(weights[0], w) for w in weights[:5]) and not torch.equal(weights[0], weights[5])
    for weight in weights:
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(6))


# --- small data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, bs, prototypes, queue, found",
    [
        (200, 32, None, None, (20, 0)),
        (100, 8, None, None, (16, 8)),
        (1000, 64, None, None, (100, 64)),
        (10_000, 64, None, None, (1000, 960)),
        (60_000, 256, None, None, (3000, 2816)),
        (1_300_000, 4096, None, None, (3000, 0)),
        (100, 8, 300, None, (300, 48)),  # at most half of the images, in whole batches
        (100, 8, 50, 0, (50, 0)),
        (100, 8, None, 24, (16, 24)),
    ],
)
def test_prototypes_and_queue_follow_the_data(images, bs, prototypes, queue, found, capsys):
    class Split(list):
        pass

    class Loader:
        pass

    class Loaders:
        train, train_ds, loaders = Loader(), range(images), [None]

    Loaders.train.bs = bs
    task = get_task("swav", prototypes=prototypes, queue=queue, n_small=0)

    class Encoder:
        image_channels = 3

    task.setup(Loaders, Encoder)
    assert (task.n_prototypes, task.n_queued) == found
    said = capsys.readouterr().err
    assert f"swav: {found[0]:,} prototypes for {images:,} images" in said
    assert (f"a queue of {found[1]:,} embeddings" if found[1] else "no queue") in said
    assert task.settings()["prototypes"] == prototypes  # what was asked for stays as it was


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"queue": -1}, "queue is a whole number, at least 0"),
        ({"epsilon": 0.01}, "epsilon is a number, at least 0.03; got 0.01"),
        ({"rounds": 0}, "rounds is a whole number, at least 1"),
        ({"queue_epochs": 1.5}, "queue_epochs is a whole number"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(TaskError, match=said):
        get_task("swav", **settings)


def test_a_short_run_finds_more_pairs_and_more_groups():
    learn = learner(bs=32, prototypes=64, queue=0)
    same = learn.dls.train.new(shuffle=False)
    with learn.no_bar(), learn.no_logging():
        before, _, groups = learn.validate(dl=same)
        learn.fit(40, 3e-3)
        loss, found, after = learn.validate(dl=same)
    assert loss < before - 0.2 and found > 4 / 32 and groups < 1.1 and after > 1.25  # guessing finds one of 32
    assert learn.task.metrics[0] is found_pair


def stays(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def test_queues_and_clocks_are_saved(tmp_path):
    learn = learner(prototypes=6, queue=16)
    learn.path = tmp_path
    fit(learn, 2)
    kept = stays(learn.model)
    learn.save("here")
    fit(learn, 1)
    learn.load("here")
    assert all(torch.equal(v, kept[k]) for k, v in learn.model.state_dict().items())
    assert learn.model.clock.epochs == 2 and learn.model.queues[1].entered == 64
