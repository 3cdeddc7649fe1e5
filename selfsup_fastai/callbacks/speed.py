"""The switches of a learner for faster steps and small cards: precision, layout, compiling, checkpointing."""

import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup_fastai.callbacks.aside import Steady
from selfsup_fastai.callbacks.precision import AutoPrecision
from selfsup_fastai.checks import check_flag
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.messages import say


def sped_up(
    model: nn.Module,  # A learner's, with `.encoder`
    device: torch.device | str | None,  # Where it will be trained
    precision: str | None = None,
    channels_last: bool | None = None,
    compile: bool = False,
    checkpointing: bool = False,
) -> list[Callback]:
    """The callbacks that these arguments of `pretext_learner` and `downstream_learner` ask for.

    The model is compiled here. Raises `TaskError` for what makes no sense, and for a network without checkpointing.
    """
    check_flag("compile", compile)
    check_flag("checkpointing", checkpointing)
    cbs = []
    if precision is not None or channels_last is not None:
        cbs.append(AutoPrecision(precision or "fp32", channels_last))
    if checkpointing:
        set_checkpointing(model.encoder, True)  # now, to see whether it can
        set_checkpointing(model.encoder, False)
        cbs.append(Checkpointing())
    if compile:
        compile_in_place(model, device)
    return cbs


def compile_in_place(model: nn.Module, device: torch.device | str | None) -> None:
    """`torch.compile`, with the names in the state dict as they were; where there is no compiler a line says so.

    Work starts with the first batch. Copies of the model, and what is made of a file, are not compiled.
    """
    try:
        torch.compile(_probe)(torch.ones(2, device=device or "cpu"))
    except Exception as error:  # of torch's, of the compiler's or the system's
        said = f"torch.compile finds nothing to compile with ({type(error).__name__})"
        say(f"Not compiled: {said}. On a CPU it takes a C++ compiler, such as g++. The run goes on without.")
        return
    model.compile()


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + x.cos()


class Checkpointing(Steady):
    """While a learner is fitted, its encoder forgets what the layers of a block gave and computes it again when the
    gradients need it: slower, in less memory.

    Batch norms see a batch twice then, but count it once: while gradients are computed their statistics stay.
    """

    def __init__(self):
        self.held = []

    def before_fit(self):
        self._release()  # of a fit that was broken off
        set_checkpointing(self.learn.model.encoder, True)

    def before_backward(self):
        norms = [m for m in self.learn.model.encoder.modules() if isinstance(m, _BatchNorm) and m.training]
        self.held = [(m, m.momentum, m.num_batches_tracked) for m in norms if m.num_batches_tracked is not None]
        for norm, _, count in self.held:
            norm.momentum, norm.num_batches_tracked = 0.0, count.clone()

    def after_backward(self):
        self._release()

    def after_fit(self):
        self._release()
        set_checkpointing(self.learn.model.encoder, False)

    def _release(self) -> None:
        for norm, momentum, count in self.held:
            norm.momentum, norm.num_batches_tracked = momentum, count
        self.held = []


def set_checkpointing(encoder: Encoder, on: bool) -> None:
    """Switch timm's gradient checkpointing. Raises `TaskError` for a network that has none."""
    for body in (encoder.body.lightness, encoder.body.color) if encoder.split else (encoder.body,):
        try:
            body.set_grad_checkpointing(on)
        except (AttributeError, AssertionError) as error:  # nn.Module names the attribute; timm asserts
            raise TaskError(
                f"{encoder.arch} has no gradient checkpointing. timm's ResNets, ConvNeXts and ViTs have; or leave "
                "checkpointing out and take smaller batches, where the task allows with GradientAccumulation."
            ) from error
