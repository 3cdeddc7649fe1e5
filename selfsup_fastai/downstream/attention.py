"""Where a network looks, as numbers: attention of transformers, Grad-CAM, strength of the maps. Pictures: `interpret`.

All take images as the network eats them (after `encoder.prepare`) and leave it as it was. Maps are (B, h, w).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.groups import parts
from selfsup_fastai.encoders.maps import undisturbed
from selfsup_fastai.encoders.split import SplitBody
from selfsup_fastai.errors import TaskError


class _Listener(TorchFunctionMode):
    """Attention weights of whatever runs inside, found where torch computes them: no module is changed for it.

    Fused kernels do not give them, so they are computed once more from what the kernel is given.
    """

    def __init__(self):
        super().__init__()
        self.module, self.found = "", {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:  # torch's own module; it can be asked
            out, weights = func(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            self._keep(weights)
            return out, weights
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._keep(fused_weights(*args, **kwargs))
        elif func in (F.softmax, torch.softmax, Tensor.softmax):
            self._keep(out)
        return out

    def _keep(self, weights: Tensor) -> None:
        if weights.ndim == 4 and weights.shape[2] == weights.shape[3]:  # (B, heads, N, N)
            self.found[self.module or f"attention {len(self.found)}"] = weights.detach()

    @contextmanager
    def naming(self, body: nn.Module) -> Iterator[None]:
        """Inside, what is found has the name of the layer that it is in."""
        named = [(name, m) for name, m in body.named_modules() if "att" in type(m).__name__.lower()]
        hooks = [m.register_forward_pre_hook(lambda *_, name=name: self._enter(name)) for name, m in named]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str) -> None:
        self.module = name.rpartition(".")[0] or name


def fused_weights(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> Tensor:
    """softmax(q kᵀ scale + mask): what `scaled_dot_product_attention` weighs its values with."""
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)


def attention_weights(
    encoder: Encoder,
    x: Tensor,  # (B, C, H, W), prepared
) -> dict[str, Tensor]:  # (B, heads, N, N) by layer, shallow to deep
    """How much each token of each image attends to each, of every layer in which all tokens see each other.

    Raises `TaskError` for networks without such layers: convnets, and transformers that look through windows.
    """
    listener = _Listener()
    with undisturbed(encoder), listener.naming(encoder.body), listener:
        encoder(x)
    if len({weights.shape for weights in listener.found.values()}) != 1 or _tokens(listener.found, x) is None:
        fix = "kind='activation' suits every net, and kind='gradcam' every fine-tuned learner"
        raise TaskError(f"{encoder.arch} has no layers in which all patches of an image attend to each other: {fix}.")
    return listener.found


def _tokens(found: dict[str, Tensor], x: Tensor) -> int | None:
    """Tokens an image; None where attention is within windows, which pose as so many more images."""
    shape = next(iter(found.values())).shape
    return shape[-1] if shape[0] == len(x) else None


def looked_at(
    encoder: Encoder,
    weights: Tensor,  # (B, heads, N, N), or (B, N, N)
) -> Tensor:  # (B, h, w)
    """What the class token attends to, mean of the heads; without such a token the mean over all patches."""
    rows = weights.mean(1) if weights.ndim == 4 else weights
    n_prefix = _prefix(encoder.body, rows.shape[-1])
    has_class = n_prefix and _has_class_token(encoder.body)
    asked = rows[:, 0] if has_class else rows[:, n_prefix:].mean(1)
    patches = asked[:, n_prefix:]
    side = round(patches.shape[1] ** 0.5)
    return patches.reshape(len(patches), side, side)


def _has_class_token(body: nn.Module) -> bool:
    return getattr(body, "cls_token", None) is not None or getattr(body, "class_token", None) is not None


def _prefix(body: nn.Module, n_tokens: int) -> int:
    """Tokens before those of the patches: of the class, and registers. Images are square, and so are their patches."""
    known = getattr(body, "num_prefix_tokens", None)
    known = int(_has_class_token(body)) if known is None else known
    for n in (known, 0):  # CaiT adds its class token in the last layers
        if round((n_tokens - n) ** 0.5) ** 2 == n_tokens - n:
            return n
    raise TaskError(f"{n_tokens - known} patches are no square. Attention is drawn for square images.")


def rollout(weights: Sequence[Tensor]) -> list[Tensor]:
    """Abnar & Zuidema 2020: how much of each patch has come to each token after each layer, (B, N, N).

    Half of what a layer gives is what it got (the residual connection), half what it attended to.
    """
    steps, through = [], None
    for layer in weights:
        step = (layer.mean(1) + torch.eye(layer.shape[-1], device=layer.device)) / 2
        through = step if through is None else step @ through
        steps.append(through)
    return steps


def strengths(
    encoder: Encoder,
    x: Tensor,  # (B, C, H, W), prepared
    layers: Sequence[str],
) -> dict[str, Tensor]:  # (B, h, w) by layer
    """The mean magnitude over the channels of each layer's map."""
    with undisturbed(encoder):
        return {name: m.abs().mean(1) for name, m in encoder.feature_maps(x, list(layers)).items()}


