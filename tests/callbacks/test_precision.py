"""Half precision on the device where the learner is, and what is left as it was."""

import pytest
import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from fastai.vision.data import ImageDataLoaders

from selfsup_fastai.callbacks import precision
from selfsup_fastai.callbacks.layout import lay_out
from selfsup_fastai.callbacks.precision import AutoPrecision
from selfsup_fastai.callbacks.resume import Resume
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.errors import ResumeError, SelfsupError
from selfsup_fastai.pretext.learner import pretext_learner
from tests.conftest import write_images


def make(color_folder, task="rotation", **kwargs):
    set_seed(0)
    dls = UnlabeledDataLoaders.from_folder(color_folder, size=32, bs=8, cache="ram", num_workers=0)
    return pretext_learner(dls, task, "resnet10t", **kwargs)


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


@pytest.mark.parametrize(
    ("times", "chosen", "channels_last"),  # of fp32, bf16, and both with channels last
    [
        ((0.2, 0.1, 0.2, 0.1), "bf16", False),
        ((0.1, 0.2, 0.1, 0.2), "fp32", False),
        ((0.1, 0.098, 0.095, 0.096), "fp32", False),
        ((0.2, 0.1, 0.2, 0.05), "bf16", True),
        ((0.2, 0.3, 0.1, 0.3), "fp32", True),
    ],
)
def test_auto_takes_the_fastest_and_times_once(color_folder, monkeypatch, capsys, times, chosen, channels_last):
    seconds = dict(zip(["fp32", "bf16", "fp32 with channels last", "bf16 with channels last"], times))
    monkeypatch.setattr(precision, "_step", lambda *args: seconds[str(args[-1])])
    learn = make(color_folder, precision="auto")
    learn.fit(1)
    assert (learn.auto_precision.chosen, learn.auto_precision.laid_out) == (chosen, channels_last)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Precision: ")]
    assert len(said) == 1 and said[0].startswith(f"Precision: {learn.auto_precision.way}. How many times")
    monkeypatch.setattr(precision, "_step", None)  # a second timing would fail, and say so
    learn.fit(1)
    assert "Precision" not in capsys.readouterr().err


class Killed(Exception):
    pass


class Kill(Callback):
    order = 95  # after the state is written

    def before_fit(self):
        self.left = 2

    def after_epoch(self):
        self.left -= 1
        if not self.left:
            raise Killed("now")


def test_a_run_that_goes_on_keeps_to_what_was_chosen(color_folder, tmp_path, monkeypatch):
    """The machine is busier then, and would choose another way; the weights are those of one run nevertheless."""
    ends = []
    for killed in (False, True):
        choose = iter([("bf16", True), ("fp32", False)])
        monkeypatch.setattr(precision, "fastest", lambda *_, choose=choose: precision.Way(*next(choose)))
        folder = tmp_path / str(killed)
        if killed:
            with pytest.raises(Killed):
                make(color_folder, precision="auto").fit(3, 1e-3, cbs=[Resume(folder), Kill()])
        learn = make(color_folder, precision="auto")
        learn.fit(3, 1e-3, cbs=Resume(folder))
        assert learn.auto_precision.way == "bf16 with channels last"
        ends.append(learn.model.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    with pytest.raises(ResumeError, match="differs from this one in precision"):
        make(color_folder, precision="bf16").fit(3, 1e-3, cbs=Resume(tmp_path / "True"))


def test_channels_last_while_it_trains_and_not_after_it(color_folder, tmp_path):
    class Strides(Callback):
        def after_batch(self):
            self.at = self.learn.model.encoder.body.layer1[0].conv1.weight.is_contiguous(
                memory_format=torch.channels_last
            )

    learn = make(color_folder, channels_last=True)
    learn.fit(1, cbs=(strides := Strides()))
    assert strides.at
    assert all(p.is_contiguous() for p in learn.model.parameters())
    assert all(
        state[name].is_contiguous() for *_, state, _ in learn.opt.all_params() for name in ("grad_avg", "sqr_avg")
    )
    files = learn.save_encoder(tmp_path / "plain"), tmp_path / "last.safetensors"
    lay_out(learn.model, True)  # as after a fit that was broken off
    learn.save_encoder(files[1])
    assert files[0].read_bytes() == files[1].read_bytes()


def test_layouts_train_alike(color_folder):
    losses = []
    for channels_last in (None, True):
        learn = make(color_folder, channels_last=channels_last)
        learn.fit(2, 1e-3)
        losses.append(torch.tensor([float(loss) for loss in learn.recorder.losses]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("task", ["rotation", "simclr", "mae", "byol", "deep_cluster", "moco"])
def test_timing_leaves_weights_and_random_numbers_alone(color_folder, task):
    ends = []
    for timed in (False, True):
        set_seed(0)
        dls = UnlabeledDataLoaders.from_folder(color_folder, size=32, bs=8, cache="ram", num_workers=0)
        learn = pretext_learner(dls, task, "vit_tiny_patch16_224" if task == "mae" else "resnet10t")
        if timed:
            precision.fastest(learn, "cpu", precision.ways(learn))
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
