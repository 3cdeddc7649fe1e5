"""The network that is kept: one wrapper around any timm net, torchvision constructor or `nn.Module`.

Read `create_encoder` for how a network is made, `Encoder` for what it can do. What differs from network to network
(how wide the features are, in which layout the last map comes) is measured once on an empty image, never assumed.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import timm
import torch
import torch.nn.functional as F
import torchvision.models
from timm.models import group_parameters
from torch import Tensor, nn

from selfsup_fastai.errors import SelfsupError, TaskError, unknown
from selfsup_fastai.messages import say

HEADS = ("fc", "classifier", "heads", "head")  # What torchvision and most people call the classification head
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"
TINY = 0.01  # Groups with a smaller share of the parameters are not worth a learning rate of their own
WEIGHT_SOURCES = ("pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")  # Not part of the net


class Encoder(nn.Module):
    """A network without its head: images `(B, in_chans, H, W)` to features `(B, num_features)`, or to maps.

    Networks of one fixed image size (ViT, Swin) are given images resized to it, so any image, tile or crop will do.
    `body` is the bare network; its state_dict keys are timm's. Made by `create_encoder` and `load_encoder`.

    - `arch`, `source` ('timm', 'torchvision', 'module'), `kwargs`: what rebuilds the body:
      `timm.create_model(arch, **kwargs)`
    - `in_chans`, `num_features`: channels that enter, features that come out (measured)
    - `size`: image size it was or will be trained at, in pixels; `fixed_size`: the only size the body takes, or None
    - `input`: what the channels are: 'rgb', 'grey', 'other', or what a pretext task sets ('L', 'lab', 'sobel')
    - `mean`, `std`: of the training images, on the [0, 1] scale, one number per channel; None until measured
    - `lineage`: the rounds of pretraining so far, oldest first
    - `layer_names`: the layers that `feature_maps` can give, shallow to deep
    """

    def __init__(
        self,
        body: nn.Module,  # The network, its head off
        arch: str | None = None,  # Its name
        source: str = "module",  # Where the name counts: 'timm', 'torchvision' or 'module'
        kwargs: dict | None = None,  # Arguments that rebuild it
        in_chans: int = 3,  # Channels it takes
        size: int | None = None,  # Image size it is trained at
    ):
        super().__init__()
        self.body, self.arch, self.source, self.kwargs = body, arch, source, dict(kwargs or {})
        self.in_chans, self.size, self.fixed_size = in_chans, size, _fixed_size(body, self.kwargs)
        self.input = {1: "grey", 3: "rgb"}.get(in_chans, "other")
        self.mean = self.std = None
        self.lineage = []
        self._measure()

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, H, W)` to pooled features `(B, num_features)`."""
        return _pooled(self.body(self._checked(x)))

    def feature_map(self, x: Tensor) -> Tensor:
        """The last map, `(B, C, h, w)`: what `forward` pools, where the network pools a map."""
        x = self._checked(x)
        if self._map_from == "features":
            out = self.body.forward_features(x)
            return out.permute(0, 3, 1, 2).contiguous() if self._channels_last else out
        if self._map_from == "tokens":
            return self.body.forward_intermediates(x, indices=1, norm=self._normed, intermediates_only=True)[-1]
        if self._map_from == "output":
            return self.body(x)
        if not self.layer_names:
            raise TaskError(f"{self.arch} gives no feature maps (B, C, h, w). Take a timm network, e.g. 'resnet18'.")
        return self._hooked(x, self.layer_names[-1:])[self.layer_names[-1]]

    def feature_maps(
        self,
        x: Tensor,  # Images (B, in_chans, H, W)
        layers: list[str] | None = None,  # Some of `layer_names`; None: all
    ) -> dict[str, Tensor]:
        """The maps `(B, C, h, w)` of several layers by name, shallow to deep, channels second whatever the network."""
        wanted = self.layer_names if layers is None else list(layers)
        for name in wanted:
            if name not in self.layer_names:
                raise unknown(f"layer of {self.arch}", name, self.layer_names)
        names = [name for name in self.layer_names if name in wanted]
        x = self._checked(x)
        if not hasattr(self.body, "forward_intermediates"):
            return self._hooked(x, names)
        indices = [self.layer_names.index(name) for name in names]
        return dict(zip(names, self.body.forward_intermediates(x, indices=indices, intermediates_only=True)))

    def prepare(self, x: Tensor) -> Tensor:
        """Images `(B, 1 or 3, H, W)`, float in [0, 1], to what the network was trained on.

        Channels are matched (luma of color images, copies of gray ones), then `mean` and `std` taken out; while those
        are not known the values stay as they are. Raises `TaskError` for other channels and for integer pixels.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise TaskError(
                f"Expected float images (B, C, H, W) in [0, 1], got {x.dtype} of shape {tuple(x.shape)}. "
                "Divide integer pixels by their greatest value first."
            )
        x = self._matched(x)
        if self.mean is None or self.std is None:
            return x
        mean, std = (x.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def normalize_stats(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """`(mean, std)` on the [0, 1] scale, one number per channel, or None while they are not measured."""
        return None if self.mean is None or self.std is None else (self.mean, self.std)

    def param_groups(self) -> list[list[nn.Parameter]]:
        """The parameters in groups, stem first, each exactly once; groups under 1 % are merged into a neighbor."""
        params = dict(self.body.named_parameters())
        return [[params[name] for name in names] for names in _group_names(self.body)]

    def group_names(self) -> list[str]:
        """A readable name for each of `param_groups`: 'conv1–layer1', 'layer2', 'blocks.0–2'."""
        groups = _group_names(self.body)
        return [_label(names, _divided(groups)) for names in groups]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters (as in `named_parameters()`) that the network wants free of weight decay."""
        exempt = getattr(self.body, "no_weight_decay", None)
        names = set(exempt() or ()) if callable(exempt) else set()
        return {f"body.{name}" for name, _ in self.body.named_parameters() if name in names}

    def __repr__(self) -> str:
        millions = _count(self) / 1e6
        channels = f"{self.in_chans} channel{'s' if self.in_chans > 1 else ''}"
        return f"Encoder({self.arch}, {channels}, {self.num_features} features, {millions:.1f} M parameters)"

    def _checked(self, x: Tensor) -> Tensor:
        """Images of the right channels, resized where the body takes one size only."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            got = f"{x.shape[1]} channels" if x.ndim == 4 else f"a tensor of shape {tuple(x.shape)}"
            raise TaskError(
                f"This encoder ({self.arch}) takes images of {self.in_chans} channels (B, {self.in_chans}, H, W), got "
                f"{got}. `encoder.prepare(x)` matches channels; `n_in=` makes another encoder."
            )
        if self.fixed_size is None or x.shape[-2:] == (self.fixed_size, self.fixed_size):
            return x
        return F.interpolate(x, (self.fixed_size, self.fixed_size), mode="bilinear", antialias=True)

    def _matched(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.in_chans:
            return x
        if x.shape[1] == 1:
            return x.expand(-1, self.in_chans, -1, -1)
        if x.shape[1] == 3 and self.in_chans == 1:
            return (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        raise TaskError(
            f"Images of {x.shape[1]} channels cannot be turned into the {self.in_chans} that this encoder takes. "
            f"Choose channels first, or make an encoder with n_in={x.shape[1]}."
        )

    def _hooked(self, x: Tensor, names: list[str]) -> dict[str, Tensor]:
        blocks = _blocks(self.body)
        return _outputs({name: blocks[name] for name in names}, self.body, x)

    def _measure(self) -> None:
        """Run the body on one empty image: features, layers, where the last map comes from."""
        sizes = self._sizes_to_try()
        for size in sizes:
            try:
                with _undisturbed(self.body):
                    return self._look(_empty_image(self.body, self.in_chans, size))
            except SelfsupError:
                raise
            except (RuntimeError, ValueError, AssertionError, TypeError, LookupError) as error:
                reason = error
        raise TaskError(
            f"The network {self.arch} could not be run on an empty image of {self.in_chans} channels and "
            f"{' or '.join(map(str, sizes))} pixels ({type(reason).__name__}: {reason}). Say which `n_in` and `size` "
            "it takes; a multiple of 32 suits most networks."
        ) from reason

    def _sizes_to_try(self) -> tuple[int, ...]:
        if self.fixed_size:
            return (self.fixed_size,)
        if self.size:  # Any size is as good as 224 to measure a timm net, and cheaper than 1024
            return (min(self.size, 224) if self.source == "timm" else self.size,)
        return 96, 224, 32

    def _look(self, x: Tensor) -> None:
        body, out = self.body, self.body(x)
        self.num_features = _pooled(out).shape[1]
        self._map_from, self._channels_last = "hooks", False
        last = body.forward_features(x) if hasattr(body, "forward_features") else None
        if isinstance(last, Tensor) and last.ndim == 4:  # The image is square, so a square says where h and w are
            self._map_from, self._channels_last = "features", last.shape[2] != last.shape[3]
        elif hasattr(body, "forward_intermediates"):
            self._map_from, self._normed = "tokens", _can_norm(body, x)
        elif out.ndim == 4 and out.shape[-1] > 1:
            self._map_from = "output"
        self.layer_names = _timm_layers(body) or _map_names(_blocks(body), body, x)


def create_encoder(
    arch: str | Callable | nn.Module = "resnet18",  # timm name, constructor (torchvision.models.resnet18), or module
    n_in: int | None = None,  # Channels of the images; None: 3, or what the first convolution of a module takes
    pretrained: bool = False,  # Start from published weights (downloaded at first use)
    size: int | None = None,  # Training image size in pixels; networks of fixed input size are built for it
    **kwargs,  # For the network's constructor (drop_path_rate=0.1, ...)
) -> Encoder:
    """A fresh encoder. A module given ready-made is copied, so yours stays as it is.

    The classification head is taken off. Where `n_in` differs from the channels the network was made for, the first
    convolution is changed: fresh weights, or (pretrained) the sum over the old channels spread over the new ones.
    Raises `UnknownNameError` for a name timm does not have, `TaskError` for a network that does not run,
    `SelfsupError` for arguments that cannot be used.
    """
    _check_number("n_in", n_in)
    _check_number("size", size)
    if getattr(arch, "__module__", "").startswith("timm.") and timm.is_model(getattr(arch, "__name__", "")):
        arch = arch.__name__
    if isinstance(arch, str):
        return _from_timm(arch, n_in or 3, pretrained, size, kwargs)
    if isinstance(arch, nn.Module):
        if pretrained or kwargs:
            given = ", ".join([*kwargs, *["pretrained"] * bool(pretrained)])
            raise SelfsupError(f"A ready-made module takes no further arguments for its construction, got {given}.")
        return _from_module(copy.deepcopy(arch), n_in, size, trained=True)
    if callable(arch):
        return _from_constructor(arch, n_in, pretrained, size, kwargs)
    raise SelfsupError(
        f"Expected the name of a timm network, a constructor or an nn.Module, got {type(arch).__name__}: {arch!r:.80}."
    )


def is_timm_name(arch: object) -> bool:
    """Whether timm itself knows this name ('resnet18', 'resnet18.a1_in1k'; nothing from a hub or a folder)."""
    return isinstance(arch, str) and bool(re.fullmatch(r"\w+(\.\w+)?", arch)) and timm.is_model(arch)


def torchvision_names() -> list[str]:
    """The classification networks of torchvision."""
    return torchvision.models.list_models(module=torchvision.models)


def bare_module(
    body: nn.Module,  # Changed in place
    n_in: int | None,  # Channels it shall take; None: as it is
    trained: bool,  # Whether its weights are worth keeping when the first convolution changes
    quiet: bool = False,  # Do not say that a head was left out
) -> int:
    """Make a module that is not from timm's factory a bare one: head off, first convolution for `n_in` channels.

    Returns the channels it now takes.
    """
    _take_head_off(body, quiet)
    name, conv = next(((n, m) for n, m in body.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if conv is None:
        return n_in or 3
    if n_in and name and conv.in_channels != n_in:
        body.set_submodule(name, _adapted(conv, n_in, trained))
    return n_in or conv.in_channels


def _from_module(body: nn.Module, n_in: int | None, size: int | None, trained: bool) -> Encoder:
    n_in = bare_module(body, n_in, trained)
    return Encoder(body, type(body).__name__, in_chans=n_in, size=size)


def _from_timm(arch: str, n_in: int, pretrained: bool, size: int | None, kwargs: dict) -> Encoder:
    if not is_timm_name(arch):
        raise unknown("architecture", arch, timm.list_models())
    try:
        cfg = timm.get_pretrained_cfg(arch)
    except RuntimeError:  # The name is known, what follows the dot is not
        raise unknown("architecture", arch, timm.list_models(f"{arch.split('.')[0]}.*", pretrained=True)) from None
    ours = {"num_classes", "in_chans", "features_only", "pretrained"} & set(kwargs)
    if ours:
        raise SelfsupError(f"{', '.join(sorted(ours))}: set by the encoder itself; `n_in` sets the channels.")
    every = {"num_classes": 0, "in_chans": n_in, **{k: v for k, v in kwargs.items() if v is not None}}
    if size and "img_size" not in every and _takes_one_size(cfg, every):
        every |= _fitting_size(arch, size, every)
    body = _build(arch, every, pretrained)
    kept = {k: v for k, v in every.items() if k not in WEIGHT_SOURCES}
    encoder = Encoder(body, arch, "timm", kept, n_in, size)
    if pretrained:
        encoder.mean, encoder.std = (_spread(body.pretrained_cfg[k], n_in) for k in ("mean", "std"))
    return encoder


def _build(arch: str, kwargs: dict, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(arch, pretrained=pretrained, **kwargs)
    except Exception as error:  # Whatever a constructor or a download can raise; always passed on
        raise _build_error(arch, pretrained, error) from error


def _build_error(arch: str, pretrained: bool, error: Exception) -> SelfsupError:
    reason = f"{type(error).__name__}: {error}".split("\n")[0]
    if isinstance(error, TypeError) or not pretrained:
        return SelfsupError(f"The network {arch} cannot be built with these arguments ({reason}).")
    return SelfsupError(
        f"The pretrained weights of {arch} could not be had ({reason}). They need the internet once; pretrained=False "
        "starts from scratch."
    )


def _from_constructor(make: Callable, n_in: int | None, pretrained: bool, size: int | None, kwargs: dict) -> Encoder:
    name = getattr(make, "__name__", type(make).__name__)
    known = getattr(make, "__module__", "").startswith("torchvision.models") and name in torchvision_names()
    if pretrained and not known:
        raise SelfsupError(f"No published weights are known for {name}: load them, then pass the module itself.")
    weights = {"weights": "DEFAULT" if pretrained else None} if known and "weights" not in kwargs else {}
    try:
        body = make(**kwargs, **weights)
    except Exception as error:  # Whatever a constructor or a download can raise; always passed on
        raise _build_error(name, pretrained, error) from error
    if not isinstance(body, nn.Module):
        raise SelfsupError(f"{name}() gave {type(body).__name__}, expected an nn.Module.")
    if not known:
        return _from_module(body, n_in, size, trained=False)
    trained = pretrained or kwargs.get("weights") is not None
    kept = {k: v for k, v in kwargs.items() if k not in ("weights", "progress")}
    n_in = bare_module(body, n_in or 3, trained, quiet=True)
    encoder = Encoder(body, name, "torchvision", kept, n_in, size)
    if pretrained:
        stats = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        encoder.mean, encoder.std = _spread(stats.mean, n_in), _spread(stats.std, n_in)
    return encoder


def _check_number(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise SelfsupError(f"{name} is a whole number above 0, or None; got {value!r}.")


def _spread(stats: tuple[float, ...], n_in: int) -> tuple[float, ...]:
    """Statistics of 3 channels for `n_in`: their mean for one, else repeated in turn as timm repeats weights."""
    if n_in == 1:
        return (sum(stats) / len(stats),)
    return tuple(float(stats[i % len(stats)]) for i in range(n_in))


def _takes_one_size(cfg: object, kwargs: dict) -> bool:
    return bool(getattr(cfg, "fixed_input_size", False)) and not kwargs.get("dynamic_img_size")


def _fitting_size(arch: str, size: int, kwargs: dict) -> dict:
    """The smallest image size from `size` up that this network can be built for; {}: its own.

    Tried on the meta device, which computes shapes only: windows and patches divide some sizes and not others.
    """
    kwargs = {k: v for k, v in kwargs.items() if k not in WEIGHT_SOURCES}
    for candidate in dict.fromkeys(math.ceil(size / step) * step for step in (1, 16, 32, 64, 128)):
        try:
            with torch.device("meta"), torch.no_grad():
                body = timm.create_model(arch, **kwargs, img_size=candidate).eval()
                body(torch.empty(1, kwargs["in_chans"], candidate, candidate))
            return {"img_size": candidate}
        except (RuntimeError, ValueError, AssertionError, TypeError):
            continue
    return {}


def _fixed_size(body: nn.Module, kwargs: dict) -> int | None:
    """The one image size that a network takes, or None."""
    cfg = getattr(body, "pretrained_cfg", None)
    if not isinstance(cfg, dict):
        size = getattr(body, "image_size", None)  # torchvision's ViT
        return size if isinstance(size, int) else None
    if not cfg.get("fixed_input_size") or kwargs.get("dynamic_img_size"):
        return None
    size = kwargs.get("img_size") or getattr(getattr(body, "patch_embed", None), "img_size", None)
    size = size or cfg["input_size"][-2:]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise SelfsupError(f"img_size must be one number or a square, got {size!r}.")
    return height


def _take_head_off(body: nn.Module, quiet: bool) -> None:
    """Replace the classification head by nothing (by a pooling where the head did the pooling)."""
    if hasattr(body, "reset_classifier") and hasattr(body, "num_classes"):
        return body.reset_classifier(0)
    name = next((h for h in HEADS if isinstance(getattr(body, h, None), nn.Module)), None)
    if name is None or not any(True for _ in getattr(body, name).parameters()):
        return None
    pools = any(isinstance(m, nn.AdaptiveAvgPool2d) for m in getattr(body, name).modules())
    setattr(body, name, nn.AdaptiveAvgPool2d(1) if pools else nn.Identity())
    if not quiet:
        say(f"Encoder: `{name}` of {type(body).__name__} was taken for a classification head and left out.")
    return None


def _adapted(conv: nn.Conv2d, n_in: int, trained: bool) -> nn.Conv2d:
    """The same convolution for `n_in` channels; trained weights answer a gray image as they did before."""
    if conv.groups != 1:
        raise SelfsupError(f"The first convolution has {conv.groups} groups and cannot be changed to {n_in} channels.")
    new = copy.deepcopy(conv)
    new.in_channels = n_in
    weight = conv.weight.detach().sum(1, keepdim=True).expand(-1, n_in, -1, -1) / n_in
    new.weight = nn.Parameter(weight.contiguous())
    if not trained:
        new.reset_parameters()
    return new


def _pooled(out: object) -> Tensor:
    """What a body gave as `(B, C)`: maps are averaged over their places."""
    if isinstance(out, Tensor) and out.ndim == 2:
        return out
    if isinstance(out, Tensor) and out.ndim == 4:
        return out.mean((2, 3))
    got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"{type(out).__name__}"
    raise TaskError(f"An encoder must give features (B, C) or maps (B, C, h, w); this network gave {got}.")


@contextmanager
def _undisturbed(body: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, running statistics and random state are afterwards as they were."""
    modes = {module: module.training for module in body.modules()}
    body.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _empty_image(body: nn.Module, in_chans: int, size: int) -> Tensor:
    like = next((p for p in body.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, in_chans, size, size, dtype=like.dtype, device=like.device)


def _blocks(body: nn.Module) -> dict[str, nn.Module]:
    """The parts of a network by name, in order: its children; one that holds nearly everything gives its own."""
    blocks, most = dict(body.named_children()), 0.9 * _count(body)
    while big := next((n for n, m in blocks.items() if _count(m) > most and any(True for _ in m.children())), None):
        inside = {f"{big}.{name}": child for name, child in blocks[big].named_children()}
        before = list(blocks).index(big)
        items = list(blocks.items())
        blocks = dict([*items[:before], *inside.items(), *items[before + 1 :]])
    return blocks


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _outputs(blocks: dict[str, nn.Module], body: nn.Module, x: Tensor) -> dict[str, object]:
    """One pass through the body: what each block gave, in the order they ran."""
    outs = {}
    hooks = [
        block.register_forward_hook(lambda _block, _inputs, out, name=name: outs.__setitem__(name, out))
        for name, block in blocks.items()
    ]
    try:
        body(x)
    finally:
        for hook in hooks:
            hook.remove()
    return outs


def _map_names(blocks: dict[str, nn.Module], body: nn.Module, x: Tensor) -> list[str]:
    """Blocks that give maps `(B, C, h, w)`; none where the maps are only a prelude to tokens (a patch embedding)."""
    outs = {name: out for name, out in _outputs(blocks, body, x).items() if isinstance(out, Tensor)}
    names = [name for name, out in outs.items() if _is_map(out, blocks[name])]
    later = list(outs)[list(outs).index(names[-1]) :] if names else []
    return [] if any(outs[name].ndim == 3 for name in later) else names


def _is_map(out: Tensor, block: nn.Module) -> bool:
    """A square map: not channels last, and not the 1×1 left by a global pooling."""
    if out.ndim != 4 or out.shape[2] != out.shape[3]:
        return False
    return out.shape[-1] > 1 or any(True for _ in block.parameters())


def _can_norm(body: nn.Module, x: Tensor) -> bool:
    """Whether the last norm can be had on the map of a token network; Hiera has it after the pooling."""
    try:
        body.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    except AssertionError:
        return False
    return True


def _timm_layers(body: nn.Module) -> list[str]:
    if not hasattr(body, "forward_intermediates"):
        return []
    return [info["module"] for info in body.feature_info]


def _group_names(body: nn.Module) -> list[list[str]]:
    """Parameter names in groups, stem first, the tiny ones merged."""
    sizes = {name: p.numel() for name, p in body.named_parameters()}
    tiny = TINY * sum(sizes.values())
    merged, pending = [], []
    for names in _raw_groups(body):
        pending = pending + names
        if sum(sizes[name] for name in pending) >= tiny:
            merged.append(pending)
            pending = []
    if pending:
        merged[-1:] = [[*(merged[-1] if merged else []), *pending]]
    return merged


def _raw_groups(body: nn.Module) -> list[list[str]]:
    matcher = getattr(body, "group_matcher", None)
    if callable(matcher):
        try:
            return list(group_parameters(body, matcher(coarse=True)).values())
        except (AssertionError, TypeError):  # Some timm nets have groups in name only, or no coarse ones
            pass
    names = [name for name, _ in body.named_parameters()]
    groups = [[name for name in names if name.startswith(f"{block}.")] for block in _blocks(body)]
    inside = {name for group in groups for name in group}
    return [[name for name in names if name not in inside], *groups]


def _label(names: list[str], divided: set[str]) -> str:
    """'layer2' for parameters of one part of the network, 'blocks.0–2' or 'conv1–layer1' for those of several."""
    units = [".".join(name.split(".")[: 2 if name.split(".")[0] in divided else 1]) for name in (names[0], names[-1])]
    if units[0] == units[1]:
        return units[0]
    (stem, _, _), (other, _, number) = (unit.partition(".") for unit in units)
    return f"{units[0]}–{number if stem == other else units[1]}"


def _divided(groups: list[list[str]]) -> set[str]:
    """The top-level parts of a network ('blocks') that are spread over several groups."""
    parts = [part for names in groups for part in {name.split(".")[0] for name in names}]
    return {part for part in parts if parts.count(part) > 1}
