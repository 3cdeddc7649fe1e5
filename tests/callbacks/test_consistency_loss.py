"""Consistency on unlabeled images: the losses as the authors' formulas, and the steps as they are taken."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.losses import BCEWithLogitsLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.data import ImageDataLoaders
from PIL import Image

from selfsup_fastai.callbacks.consistency_loss import KINDS, ConsistencyLoss
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.errors import TaskError, UnknownNameError
from selfsup_fastai.losses import confidence, fixmatch_loss, softmax_mse, uda_loss


def logits(n=40, k=4, seed=0, scale=3.0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * scale


def test_uda_is_the_formula_row_by_row():
    weak, strong = logits(seed=1), logits(seed=2)
    total = 0.0
    for w, s in zip(weak.double(), strong.double()):
        sure = max(math.exp(a) for a in w) / sum(math.exp(a) for a in w)
        if sure > 0.8:
            sharp = [math.exp(a / 0.4) for a in w]
            p = [a / sum(sharp) for a in sharp]
            q = [math.exp(a) / sum(math.exp(b) for b in s) for a in s]
            total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q) if a > 0)
    assert float(uda_loss(weak, strong)) == pytest.approx(total / len(weak), rel=1e-5)
    assert 0.1 < float(confidence(weak, strong, 0.8)[0]) < 0.9  # some count, some do not


def test_fixmatch_is_the_formula_row_by_row():
    weak, strong = logits(seed=3), logits(seed=4)
    total, sure, alike = 0.0, 0, 0
    for w, s in zip(weak.double(), strong.double()):
        p = [math.exp(a) / sum(math.exp(b) for b in w) for a in w]
        if max(p) >= 0.95:
            sure += 1
            alike += int(s.argmax()) == p.index(max(p))
            total -= math.log(math.exp(s[p.index(max(p))]) / sum(math.exp(b) for b in s))
    assert float(fixmatch_loss(weak, strong)) == pytest.approx(total / len(weak), rel=1e-5)
    found = confidence(weak, strong, 0.95)
    assert [float(f) for f in found] == pytest.approx([sure / len(weak), alike / sure])


def test_the_weak_side_has_no_gradient():
    for loss in (uda_loss, fixmatch_loss):
        weak, strong = logits(seed=5, scale=8).requires_grad_(), logits(seed=6).requires_grad_()
        loss(weak, strong).backward()
        assert weak.grad is None and strong.grad.abs().sum() > 0


def test_softmax_mse_is_the_mean_over_classes_and_images():
    a, b = logits(seed=7), logits(seed=8)
    p, q = (np.exp(x.numpy()) / np.exp(x.numpy()).sum(1, keepdims=True) for x in (a, b))
    assert float(softmax_mse(a, b)) == pytest.approx(((p - q) ** 2).mean(), rel=1e-5)
    assert float(softmax_mse(a, a)) == 0


def test_several_answers_are_yes_and_no_each():
    weak, strong = logits(seed=9), logits(seed=10)
    p, q = weak.double().sigmoid(), strong.double().sigmoid()
    sure = torch.maximum(p, 1 - p)
    hard = F.binary_cross_entropy(q, (p > 0.5).double(), reduction="none")
    assert float(fixmatch_loss(weak, strong, several=True)) == pytest.approx(
        float((hard * (sure >= 0.95)).mean()), rel=1e-5
    )
    t = (weak.double() / 0.4).sigmoid()
    kl = t * (t / q).log() + (1 - t) * ((1 - t) / (1 - q)).log()
    assert float(uda_loss(weak, strong, several=True)) == pytest.approx(float((kl * (sure > 0.8)).mean()), rel=1e-4)
    assert float(softmax_mse(weak, strong, several=True)) == pytest.approx(float((p - q).square().mean()), rel=1e-5)


def test_pixels_count_by_themselves():
    weak, strong = logits(6 * 5 * 5, seed=11), logits(6 * 5 * 5, seed=12)
    maps = [x.view(6, 5, 5, 4).permute(0, 3, 1, 2) for x in (weak, strong)]
    for loss in (uda_loss, fixmatch_loss, softmax_mse):
        assert float(loss(*maps)) == pytest.approx(float(loss(weak, strong)), rel=1e-5)


# --- in a learner -----------------------------------------------------------------------------------------------------


def write(root, n, seed, noise=25):
    """Stripes across and down: what tells the classes apart is left by mirroring and shifting."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        name = ("across", "down")[i % 2]
        (root / name).mkdir(parents=True, exist_ok=True)
        wave = 128 + 60 * np.sin(np.arange(32) * rng.uniform(0.5, 1.3) + rng.uniform(0, 6))[:, None, None]
        pixels = wave * rng.uniform(0.7, 1.3, 3) + rng.normal(0, noise, (32, 32, 3))
        pixels = pixels if i % 2 else pixels.transpose(1, 0, 2)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write(tmp_path_factory.mktemp("few"), 24, 0)


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("unlabeled"), 80, 1)
    return UnlabeledDataLoaders.from_folder(folder, size=32, bs=16, valid_pct=0.1, cache="ram")


