"""VICReg."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup_fastai.checks import check_number
from selfsup_fastai.data.recipes import BYOL_1, BYOL_2
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.losses import off_diagonal_squares
from selfsup_fastai.pretext.joint import JointTask, ViewByView, found_pair, of_batch
from selfsup_fastai.processes import gathered

EPSILON = 1e-4  # Added to a variance before its root is taken


def deviation(pred: Tensor, *_) -> Tensor:
    """Standard deviation of the features of first views over the batch, the mean: near 1, or 0 after a collapse."""
    return pred[:, 0].float().std(0, correction=min(1, len(pred) - 1)).mean()


class VICReg(JointTask):
    """Do two views of an image have one embedding, with features that vary from image to image and each by itself?

    Bardes, Ponce & LeCun, VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, 2021
    (arXiv 2105.04906). Three terms: embeddings of two views are to be equal (invariance), every feature is to have a
    standard deviation of at least 1 over the batch (variance: no collapse), and no two features are to vary together
    (covariance: no repetition). No negatives, no teacher, nothing normalized.

    In: two views of each image, one input (B, 2, C, H, W), drawn as for BYOL: crop of 8-100 % of the area, flip, color
    jitter, grey; the first view blurred, the second seldom blurred and sometimes solarized (no blur under 64 pixels).
    Target: the row of its partner, (B,), for the metric alone. Prediction: embeddings (B, 2, dim). Loss, as in the
    authors' code: 25 times the squared difference (its mean over images and features; the paper's formula sums over the
    features), plus 25 times the mean of max(0, 1 - deviation), halved for two views, plus the squared covariances
    beside the diagonal, divided by dim and summed for the two views. The loss is one number for the batch:
    reduction='none' gives that number for each image. One image alone has variances of 0.

    Guards: without its variance term embeddings shrink to a point. The metric deviation shows it, their standard
    deviation; found_pair does not, as it knows directions only. As in SimCLR the views' colors hide color histograms.

    Suits most data that views do not destroy. Covariances of a small batch are noise of the size dim / batch, against
    which the variances shrink: hence 512 features for batches of 64 (the paper: 8192 for 2048); take fewer for smaller
    batches. The loss depends on the batch size: compare it within one run only. The authors train with LARS for batches
    of 2048; Adam does for small ones.
    """

    name = "vicreg"
    length_counts = True
    collapse_hint = (
        "one embedding for all images. The variance term keeps that from happening: its weight is too small beside "
        "that of the invariance, or the rate is too high."
    )
    paper = "Bardes et al. 2021"
    scaled = (("dim", "8,192"),)
    recipes = (BYOL_1, BYOL_2)
    passes = 2
    metrics = (found_pair, deviation)
    accumulates = False  # variances and covariances are those of a whole batch

    def __init__(
        self,
        invariance: float = 25.0,  # Weight of the squared difference between the views
        variance: float = 25.0,  # Weight of deviations below 1
        covariance: float = 1.0,  # Weight of features that vary together
        dim: int = 512,  # Width of the three layers of the expander; the paper's 8192, for batches of 2048
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5} for weaker colors
    ):
        for name, weight in {"invariance": invariance, "variance": variance, "covariance": covariance}.items():
            check_number(name, weight, 0)
        check_number("dim", dim, 2, whole=True)
        self.check_views(views)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance
        self.dim, self.views = dim, views

    def model(self, encoder):
        expander = mlp(encoder.num_features, self.dim, self.dim, n_layers=3, batchnorm=True, last_bias=False)
        return ViewByView(encoder, expander)

    def loss(self, pred, target, reduction="mean"):
        loss = vicreg_loss(pred[:, 0], pred[:, 1], self.invariance, self.variance, self.covariance)
        return of_batch(loss, len(pred), reduction)


def vicreg_loss(
    z1: Tensor,  # (B, D) embeddings of the first views
    z2: Tensor,  # (B, D) of the second views
    invariance: float = 25.0,  # Weights of the three terms
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:  # scalar
    """The three terms; variances and covariances are those of the images of all processes."""
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z1, z2))
        loss = invariance * F.mse_loss(z1, z2)
        for z in (gathered(z1), gathered(z2)):
            z = z - z.mean(0)
            covariances = z.T @ z / max(1, len(z) - 1)
            deviations = (covariances.diagonal() + EPSILON).sqrt()
            loss = loss + variance * F.relu(1 - deviations).mean() / 2
            loss = loss + covariance * off_diagonal_squares(covariances) / z.shape[1]
        return loss
