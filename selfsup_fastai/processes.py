"""Tensors shared by the processes of a run on several devices (torch.distributed); with one process nothing happens.

Each process trains on images of its own and has the gradients of its own mean loss; DistributedDataParallel averages
them. For a loss that compares images of a batch, all processes' images are the batch: `gathered` and `summed` hand them
over, and hand back to each process what all losses together want of its tensor. Averaged, that is the gradient of one
process with the whole batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def n_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first_row(
    x: Tensor,  # (B, ...)
) -> int:
    """Where the rows of this process begin in `gathered(x)`."""
    return len(x) * dist.get_rank() if n_processes() > 1 else 0


def own_share(
    x: Tensor,  # (N, ...), the same in all processes
) -> Tensor:  # (about N / processes, ...)
    """The rows that fall to this process, so that each is counted once in a sum over the processes."""
    return x[dist.get_rank() :: n_processes()] if n_processes() > 1 else x


def gathered(
    x: Tensor,  # (B, ...), of one shape in all processes
) -> Tensor:  # (processes * B, ...), in the order of the processes
    """The rows of all processes; gradients go back to where a row came from."""
    return _Gather.apply(x) if n_processes() > 1 else x


def summed(
    x: Tensor,  # Of one shape in all processes
) -> Tensor:
    """The sum over the processes, with gradients."""
    return _Sum.apply(x) if n_processes() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(n_processes())]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = slice(first_row(x), first_row(x) + len(x))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.rows]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad
