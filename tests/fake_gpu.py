"""A GPU that is not there: tensors without values that say they lie on one, and what of it a program would wait for.

torch's FakeTensorMode knows shapes, types and devices of what lies there. It raises where a value is asked for, and
where tensors of two devices meet; copies to the GPU that the program would wait for are counted here. What lies on the
CPU has values. Gradients cannot be computed.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import extract_stack

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import selfsup_fastai

PACKAGE = selfsup_fastai.__path__[0]
GPU = torch.device("cuda", 0)
DECOMPOSITIONS = "aten::_linalg_check_errors", "aten::_linalg_eigh", "aten::linalg_eig", "aten::_linalg_svd"


class FakeGenerator(torch.Generator):
    """One that says that it is on the GPU, with a host."""

    def __init__(self):
        self.host = torch.Generator().manual_seed(0)

    @property
    def device(self) -> torch.device:
        return GPU


class Waits(TorchDispatchMode):
    """Counts what a program waits for, besides the values that it asks for, by the innermost function of this package.

    Those are copies to the GPU from memory that is not pinned, copies from the GPU, tensors indexed by others of the
    CPU or by masks, and decompositions.
    """

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten._pin_memory.default:
            return args[0]
        here = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        if here and not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            with unset_fake_temporarily():  # on the CPU tensors have values
                return func(*args, **kwargs)
        if func is aten._to_copy.default and kwargs.get("device") is not None and not kwargs.get("non_blocking"):
            self._note(args[0].device.type != torch.device(kwargs["device"]).type)
        if func is aten.copy_.default and args[1].ndim and not any(args[2:]):  # a single number goes with the call
            self._note(args[0].device.type != args[1].device.type)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            for index in args[1]:
                self._note(index is not None and (index.device.type == "cpu" or index.dtype == torch.bool))
        if func.name().startswith(DECOMPOSITIONS):
            self._note()
        return func(*args, **kwargs)

    def _note(self, waits: bool = True) -> None:
        where = innermost()
        self.found[where] += waits and where != "constant"  # once a device: what is fake is not kept


def innermost() -> str:
    """The function of this package that is at work."""
    stack = [frame for frame in extract_stack() if frame.filename.startswith(PACKAGE)]
    return stack[-1].name if stack else "torch"


@contextmanager
def fake_gpu() -> Iterator[Waits]:
    """Inside, `on_gpu` works."""
    waits = Waits()
    with FakeTensorMode(allow_non_fake_inputs=True), waits:
        yield waits


def on_gpu(module: nn.Module) -> nn.Module:
    """The module's parameters and buffers become tensors on the fake GPU."""
    made = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                kind = made.setdefault(id(p), nn.Parameter(p.detach().to(GPU, non_blocking=True), p.requires_grad))
                part._parameters[name] = kind
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = made.setdefault(id(b), b.to(GPU, non_blocking=True))
    return module
