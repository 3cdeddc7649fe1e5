"""Bare networks, their heads off: made from a timm name, a constructor, or a module that is already there."""

import copy
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
import torchvision.models
from torch import nn

from selfsup_fastai.encoders.split import CHANNELS as HALVES
from selfsup_fastai.encoders.split import SplitBody
from selfsup_fastai.errors import SelfsupError, unknown
from selfsup_fastai.messages import say

HEADS = ("fc", "classifier", "heads", "head")  # What torchvision and most people call the classification head
# Arguments that say where weights come from, where they go and of which type they are; no part of the network
ABOUT_WEIGHTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
ABOUT_WEIGHTS |= {"weights", "progress", "device", "dtype"}


class Body(NamedTuple):
    """A bare network and what an `Encoder` has to know of it."""

    net: nn.Module
    arch: str  # Its name
    source: str  # Where the name counts: 'timm', 'torchvision' or 'module'; 'split timm' and so on for two halves
    kwargs: dict  # Arguments that rebuild it
    in_chans: int  # Channels it takes
    stats: tuple | None = None  # (mean, std) of the images behind its published weights


def is_timm_name(arch: object) -> bool:
    """Whether timm itself knows this name ('resnet18', 'resnet18.a1_in1k'; nothing from a hub or a folder)."""
    return isinstance(arch, str) and bool(re.fullmatch(r"\w+(\.\w+)?", arch)) and timm.is_model(arch)


def torchvision_names() -> list[str]:
    """The classification networks of torchvision."""
    return torchvision.models.list_models(module=torchvision.models)


def timm_body(arch: str, n_in: int, pretrained: bool, size: int | None, kwargs: dict) -> Body:
    """The network of this name, built for images of `size` where it takes one size only."""
    cfg = _timm_cfg(arch)
    ours = {"num_classes", "in_chans", "features_only", "pretrained"} & kwargs.keys()
    if ours:
        raise SelfsupError(f"{', '.join(sorted(ours))}: set by the encoder itself; `n_in` sets the channels.")
    kwargs = {"num_classes": 0, "in_chans": n_in, **{k: v for k, v in kwargs.items() if v is not None}}
    kept = {k: v for k, v in kwargs.items() if k not in ABOUT_WEIGHTS}
    if size and "img_size" not in kept and cfg.fixed_input_size and not kept.get("dynamic_img_size"):
        kept |= _fitting_size(arch, size, kept)
    net = _built(timm.create_model, arch, pretrained, {**kwargs, **kept, "model_name": arch, "pretrained": pretrained})
    stats = tuple(_spread(net.pretrained_cfg[k], n_in) for k in ("mean", "std")) if pretrained else None
    return Body(net, arch, "timm", kept, n_in, stats)


def constructed_body(make: Callable, n_in: int | None, pretrained: bool, kwargs: dict) -> Body:
    """The network that a constructor makes; those of torchvision are known by name."""
    name = getattr(make, "__name__", type(make).__name__)
    if getattr(make, "__module__", "").startswith("torchvision.models") and name in torchvision_names():
        return _torchvision_body(make, n_in or 3, pretrained, kwargs)
    if pretrained:
        raise SelfsupError(f"No published weights are known for {name}: load them, then pass the module itself.")
    net = _built(make, name, pretrained, kwargs)
    if not isinstance(net, nn.Module):
        raise SelfsupError(f"{name}() gave {type(net).__name__}, expected an nn.Module.")
    return module_body(net, n_in, trained=False)


def module_body(
    net: nn.Module,  # Changed in place
    n_in: int | None,  # Channels it shall take; None: as it is
    trained: bool,  # Whether its weights are worth keeping when the first convolution changes
) -> Body:
    """A network of one's own, its head off."""
    return Body(net, type(net).__name__, "module", {}, bare_module(net, n_in, trained))


