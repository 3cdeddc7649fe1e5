"""Images at half their size, each with a resampling kernel of its own."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from selfsup_fastai.transfer import constant


def _cubic(at: float) -> float:
    """Keys' kernel with a = -1/2, as Pillow's."""
    if at >= 2:
        return 0.0
    return 1.5 * at**3 - 2.5 * at**2 + 1 if at < 1 else -0.5 * at**3 + 2.5 * at**2 - 4 * at + 2


def _lanczos(at: float) -> float:
    """Three lobes."""
    return _sinc(at) * _sinc(at / 3) if at < 3 else 0.0


def _sinc(at: float) -> float:
    return math.sin(math.pi * at) / (math.pi * at) if at else 1.0


def _taps(kernel: Callable[[float], float]) -> tuple[float, ...]:
    """Weights of the six pixels to either side of the new pixel's center, which lies between two old ones."""
    weights = [kernel(abs(k - 5.5) / 2) for k in range(12)]
    return tuple(w / sum(weights) for w in weights)


KERNELS = {
    "nearest": tuple(float(k == 5) for k in range(12)),  # the upper left of four pixels, as torch's
    "area": _taps(lambda at: float(at < 0.5)),
    "bilinear": _taps(lambda at: max(0.0, 1 - at)),
    "bicubic": _taps(_cubic),
    "lanczos": _taps(_lanczos),
}
"""Weights of twelve neighbors in a row, by name: what antialiased resampling to half the size comes to."""


def halved(
    x: Tensor,  # (B, C, H, W) in [0, 1], H and W even
    kernels: Tensor,  # (B,) int64: which of KERNELS, by place
) -> Tensor:  # (B, C, H/2, W/2) in [0, 1]
    """Each image at half its size. Pixels at the borders are repeated; overshooting kernels are cut to [0, 1]."""
    weights = constant(tuple(KERNELS.values()), x.dtype, x.device)[kernels]
    return _halved_rows(_halved_rows(x, weights).mT, weights).mT.clamp(0, 1)


def _halved_rows(x: Tensor, weights: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H/2, W)"""
    padded, half = F.pad(x, (0, 0, 5, 5), mode="replicate"), x.shape[2] // 2
    taps = (padded[:, :, k : k + 2 * half : 2] * weights[:, k].view(-1, 1, 1, 1) for k in range(12))
    return sum(taps)
