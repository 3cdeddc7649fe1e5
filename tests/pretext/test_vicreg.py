"""VICReg: three terms with the code's normalizations, and what becomes of embeddings without the one for variance."""

from statistics import stdev

import pytest
import torch
from torch import Tensor, nn

from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.joint_embedding.vicreg import deviation, vicreg_loss
from tests.pretext.small_runs import MILD, found_before_and_after, learner, seeded

WEIGHTS = [(25, 25, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)]


def pair(b: int = 6, d: int = 4) -> Tensor:
    return 0.5 * torch.randn(2, b, d, generator=seeded(), dtype=torch.float64)


def transcription(z1: Tensor, z2: Tensor, invariance: float, variance: float, covariance: float) -> Tensor:
    """The authors' code in loops."""
    n, d = z1.shape
    loss = invariance * sum((z1[i, k] - z2[i, k]) ** 2 for i in range(n) for k in range(d)) / (n * d)
    for z in (z1, z2):
        means = [sum(z[i, k] for i in range(n)) / n for k in range(d)]

        def together(j: int, k: int, z: Tensor = z, means: list = means) -> Tensor:
            return sum((z[i, j] - means[j]) * (z[i, k] - means[k]) for i in range(n)) / (n - 1)

        for k in range(d):
            deviation = (together(k, k) + 0.0001).sqrt()
            loss = loss + variance * (1 - deviation).clamp(min=0) / d / 2
            loss = loss + covariance * sum(together(j, k) ** 2 for j in range(d) if j != k) / d
    return loss


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("b", [2, 6])
def test_loss_and_gradients_are_those_of_the_authors_formula(weights, b):
    ours, theirs = pair(b).requires_grad_(), pair(b).requires_grad_()
    names = ("invariance", "variance", "covariance")
    loss = get_task("vicreg", **dict(zip(names, weights))).loss(ours.transpose(0, 1), None)
    expected = transcription(*theirs, *weights)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs))


def test_defaults_are_the_papers():
    assert vicreg_loss(*pair()) == pytest.approx(transcription(*pair(), 25, 25, 1).item())
    assert get_task("vicreg").loss(pair().transpose(0, 1), None) == vicreg_loss(*pair())


def test_the_loss_is_one_number_for_the_batch_and_one_image_alone_has_one_too():
    task, pred = get_task("vicreg"), pair().transpose(0, 1)
    rows = task.loss(pred, None, reduction="none")
    assert rows.shape == (6,) and (rows == task.loss(pred, None)).all()
    alone = pred[:1].clone().requires_grad_()
    loss = task.loss(alone, None)
    loss.backward()
    off = (alone[:, 0] - alone[:, 1]).square().mean()
    assert loss.item() == pytest.approx((25 * off + 25 * 0.99).item()) and alone.grad.isfinite().all()


def test_half_precision_is_left_for_float32():
    pred = 40 * pair(64, 8).transpose(0, 1)
    task = get_task("vicreg")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.loss(pred.half(), None)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(task.loss(pred, None).item(), rel=1e-2)


def test_expander_has_three_layers_and_nothing_after_the_last():
    expander = get_task("vicreg", dim=32).model(create_encoder("resnet10t")).projector
    assert [type(m).__name__ for m in expander] == [*["Linear", "BatchNorm1d", "ReLU"] * 2, "Linear"]
    assert [m.out_features for m in expander if isinstance(m, nn.Linear)] == [32, 32, 32]
    assert expander[-1].bias is None


@pytest.mark.parametrize(
    "settings",
    [{"invariance": -1}, {"variance": "much"}, {"covariance": -0.1}, {"dim": 1}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(TaskError, match=next(iter(settings))):
        get_task("vicreg", **settings)


def test_deviation_is_that_of_the_features():
    pred = 0.5 * torch.randn(6, 2, 4, generator=seeded())
    columns = [pred[:, 0, k].tolist() for k in range(4)]
    assert deviation(pred).item() == pytest.approx(sum(map(stdev, columns)) / 4)
    assert deviation(pred[:1]) == 0


def test_embeddings_collapse_without_the_variance_term_and_not_with_it():
    left = {}
    for variance in (25, 0):
        learn = learner("vicreg", n=48, dim=8, variance=variance, views={"strength": 0.2, "scale": [0.5, 1.0]})
        with learn.no_logging():
            learn.fit(25, 1e-2)
        left[variance] = learn.validate()[2]
    assert left[25] > 0.4 and left[0] < 0.06


def test_pairs_are_found_after_a_few_dozen_steps():
    learn = learner("vicreg", n=96, valid_pct=1 / 3, dim=64, views=MILD)
    start = learn.validate()[0]
    before, after = found_before_and_after(learn, 12, 3e-3)
    assert after > max(before, 3 / 16) and learn.validate()[0] < start - 2