def make(folder, encoder="resnet10t", **kwargs):
    set_seed(0)
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.5, seed=1, bs=4, num_workers=0, device="cpu")
    return downstream_learner(dls, encoder, metrics=accuracy, **kwargs)


class WhatWent(Callback):
    """What went through the network, what came out, and the losses."""

    order = 6

    def __init__(self):
        self.x, self.pred, self.loss, self.plain = [], [], [], []

    def before_batch(self):
        if self.training:
            self.x.append(self.learn.xb[0].clone())

    def after_pred(self):
        if self.training:
            self.pred.append(self.learn.pred.detach().clone())

    def after_loss(self):
        if self.training:
            self.plain.append(
                float(F.cross_entropy(self.learn.pred.detach().as_subclass(torch.Tensor), self.learn.yb[0]))
            )
            self.loss.append(float(self.learn.loss.detach()))


@pytest.mark.parametrize(("kind", "images"), [("uda", 4 * 15), ("fixmatch", 4 * 15), ("mean_teacher", 16), ("pi", 16)])
def test_labeled_weak_and_strong_images_are_one_batch(few, unlabeled, kind, images):
    learn, watch = make(few), WhatWent()
    consistency = ConsistencyLoss(unlabeled, kind)
    learn.fit(1, 1e-3, cbs=[consistency, watch])
    assert [len(x) for x in watch.x] == [images] * 3
    assert [len(p) for p in watch.pred] == [4] * 3  # the loss of the labels sees the labeled images only
    assert learn.images_seen == images * 3
    assert list(learn.recorder.metric_names)[3:7] == ["accuracy", "consistency", "confident", "agreement"]
    assert [str(m.name) for m in learn.metrics] == ["accuracy"]  # as before
    assert len(consistency.history) == 1


def test_the_loss_is_the_labels_and_the_consistency_by_hand(few, unlabeled):
    """FixMatch at threshold 0 with a still network: everything can be computed again from what went in."""
    learn, watch = make(few), WhatWent()
    consistency = ConsistencyLoss(unlabeled, "fixmatch", threshold=0, ratio=2, weight=0.5)
    model_before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit(1, 0.0, cbs=[consistency, watch], wd=0.0)
    model = make(few).model
    for x, loss, plain in zip(watch.x, watch.loss, watch.plain):
        model.load_state_dict(model_before)
        model.train()
        with torch.no_grad():
            out = model(x.as_subclass(torch.Tensor))
        weak, strong = out[4:].chunk(2)
        expected = F.cross_entropy(strong, weak.argmax(1))
        assert loss == pytest.approx(plain + 0.5 * float(expected), rel=1e-4)


def test_unlabeled_images_are_the_files_pixels_as_the_encoder_wants_them(few, unlabeled):
    """Weak views are shifted and mirrored pixels, no new ones; every class of the unlabeled folder comes."""
    learn, watch = make(few), WhatWent()
    learn.model.encoder.mean, learn.model.encoder.std = (0.5,) * 3, (0.25,) * 3
    learn.fit(1, 1e-3, cbs=[ConsistencyLoss(unlabeled, "fixmatch", ratio=3), watch])
    x = torch.cat([b[4:16] for b in watch.x]).as_subclass(torch.Tensor) * 0.25 + 0.5
    levels = (x * 255).round() / 255
    assert torch.allclose(x, levels, atol=1e-5)  # whole steps of 8 bits: nothing was interpolated
    strong = torch.cat([b[16:] for b in watch.x]).as_subclass(torch.Tensor) * 0.25 + 0.5
    assert not torch.allclose(strong, (strong * 255).round() / 255, atol=1e-4)
    assert strong.min() >= -1e-5 and strong.max() <= 1 + 1e-5


def test_ramps_count_over_the_whole_run(few, unlabeled):
    learn = make(few)
    consistency = ConsistencyLoss(unlabeled, "mean_teacher", ramp=1.0, weight=2)
    weights = []

    class Watch(Callback):
        order = 5.6

        def after_loss(self):
            if self.training:
                weights.append(consistency._weight())

    learn.fine_tune(3, cbs=[consistency, Watch()])
    steps = 4 * len(learn.dls.train)
    assert weights == pytest.approx([2 * math.exp(-5 * (1 - i / steps) ** 2) for i in range(steps)])


def test_pi_weighs_by_the_share_of_labels(few, unlabeled):
    learn, consistency = make(few), ConsistencyLoss(unlabeled, "pi", ramp=0)
    learn.fit(1, cbs=consistency)
    assert consistency.history["weight"].tolist() == pytest.approx([100 * 12 / (12 + 72)])


def test_validation_and_the_end_have_the_average_of_the_weights(few, unlabeled):
    """Transcribed: after step t the average is m * average + (1 - m) * weights, m = min(1 - 1 / (t + 1), momentum)."""
    learn, states, shown = make(few), [], []

    class Watch(Callback):
        order = 70

        def after_step(self):
            states.append({n: p.detach().clone() for n, p in self.learn.model.named_parameters()})

        def before_validate(self):
            shown.append({n: p.detach().clone() for n, p in self.learn.model.named_parameters()})

        def after_pred(self):
            if self.training and shown:
                now = dict(self.learn.model.named_parameters())
                self.back = all(torch.equal(now[n], states[len(learn.dls.train) - 1][n]) for n in now)
                shown.append("training") if self.back and shown[-1] != "training" else None

    start = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    learn.fit(2, 1e-2, cbs=[ConsistencyLoss(unlabeled, "fixmatch", ratio=1, momentum=0.6), Watch()])
    average = start
    for t, state in enumerate(states, start=1):
        m = min(1 - 1 / (t + 1), 0.6)
        average = {n: m * average[n] + (1 - m) * state[n] for n in average}
        if t == len(learn.dls.train):
            assert all(torch.allclose(shown[0][n], average[n], atol=1e-6) for n in average)
    assert shown[1] == "training"  # with the weights themselves it went on
    end = dict(learn.model.named_parameters())
    assert all(torch.allclose(end[n], average[n], atol=1e-6) for n in average)
    assert not all(torch.allclose(end[n], states[-1][n], atol=1e-6) for n in end)


def test_the_teacher_has_no_gradient_and_the_student_has(few, unlabeled):
    learn, consistency = make(few), ConsistencyLoss(unlabeled, "mean_teacher", weight=1, ramp=0)
    grads = []

    class Watch(Callback):
        order = 20

        def before_step(self):
            grads.append(float(self.learn.model.encoder.body.conv1[0].weight.grad.abs().sum()))
            assert all(p.grad is None for p in consistency.teacher.parameters())

    learn.fit(1, 1e-3, cbs=[consistency, Watch()])
    assert min(grads) > 0


def test_frozen_norms_stay_still_in_the_teacher_too(few, unlabeled):
    learn, consistency = make(few), ConsistencyLoss(unlabeled, "mean_teacher")
    still = []

    class Watch(Callback):
        order = 20

        def before_fit(self):
            self.before = {n: b.clone() for n, b in consistency.teacher.net.named_buffers() if "running" in n}

        def after_train(self):
            now = dict(consistency.teacher.net.named_buffers())
            still.append(all(torch.equal(b, now[n]) for n, b in self.before.items()))

    learn.fine_tune(1, cbs=[consistency, Watch()])
    assert still == [True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_weights(few, unlabeled, kind):
    ends = []
    for _ in range(2):
        learn = make(few)
        learn.fine_tune(1, cbs=ConsistencyLoss(unlabeled, kind, ratio=2))
        ends.append(learn.model.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_grey_images_a_vit_and_numbers(few, unlabeled, tmp_path):
    from fastai.data.block import DataBlock, RegressionBlock
    from fastai.data.transforms import RandomSplitter, get_image_files
    from fastai.vision.data import ImageBlock

    learn = make(few, "vit_tiny_patch16_224", n_in=1)
    learn.fine_tune(1, cbs=ConsistencyLoss(unlabeled, "uda", ratio=1))
    block = DataBlock(
        (ImageBlock, RegressionBlock),
        get_items=get_image_files,
        get_y=lambda f: float(f.parent.name == "down"),
        splitter=RandomSplitter(seed=0),
    )
    numbers = downstream_learner(block.dataloaders(few, bs=4, num_workers=0, device="cpu"), "resnet10t")
    with pytest.raises(TaskError, match="these labels are numbers"):
        numbers.fine_tune(1, cbs=ConsistencyLoss(unlabeled, "fixmatch"))
    consistency = ConsistencyLoss(unlabeled, "mean_teacher")
    watch, raw = WhatWent(), []
    watch.after_loss = lambda: None

    class Raw(Callback):
        order = 5

        def before_batch(self):
            if self.training:
                raw.append(self.learn.xb[0].clone())

    numbers.fine_tune(1, cbs=[consistency, watch, Raw()])
    # what a number is of may lie to the left or right: images of numbers stay as they are
    assert all(torch.equal(x[: len(r)], r) for x, r in zip(watch.x, raw))
    assert consistency.history["consistency"].notna().all() and consistency.history["confident"].eq(0).all()


def test_several_labels_are_told_by_the_loss(few, unlabeled):
    from fastai.data.block import DataBlock, MultiCategoryBlock
    from fastai.data.transforms import RandomSplitter, get_image_files
    from fastai.vision.data import ImageBlock

    block = DataBlock(
        (ImageBlock, MultiCategoryBlock),
        get_items=get_image_files,
        get_y=lambda f: [f.parent.name, "stripes"],
        splitter=RandomSplitter(seed=0),
    )
    learn = downstream_learner(block.dataloaders(few, bs=4, num_workers=0, device="cpu"), "resnet10t")
    assert isinstance(learn.loss_func, BCEWithLogitsLossFlat)
    consistency = ConsistencyLoss(unlabeled, "fixmatch", threshold=0.0)
    learn.fine_tune(1, cbs=consistency)
    assert consistency.several and consistency.history["confident"].eq(1).all()


def test_masks_count_pixel_by_pixel_and_nothing_moves_between_the_views(unlabeled, tmp_path):
    """The strong view of an image with masks has other colors and a hole, but what lies where stays."""
    from fastai.vision.data import SegmentationDataLoaders

    rng = np.random.default_rng(0)
    for i in range(8):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "masks").mkdir(exist_ok=True)
        pixels = rng.normal(100, 10, (32, 32, 3))
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 4 + i : 16 + i] = 1
        pixels[mask == 1] += 80
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    files = sorted((tmp_path / "images").iterdir())
    dls = SegmentationDataLoaders.from_label_func(
        tmp_path,
        files,
        lambda f: tmp_path / "masks" / f.name,
        codes=["none", "box"],
        bs=4,
        valid_pct=0.3,
        num_workers=0,
        device="cpu",
    )
    learn, watch = downstream_learner(dls, "resnet10t"), WhatWent()
    still = dict(brightness=0, contrast=0, saturation=0, hue=0, grey_p=0, solarize_p=0, erase_p=0)
    consistency = ConsistencyLoss(unlabeled, "fixmatch", ratio=1, threshold=0, views=still)
    watch.after_loss = lambda: None
    learn.fit(1, 1e-3, cbs=[consistency, watch])
    labeled, weak, strong = watch.x[0].as_subclass(torch.Tensor).chunk(3)
    assert torch.allclose(weak, strong, atol=1e-4)  # with all changes of color off nothing is left of "strong"
    assert not torch.allclose(labeled, weak, atol=1e-2)
    assert consistency.history["confident"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "fixmach"}, "fixmatch"),
        ({"threshold": 1.2}, "threshold of ConsistencyLoss"),
        ({"ratio": 0}, "ratio of ConsistencyLoss"),
        ({"momentum": 1.0}, "momentum of ConsistencyLoss"),
    ],
)
def test_bad_settings(unlabeled, kwargs, message):
    with pytest.raises((TaskError, UnknownNameError), match=message):
        ConsistencyLoss(unlabeled, **kwargs)
    with pytest.raises(TaskError, match="got str"):
        ConsistencyLoss("folder")


