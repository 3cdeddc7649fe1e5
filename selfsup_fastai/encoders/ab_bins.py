"""The 313 colors of Zhang, Isola & Efros (2016): centers in the ab plane of CIE Lab, and how a color is told by them.

The table is the authors': points of a grid of step 10 whose colors exist in sRGB. Rounding the colors of sRGB to the
grid instead gives other sets (261 or 309 points).
"""

import torch
from torch import Tensor

from selfsup_fastai.transfer import sent

STEP = 10  # of the grid
_B_RANGES = {  # a: least and greatest b
    **{-90: (50, 90), -80: (20, 90), -70: (0, 90), -60: (-20, 90), -50: (-30, 100), -40: (-40, 100), -30: (-50, 100)},
    **{-20: (-50, 100), -10: (-60, 100), 0: (-70, 100), 10: (-80, 90), 20: (-80, 90), 30: (-90, 90), 40: (-100, 90)},
    **{50: (-100, 80), 60: (-110, 80), 70: (-110, 80), 80: (-110, 70), 90: (-110, 70), 100: (-90, 0)},
}
PALE = 5.0  # An image with no |a| or |b| above this is grey
N_BINS = sum((high - low) // STEP + 1 for low, high in _B_RANGES.values())  # 313


def ab_centers() -> Tensor:
    """The centers, (313, 2): a and b."""
    rows = [(a, b) for a, (low, high) in _B_RANGES.items() for b in range(low, high + 1, STEP)]
    return torch.tensor(rows, dtype=torch.float32)


def squared_distances(
    ab: Tensor,  # (B, 2, h, w), in units of Lab
) -> Tensor:  # (B, 313, h, w)
    """From each pixel's color to each center."""
    a, b = sent(ab_centers(), ab.device).to(ab.dtype).T[:, :, None, None]  # (313, 1, 1) each
    return (ab[:, :1] - a) ** 2 + (ab[:, 1:] - b) ** 2


def nearest_bins(
    ab: Tensor,  # (B, 2, h, w), in units of Lab
) -> Tensor:  # (B, h, w), 0..312
    """The number of the center that is nearest to each pixel's color."""
    return squared_distances(ab).argmin(1)


def soft_bins(
    ab: Tensor,  # (B, 2, h, w), in units of Lab
    neighbors: int,  # How many centers share a color
    sigma: float,  # Width of the Gaussian that weighs them by distance
) -> tuple[Tensor, Tensor]:  # weights, which sum to 1, and bins, (B, neighbors, h, w) each, nearest first
    """Each pixel's color as a distribution over its nearest centers."""
    near, bins = squared_distances(ab).topk(neighbors, dim=1, largest=False)
    return (-near / (2 * sigma**2)).softmax(1), bins


def soft_cross_entropy(
    logits: Tensor,  # (B, 313, h, w)
    weights: Tensor,  # (B, k, h, w), as `soft_bins` gives them
    bins: Tensor,  # (B, k, h, w)
) -> Tensor:  # (B, h, w)
    """Cross-entropy of each pixel's prediction with its distribution over bins."""
    return -(weights * logits.log_softmax(1).gather(1, bins)).sum(1)


def mean_color(
    probabilities: Tensor,  # (B, 313, h, w)
) -> Tensor:  # (B, 2, h, w), in units of Lab
    """The mean of the centers, each as probable as said."""
    return torch.einsum("bqhw,qc->bchw", probabilities, ab_centers().to(probabilities))


def has_color(ab: Tensor) -> Tensor:
    """(B, 2, h, w) -> (B,): 1 for images with some |a| or |b| above 5, else 0."""
    return (ab.abs().amax((1, 2, 3)) > PALE).to(ab.dtype)