def grad_cam(
    model: nn.Module,  # With `.encoder`; (B, C, H, W) -> (B, outputs)
    x: Tensor,  # (B, C, H, W), prepared
    layers: Sequence[str],
    target: int | None = None,  # Output that is explained; None: the greatest of each image
) -> tuple[dict[str, Tensor], Tensor]:  # (B, h, w) by layer, outputs (B, n)
    """Selvaraju et al. 2017: channels of a map, weighted by the mean gradient of the output, negative sums cut off."""
    encoder = model.encoder
    with undisturbed(encoder):
        shapes = {name: m.shape[1:] for name, m in encoder.feature_maps(x, list(layers)).items()}
    with undisturbed(model), torch.enable_grad(), _outputs_of(encoder.body, layers) as outs:
        out = model(x.detach().requires_grad_())
        if out.ndim != 2:
            raise TaskError(f"Grad-CAM explains one output an image; this model gives {tuple(out.shape)}.")
        chosen = out.argmax(1) if target is None else torch.full((len(out),), target, device=out.device)
        kept = [m for name in layers for m in outs[name]]
        grads = iter(torch.autograd.grad(out.gather(1, chosen[:, None]).sum(), kept))
    cams = {}
    for name in layers:
        cams[name] = F.relu(sum(_weighed(m, next(grads), shapes[name], len(outs[name])) for m in outs[name])).detach()
    return cams, out.detach()


def _weighed(out: Tensor, grad: Tensor, shape: torch.Size, n_parts: int) -> Tensor:
    """(B, h, w): the channels' sum, each weighted by its mean gradient."""
    c, h, w = shape[0] // n_parts, *shape[1:]
    maps, grads = (_channels_second(t, c, h, w) for t in (out, grad))
    return (maps * grads.mean(dim=(2, 3), keepdim=True)).sum(1)


def _channels_second(t: Tensor, c: int, h: int, w: int) -> Tensor:
    """Maps in any layout, or tokens, to (B, C, h, w)."""
    if t.ndim == 3:  # (B, N, C), the class token and registers first
        return t[:, t.shape[1] - h * w :].transpose(1, 2).reshape(len(t), c, h, w)
    return t if t.shape[1:] == (c, h, w) else t.permute(0, 3, 1, 2)


@contextmanager
def _outputs_of(body: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the layers give while the body runs; of a split body what both halves give."""
    halves = [body.lightness, body.color] if isinstance(body, SplitBody) else [body]
    outs: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        _module(half, name).register_forward_hook(lambda _m, _x, out, name=name: outs[name].append(out))
        for half in halves
        for name in layers
    ]
    try:
        yield outs
    finally:
        for hook in hooks:
            hook.remove()


def _module(body: nn.Module, name: str) -> nn.Module:
    return body.get_submodule(name) if hasattr(body, "forward_intermediates") else parts(body)[name]
