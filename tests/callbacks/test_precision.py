"""Half precision on the device where the learner is, and what is left as it was."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from fastai.vision.data import ImageDataLoaders

from selfsup_fastai.callbacks import precision
from selfsup_fastai.callbacks.precision import AutoPrecision
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.pretext.learner import pretext_learner
from tests.conftest import write_images


def make(color_folder, task="rotation"):
    set_seed(0)
    dls = UnlabeledDataLoaders.from_folder(color_folder, size=32, bs=8, cache="ram", num_workers=0)
    return pretext_learner(dls, task, "resnet10t")


class Types(Callback):
    """Types of what the layers gave, of the prediction and of the weights."""

    order = 30

    def before_fit(self):
        self.seen = set()
        layer = self.learn.model.encoder.body.layer1
        self.hook = layer.register_forward_hook(lambda m, i, out: self.seen.add(out.dtype))

    def after_loss(self):
        self.answer, self.weight = self.learn.pred.dtype, self.learn.model.encoder.body.conv1[0].weight.dtype

    def after_fit(self):
        self.hook.remove()


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_layers_compute_in_the_precision_that_was_asked_for(color_folder, kind, dtype):
    learn, types = make(color_folder), Types()
    learn.fit(1, cbs=[AutoPrecision(kind), types])
    assert types.seen == {dtype}
    assert types.answer == types.weight == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_every_step_uses_the_weights_of_that_step(color_folder):
    """Autocast keeps cast weights while it is on: held open over a run, it would train on those of the first step."""
    losses = []
    for kind in ("fp32", "bf16"):
        learn = make(color_folder)
        learn.fit(6, 3e-3, cbs=AutoPrecision(kind))
        losses.append([float(loss) for loss in learn.recorder.losses])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.02)
    assert losses[0][-1] < losses[0][0] - 0.05  # it learns
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.15)


@pytest.mark.parametrize(("times", "chosen"), [((0.2, 0.1), "bf16"), ((0.1, 0.2), "fp32"), ((0.1, 0.098), "fp32")])
def test_auto_takes_the_faster_and_changes_nothing(color_folder, monkeypatch, capsys, times, chosen):
    learn = make(color_folder)
    seconds = {None: times[0], torch.bfloat16: times[1]}
    monkeypatch.setattr(precision, "_step", lambda *args: seconds[args[-1]])
    cb = AutoPrecision()
    learn.fit(1, cbs=cb)
    assert cb.chosen == chosen
    assert f"Precision: {chosen}; a step in bf16 is" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["rotation", "simclr", "mae", "byol", "deep_cluster", "moco"])
def test_timing_leaves_weights_and_random_numbers_alone(color_folder, task):
    ends = []
    for timed in (False, True):
        set_seed(0)
        dls = UnlabeledDataLoaders.from_folder(color_folder, size=32, bs=8, cache="ram", num_workers=0)
        learn = pretext_learner(dls, task, "vit_tiny_patch16_224" if task == "mae" else "resnet10t")
        if timed:
            precision.faster(learn, "cpu")
        learn.fit(1, 1e-3)
        ends.append(learn.model.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_what_cannot_be_had(color_folder):
    with pytest.raises(SelfsupError, match="fp16 needs a GPU"):
        make(color_folder).fit(1, cbs=AutoPrecision("fp16"))
    with pytest.raises(SelfsupError, match="bf16"):
        AutoPrecision("bf61")


def test_the_device_may_be_a_name(color_classes_folder):
    dls = ImageDataLoaders.from_folder(color_classes_folder, valid_pct=0.5, bs=4, num_workers=0, device="cpu")
    learn, precision = downstream_learner(dls, "resnet10t"), AutoPrecision("bf16")
    assert learn.dls.device == "cpu"
    learn.fit(1, cbs=precision)
    assert precision.chosen == "bf16"


@pytest.fixture(scope="module")
def color_classes_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    for i, name in enumerate("ab"):
        write_images(folder / name, 8, seed=i)
    return folder
