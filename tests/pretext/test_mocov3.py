"""MoCo v3: its loss, and the recipes of convnets and of vision transformers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import vit_b_16

from selfsup_fastai.callbacks.ema import EMATeacher
from selfsup_fastai.data.recipes import BYOL_1, BYOL_2
from selfsup_fastai.encoders.checkpoint import load_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.joint import found_pair, spread
from selfsup_fastai.pretext.joint_embedding.mocov3 import MoCoV3, patch_embedding
from tests.pretext.vectors import learner, measured, net
from tests.test_contract import learner as small_learner
from tests.test_contract import loaders, pictures

VIT = "test_vit"  # timm's smallest


def answers(b: int = 5, d: int = 6) -> tuple[Tensor, Tensor]:
    """Queries and keys, (B, 2, D) each."""
    z = torch.randn(2, b, 2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return z[0].clone().requires_grad_(), z[1].clone().requires_grad_()


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_is_the_authors_cross_entropy_both_ways(temperature):
    q, k = answers()
    task, rows = get_task("mocov3", temperature=temperature), torch.arange(5)
    loss = task.loss((q, k), rows)
    loss.backward()
    p = q.detach().clone().requires_grad_()
    terms = torch.zeros(5, dtype=torch.float64)
    for view in range(2):
        for i in range(5):
            query, keys = p[i, view], k[:, 1 - view].detach()
            logits = torch.stack([query @ key / (query.norm() * key.norm()) for key in keys]) / temperature
            terms[i] = terms[i] + 2 * temperature * (logits.logsumexp(0) - logits[i])
    terms.mean().backward()
    torch.testing.assert_close(loss, terms.mean())
    torch.testing.assert_close(q.grad, p.grad)
    assert k.grad is None  # keys are given
    torch.testing.assert_close(task.loss((q, k), rows, reduction="none"), terms)


def test_one_image_alone_has_nobody_to_be_told_from():
    q, k = answers(1)
    assert get_task("mocov3").loss((q, k), torch.zeros(1)).item() == 0


def kinds(head: nn.Sequential) -> list[type]:
    return [type(m) for m in head]


def test_a_convnet_has_the_authors_heads_views_and_all_of_it_learns():
    learn = small_learner("mocov3", loaders(pictures(8, (72, 72))))
    model, hidden = learn.model, [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds(model.projector) == [*hidden, nn.Linear, nn.BatchNorm1d] and not model.projector[-1].affine
    assert kinds(model.predictor) == [*hidden, nn.Linear]
    assert all(m.bias is None for part in (model.projector, model.predictor) for m in part if isinstance(m, nn.Linear))
    assert all(p.requires_grad for p in model.encoder.parameters())
    task = get_task("mocov3")
    assert task.recipes[0].scale == task.recipes[1].scale == (0.2, 1.0)
    assert (task.recipe(0, 3, 64).blur_p, task.recipe(1, 3, 64).solarize_p) == (1, 0.2)
    widths = [tuple(m.weight.shape) for m in task.model(create_encoder(net())).projector if isinstance(m, nn.Linear)]
    assert widths == [(1024, 32), (256, 1024)]


def test_a_transformer_has_the_authors_heads_views_and_a_frozen_patch_embedding(tmp_path):
    learn = small_learner("mocov3", loaders(pictures(8, (48, 48))), arch=VIT)
    model, hidden = learn.model, [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert kinds(model.projector) == [*hidden, *hidden, nn.Linear, nn.BatchNorm1d]
    assert kinds(model.predictor) == [*hidden, nn.Linear, nn.BatchNorm1d]
    assert not model.projector[-1].affine and not model.predictor[-1].affine
    assert learn.dls.train.task.recipes == (BYOL_1, BYOL_2)  # crops of 8 % and more
    frozen = [name for name, p in model.encoder.named_parameters() if not p.requires_grad]
    assert frozen == ["body.patch_embed.proj.weight", "body.patch_embed.proj.bias"]
    before = model.encoder.body.patch_embed.proj.weight.clone()
    learn.unfreeze()
    learn.fit(1, 1e-2)
    assert torch.equal(model.encoder.body.patch_embed.proj.weight, before)
    encoder = load_encoder(learn.save_encoder(tmp_path / "encoder"))
    assert torch.equal(encoder.body.patch_embed.proj.weight, before)
    assert all(p.requires_grad for p in encoder.parameters())  # in what is saved it is weights as any other
    second = small_learner("rotation", encoder=learn)
    assert all(p.requires_grad for p in second.encoder.parameters())


def test_patch_embeddings_are_found_by_timms_name_and_torchvisions():
    assert isinstance(patch_embedding(create_encoder(VIT)), nn.Conv2d)
    assert patch_embedding(create_encoder("resnet10t")) is None
    with torch.device("meta"):  # 86 M parameters that nobody needs
        body = vit_b_16()
    assert patch_embedding(type("Holder", (), {"body": body})) is body.conv_proj


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_teacher_follows_along_half_a_cosine_to_one(momentum):
    (callback,) = get_task("mocov3", momentum=momentum).callbacks()
    assert isinstance(callback, EMATeacher)
    assert (callback.start, callback.end, callback.shape) == (momentum, 1, "cosine")


def test_the_loss_of_the_learner_is_of_predictions_against_the_teachers_projections():
    learn = small_learner("mocov3")
    b = learn.dls.train.one_batch()
    learn.model.eval()
    with torch.no_grad():
        q, k = learn.model(b[0])
        z = learn.model.teacher.net(b[0][:, 1])
    torch.testing.assert_close(k[:, 1], z)
    loss = learn.loss_func((q, k), b[1])
    first = F.cross_entropy(F.normalize(q[:, 0], dim=1) @ F.normalize(k[:, 1], dim=1).T / 0.2, torch.arange(4))
    second = F.cross_entropy(F.normalize(q[:, 1], dim=1) @ F.normalize(k[:, 0], dim=1).T / 0.2, torch.arange(4))
    torch.testing.assert_close(loss, 0.4 * (first + second))


def test_pairs_are_found():
    learn = learner(MoCoV3(dim=64, hidden=128))
    assert measured(learn, found_pair)[0] < 0.06  # one of 64 by guessing
    learn.fit(20, 3e-3)
    found, apart = measured(learn, found_pair, spread)
    assert found > 0.15 and apart > 0.9


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"temperature": -1}, "temperature is a number, above 0"),
        ({"momentum": 1.5}, "momentum is a number, at least 0 and below 1"),
        ({"dim": 0}, "dim is a whole number, at least 2"),
        ({"hidden": 0}, "hidden is a whole number, at least 1"),
        ({"views": "scans"}, "kind of views"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(SelfsupError, match=said):
        get_task("mocov3", **settings)
