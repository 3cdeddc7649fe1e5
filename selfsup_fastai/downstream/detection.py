"""An encoder as the backbone of torchvision's detectors: its maps, and a feature pyramid (Lin et al. 2017) on them.

backbone = detection_backbone("nuclei.safetensors")
detector = FasterRCNN(backbone, num_classes=2, min_size=256, **detector_kwargs(backbone))
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from selfsup_fastai.downstream.pyramid import Level, Pyramid, levels_of
from selfsup_fastai.encoders.checkpoint import copied_encoder, get_encoder, is_fresh
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.inputs import CHANNELS
from selfsup_fastai.errors import TaskError

FINEST = 4  # Stride of the finest level: finer ones cost much and hold no object
LEVELS = 4  # As torchvision's detectors expect them by default, beside the one that is pooled from the last


class DetectionBackbone(nn.Module):
    """Images (B, C, H, W) to an `OrderedDict` of maps (B, out_channels, h, w): '0' is the finest, 'pool' the coarsest.

    What torchvision's detectors ask of a backbone. An encoder that eats lightness, colors or edges is given them: the
    detector hands images on as they are (`detector_kwargs`). Batch norms of a trained encoder keep its statistics, as
    batches of large images are small.
    """

    def __init__(
        self,
        encoder: Encoder,  # With layers that give maps
        levels: Sequence[Level],  # Some of them, fine to coarse
        out_channels: int,  # Of each map that comes out
        pooled: int = 0,  # Levels that are pooled from the coarsest, beside the last
    ):
        super().__init__()
        self.encoder, self.out_channels, self.keeps_statistics = encoder, out_channels, bool(encoder.lineage)
        self.levels, self.pooled = list(levels), pooled
        laid_out = any(level.times > 1 for level in levels)
        widths = [out_channels if laid_out else level.channels for level in levels]
        self.pyramid = Pyramid(levels, widths) if laid_out else None
        widths += widths[-1:] * pooled
        self.fpn = FeaturePyramidNetwork(widths, out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x = self._checked(x)
        maps = self.encoder.feature_maps(x, [level.layer for level in self.levels])
        found = self.pyramid(maps) if self.pyramid else [maps[level.layer] for level in self.levels]
        for _ in range(self.pooled):
            found.append(F.max_pool2d(found[-1], 1, 2))
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(found)))

    def train(self, mode: bool = True) -> "DetectionBackbone":
        """Training mode, in which batch norms of a trained encoder stay as they are."""
        super().train(mode)
        for module in self.encoder.modules() if self.keeps_statistics else ():
            if any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False)):
                module.eval()
        return self

    def _checked(self, x: Tensor) -> Tensor:
        side = self.encoder.fixed_size
        if side and tuple(x.shape[-2:]) != (side, side):
            fix = "Give the detector what detector_kwargs(backbone) says, or make the encoder with another size=."
            got = " x ".join(map(str, x.shape[-2:]))
            raise TaskError(f"{self.encoder.arch} sees images of {side} x {side} pixels only, got {got}. {fix}")
        return self.encoder.prepare(x) if self.encoder.input in CHANNELS else x


def detection_backbone(
    encoder: Any,  # A file from `save_encoder`, a learner, an `Encoder`, an `nn.Module` or a timm name
    out_channels: int = 256,  # Of each map
    layers: Sequence[str] | None = None,  # Some of `encoder.layer_names`; None: of each scale from stride 4 the deepest
    **kwargs,  # For a new net: n_in, size, pretrained, ... as in `create_encoder`
) -> DetectionBackbone:
    """A backbone for torchvision's detectors (FasterRCNN, RetinaNet, ...) around a copy of the encoder.

    It gives five maps, as they expect by default: four and one that is pooled; with `layers` one for each and that.
    Where all maps have one scale (ViT), finer ones are laid out of them. Raises `TaskError` for encoders without maps,
    and for those whose maps are not 2, 4, 8, ... times smaller than images: detectors could not place boxes on them.
    """
    fresh = is_fresh(encoder)
    if kwargs and not fresh:
        raise TaskError(f"{', '.join(kwargs)}: for new networks alone; this encoder comes as it is.")
    own = get_encoder(encoder, **kwargs) if fresh else copied_encoder(encoder)
    levels = levels_of(own, layers, FINEST)
    levels = levels if layers else levels[:LEVELS]
    strides = [level.stride for level in levels]
    if not levels or any(stride & (stride - 1) for stride in strides):
        fix = "Take a net with strides 4, 8, 16, 32, such as 'resnet18', or a ViT of patches of 16 pixels."
        raise TaskError(f"The maps of {own.arch} are {strides} times smaller than images. {fix}")
    return DetectionBackbone(own, levels, out_channels, 0 if layers else LEVELS - len(levels))


def detector_kwargs(
    backbone: DetectionBackbone | Encoder,  # Or the encoder in it
) -> dict:
    """How a detector of torchvision is to treat images for this backbone: its arguments `image_mean`, `image_std`.

    For encoders of one image size also `fixed_size` and `size_divisible`: images are squeezed to that size, boxes too.
    """
    encoder = getattr(backbone, "encoder", backbone)
    n, eats = encoder.image_channels, encoder.input in CHANNELS  # which standardizes what it eats by itself
    known = encoder.mean is not None and not eats
    kwargs = {
        "image_mean": list(encoder.mean) if known else [0.0] * n,
        "image_std": list(encoder.std) if known else [1.0] * n,
    }
    if encoder.fixed_size:
        kwargs |= {"fixed_size": (encoder.fixed_size, encoder.fixed_size), "size_divisible": 1}
    return kwargs
