"""A module used as it stands: what a rival network, a teacher or a judge needs."""

from torch import nn
from torch.func import functional_call


def as_it_stands(
    module: nn.Module,
    *args,
    **kwargs,
):
    """`module(*args)`, its weights held constant and its buffers left alone; gradients reach the arguments alone.

    With a judge D of what G makes, `d_loss(D(fake.detach()))` trains D, `g_loss(as_it_stands(D, fake))` trains G, and
    their sum does both in one backward pass: to Adam, which treats every weight by itself, that is two optimizers.
    """
    weights = {name: p.detach() for name, p in module.named_parameters()}
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    return functional_call(module, {**weights, **buffers}, args, kwargs)
