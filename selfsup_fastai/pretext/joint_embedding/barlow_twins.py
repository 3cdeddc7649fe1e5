"""Barlow Twins."""

import torch
from torch import Tensor

from selfsup_fastai.checks import check_number
from selfsup_fastai.data.recipes import BYOL_1, BYOL_2
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.losses import off_diagonal_squares
from selfsup_fastai.pretext.joint import JointTask, ViewByView, of_batch
from selfsup_fastai.processes import n_rows, summed

EPSILON = 1e-5  # Of the batch norm that standardizes features


class BarlowTwins(JointTask):
    """Do two views of an image agree in every feature, and does each feature say something of its own?

    Zbontar, Jing, Misra, LeCun & Deny, Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021 (arXiv
    2103.03230). The correlations, over a batch, of the features of first views with those of second views are to be the
    identity: a feature equal to itself in the other view, and different from all others. No negatives, no teacher.

    In: two views of each image, one input (B, 2, C, H, W), drawn as for BYOL: crop of 8-100 % of the area, flip, color
    jitter, grey; the first view blurred, the second seldom blurred and sometimes solarized (no blur under 64 pixels).
    Target: the row of its partner, (B,), for the metric alone. Prediction: projections (B, 2, dim). Loss: with the
    correlations c, the sum of (1 - c_ii)^2 plus `redundancy` times the sum of c_ij^2 beside the diagonal. Features are
    standardized by the batch as by a batch norm without scale and shift. The loss is one number for the batch:
    reduction='none' gives that number for each image, and the loss of one image alone is `dim`. The weight .0051 is
    the code's (the paper: .005).

    Guards: collapse costs as much as no agreement at all, because a constant feature correlates with nothing; in
    found_pair it shows. As in SimCLR the views' colors hide color histograms.

    Suits most data that views do not destroy; in the paper small batches cost it less than SimCLR. Wide projectors want
    long runs: a net of four layers on 886 photographs had, after 182 steps of 64, a found_pair of .05 with 2048
    features and of .22 with 512 (guessing: .02). The loss depends on dim and batch size: compare it within one run
    only. The authors train with LARS for batches of 2048; Adam does for small ones.
    """

    name = "barlow_twins"
    paper = "Zbontar et al. 2021"
    scaled = (("dim", "8,192"),)
    recipes = (BYOL_1, BYOL_2)
    passes = 2
    accumulates = False  # correlations are those of a whole batch

    def __init__(
        self,
        redundancy: float = 0.0051,  # Weight of what is beside the diagonal
        dim: int = 512,  # Width of the three layers of the projector; the paper's 8192, for batches of 2048
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5} for weaker colors
    ):
        check_number("redundancy", redundancy, 0)
        check_number("dim", dim, 2, whole=True)
        self.check_views(views)
        self.redundancy, self.dim, self.views = redundancy, dim, views

    def model(self, encoder):
        projector = mlp(encoder.num_features, self.dim, self.dim, n_layers=3, batchnorm=True, last_bias=False)
        return ViewByView(encoder, projector)

    def loss(self, pred, target, reduction="mean"):
        return of_batch(barlow_loss(pred[:, 0], pred[:, 1], self.redundancy), len(pred), reduction)


def barlow_loss(
    z1: Tensor,  # (B, D) projections of the first views
    z2: Tensor,  # (B, D) of the second views
    redundancy: float = 0.0051,  # Weight of what is beside the diagonal
) -> Tensor:  # scalar
    """How far the correlations of the features of two views are from the identity; over all processes."""
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (_standardized(z.to(torch.promote_types(z.dtype, torch.float32))) for z in (z1, z2))
        correlations = summed(z1.T @ z2) / n_rows(z1)
        return (1 - correlations.diagonal()).square().sum() + redundancy * off_diagonal_squares(correlations)


def _standardized(z: Tensor) -> Tensor:
    """Each feature with mean 0 and variance 1 over the images of all processes."""
    n = n_rows(z)
    z = z - summed(z.sum(0)) / n
    return z * (summed(z.square().sum(0)) / n + EPSILON).rsqrt()
