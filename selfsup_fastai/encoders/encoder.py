"""The network that is kept: one wrapper around any timm net, torchvision constructor or `nn.Module`.

`create_encoder` makes one, `Encoder` says what it can do. What differs from network to network (how wide the features
are, in which layout the last map comes) is measured once on an empty image, never assumed.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_fastai.encoders.bodies import (
    Body,
    constructed_body,
    fixed_size,
    half_width,
    is_timm_name,
    module_body,
    split_body,
    timm_body,
)
from selfsup_fastai.encoders.groups import count, grouped_names, labels
from selfsup_fastai.encoders.inputs import CHANNELS, DEVIATIONS, standardized, to_input
from selfsup_fastai.encoders.maps import LastMap, maps_of, measure, undisturbed
from selfsup_fastai.encoders.split import CHANNELS as HALVES
from selfsup_fastai.encoders.split import SplitBody, pooled
from selfsup_fastai.errors import SelfsupError, TaskError, unknown
from selfsup_fastai.messages import say
from selfsup_fastai.transfer import constant

PUBLISHED = "published weights"  # What the lineage calls the round before ours
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"


class Encoder(nn.Module):
    """A network without its head: images `(B, in_chans, H, W)` to features `(B, num_features)`, or to maps.

    Networks of one fixed image size (ViT, Swin) are given images resized to it, so any image, tile or crop will do.
    `body` is the bare network; its state_dict keys are timm's. Made by `create_encoder` and `load_encoder`.

    - `arch`, `source` ('timm', 'torchvision', 'module'), `kwargs`: what rebuilds the body:
      `timm.create_model(arch, **kwargs)`; with 'split timm' and so on, each half of a `SplitBody`
    - `in_chans`, `num_features`: channels that enter, features that come out (measured)
    - `size`: image size it was or will be trained at, in pixels; `fixed_size`: the only size the body takes, or None
    - `input`: what the channels are: 'rgb', 'grey', 'other', or 'L', 'ab', 'lab', 'sobel' (see `encoders.inputs`)
    - `mean`, `std`: of the training images, on the [0, 1] scale, one number per channel; None until measured
    - `lineage`: the rounds of training so far, oldest first; weights that somebody published are the first
    - `layer_names`: the layers that `feature_maps` can give, shallow to deep
    """

    def __init__(
        self,
        body: nn.Module,  # The network, its head off
        arch: str | None = None,  # Its name
        source: str = "module",  # Where the name counts: 'timm', 'torchvision' or 'module'; 'split timm' and so on
        kwargs: dict | None = None,  # Arguments that rebuild it
        in_chans: int = 3,  # Channels it takes
        size: int | None = None,  # Image size it is trained at
    ):
        super().__init__()
        self.body, self.arch, self.source, self.kwargs = body, arch, source, dict(kwargs or {})
        self.in_chans, self.size, self.fixed_size = in_chans, size, fixed_size(body, self.kwargs)
        self.input = {1: "grey", 3: "rgb"}.get(in_chans, "other")
        self.mean = self.std = None
        self.lineage = []
        self.num_features, self.layer_names, self._last_map = self._measured()

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, H, W)` to pooled features `(B, num_features)`."""
        return pooled(self.body(self._checked(x)))

    def feature_map(self, x: Tensor) -> Tensor:
        """The last map, `(B, C, h, w)`: what `forward` pools, where the network pools a map."""
        if self._last_map is None:
            fix = "Take one of timm's, e.g. 'resnet18' or 'vit_tiny_patch16_224'."
            raise TaskError(f"{self.arch} gives no feature maps (B, C, h, w). {fix}")
        return self._last_map(self.body, self._checked(x))

    def map_shape(
        self,
        image: tuple[int, int],  # Height and width of the images
    ) -> tuple[int, int, int]:
        """(C, h, w) of `feature_map` for images of this size, measured on an empty one."""
        like = next(self.parameters())
        x = torch.zeros(1, self.in_chans, *image, dtype=like.dtype, device=like.device)
        with undisturbed(self.body):
            return tuple(self.feature_map(x).shape[1:])

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
        return maps_of(self.body, self._checked(x), self.layer_names, wanted)

    def behind_map(self) -> list[str]:
        """Names of the parameters that `feature_map` does without: training through maps leaves them as they are."""
        like, side = next(self.parameters()), self.side
        x = torch.zeros(1, self.in_chans, side, side, dtype=like.dtype, device=like.device)
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        with undisturbed(self.body), torch.enable_grad():
            total = self.feature_map(x).sum()
        if not total.requires_grad:  # all that comes before is frozen
            return list(trained)
        grads = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        return [name for name, grad in zip(trained, grads) if grad is None]

    @property
    def split(self) -> bool:
        """Whether it is two networks, one for lightness and one for color."""
        return isinstance(self.body, SplitBody)

    @property
    def side(self) -> int:
        """Side in pixels of the images that it is made for: those it is trained at, else the only ones it takes."""
        return self.size or self.fixed_size or 224

    @property
    def image_channels(self) -> int:
        """Channels that images have before they are turned into what the network eats."""
        return 3 if self.input in CHANNELS else self.in_chans

    def eat(self, kind: str) -> None:
        """Have the network fed with 'L', 'ab', 'lab' or 'sobel' made of images (`encoders.inputs`), centered."""
        if self.in_chans != CHANNELS[kind]:
            fix = f"Make it with n_in={CHANNELS[kind]}."
            raise TaskError(f"An encoder of {self.in_chans} channels cannot be fed with {kind}. {fix}")
        self.input, self.mean, self.std = kind, (0.5,) * self.in_chans, (DEVIATIONS[kind],) * self.in_chans

    def prepare(self, x: Tensor) -> Tensor:
        """Images `(B, 1 or 3, H, W)`, float in [0, 1], to what the network was trained on.

        Channels are matched (luma of color images, copies of gray ones) and, for a network that eats lightness, Lab
        or edges, turned into it; then `mean` and `std` are taken out; while those are not known the values stay as they
        are. Raises `TaskError` for other channels and for integer pixels.
        """
        if x.ndim != 4 or not x.is_floating_point():
            raise TaskError(
                f"Expected float images (B, C, H, W) in [0, 1], got {x.dtype} of shape {tuple(x.shape)}. "
                "Divide integer pixels by their greatest value first."
            )
        x = to_input(self._matched(x), self.input) if self.input in CHANNELS else self._matched(x)
        return standardized(x, self.mean, self.std)

    def param_groups(self) -> list[list[nn.Parameter]]:
        """The parameters in groups, stem first, each exactly once; groups under 1 % are merged into a neighbor."""
        params = dict(self.body.named_parameters())
        return [[params[name] for name in names] for names in grouped_names(self.body)]

    def group_names(self) -> list[str]:
        """A readable name for each of `param_groups`: 'conv1–layer1', 'layer2', 'blocks.0–2'."""
        return labels(self.body)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters (as in `named_parameters()`) that the network wants free of weight decay."""
        exempt = self.body.no_weight_decay() if hasattr(self.body, "no_weight_decay") else ()
        return {f"body.{name}" for name, _ in self.body.named_parameters() if name in exempt}

    def __repr__(self) -> str:
        millions = count(self) / 1e6
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
        side = (self.fixed_size, self.fixed_size)  # In float32, because half precision has no such resize on the CPU
        return F.interpolate(x.float(), side, mode="bilinear", antialias=True).to(x.dtype)

    def _matched(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.image_channels:
            return x
        if x.shape[1] == 1:
            return x.expand(-1, self.image_channels, -1, -1)
        if x.shape[1] == 3 and self.image_channels == 1:
            return (x * constant(LUMA, x.dtype, x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
        raise TaskError(
            f"Images of {x.shape[1]} channels cannot be turned into the {self.image_channels} that this encoder "
            f"takes. Choose channels first, or make an encoder with n_in={x.shape[1]}."
        )

    def _measured(self) -> tuple[int, list[str], LastMap | None]:
        for size in self._sizes_to_try():
            try:
                return measure(self.body, self.in_chans, size)
            except SelfsupError:
                raise
            except (RuntimeError, ValueError, AssertionError, TypeError, LookupError) as error:
                reason = error
        raise TaskError(
            f"The network {self.arch} could not be run on an empty image of {self.in_chans} channels and "
            f"{' or '.join(map(str, self._sizes_to_try()))} pixels ({type(reason).__name__}: {reason}). Say which "
            "`n_in` and `size` it takes; a multiple of 32 suits most networks."
        ) from reason

    def _sizes_to_try(self) -> tuple[int, ...]:
        if self.fixed_size:
            return (self.fixed_size,)
        if self.size:  # To timm and torchvision any size is as good as 224, and it is cheaper than 1024
            return (self.size if self.source.endswith("module") else min(self.size, 224),)
        return 96, 224, 32


def create_encoder(
    arch: str | Callable | nn.Module = "resnet18",  # timm name, constructor (torchvision.models.resnet18), or module
    n_in: int | None = None,  # Channels of the images; None: 3, or what the first convolution of a module takes
    pretrained: bool = False,  # Start from published weights (downloaded at first use)
    size: int | None = None,  # Training image size in pixels; networks of fixed input size are built for it
    split: bool = False,  # Two networks of half the width, for channel 0 and for channels 1 and 2
    **kwargs,  # For the network's constructor (drop_path_rate=0.1, ...)
) -> Encoder:
    """A fresh encoder. A module given ready-made is copied, so yours stays as it is.

    The classification head is taken off. Where `n_in` differs from the channels the network was made for, the first
    convolution is changed: fresh weights, or (pretrained) the sum over the old channels spread over the new ones.
    With `split` each half is as wide as half of `arch` where timm can build it so (ResNet, ConvNeXt, ViT, Swin and
    others); else both have the full width, which one line says.
    Raises `UnknownNameError` for a name timm does not have, `TaskError` for a network that does not run,
    `SelfsupError` for arguments that cannot be used.
    """
    _check_number("n_in", n_in)
    _check_number("size", size)
    if getattr(arch, "__module__", "").startswith("timm.") and is_timm_name(getattr(arch, "__name__", "")):
        arch = arch.__name__
    made = (_made_split if split else _made)(arch, n_in, pretrained, size, kwargs)
    encoder = Encoder(made.net, made.arch, made.source, made.kwargs, made.in_chans, size)
    if made.stats:
        encoder.mean, encoder.std = made.stats
        encoder.lineage = [{"task": PUBLISHED}]
    return encoder


def _made(arch: object, n_in: int | None, pretrained: bool, size: int | None, kwargs: dict) -> Body:
    if isinstance(arch, str):
        return timm_body(arch, n_in or 3, pretrained, size, kwargs)
    if isinstance(arch, nn.Module):
        if pretrained or kwargs:
            given = ", ".join([*kwargs, *["pretrained"] * bool(pretrained)])
            raise SelfsupError(f"A ready-made module takes no further arguments for its construction, got {given}.")
        return module_body(copy.deepcopy(arch), n_in, trained=True)
    if callable(arch):
        return constructed_body(arch, n_in, pretrained, kwargs)
    raise SelfsupError(
        f"Expected the name of a timm network, a constructor or an nn.Module, got {type(arch).__name__}: {arch!r:.80}."
    )


def _made_split(arch: object, n_in: int | None, pretrained: bool, size: int | None, kwargs: dict) -> Body:
    if n_in not in (None, sum(HALVES)) or pretrained:
        given = "published weights" if pretrained else f"n_in={n_in}"
        raise SelfsupError(f"A split network takes 3 channels and starts with fresh weights; {given} cannot be had.")
    widths = half_width(arch, kwargs) if is_timm_name(arch) else {}
    if not widths:
        name = arch if isinstance(arch, str) else getattr(arch, "__name__", type(arch).__name__)
        say(f"Encoder: {name} cannot be built at half its width, so each of the two halves has all of it.")
    return split_body(*(_made(arch, n, False, size, {**kwargs, **widths}) for n in HALVES))


def _check_number(name: str, value: object) -> None:
    # A bool is an int to Python: create_encoder("resnet18", True) is meant as pretrained=True
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise SelfsupError(f"{name} is a whole number above 0, or None; got {value!r}.")
