"""Optimizers that take a step for all parameters at once."""

from collections.abc import Iterable, Iterator

import torch
from fastai.optimizer import Optimizer
from torch import Tensor
from torch.optim.adamw import adamw

FUSED = ("cpu", "cuda")  # Devices where torch has one kernel for the whole of AdamW


def FusedAdam(
    params: Iterable,  # Parameters, or groups of them
    lr: float | slice,
    mom: float = 0.9,  # Running average of gradients
    sqr_mom: float = 0.99,  # Running average of squared gradients
    eps: float = 1e-5,
    wd: float = 0.01,  # Decoupled weight decay, as in AdamW
) -> "FusedOptimizer":
    """fastai's `Adam` with its defaults, computed by torch's fused AdamW: `pretext_learner(dls, opt_func=FusedAdam)`.

    fastai goes through the parameters one by one in Python. The steps are the same but for rounding, weight decay
    leaves out norms and biases as fastai does, and what is remembered has the same names: an optimizer saved by the one
    can be loaded by the other.
    """
    return FusedOptimizer(params, [adamw], lr=lr, mom=mom, sqr_mom=sqr_mom, eps=eps, wd=wd)


class FusedOptimizer(Optimizer):
    """A fastai `Optimizer` whose step is torch's AdamW over each group of parameters as a whole."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One step; a `closure` is not known here, as in fastai."""
        if closure is not None:
            raise NotImplementedError("fastai's optimizers take no closure.")
        for params, hyper, decays in self._parts():
            states = [self._remembered(p) for p in params]
            adamw(
                params,
                [_laid_out_as(p, p.grad) for p in params],
                [state["grad_avg"] for state in states],
                [state["sqr_avg"] for state in states],
                [],
                [state["step"] for state in states],
                fused=params[0].device.type in FUSED and all(map(_is_dense, params)),
                foreach=False,
                amsgrad=False,
                maximize=False,
                lr=float(hyper["lr"]),
                beta1=float(hyper["mom"]),
                beta2=float(hyper["sqr_mom"]),
                eps=float(hyper["eps"]),
                weight_decay=float(hyper["wd"]) if decays else 0.0,
            )

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Zeros, not None, as in fastai: a part of the net that a step did without still moves on by its momentum."""
        grads = [p.grad for params in self.param_lists for p in params if p.grad is not None]
        for grad in grads:
            grad.detach_()
        if grads:
            torch._foreach_zero_(grads)

    def _parts(self) -> Iterator[tuple[list[Tensor], dict, bool]]:
        """The parameters with a gradient: of each group those that decay, and those that do not."""
        for group, hyper in zip(self.param_lists, self.hypers):
            found = [p for p in group if p.grad is not None]
            for decays in (True, False):
                params = [p for p in found if self.state[p].get("do_wd", True) == decays]
                if params:
                    yield params, hyper, decays

    def _remembered(self, p: Tensor) -> dict:
        state = self.state[p]
        if not isinstance(state.get("step"), Tensor):  # fastai's own counts in Python
            state["step"] = torch.tensor(float(state.get("step", 0)), device=p.device)
        for name in ("grad_avg", "sqr_avg"):
            state[name] = _laid_out_as(p, state[name]) if name in state else torch.zeros_like(p)
        return state


def _is_dense(p: Tensor) -> bool:
    """Whether nothing lies between its numbers: the fused kernel would take that for numbers, too.

    Orders in memory other than the usual two count as not dense; those take torch's slower way.
    """
    return p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))


def _laid_out_as(p: Tensor, value: Tensor) -> Tensor:
    """The fused kernel goes through memory and does not look at strides: mixed layouts would mix up the numbers."""
    return value if value.stride() == p.stride() else torch.empty_like(p).copy_(value)
