"""What a network gives, measured once on an empty image: its features, and the maps `(B, C, h, w)` of its layers.

timm's networks hand out maps themselves (`forward_intermediates`); the parts of the others are listened to with hooks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from selfsup_fastai.encoders.groups import parts
from selfsup_fastai.encoders.split import CHANNELS, SplitBody, pooled

LastMap = Callable[[nn.Module, Tensor], Tensor]  # (body, images) to the map before the pooling


def measure(body: nn.Module, in_chans: int, size: int) -> tuple[int, list[str], LastMap | None]:
    """Width of the features, names of the layers that give maps, and how the last map is had (None: in no way).

    The body is afterwards as it was. Raises what the body raises, and `TaskError` where it gives no features.
    """
    if isinstance(body, SplitBody):
        halves = [measure(half, n, size) for half, n in zip((body.lightness, body.color), CHANNELS)]
        widths, layers, ways = zip(*halves)
        return sum(widths), layers[0], partial(_both_halves, ways=ways) if None not in ways else None
    like = next((p for p in body.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.zeros(1, in_chans, size, size, dtype=like.dtype, device=like.device)
    with undisturbed(body):
        out = body(x)
        width, layers = pooled(out).shape[1], _layer_names(body, x)
        return width, layers, _way_to_last_map(body, x, out, layers)


def maps_of(body: nn.Module, x: Tensor, layers: list[str], names: list[str]) -> dict[str, Tensor]:
    """The maps of those of all `layers` that are in `names`, shallow to deep, channels second."""
    if isinstance(body, SplitBody):
        first, second = (maps_of(half, part, layers, names) for half, part in body.shares(x))
        return {name: torch.cat([first[name], second[name]], 1) for name in first}
    names = [name for name in layers if name in names]
    if hasattr(body, "forward_intermediates"):
        indices = [layers.index(name) for name in names]
        return dict(zip(names, body.forward_intermediates(x, indices=indices, intermediates_only=True)))
    found = parts(body)
    return _outputs({name: found[name] for name in names}, body, x)


@contextmanager
def undisturbed(body: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, running statistics and random state are afterwards as they were."""
    modes = {module: module.training for module in body.modules()}
    body.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _layer_names(body: nn.Module, x: Tensor) -> list[str]:
    """Layers that give maps `(B, C, h, w)`; none where the maps are only a prelude to tokens (a patch embedding)."""
    if hasattr(body, "forward_intermediates"):
        return [info["module"] for info in body.feature_info]
    found = parts(body)
    outs = {name: out for name, out in _outputs(found, body, x).items() if isinstance(out, Tensor)}
    names = [name for name, out in outs.items() if _is_map(out, found[name])]
    later = list(outs)[list(outs).index(names[-1]) :] if names else []
    return [] if any(outs[name].ndim == 3 for name in later) else names


def _outputs(found: dict[str, nn.Module], body: nn.Module, x: Tensor) -> dict[str, object]:
    """One pass through the body: what each part gave, in the order they ran."""
    outs = {}
    hooks = [
        part.register_forward_hook(lambda _part, _inputs, out, name=name: outs.__setitem__(name, out))
        for name, part in found.items()
    ]
    try:
        body(x)
    finally:
        for hook in hooks:
            hook.remove()
    return outs


def _is_map(out: Tensor, part: nn.Module) -> bool:
    """A square map: not channels last, and not the 1×1 left by a global pooling."""
    if out.ndim != 4 or out.shape[2] != out.shape[3]:
        return False
    return out.shape[-1] > 1 or any(True for _ in part.parameters())


def _way_to_last_map(body: nn.Module, x: Tensor, out: Tensor, layers: list[str]) -> LastMap | None:
    last = body.forward_features(x) if hasattr(body, "forward_features") else None
    if isinstance(last, Tensor) and last.ndim == 4:  # The image is square, so a square says where h and w are
        return _features if last.shape[2] == last.shape[3] else _features_channels_last
    if hasattr(body, "forward_intermediates"):
        return partial(_tokens, norm=_can_norm(body, x))
    if out.ndim == 4 and out.shape[-1] > 1:
        return _output
    return partial(_hooked, layer=layers[-1]) if layers else None


def _can_norm(body: nn.Module, x: Tensor) -> bool:
    """Whether the last norm can be had on the map of a token network; Hiera has it after the pooling."""
    try:
        _tokens(body, x, norm=True)
    except AssertionError:
        return False
    return True


# The ways to the last map. Functions of this file, so that an encoder that remembers one can be copied and pickled.


def _features(body: nn.Module, x: Tensor) -> Tensor:
    return body.forward_features(x)


def _features_channels_last(body: nn.Module, x: Tensor) -> Tensor:
    return body.forward_features(x).permute(0, 3, 1, 2).contiguous()


def _tokens(body: nn.Module, x: Tensor, norm: bool) -> Tensor:
    return body.forward_intermediates(x, indices=1, norm=norm, intermediates_only=True)[-1]


def _output(body: nn.Module, x: Tensor) -> Tensor:
    return body(x)


def _hooked(body: nn.Module, x: Tensor, layer: str) -> Tensor:
    return _outputs({layer: parts(body)[layer]}, body, x)[layer]


def _both_halves(body: SplitBody, x: Tensor, ways: tuple[LastMap, LastMap]) -> Tensor:
    return torch.cat([way(half, part) for way, (half, part) in zip(ways, body.shares(x))], 1)
