"""MoCo v3."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.ema import EMATeacher
from selfsup_fastai.checks import check_number
from selfsup_fastai.data.recipes import BYOL_1, BYOL_2
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.losses import units
from selfsup_fastai.pretext.base import per_image
from selfsup_fastai.pretext.joint import JointTask, StudentTeacher
from selfsup_fastai.processes import first_row, gathered


class MoCoV3(JointTask):
    """Which of the images of this batch, as a slower copy of the network sees them, is this one?

    Chen, Xie & He, An Empirical Study of Training Self-Supervised Vision Transformers, 2021 (arXiv 2104.02057). The
    network's prediction from one view must be nearest, among all images of the batch, to what its slow copy (teacher)
    makes of the other view. MoCo without the queue, with BYOL's predictor.

    In: two views of each image, one input (B, 2, C, H, W), with BYOL's two recipes: crop, flip, color jitter, grey; the
    first always blurred (from 64 pixels up), the second seldom, but in one of five images solarized. Target: the
    image's row, (B,). Prediction: the student's predictions (queries) and the teacher's projections (keys) of both
    views, (B, 2, dim) each; loss: cross-entropy of each query's own key among those of the batch, for both pairs of
    views, times 2 * temperature (as the code). No gradient flows through keys, those of other processes included. After
    each step the teacher follows, with a momentum that goes from `momentum` to 1 along half a cosine. The student's
    encoder is kept.

    Convnets and vision transformers have recipes of their own, the authors'. Convnets: crops of 20-100 % of the area, a
    projector of 2 layers, nothing behind the predictor. Transformers (whatever has a patch embedding): crops of
    8-100 %, a projector of 3 layers, a batch norm behind the predictor, and the patch embedding frozen as it is at the
    start, without which the authors' training was unstable; in what is saved it is weights as any other. The authors'
    vision transformers have fixed positions and start from other random weights; ours are timm's.

    Ours: the temperature is .2 for convnets, too, where the authors' is 1 in batches of 4,096: in small trials with
    batches of 32 it found pairs sooner or as soon. Hidden layers of 1,024, twice the features of a ResNet-18 as the
    paper's 4,096 is of a ResNet-50. A momentum that suits the run's length; the paper's .99 is for 300 epochs.

    Guards: color jitter and grey, without which color histograms would be enough to find the partner. Each view goes
    through the networks by itself, so batch norms see both views of an image in no batch.

    Suits batches of 64 and more; it is made for vision transformers. Does not suit tiny batches, in which there are few
    images to be told from, nor data in which what tells classes apart is what the views destroy: change `views` then.
    `get_preds` decodes to the cosine of an image's two predictions.
    """

    name = "mocov3"
    paper = "Chen et al. 2021"
    scaled = (("hidden", "4,096"),)
    recipes = (replace(BYOL_1, scale=(0.2, 1.0)), replace(BYOL_2, scale=(0.2, 1.0)))
    accumulates = False  # images of a batch are told apart
    passes = 4  # two of the student and two of the teacher

    def __init__(
        self,
        temperature: float = 0.2,  # The authors' for transformers; for convnets, in batches of 4,096, theirs is 1
        momentum: float | None = None,  # Of the teacher at the start; the paper's .99; None: by the number of steps
        dim: int = 256,  # Width of the projection
        hidden: int = 1024,  # Width of the hidden layers of projector and predictor; the paper's 4,096
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5}
    ):
        check_number("temperature", temperature, above=0)
        if momentum is not None:
            check_number("momentum", momentum, 0, below=1)
        check_number("dim", dim, 2, whole=True)
        check_number("hidden", hidden, 1, whole=True)
        self.check_views(views)
        self.temperature, self.momentum, self.dim, self.hidden, self.views = temperature, momentum, dim, hidden, views

    def setup(self, dls, encoder):
        if patch_embedding(encoder) is None:
            self.scaled = (*self.scaled, ("temperature", "1"))
        super().setup(dls, encoder)
        if patch_embedding(encoder) is not None:
            self.recipes = (BYOL_1, BYOL_2)

    def model(self, encoder):
        patches = patch_embedding(encoder)
        n_layers, behind = (2, None) if patches is None else (3, "plain")
        if patches is not None:
            patches.requires_grad_(False)
        n_in = encoder.num_features
        projector = mlp(n_in, self.hidden, self.dim, n_layers, batchnorm=True, last_batchnorm="plain")
        predictor = mlp(self.dim, self.hidden, self.dim, batchnorm=True, last_batchnorm=behind, last_bias=False)
        return StudentTeacher(encoder, projector, predictor)

    def callbacks(self):
        return [EMATeacher(self.momentum)]

    def loss(self, pred, target, reduction="mean"):
        queries, keys = pred
        pairs = [(queries[:, 0], keys[:, 1]), (queries[:, 1], keys[:, 0])]
        return per_image(sum(find_key(q, k, self.temperature) for q, k in pairs), reduction)


def find_key(
    queries: Tensor,  # (B, D), any scale
    keys: Tensor,  # (B, D), row i from the same image as in queries
    temperature: float,
) -> Tensor:  # (B,)
    """Cross-entropy of each query's own key among those of all processes, times 2 * temperature."""
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = units(queries), gathered(units(keys.detach()))
        own = torch.arange(len(queries), device=queries.device) + first_row(queries)
        return 2 * temperature * F.cross_entropy(queries @ keys.T / temperature, own, reduction="none")


def patch_embedding(encoder: Encoder) -> nn.Module | None:
    """The layer that turns patches into tokens, under timm's name for it or torchvision's; None of a convnet."""
    layers = dict(encoder.body.named_modules())
    return layers.get("patch_embed.proj", layers.get("conv_proj"))
