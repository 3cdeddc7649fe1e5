"""Several processes that train one model together (torch.distributed); with one process nothing here does anything.

Each process trains on images of its own and has the gradients of its own mean loss; `callbacks.data_parallel` averages
them. For a loss that compares images of a batch, all processes' images are the batch: `gathered` and `summed` hand them
over, and hand back to each process what all losses together want of its tensor. Averaged, that is the gradient of one
process with the whole batch.

Functions that exchange something must be called by all processes, in the same order. What one does by itself, such as
looking at predictions, it does inside of `alone`. Python objects travel as JSON: nothing is pickled.
"""

import atexit
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfsup_fastai.errors import LostProcessError, SelfsupError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # With a process that does not come to an exchange
LONG = timedelta(days=2)  # While the first one prepares what all will use
BUCKET = 32 << 20  # Bytes that are averaged at a time
STARTED = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"  # torchrun, accelerate, `--nproc` set them


class _Now:
    """What holds at the moment."""

    alone = False  # Whether this process works by itself
    unequal = False  # Whether processes may have different numbers of rows


# --- who is there -----------------------------------------------------------------------------------------------------


def join() -> None:
    """Meet the other processes that `torchrun`, `accelerate launch` or `selfsup pretrain --nproc` started, if any.

    On GPUs each takes the one of its number on its machine. Only the first one speaks to the user from now on.
    Where they have met already, such as by `accelerate`'s Accelerator, that is what counts. Raises `SelfsupError` for
    a start that is not whole, more processes than GPUs, and a meeting on GPUs alone.
    """
    if not is_started() or not dist.is_available():
        return
    if not dist.is_initialized():
        _meet()
    elif "cpu:" not in dist.get_backend_config():
        have = f"The processes have met with {dist.get_backend_config()!r} alone, and numbers on the CPU travel, too."
        raise SelfsupError(f"{have} Say init_process_group('cpu:gloo,cuda:nccl'), or leave it to pretext_learner.")
    if not is_first():
        logging.getLogger("selfsup_fastai").setLevel(logging.WARNING)  # that of `messages`


def _meet() -> None:
    missing = [name for name in STARTED if name not in os.environ]
    if missing:
        fix = "Start it with torchrun, accelerate launch or selfsup pretrain --nproc."
        raise SelfsupError(f"WORLD_SIZE says that several processes train, but {', '.join(missing)} is not set. {fix}")
    backend, gpus, here = "gloo", torch.cuda.device_count(), local_rank()
    if gpus:
        if here >= gpus:
            raise SelfsupError(f"Process {here + 1} on this machine has no GPU: there are {gpus}. Start as many.")
        torch.cuda.set_device(here)
        backend = "cpu:gloo,cuda:nccl"
    with told():
        dist.init_process_group(backend, timeout=PATIENCE)
        _patient()
    atexit.register(_leave)  # else one that ends beside others may be aborted by torch


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_started() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def check_single(
    what: str,  # Such as 'Fine-tuning'
) -> None:
    """Raises `SelfsupError` in one of several processes: what one does all would do, over each other's files."""
    if is_started() and not _Now.alone:
        have = f"{what} takes place in one process, and this one was started as one of {os.environ['WORLD_SIZE']}."
        fix = "Start it by itself, without torchrun, accelerate launch or --nproc; only pretraining can be shared."
        raise SelfsupError(f"{have} {fix}")


def n_processes() -> int:
    """How many processes train together."""
    joined = dist.is_available() and dist.is_initialized() and not _Now.alone
    return dist.get_world_size() if joined else 1


def rank() -> int:
    """The number of this process, from 0; 0 of a single one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works as if there were no others."""
    before, _Now.alone = _Now.alone, True
    try:
        yield
    finally:
        _Now.alone = before


def unequal(may_be: bool) -> None:
    """Say whether from now on batches of the processes may differ in size, as in validation."""
    _Now.unequal = may_be


@contextmanager
def first_here() -> Iterator[None]:
    """What is inside, the first process of a machine does while the others wait: then they find it done."""
    if n_processes() == 1:
        yield
        return
    if local_rank():
        _wait()
    yield
    if not local_rank():
        _wait()