def test_in_the_learners_own_callbacks_validating_is_no_run_and_a_broken_fit_leaves_nothing(few, unlabeled):
    consistency = ConsistencyLoss(unlabeled, "fixmatch", ratio=1)
    learn = make(few, cbs=consistency)

    class Stop(Callback):
        def after_step(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=Stop())
    learn.fit(2)
    assert [m.name for m in learn.metrics] == ["accuracy"]
    assert list(learn.recorder.metric_names)[3:-1] == ["accuracy", "consistency", "confident", "agreement"]
    assert consistency.history["epoch"].tolist() == [0, 1]
    assert len(learn.validate()) == 2
    learn.get_preds()
    assert len(consistency.history) == 2


@pytest.mark.slow
def test_unlabeled_images_help_where_they_can(tmp_path):
    """Six labels, 200 images without: with consistency more of the test images are named, over five seeds."""
    labeled, free = write(tmp_path / "labeled", 206, 3, noise=90), write(tmp_path / "free", 200, 4, noise=90)
    dls = UnlabeledDataLoaders.from_folder(free, size=32, bs=16, valid_pct=0.05, cache="ram")
    gains = []
    for seed in range(5):
        found = []
        for cbs in (None, ConsistencyLoss(dls, "fixmatch", ratio=4, threshold=0.8)):
            set_seed(seed)
            few = ImageDataLoaders.from_folder(labeled, valid_pct=0.97, seed=seed, bs=6, num_workers=0, device="cpu")
            learn = downstream_learner(few, "resnet10t", metrics=accuracy)
            learn.fine_tune(40, 1e-2, schedule="all", lr_mult=1, cbs=cbs)
            found.append(learn.validate()[1])
        gains.append(found[1] - found[0])
    assert np.mean(gains) > 0.02, gains


@pytest.mark.parametrize("shares", [[0.0, 0.0], [0.0, 0.1, 0.0], [0.2]])
def test_a_loss_that_did_nothing_says_so(unlabeled, capsys, shares):
    loss = ConsistencyLoss(unlabeled)
    loss.rows = [{"confident": share} for share in shares]
    loss._say_unsure()
    said = capsys.readouterr().err
    wanted = {1: "", 2: "fixmatch did nothing: no unlabeled image was ever as sure as the threshold, 0.95. Lower"}
    wanted[3] = "fixmatch: in 2 of 3 epochs no unlabeled image was as sure as the threshold, 0.95,"
    assert said.startswith(wanted[len(shares)]) and bool(said) == (len(shares) > 1)
