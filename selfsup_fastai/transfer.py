"""Small tensors on their way to the device, which is not waited for: a GPU that waits for the program stands still."""

import torch
from torch import Tensor

_MADE: dict[tuple, Tensor] = {}


def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of numbers, or of tuples of them, brought to a device once. Not to be changed in place."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed():
        return torch.tensor(values, dtype=dtype, device=device)
    key = values, dtype, device
    if key in _MADE:
        return _MADE[key]
    made = torch.tensor(values, dtype=dtype, device=device)
    if type(made) is Tensor and not made.is_inference():  # else it is of a trace, or of no use to gradients
        _MADE[key] = made
    return made


def _is_transformed() -> bool:
    """Whether torch.func is at work, whose tensors do not outlive it."""
    return torch._C._functorch.maybe_current_level() is not None


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; what comes from the CPU is there before anything that is asked for later."""
    from_host = x.device.type == "cpu" and torch.device(device).type == "cuda"
    return x.pin_memory().to(device, non_blocking=True) if from_host else x.to(device)
