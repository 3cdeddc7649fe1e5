"""Half precision, and channels last in memory, on the learner's own device, where they pay."""

import time
from copy import deepcopy
from typing import NamedTuple

import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import Learner
from fastai.torch_core import to_float
from torch.amp import GradScaler
from torch.nn import Module

from selfsup_fastai.callbacks.aside import Steady
from selfsup_fastai.callbacks.layout import has_convolutions, lay_out, lay_out_learner
from selfsup_fastai.checks import check_choice
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.messages import say
from selfsup_fastai.processes import alone, gathered
from selfsup_fastai.seeding import preserved_rng

KINDS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDS, WORTH = 3, 1.1  # Timed steps of each way; how many times as fast one must be to be taken instead


class Way(NamedTuple):
    """One way to compute a step."""

    kind: str  # In `KINDS`
    channels_last: bool = False

    def __str__(self) -> str:
        return self.kind + " with channels last" * self.channels_last


class AutoPrecision(Steady, MixedPrecision):
    """Forward passes and losses in half precision by torch's autocast; weights stay fp32.

    `learn.fit(5, cbs=AutoPrecision('bf16'))`. fastai's own asks for 'cuda' and silently stays in fp32 on a CPU; this
    one goes by the learner's device. 'auto' times a few steps of the model before its first fit, in fp32 and bf16, of
    nets of convolutions also with the channels last in memory, says what it found and takes what pays; later fits, and
    a run that `Resume` goes on with, keep to it. On a CPU that knows bf16 it is faster on ResNets from about 64 pixels,
    and slower on tiny nets. What is timed is a copy: weights, statistics and random generators stay as they were; but
    what is chosen depends on how busy the machine is, and results differ by rounding: for the same numbers each time
    name a kind. 'fp16' scales the loss, and needs a GPU. After a fit the weights lie in memory as they did before.
    Raises `SelfsupError` for fp16 on a CPU.
    """

    def __init__(
        self,
        kind: str = "auto",  # 'auto', 'bf16', 'fp16' or 'fp32'
        channels_last: bool | None = None,  # Channels last in memory; None: with 'auto' where it pays, else not
    ):
        check_choice("precision", kind, ("auto", *KINDS))
        check_choice("channels_last", channels_last, (True, False, None))
        super().__init__()
        self.kind, self.asked = kind, [kind, channels_last]
        self.chosen = None if kind == "auto" else kind  # these two are kept by `Resume`
        self.laid_out = bool(channels_last) if kind != "auto" else channels_last

    def before_fit(self):
        device = _device(self.learn)
        check_precision(self.kind, device)
        self.autocast = torch.autocast(device, enabled=False)  # until the choice is made
        self.learn.scaler, self.scales = GradScaler(device, enabled=self.chosen == "fp16"), []
        if self.chosen is not None:
            self.autocast = torch.autocast(device, dtype=KINDS[self.chosen], enabled=KINDS[self.chosen] is not None)
        self.begun = False

    def before_train(self):  # after `Resume`, which may know the choice
        if self.begun:
            return
        if self.chosen is None:
            self.chosen, self.laid_out = fastest(self.learn, _device(self.learn), ways(self.learn, self.laid_out))
        dtype, self.begun = KINDS[self.chosen], True
        self.autocast = torch.autocast(_device(self.learn), dtype=dtype, enabled=dtype is not None)
        if self.laid_out:
            lay_out_learner(self.learn, True)

    def after_fit(self):
        super().after_fit()
        if self.begun and self.laid_out:
            lay_out_learner(self.learn, False)

    @property
    def way(self) -> str | None:
        """What was chosen, in words; None while it is not known."""
        return None if self.chosen is None else str(Way(self.chosen, bool(self.laid_out)))


def check_precision(kind: str | None, device: str) -> None:
    """Raises `SelfsupError` for fp16 on a CPU."""
    if kind == "fp16" and device == "cpu":
        raise SelfsupError("fp16 needs a GPU: its small range overflows, and CPUs do not compute in it. Take bf16.")


def ways(learn: Learner, channels_last: bool | None = None) -> list[Way]:
    """What may pay on the learner's device, plain fp32 first."""
    kinds = ["fp32", *["bf16"] * (_device(learn) != "cuda" or torch.cuda.is_bf16_supported())]
    layouts = [False, *[True] * has_convolutions(learn.model)] if channels_last is None else [channels_last]
    return [Way(kind, layout) for layout in layouts for kind in kinds]


def fastest(learn: Learner, device: str, tried: list[Way]) -> Way:
    """The way that pays, by a few steps of a copy of the learner's model on one of its batches; says what it found.

    Several processes choose the same: each time is that of the slowest.
    """
    times = torch.tensor([torch.inf] * len(tried))
    try:
        with preserved_rng(), alone():
            times = _timed(learn, device, tried)
    except Exception as error:  # a task may need its callbacks around a batch; whatever it is, training can go on
        say(f"Precision: {tried[0]}; a step could not be timed ({type(error).__name__}).")
    times = gathered(times.to(learn.dls.device or "cpu")).view(-1, len(tried)).amax(0).tolist()
    best = 0
    for i in range(1, len(tried)):
        best = i if times[best] / times[i] > WORTH else best
    if times[0] < torch.inf:
        found = ", ".join(f"{way} {times[0] / took:.1f}" for way, took in zip(tried[1:], times[1:]))
        say(f"Precision: {tried[best]}. How many times as fast as {tried[0]} is here: {found or 'nothing to try'}.")
    return tried[best]


def _timed(learn: Learner, device: str, tried: list[Way]) -> torch.Tensor:
    """The seconds of the quickest step of each way."""
    *inputs, targets = _batch(learn)
    model = deepcopy(learn.model).train()
    seconds = [[] for _ in tried]
    for round_ in range(ROUNDS + 1):
        for way, times in zip(tried, seconds):
            lay_out(model, way.channels_last)
            took = _step(learn, model, inputs, targets, device, way)
            times += [took] * (round_ > 0)  # the first one warms up
    return torch.tensor([min(times) for times in seconds])


def _batch(learn: Learner) -> tuple:
    """Inputs, and targets as one tuple, of a training batch."""
    loader = learn.dls.train.new(num_workers=0)
    b = loader.one_batch()
    return (*b[: learn.dls.n_inp], b[learn.dls.n_inp :])


def _step(learn: Learner, model: Module, inputs: list, targets: tuple, device: str, way: Way) -> float:
    """Seconds of a forward and backward pass."""
    _finish(device)
    start = time.perf_counter()
    dtype = KINDS[way.kind]
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        loss = learn.loss_func(to_float(model(*inputs)), *targets)
    loss.backward()
    model.zero_grad()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _device(learn: Learner) -> str:
    return torch.device(learn.dls.device or "cpu").type  # users give names, too
