"""Half precision on the learner's own device, where it pays."""

import time
from copy import deepcopy

import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import Learner
from fastai.torch_core import to_float
from torch.amp import GradScaler
from torch.nn import Module

from selfsup_fastai.checks import check_choice
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.messages import say
from selfsup_fastai.processes import agreed, alone
from selfsup_fastai.seeding import preserved_rng

KINDS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDS, WORTH = 3, 1.1  # Timed steps of each; how many times as fast half precision must be


class AutoPrecision(MixedPrecision):
    """Forward passes and losses in half precision by torch's autocast; weights stay fp32.

    `learn.fit(5, cbs=AutoPrecision('bf16'))`. fastai's own asks for 'cuda' and silently stays in fp32 on a CPU; this
    one goes by the learner's device. 'auto' times a few steps of the model in fp32 and bf16 before the first fit, says
    what it found and takes the faster one: on a CPU that knows bf16 it is faster on ResNets from about 64 pixels, and
    slower on tiny nets. What is timed is a copy: weights, statistics and random generators stay as they were. 'fp16'
    scales the loss, and needs a GPU. Results differ from those in fp32 by rounding. Raises `SelfsupError` for fp16 on a
    CPU.
    """

    def __init__(
        self,
        kind: str = "auto",  # 'auto', 'bf16', 'fp16' or 'fp32'
    ):
        check_choice("precision", kind, ("auto", *KINDS))
        super().__init__()
        self.kind, self.chosen = kind, None if kind == "auto" else kind

    def before_fit(self):
        device = torch.device(self.dls.device or "cpu").type  # users give names, too
        if self.kind == "fp16" and device == "cpu":
            raise SelfsupError("fp16 needs a GPU: its small range overflows, and CPUs do not compute in it. Take bf16.")
        if self.chosen is None:
            with alone():
                chosen = faster(self.learn, device)
            self.chosen = agreed(chosen)
        self.run = KINDS[self.chosen] is not None  # fastai sets it back after the fit
        if self.run:
            self.autocast = torch.autocast(device, dtype=KINDS[self.chosen])
            self.learn.scaler, self.scales = GradScaler(device, enabled=self.chosen == "fp16"), []


def faster(learn: Learner, device: str) -> str:
    """'bf16' or 'fp32', by a few steps of a copy of the learner's model on one of its batches; says what it found."""
    if device == "cuda" and not torch.cuda.is_bf16_supported():
        say("Precision: fp32, as this GPU does not know bf16.")
        return "fp32"
    try:
        with preserved_rng():
            *inputs, targets = _batch(learn)
            model = deepcopy(learn.model).train()
            seconds = {kind: [] for kind in ("fp32", "bf16")}
            for round_ in range(ROUNDS + 1):
                for kind, times in seconds.items():
                    took = _step(learn, model, inputs, targets, device, KINDS[kind])
                    times += [took] * (round_ > 0)  # the first one warms up
    except Exception as error:  # a task may need its callbacks around a batch; whatever it is, training can go on
        say(f"Precision: fp32; a step could not be timed ({type(error).__name__}).")
        return "fp32"
    ratio = min(seconds["fp32"]) / min(seconds["bf16"])
    kind = "bf16" if ratio > WORTH else "fp32"
    say(f"Precision: {kind}; a step in bf16 is {ratio:.1f} times as fast as in fp32 here.")
    return kind


def _batch(learn: Learner) -> tuple:
    """Inputs, and targets as one tuple, of a training batch."""
    loader = learn.dls.train.new(num_workers=0)
    b = loader.one_batch()
    return (*b[: learn.dls.n_inp], b[learn.dls.n_inp :])


def _step(learn: Learner, model: Module, inputs: list, targets: tuple, device: str, dtype: torch.dtype | None) -> float:
    """Seconds of a forward and backward pass."""
    _finish(device)
    start = time.perf_counter()
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        loss = learn.loss_func(to_float(model(*inputs)), *targets)
    loss.backward()
    model.zero_grad()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