def split_body(lightness: Body, color: Body) -> Body:
    """Two networks of one make, for 1 and for 2 channels, as one."""
    kwargs = {name: value for name, value in lightness.kwargs.items() if name != "in_chans"}
    net = SplitBody(lightness.net, color.net)
    return Body(net, lightness.arch, f"split {lightness.source}", kwargs, sum(HALVES))


def half_width(arch: str, kwargs: dict) -> dict:
    """Arguments with which timm builds this network half as wide, {} where there are none.

    Which arguments a network has is tried on the meta device, which computes shapes only. The first convolution of
    plain ResNets is always of 64 channels.
    """
    full = _on_paper(arch, kwargs)
    for widths in _halved(full) if full else []:
        half = _on_paper(arch, {**kwargs, **widths})
        if half and 2 * half.num_features == full.num_features:
            return widths
    return {}


def _on_paper(arch: str, kwargs: dict) -> nn.Module | None:
    """The network without its numbers; None where it cannot be built so."""
    try:
        with torch.device("meta"):
            return timm.create_model(arch, **{**kwargs, "num_classes": 0})
    except (RuntimeError, ValueError, AssertionError, TypeError):
        return None


def _halved(net: nn.Module) -> list[dict]:
    """How the constructors of timm's ResNets, ConvNeXts, ViTs and Swins would be told half the width of `net`."""
    found = [(info["num_chs"], net.get_submodule(info["module"])) for info in getattr(net, "feature_info", [])]
    if not found:
        return []
    first = found[0][0]
    stages = [(n, part[-1]) for n, part in found if isinstance(part, nn.Sequential)]
    channels = [n // getattr(block, "expansion", 1) // 2 for n, block in stages]
    resnet = {"channels": channels, "stem_width": first // 4}  # a stem's last layer has twice the width it is told
    return [resnet, {"dims": [n // 2 for n, _ in found]}, {"embed_dim": first // 2}]


def bare_module(
    net: nn.Module,  # Changed in place
    n_in: int | None,  # Channels it shall take; None: as it is
    trained: bool,  # Whether its weights are worth keeping when the first convolution changes
    quiet: bool = False,  # Do not say that a head was left out
) -> int:
    """Make a module that is not from timm's factory a bare one: head off, first convolution for `n_in` channels.

    Returns the channels it now takes.
    """
    _take_head_off(net, quiet)
    name, conv = next(((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if conv is None:
        return n_in or 3
    if n_in and conv.in_channels != n_in:
        net.set_submodule(name, _adapted(conv, n_in, trained))
    return n_in or conv.in_channels


def fixed_size(net: nn.Module, kwargs: dict) -> int | None:
    """The one image size that a network takes, in pixels, or None."""
    if isinstance(net, SplitBody):
        return fixed_size(net.lightness, kwargs)
    cfg = getattr(net, "pretrained_cfg", None)
    if not isinstance(cfg, dict):
        size = getattr(net, "image_size", None)  # torchvision's ViT
        return size if isinstance(size, int) else None
    if not cfg.get("fixed_input_size") or kwargs.get("dynamic_img_size"):
        return None
    size = kwargs.get("img_size") or getattr(getattr(net, "patch_embed", None), "img_size", None)
    size = size or cfg["input_size"][-2:]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise SelfsupError(f"img_size must be one number or a square, got {size!r}.")
    return height


def _timm_cfg(arch: str) -> timm.models.PretrainedCfg:
    if not is_timm_name(arch):
        if arch in torchvision_names():
            fix = f"Give torchvision.models.{arch} instead of a name."
            raise SelfsupError(f"timm has no {arch!r}, but torchvision has. {fix}")
        raise unknown("architecture", arch, timm.list_models())
    try:
        return timm.get_pretrained_cfg(arch)
    except RuntimeError:  # The name is known, what follows the dot is not
        raise unknown("architecture", arch, timm.list_models(f"{arch.split('.')[0]}.*", pretrained=True)) from None


def _built(make: Callable, arch: str, pretrained: bool, kwargs: dict) -> nn.Module:
    try:
        return make(**kwargs)
    except Exception as error:  # Whatever a constructor or a download can raise; always passed on
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        if isinstance(error, TypeError) or not pretrained:
            raise SelfsupError(f"The network {arch} cannot be built with these arguments ({reason}).") from error
        raise SelfsupError(
            f"The pretrained weights of {arch} could not be had ({reason}). They need the internet once; "
            "pretrained=False starts from scratch."
        ) from error


def _torchvision_body(make: Callable, n_in: int, pretrained: bool, kwargs: dict) -> Body:
    name = make.__name__
    weights = _chosen_weights(name, kwargs.get("weights", "DEFAULT" if pretrained else None))
    net = _built(make, name, weights is not None, {**kwargs, "weights": weights})
    bare_module(net, n_in, trained=weights is not None, quiet=True)
    published = weights.transforms() if weights else None
    stats = (_spread(published.mean, n_in), _spread(published.std, n_in)) if published else None
    return Body(net, name, "torchvision", {k: v for k, v in kwargs.items() if k not in ABOUT_WEIGHTS}, n_in, stats)


def _chosen_weights(name: str, weights: object) -> torchvision.models.WeightsEnum | None:
    """The published weights of a torchvision network that a name or an enum means."""
    offered = torchvision.models.get_model_weights(name)
    try:
        return offered.verify(weights)
    except (KeyError, TypeError):
        raise unknown(f"set of weights of {name}", weights, [w.name for w in offered]) from None


def _fitting_size(arch: str, size: int, kwargs: dict) -> dict:
    """The smallest image size from `size` up that this network can be built for; {}: its own.

    Tried on the meta device, which computes shapes only: windows and patches divide some sizes and not others.
    """
    for candidate in dict.fromkeys(math.ceil(size / step) * step for step in (1, 16, 32, 64, 128)):
        try:
            with torch.device("meta"), torch.no_grad():
                net = timm.create_model(arch, **kwargs, img_size=candidate).eval()
                net(torch.empty(1, kwargs["in_chans"], candidate, candidate))
            patch = getattr(getattr(net, "patch_embed", None), "patch_size", (1,))
            if candidate % patch[0] == 0:  # else pixels at the rim go unseen
                return {"img_size": candidate}
        except (RuntimeError, ValueError, AssertionError, TypeError):
            continue
    return {}


def _spread(stats: tuple[float, ...], n_in: int) -> tuple[float, ...]:
    """Statistics of 3 channels for `n_in`: their mean for one, else repeated in turn as timm repeats weights."""
    if n_in == 1:
        return (sum(stats) / len(stats),)
    return tuple(float(stats[i % len(stats)]) for i in range(n_in))


def _take_head_off(net: nn.Module, quiet: bool) -> None:
    """Replace the classification head by nothing (by a pooling where the head did the pooling)."""
    if hasattr(net, "reset_classifier") and hasattr(net, "num_classes"):
        net.reset_classifier(0)
        return
    name = next((h for h in HEADS if isinstance(getattr(net, h, None), nn.Module)), None)
    if name is None or not any(True for _ in getattr(net, name).parameters()):
        return
    pools = any(isinstance(m, nn.AdaptiveAvgPool2d) for m in getattr(net, name).modules())
    setattr(net, name, nn.AdaptiveAvgPool2d(1) if pools else nn.Identity())
    if not quiet:
        say(f"Encoder: `{name}` of {type(net).__name__} was taken for a classification head and left out.")


def _adapted(conv: nn.Conv2d, n_in: int, trained: bool) -> nn.Conv2d:
    """The same convolution for `n_in` channels; trained weights answer a gray image as they did before."""
    new = copy.deepcopy(conv)
    new.in_channels = n_in
    weight = conv.weight.detach().sum(1, keepdim=True).expand(-1, n_in, -1, -1) / n_in
    new.weight = nn.Parameter(weight.contiguous())
    if not trained:
        new.reset_parameters()
    return new
