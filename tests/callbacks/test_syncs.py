"""No step waits for a number: what is known to, and why.

On a CPU nothing waits, but the same operations are dispatched: a tensor's number asked for (`_local_scalar_dense`), and
results whose size depends on values. `LossesAsNumbers` asks on the CPU alone, on purpose. On a fake GPU (fake_gpu.py)
what is drawn on the CPU for a batch of the GPU counts as known.
"""

from collections import Counter
from traceback import extract_stack, extract_tb

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.torch_core import set_seed
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from selfsup_fastai.callbacks import syncs
from selfsup_fastai.callbacks.log import LossesAsNumbers
from selfsup_fastai.callbacks.syncs import SmoothLossThere
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.downstream.segmentation import KnownCodes
from selfsup_fastai.encoders.memories import Memory
from selfsup_fastai.errors import DataError
from selfsup_fastai.pretext import TASKS
from selfsup_fastai.pretext.learner import pretext_learner
from tests import test_contract
from tests.fake_gpu import GPU, PACKAGE, FakeGenerator, fake_gpu, on_gpu

KNOWN = {  # What else waits, function by function
    "models_genesis": {"shuffled"},  # it shuffles the pixels of drawn images only: on a GPU, too, drawn on the CPU
    "npid": {"settled"},  # Z is estimated in the first step
    "pirl": {"settled"},
    "swav": {"settled"},  # until the queue is full
    "ijepa": {"numbers"},  # how many patches are seen follows from what is drawn for all of them, on the GPU
    "nat": {"exchanged"},  # codes are dealt out by scipy
    "rotation+simclr": {"make_batch"},  # which task is asked is drawn on the CPU
}
ON_GPU = {name: found for name, found in KNOWN.items() if name not in ("models_genesis", "rotation+simclr")}
ASKS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten._unique2.default}
SETTINGS = {"deep_cluster": {"clusters": 3}, "dino": {"prototypes": 16}}
OTHER_DATA = {"dicom_tags", "slice_order", "micle"}  # they need scans, of patients
SLOW = {"spot_artifacts"}  # trains another network first


class Asked(TorchDispatchMode):
    """Counts operations that a CPU waits for, by the function of this package that caused them."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in ASKS or (func is torch.ops.aten.index.Tensor and any(_is_mask(i) for i in args[1])):
            stack = [f for f in extract_stack() if f.filename.startswith(PACKAGE) and f.name != "fit"]  # fastai's own
            self.found[stack[-1].name if stack else "fastai"] += not (stack and _on_cpu_alone(stack[-1]))
        return func(*args, **(kwargs or {}))


def _on_cpu_alone(frame) -> bool:
    """`LossesAsNumbers`; and torch checks one-hot numbers there only."""
    return frame.filename.endswith("log.py") or "one_hot" in frame.line


def _is_mask(index) -> bool:
    return index is not None and index.dtype == torch.bool


class Watch(Callback):
    """Looks at all steps but the first one, as all that they do outside of loading images."""

    order = -100

    def before_train(self):
        self.asked, self.steps = Asked(), 0

    def before_batch(self):
        self.steps += self.training
        if self.training and self.steps == 2:
            self.asked.__enter__()

    def after_train(self):
        self.asked.__exit__(None, None, None)


def learner(task: str):
    set_seed(0)
    array = np.random.default_rng(0).integers(0, 256, (24, 48, 48, 3), dtype=np.uint8)
    dls = UnlabeledDataLoaders.from_array(array, size=48, bs=6, valid_pct=0.2, num_workers=0, seed=1)
    arch = None if task in ("mae", "ijepa") else "resnet10t"
    return pretext_learner(dls, task.split("+") if "+" in task else task, arch, **SETTINGS.get(task, {}))


@pytest.mark.parametrize("task", [*(t for t in TASKS if t not in OTHER_DATA | SLOW), "rotation+simclr"])
def test_no_step_waits_but_those_known_to(task):
    learn, watch = learner(task), Watch()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=watch)
    assert watch.steps == 3
    found = {name: n for name, n in watch.asked.found.items() if n}
    assert found.keys() == KNOWN.get(task, set())
    assert found.get("settled", 0) <= sum(isinstance(m, Memory) for m in learn.model.modules())  # each asked once


@pytest.mark.parametrize("train", [True, False], ids=["train", "valid"])
@pytest.mark.parametrize("task", [*TASKS, "rotation+simclr"])
def test_on_a_gpu_questions_and_losses_wait_for_nothing(task, train):
    """Nor do tensors of the CPU and of the GPU meet."""
    learn = test_contract.learner(task, arch="resnet10t") if task in OTHER_DATA else learner(task)
    asked, n = learn.task, learn.dls.n_inp
    with fake_gpu() as waits:
        model = on_gpu(learn.model).train(train)
        x, idx = torch.rand(6, 3, 48, 48, device=GPU), torch.arange(6, device=GPU)
        known = of_the_facts(asked, x) if task in OTHER_DATA else {}
        made = asked.make_batch(x, generator=FakeGenerator(), train=train, idx=idx, **known)
        made = [t for part in made for t in part]
        assert all(t.device == GPU for t in made)
        try:
            loss = learn.loss_func(model(*made[:n]), *made[n:])
        except (DataDependentOutputException, DynamicOutputShapeException) as wait:
            frames = [f for f in extract_tb(wait.__traceback__) if f.filename.startswith(PACKAGE)]
            assert {frames[-1].name} == ON_GPU[task]
        else:
            assert task not in ON_GPU or not train
            assert loss.device == GPU and loss.shape == ()
    assert {name for name, n in waits.found.items() if n} == {"exemplar": {"scale_components"}}.get(task, set())


def of_the_facts(task, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is known of images, and other images beside them."""
    table = test_contract.facts(len(x))
    known, companions = task.known(table), task.companions(table)
    others = companions and torch.rand(*np.shape(companions.of([*range(len(x))], 0)), *x.shape[1:], device=GPU)
    return task.wanted(known=known.to(GPU, non_blocking=True), others=others)


def test_the_fake_gpu_sees_what_waits():
    with fake_gpu() as waits:
        x = torch.rand(4, 3, device=GPU)
        with pytest.raises(DataDependentOutputException):
            float(x.sum())
        with pytest.raises(DynamicOutputShapeException):
            x[x > 0.5]
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.rand(4, 3)
        y, ints = torch.rand(3), torch.arange(3)
        waits.found.clear()
        assert y.tolist()
        ints.pin_memory().to(GPU, non_blocking=True)
        x[0] = 1.0
        x[torch.arange(2, device=GPU)] = 0.0
        x * 0.5 + x[:, :1] @ x[:1] + torch.linalg.inv_ex(x[:3])[0].sum()
        assert not +waits.found
        for waiting in (
            lambda: ints.to(GPU),
            lambda: torch.tensor(0.5, device=GPU),
            lambda: x.new_tensor([0.5]),
            lambda: x[[0, 1]],
            lambda: x[ints],
            lambda: x.__setitem__(ints, 0.0),
            lambda: x.__setitem__(x > 0.5, 0.0),
            lambda: x.cpu(),
            lambda: y.copy_(x[0]),
            lambda: torch.linalg.solve(x[:3], x[:3]),
            lambda: torch.linalg.eigh(x[:3]),
        ):
            before = waits.found.total()
            waiting()
            assert waits.found.total() == before + 1


def test_the_watch_sees_a_step_that_waits():
    class Waits(Callback):
        def after_loss(self):
            float(self.learn.loss.detach())

    learn, watch = learner("rotation"), Watch()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=[watch, Waits()])
    assert watch.asked.found["fastai"] == 2


def test_losses_that_stay_on_the_device_are_the_same(monkeypatch):
    """As on a GPU, where `LossesAsNumbers` does nothing; the bar shows a loss that may be a second old."""
    monkeypatch.setattr(syncs, "SECONDS", 1e9)
    recorders, bar = [], OnTheBar()
    for there in (False, True):
        monkeypatch.setattr(syncs, "trains_elsewhere", lambda device, there=there: there)
        learn = learner("rotation")
        learn.remove_cb(LossesAsNumbers)
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-3, cbs=bar if there else None)
        recorders.append(learn.recorder)
    assert isinstance(recorders[1].smooth_loss, SmoothLossThere)
    assert all(isinstance(loss, float) for loss in recorders[1].losses)
    assert [float(loss) for loss in recorders[0].losses] == recorders[1].losses
    assert recorders[0].values == recorders[1].values
    assert len(bar.values) == 6 and len(set(bar.values)) == 1


def test_foreign_codes_are_found_without_looking_at_each_batch():
    """As on a GPU: what the loss is given is a code at least, and the value is said in the end."""
    looks = KnownCodes(3, ignored=255, every=4)
    looks.learn = Batches(torch.tensor([[0, 2, 255]]), torch.tensor([[1, 7, 0]]), torch.tensor([[1, 1, 1]]))
    given = []
    for i in range(3):
        looks.learn.next(i)
        looks.before_batch()
        given.append(looks.learn.yb[0].tolist())
    assert given == [[[0, 2, 255]], [[1, 0, 0]], [[1, 1, 1]]]
    with pytest.raises(DataError, match="A mask holds the value 7; expected 0 to 2"):
        looks.after_train()
    looks.after_validate()  # said once


class Batches:
    """A learner that has masks."""

    def __init__(self, *masks):
        self.masks, self.xb = masks, (torch.zeros(1),)

    def next(self, i: int) -> None:
        self.iter, self.yb = i, (self.masks[i],)


class OnTheBar(Callback):
    """The loss that the bar is given, at the time when it is."""

    order = ProgressCallback.order

    def before_train(self):
        self.values = getattr(self, "values", [])

    def after_batch(self):
        if self.training:
            self.values.append(float(self.learn.smooth_loss))
