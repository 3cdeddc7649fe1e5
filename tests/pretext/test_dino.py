"""DINO: its loss, its center, its teacher, what is trained when, and what is kept."""

import math

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.training import GradientClip
from fastai.torch_core import set_seed
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.ema import momentum_for
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.encoders.checkpoint import copied_encoder, get_encoder, load_encoder
from selfsup_fastai.encoders.encoder import create_encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.joint_embedding.dino import Center
from selfsup_fastai.pretext.learner import pretext_learner

EASY = {"n_small": 2, "border": 0.5, "prototypes": 24, "hidden": 32, "dim": 16, "views": {"strength": 0.2}}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny() -> nn.Module:
    first = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())


def learner(arch=tiny, n: int = 40, bs: int = 8, **settings):
    coarse = torch.rand(n, 3, 4, 4, generator=seeded(1))
    x = F.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)
    array = (x.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=None, bs=bs, num_workers=0, valid_pct=0.2)
    set_seed(0)
    encoder = {"encoder": arch} if not callable(arch) or isinstance(arch, nn.Module) else {"arch": arch}
    return pretext_learner(dls, "dino", **encoder, **{**EASY, **settings})


def fit(learn, epochs: int, lr: float = 1e-2, **kwargs) -> None:
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr, **kwargs)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops", [2, 5])
def test_the_loss_is_the_loop_over_teachers_and_students_crops(crops):
    task, center = get_task("dino", temperature=0.2), Center(6, 0.9).double()
    center.mean.copy_(torch.randn(6, generator=seeded(1)))
    seen = torch.randn(4, 2, 6, generator=seeded(2), dtype=torch.float64)
    logits = torch.randn(4, crops, 6, generator=seeded(3), dtype=torch.float64)
    plain, ours = (logits.clone().requires_grad_() for _ in range(2))
    total, terms = 0, 0
    for teacher in range(2):
        for student in range(crops):
            if student == teacher:
                continue
            q = ((seen[:, teacher] - center.mean) / 0.05).exp()
            q = q / q.sum(1, keepdim=True)
            p = (plain[:, student] / 0.2).exp()
            total = total - (q * (p / p.sum(1, keepdim=True)).log()).sum(1).mean()
            terms += 1
    loss = task.loss((None, ours, center.codes(seen, 0.05)), torch.arange(4))
    (total / terms).backward()
    loss.backward()
    torch.testing.assert_close(loss, total / terms)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_the_center_is_a_running_average_of_the_mean_over_both_crops():
    center = Center(3, 0.9)
    a, b = torch.rand(4, 2, 3, generator=seeded()), torch.rand(2, 2, 3, generator=seeded(1))
    center.note(a.mean(1))
    center.note(b.mean(1))  # the second part of an accumulated batch
    assert not center.mean.any()
    center.commit()
    torch.testing.assert_close(center.mean, 0.1 * torch.cat([a, b]).mean((0, 1)))
    center.note(a.mean(1))
    center.commit()
    torch.testing.assert_close(center.mean, 0.09 * torch.cat([a, b]).mean((0, 1)) + 0.1 * a.mean((0, 1)))
    assert center.codes(a.half(), 0.04).dtype == torch.float32


# --- the network ------------------------------------------------------------------------------------------------------


def test_the_teacher_is_given_the_large_crops_alone_and_has_no_gradient():
    learn = learner()
    large, small, target = learn.dls.one_batch()
    net, sizes = learn.model, []
    net.teacher.net.encoder.body.register_forward_pre_hook(lambda _, x: sizes.append(tuple(x[0].shape)))
    z, logits, codes = net(large, small)
    assert sizes == [(16, 3, 32, 32)]
    assert z.shape == (8, 4, 16) and logits.shape == (8, 4, 24) and codes.shape == (8, 2, 24)
    assert not codes.requires_grad
    learn.loss_func((z, logits, codes), target).backward()
    assert all(p.grad is None and not p.requires_grad for p in net.teacher.parameters())
    assert all(p.grad is not None for p in net.student.parameters())
    assert net.teacher.net.encoder.body.training  # its batch norms see batches of their own


def test_embeddings_logits_and_codes():
    learn = learner()
    large, small, _ = learn.dls.one_batch()
    net = learn.model.eval()
    net.center.mean.normal_()
    with torch.no_grad():
        net.teacher.net.prototypes.weight.normal_()
        z, logits, codes = net(large, small)
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(8, 4))
        alone = F.normalize(net.student.projector(net.encoder(small[:, 0])), dim=1)
        torch.testing.assert_close(z[:, 2], alone)
        torch.testing.assert_close(logits, z @ F.normalize(net.student.prototypes.weight, dim=1).T)
        seen = net.teacher.net(large, small)[1][:, :2]
        torch.testing.assert_close(codes, ((seen - net.center.mean) / 0.04).softmax(-1))


@pytest.mark.parametrize("norm", [True, False])
def test_the_head_has_three_layers(norm):
    projector = get_task("dino", **EASY, batchnorm=norm).model(create_encoder(tiny)).student.projector
    layer = ["Linear", *["BatchNorm1d"] * norm, "GELU"]
    assert [type(m).__name__ for m in projector] == [*layer, *layer, "Linear"]
    for linear in projector:
        if isinstance(linear, nn.Linear):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert linear.bias is None or not linear.bias.any()


def test_only_the_student_drops_paths():
    encoder = create_encoder("test_vit3", size=32, patch_size=8, drop_path_rate=0.2)
    net = get_task("dino", **EASY).model(encoder)
    rates = [[m.drop_prob for m in half.modules() if isinstance(m, DropPath)] for half in (net.student, net.teacher)]
    assert max(rates[0]) == pytest.approx(0.2) and set(rates[1]) == {0} and len(rates[0]) == len(rates[1]) > 0