@contextmanager
def told() -> Iterator[None]:
    """Turns errors of torch.distributed into a `LostProcessError`: nearly always another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        raise LostProcessError(
            f"Another process of this run has ended or cannot be reached, so process {rank()} stops, too. Its own "
            "message says why; a run that keeps its state (Resume) goes on when all are started again."
        ) from error


@cache
def _patient() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=LONG)


def _wait() -> None:
    with told():
        dist.barrier(_patient())


# --- facts ------------------------------------------------------------------------------------------------------------


def agreed(
    value: T,  # As JSON has it; counts in the first process
) -> T:
    """What the first process says: for everything that is decided by time or chance."""
    if n_processes() == 1:
        return value
    size, text = _as_bytes(value)
    with told():
        dist.broadcast(size, 0)
        text = text if is_first() else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(text, 0)
    return json.loads(bytes(text.tolist()))


def of_all(
    value: T,  # As JSON has it
) -> list[T]:
    """What each process says, in the order of the processes."""
    if n_processes() == 1:
        return [value]
    _, text = _as_bytes(value)
    with _unequal_for_now():
        texts = gathered(text).split(lengths(text))
    return [json.loads(bytes(text.tolist())) for text in texts]


def totals(
    numbers: Iterable[Any],  # Plain ones, or tensors of any shape
) -> list:
    """The sum over the processes of each number."""
    numbers = list(numbers)
    if n_processes() == 1:
        return numbers
    tensors = [torch.as_tensor(number, dtype=torch.float64).detach().cpu() for number in numbers]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with told():
        dist.all_reduce(flat)
    parts = [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors)]
    return [part if isinstance(number, Tensor) else part.item() for part, number in zip(parts, numbers)]


def _as_bytes(value: object) -> tuple[Tensor, Tensor]:
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    return torch.tensor(len(text)), text


# --- tensors ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def shared(module: nn.Module) -> None:
    """Gives the parameters and buffers of all processes the values that the first one has."""
    if n_processes() == 1:
        return
    for tensor in (*module.parameters(), *module.buffers()):
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach().contiguous()
        with told():
            dist.broadcast(sent, 0)
        tensor.copy_(sent)


@torch.no_grad()
def averaged(
    tensors: Iterable[Tensor],  # Of the same shapes in all processes
) -> None:
    """Gives each the mean over the processes, in place."""
    if n_processes() == 1:
        return
    sent = []
    with told():
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.detach().flatten() for tensor in bucket])
            sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
        for bucket, flat, work in sent:
            work.wait()
            flat.div_(n_processes())
            for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                tensor.copy_(mean.view(tensor.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one kind and about `BUCKET` bytes together."""
    kinds: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        bucket = kinds.setdefault((tensor.device, tensor.dtype), [])
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= BUCKET:
            yield kinds.pop((tensor.device, tensor.dtype))
    yield from kinds.values()


def lengths(
    x: Tensor,  # (B, ...)
) -> list[int]:
    """Rows that each process has."""
    if n_processes() == 1 or not _Now.unequal:
        return [len(x)] * n_processes()
    found = [torch.tensor(0) for _ in range(n_processes())]
    with told():
        dist.all_gather(found, torch.tensor(len(x)))
    return [int(n) for n in found]


def n_rows(
    x: Tensor,  # (B, ...)
) -> int:
    """Rows of all processes together."""
    return sum(lengths(x))


def first_row(
    x: Tensor,  # (B, ...)
) -> int:
    """Where the rows of this process begin in `gathered(x)`."""
    return sum(lengths(x)[: rank()]) if n_processes() > 1 else 0


def own_share(
    x: Tensor,  # (N, ...), the same in all processes
) -> Tensor:  # (about N / processes, ...)
    """The rows that fall to this process, so that each is counted once in a sum over the processes."""
    return x[rank() :: n_processes()] if n_processes() > 1 else x


def gathered(
    x: Tensor,  # (B, ...), of one shape in all processes; in validation and other `unequal` times B may differ
) -> Tensor:  # (rows of all processes, ...), in the order of the processes
    """The rows of all processes; gradients go back to where a row came from."""
    if n_processes() == 1:
        return x
    rows = lengths(x)
    return _Gather.apply(x) if len(set(rows)) == 1 else _padded_and_cut(x, rows)


def of_unequal(
    x: Tensor,  # (B, ...)
) -> Tensor:
    """The rows of all processes, which may have different numbers of them; without gradients."""
    with _unequal_for_now():
        return gathered(x.detach())


@contextmanager
def _unequal_for_now() -> Iterator[None]:
    before, _Now.unequal = _Now.unequal, True
    try:
        yield
    finally:
        _Now.unequal = before


def summed(
    x: Tensor,  # Of one shape in all processes
) -> Tensor:
    """The sum over the processes, with gradients."""
    return _Sum.apply(x) if n_processes() > 1 else x


@torch.no_grad()
def _padded_and_cut(x: Tensor, rows: list[int]) -> Tensor:
    padded = x.new_zeros(max(rows), *x.shape[1:])
    padded[: len(x)] = x
    parts = _all_gather(padded)
    return torch.cat([part[:n] for part, n in zip(parts, rows)])


def _all_gather(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(n_processes())]
    with told():
        dist.all_gather(parts, x.contiguous())
    return parts


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        first = len(x) * rank()
        ctx.rows = slice(first, first + len(x))
        return torch.cat(_all_gather(x))

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        with told():
            dist.all_reduce(grad)
        return grad[ctx.rows]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        with told():
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        with told():
            dist.all_reduce(grad)
        return grad
