"""Barlow Twins: its loss is the code's, correlations are those of the batch, and a run of seconds finds pairs."""

import pytest
import torch
from torch import Tensor, nn

from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.joint_embedding.barlow_twins import barlow_loss
from tests.pretext.small_runs import MILD, blots, found_before_and_after, learner, seeded


def pair(b: int = 6, d: int = 4) -> Tensor:
    return torch.randn(2, b, d, generator=seeded(), dtype=torch.float64)


def transcription(z1: Tensor, z2: Tensor, redundancy: float) -> Tensor:
    """The authors' code in loops: a batch norm without scale and shift, z1' z2 / N, one sum on and one beside."""
    n, d = z1.shape

    def normed(z: Tensor) -> list[list[Tensor]]:
        columns = []
        for k in range(d):
            mean = sum(z[i, k] for i in range(n)) / n
            variance = sum((z[i, k] - mean) ** 2 for i in range(n)) / n  # biased, as batch norms normalize
            columns.append([(z[i, k] - mean) / (variance + 1e-5).sqrt() for i in range(n)])
        return columns

    a, b = normed(z1), normed(z2)
    loss = z1.new_zeros(())
    for i in range(d):
        for j in range(d):
            c = sum(x * y for x, y in zip(a[i], b[j])) / n
            loss = loss + ((c - 1) ** 2 if i == j else redundancy * c**2)
    return loss


@pytest.mark.parametrize("redundancy", [0.0051, 0.5])
@pytest.mark.parametrize("b", [2, 6])
def test_loss_and_gradients_are_those_of_the_authors_formula(redundancy, b):
    ours, theirs = pair(b).requires_grad_(), pair(b).requires_grad_()
    task = get_task("barlow_twins", redundancy=redundancy)
    loss, expected = task.loss(ours.transpose(0, 1), None), transcription(*theirs, redundancy)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs))
    assert barlow_loss(*pair(b)) == pytest.approx(transcription(*pair(b), 0.0051).item())  # the code's weight


def test_known_values():
    """Columns of a Hadamard matrix vary by themselves; a copied column costs its two off-diagonal entries."""
    a = torch.tensor([1.0, 1, -1, -1])
    z = torch.stack([a, a * torch.tensor([1.0, -1, 1, -1])], 1).double()
    assert barlow_loss(z, 3 * z + 5) == pytest.approx(0, abs=1e-8)
    assert barlow_loss(z, -z, 0.0) == pytest.approx(8, rel=1e-4)  # opposites: (1 + 1)^2 each
    both = torch.stack([a, a], 1).double()
    assert barlow_loss(both, both, 0.5) == pytest.approx(1, rel=1e-4)  # 0.5 * 2
    assert barlow_loss(z * 0, z * 0) == 2  # collapsed: nothing correlates


def test_the_loss_is_one_number_for_the_batch_and_one_image_alone_has_one_too():
    task, pred = get_task("barlow_twins"), pair().transpose(0, 1)
    rows = task.loss(pred, None, reduction="none")
    assert rows.shape == (6,) and (rows == task.loss(pred, None)).all()
    alone = pred[:1].clone().requires_grad_()
    loss = task.loss(alone, None)
    loss.backward()
    assert loss == 4 and alone.grad.isfinite().all()


def test_half_precision_is_left_for_float32():
    pred = 40 * pair(64, 8).transpose(0, 1)  # sums of squares that float16 does not hold
    task = get_task("barlow_twins")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.loss(pred.half(), None)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(task.loss(pred, None).item(), rel=1e-2)


def test_projector_has_three_layers_and_nothing_after_the_last():
    projector = get_task("barlow_twins", dim=32).model(create_encoder("resnet10t")).projector
    assert [type(m).__name__ for m in projector] == [*["Linear", "BatchNorm1d", "ReLU"] * 2, "Linear"]
    assert [m.out_features for m in projector if isinstance(m, nn.Linear)] == [32, 32, 32]
    assert projector[-1].bias is None


def test_views_go_through_the_network_one_after_the_other():
    x = blots(4)
    task = get_task("barlow_twins", dim=8)
    (views,), _ = task.make_batch(x, generator=seeded(), train=True)
    model = task.model(create_encoder(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    seen = []
    model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    z = model(views)
    assert len(seen) == 2 and all(torch.equal(x, views[:, v]) for v, x in enumerate(seen))
    torch.testing.assert_close(z[:, 1], model.projector(model.encoder(views[:, 1])))


def test_views_are_those_of_byol():
    first, second = (get_task("barlow_twins").recipe(v, 3, 64) for v in range(2))
    for recipe in (first, second):
        assert recipe.scale == (0.08, 1.0) and (recipe.jitter_p, recipe.grey_p, recipe.flip) == (0.8, 0.2, 0.5)
        assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (first.blur_p, first.solarize_p, second.blur_p, second.solarize_p) == (1.0, 0.0, 0.1, 0.2)


@pytest.mark.parametrize("settings", [{"redundancy": -1}, {"dim": 1}, {"dim": 2.5}])
def test_settings_out_of_range(settings):
    with pytest.raises(TaskError, match=next(iter(settings))):
        get_task("barlow_twins", **settings)


def test_pairs_are_found_after_a_few_dozen_steps():
    learn = learner("barlow_twins", n=96, valid_pct=1 / 3, dim=64, views=MILD)
    start = learn.validate()[0]
    before, after = found_before_and_after(learn, 12, 3e-3)
    assert after > max(before, 3 / 16) and learn.validate()[0] < 0.8 * start