# --- order of events --------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Center, weights and temperature as a batch is predicted; the teacher's logits of it; weights after the step."""

    order = 30

    def __init__(self):
        self.seen, self.after = [], []

    def before_fit(self):
        self.hook = self.learn.model.teacher.net.prototypes.register_forward_hook(self.note)

    def note(self, _, inputs, out):
        self.logits = out

    def before_batch(self):
        net = self.learn.model
        self.before = net.center.mean.clone(), [p.clone() for p in net.teacher.parameters()]

    def after_pred(self):
        if self.training:
            self.seen.append((*self.before, self.logits, self.learn.pred[2]))

    def after_step(self):
        net = self.learn.model
        self.after.append(([p.detach().clone() for p in net.student.parameters()], list(net.teacher.parameters())))

    def after_fit(self):
        self.hook.remove()


def test_the_center_changes_after_the_loss_and_the_teacher_after_the_step():
    learn = learner(momentum=0.8, first_temperature=0.04, teacher_temperature=0.08, warm_up=0.5)
    watch = Watch()
    fit(learn, 2, cbs=watch)  # eight steps
    center = torch.zeros(24)
    for step, (before, teacher, logits, codes) in enumerate(watch.seen):
        torch.testing.assert_close(before, center)
        temperature = 0.04 + 0.04 * min(1, step / 4)
        torch.testing.assert_close(codes, ((logits - center) / temperature).softmax(-1))
        center = 0.9 * center + 0.1 * logits.mean((0, 1))
        if step + 1 < len(watch.seen):
            m = 1 - (1 - 0.8) * (math.cos(math.pi * step / 8) + 1) / 2
            for old, own, new in zip(teacher, watch.after[step][0], watch.seen[step + 1][1]):
                torch.testing.assert_close(new, m * old + (1 - m) * own)
    torch.testing.assert_close(learn.model.center.mean, center)
    weights = [p.clone() for p in learn.model.state_dict().values()]
    with learn.no_bar():
        learn.validate()
        learn.get_preds()
    assert all(torch.equal(a, b) for a, b in zip(weights, learn.model.state_dict().values()))


def test_the_momentum_starts_where_the_runs_length_says():
    learn = learner()
    fit(learn, 2)
    assert learn.ema_teacher.first == momentum_for(8) and learn.ema_teacher.shape == "cosine"


def test_the_last_layer_is_frozen_for_an_epoch():
    learn = learner()
    weights = []

    class Keep(Callback):
        def before_batch(self):
            weights.append(self.learn.model.student.prototypes.weight.detach().clone())

    fit(learn, 10, cbs=Keep())
    steps = [w for i, w in enumerate(weights) if i % 5 < 4]  # four to train, one to validate
    assert all(torch.equal(steps[0], w) for w in steps[:5]) and not torch.equal(steps[0], steps[5])


@pytest.mark.parametrize(
    "warm_up, share, expected", [(0.3, 0, 0.04), (0.3, 0.15, 0.055), (0.3, 0.6, 0.07), (0, 0, 0.07)]
)
def test_the_temperature_rises(warm_up, share, expected):
    task = get_task("dino", first_temperature=0.04, teacher_temperature=0.07, warm_up=warm_up)
    assert task.sharpness(share) == pytest.approx(expected)


def test_decay_rises_and_gradients_are_clipped_as_the_docstring_says():
    learn, decays = learner(), []

    class Keep(Callback):
        order = 70

        def before_step(self):
            decays.append(self.opt.hypers[-1]["wd"])

    with learn.no_bar(), learn.no_logging():
        cbs = [ParamScheduler({"wd": SchedCos(0.04, 0.4)}), GradientClip(3.0), Keep()]
        learn.fit_one_cycle(2, 1e-3, cbs=cbs)
    expected = [0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert decays == pytest.approx(expected)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_teachers_encoder_is_kept(tmp_path):
    learn = learner("resnet10t")
    fit(learn, 1)
    teacher, student = learn.model.teacher.net.encoder, learn.model.student.encoder
    assert learn.encoder is teacher is get_encoder(learn) and learn.model.encoder is student
    saved = load_encoder(learn.save_encoder(tmp_path / "dino"))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        features = teacher.eval()(x)
        assert torch.equal(saved.eval()(x), features) and not torch.equal(student.eval()(x), features)
    further = copied_encoder(learn)  # for another round
    assert all(p.requires_grad for p in further.parameters()) and further.lineage[-1]["task"] == "dino"
    with torch.no_grad():
        assert torch.equal(further.eval()(x), features)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"teacher_temperature": 0}, "teacher_temperature is a number, above 0"),
        ({"first_temperature": -1}, "first_temperature is a number, above 0"),
        ({"warm_up": 1.5}, "warm_up is a number, at least 0 and at most 1"),
        ({"momentum": 2}, "momentum is a number, at least 0 and at most 1"),
        ({"center_momentum": 1}, "center_momentum is a number, at least 0 and below 1"),
        ({"batchnorm": "no"}, "batchnorm is True or False, got 'no'"),
        ({"hidden": 0}, "hidden is a whole number, at least 1"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(TaskError, match=said):
        get_task("dino", **settings)


def test_a_short_run_finds_more_pairs_and_more_groups():
    learn = learner(bs=32, prototypes=64, dim=32, hidden=64)
    same = learn.dls.train.new(shuffle=False)
    with learn.no_bar(), learn.no_logging():
        _, _, groups = learn.validate(dl=same)
        learn.fit(50, 2e-3)
        _, found, after = learn.validate(dl=same)
    assert found > 4 / 32 and after > groups + 0.3  # guessing finds one of 32
