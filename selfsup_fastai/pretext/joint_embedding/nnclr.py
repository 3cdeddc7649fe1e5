"""NNCLR."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.checks import check_number
from selfsup_fastai.data.recipes import BYOL_1, BYOL_2
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.encoders.memories import FeatureQueue
from selfsup_fastai.messages import say
from selfsup_fastai.pretext.base import per_image
from selfsup_fastai.pretext.joint import JointTask, each_view
from selfsup_fastai.processes import first_row, gathered

QUEUE = 98_304  # The paper's


class NNCLR(JointTask):
    """Which of the other images goes with what is most like the other view of this one?

    Dwibedi, Aytar, Tompson, Sermanet & Zisserman, With a Little Help from My Friends: Nearest-Neighbor Contrastive
    Learning of Visual Representations, 2021 (arXiv 2104.14548). SimCLR, but a view is to be predicted not from the
    other view of its image but from that view's nearest neighbor among earlier images: what two images of a kind have
    in common no crop or change of color could show.

    In: two views of each image, one input (B, 2, C, H, W), drawn as for BYOL: crop of 8-100 % of the area, flip, color
    jitter, grey; the first view blurred, the second seldom blurred and sometimes solarized (no blur under 64 pixels).
    Target: the row of its partner, (B,). Prediction: projections z of length 1, predictions p made of the projections,
    and the nearest neighbors n of the z in the queue, (B, 2, dim) each. Loss: the neighbor of one view must find the
    prediction of the other view among those of the batch; cross-entropy of n p' / temperature, the mean of both
    directions. Gradients flow through p alone. The queue holds projections of first views; those of this batch enter
    after the step, so no view is its own neighbor. It starts with random directions. Validation looks for neighbors in
    the queue as training left it.

    Guards: as in SimCLR color jitter and grey, without which color histograms would be enough.

    Suits data with many images of each kind: the neighbor is then another image of that kind. Does not suit small data
    in which every image is one of its kind, or in which kinds differ by less than images of one kind do. The queue is
    half as long as the training set by default, at most the paper's: in a longer one the neighbor would be the same
    image of an epoch ago, in a much shorter one there is nobody of its kind.
    """

    name = "nnclr"
    paper = "Dwibedi et al. 2021"
    recipes = (BYOL_1, BYOL_2)
    passes = 2
    accumulates = False  # images of a batch are told apart

    def __init__(
        self,
        temperature: float = 0.1,  # The paper's
        queue: int | None = None,  # Projections kept; None: half as many as training images, at most the paper's 98,304
        hidden: int | None = None,  # Of the projector, of the predictor twice that; None: the encoder's (paper: 2048)
        dim: int = 256,  # Width of projections and predictions
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5} for weaker colors
    ):
        check_number("temperature", temperature, above=0)
        for name, value in {"queue": queue, "hidden": hidden}.items():
            if value is not None:
                check_number(name, value, 1, whole=True)
        check_number("dim", dim, 1, whole=True)
        self.check_views(views)
        self.temperature, self.queue, self.hidden, self.dim, self.views = temperature, queue, hidden, dim, views
        self.kept = queue or QUEUE  # known after setup

    def setup(self, dls, encoder):
        super().setup(dls, encoder)
        if self.queue is None:
            n = len(dls.train_ds)
            self.kept = min(QUEUE, max(1, n // 2))
            say(f"{self.name}: neighbors are looked for among {self.kept:,} projections, for {n:,} training images.")
        if self.hidden is None:
            say(
                f"{self.name}: hidden layers as wide as the encoder's {encoder.num_features:,} features (paper: 2,048)."
            )

    def model(self, encoder):
        hidden = self.hidden or encoder.num_features
        projector = mlp(encoder.num_features, hidden, self.dim, n_layers=3, batchnorm=True, last_batchnorm="affine")
        predictor = mlp(self.dim, 2 * hidden, self.dim, batchnorm=True)
        return NeighborNet(encoder, projector, predictor, FeatureQueue(self.kept, self.dim))

    def callbacks(self):
        return [KeepMemories()]

    def loss(self, pred, target, reduction="mean"):
        _, p, neighbors = pred
        return nnclr_loss(neighbors, p, self.temperature, reduction)


class NeighborNet(nn.Module):
    """(B, 2, C, S, S) -> projections, predictions and nearest neighbors of the projections, (B, 2, dim) each."""

    def __init__(self, encoder: nn.Module, projector: nn.Module, predictor: nn.Module, queue: FeatureQueue):
        super().__init__()
        self.encoder, self.projector, self.predictor, self.queue = encoder, projector, predictor, queue

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = each_view(self.embed, x)
        p = each_view(self.predictor, z)
        z = F.normalize(z.detach(), dim=-1)
        neighbors = self.queue.nearest(z)
        self.queue.note(z[:, 0])
        return z, p, neighbors

    def embed(self, x: Tensor) -> Tensor:
        """Of one view, (B, C, S, S) -> (B, dim)."""
        return self.projector(self.encoder(x))


def nnclr_loss(
    neighbors: Tensor,  # (B, 2, D) of length 1, of the first and of the second views
    p: Tensor,  # (B, 2, D) predictions of the first and of the second views, any scale
    temperature: float = 0.1,
    reduction: str = "mean",
) -> Tensor:  # scalar, or (B,) with reduction='none'
    """Cross-entropy of finding the prediction of the other view among those of all images of all processes."""
    with torch.autocast(p.device.type, enabled=False):
        wide = torch.promote_types(p.dtype, torch.float32)
        neighbors, p = neighbors.to(wide), F.normalize(p.to(wide), dim=-1)
        others = gathered(p)
        own = torch.arange(len(p), device=p.device) + first_row(p)
        logits = [neighbors[:, v] @ others[:, 1 - v].T / temperature for v in range(2)]
        terms = [F.cross_entropy(rows, own, reduction="none") for rows in logits]
        return per_image((terms[0] + terms[1]) / 2, reduction)
