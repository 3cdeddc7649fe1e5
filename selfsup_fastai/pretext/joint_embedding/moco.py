"""MoCo v2."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup_fastai.callbacks.ema import EMATeacher
from selfsup_fastai.callbacks.fill import FillForRates
from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.checks import check_number
from selfsup_fastai.data.recipes import MOCO
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.encoders.memories import FeatureQueue
from selfsup_fastai.encoders.teacher import Teacher
from selfsup_fastai.errors import TaskError
from selfsup_fastai.losses import units
from selfsup_fastai.messages import say
from selfsup_fastai.pretext.base import per_image
from selfsup_fastai.pretext.joint import JointTask

MOST_KEYS = 65_536  # the paper's queue
GROUP, MOST_GROUPS = 8, 8  # images in a group at least; as many groups as the authors had devices


class MoCo(JointTask):
    """Which of the images seen lately is the other view of this one?

    Chen, Fan, Girshick & He, Improved Baselines with Momentum Contrastive Learning, 2020 (arXiv 2003.04297), on He et
    al. 2019 (arXiv 1911.05722). The network's embedding of one view, the query, is pulled to the key of the other view
    and pushed away from the keys of earlier batches, which are kept in a queue: many negatives with small batches. Keys
    come from a slow copy of the network, so that old ones still fit.

    In: two views of each image, one input (B, 2, C, H, W): crop of 20-100 % of the area, flip, color jitter (half of
    SimCLR's), grey, blur (none under 64 pixels). Target: the image's row, (B,). Prediction: query and key, of length 1,
    (B, 2, dim), and the logarithm of the sum of exp(query * key / temperature) over the queue, (B,), which is all that
    the loss needs to know of it; loss: cross-entropy of the own key among itself and the queue, log(1 + queue) where
    nothing is known. The batch's keys enter the queue after the step. The loss is one-sided, as the paper's: the key's
    view brings no gradient. The encoder of the queries is kept.

    Ours: the queue's length, a quarter of the training images (at most the paper's 65,536). The longer it is, the
    likelier it holds an image's own key of the epoch before, as a negative: at a quarter for 3 % of the queries, at the
    number of images for half of them. And the momentum, constant as the authors', which suits the run's length: theirs
    are .999 for a million steps and .99 for the 19,400 of their CIFAR-10 notebook.

    As in the authors' code the queue starts with random directions, far from everything: the loss is low at first and
    rises until keys have filled it. For `lr_find` it is filled before the first step.

    Guards: an own key could be known by its batch norms, which have seen the query's batch, while the queue's have seen
    other batches. The authors shuffle the keys over 8 devices, and on one device split all batch norms into 8 groups
    of 64 images. Here the key network alone takes the batch in `groups`, of 8 images or more: the norms of the encoder
    that is kept see whole batches and count in their running means as ever. Color jitter and grey hide color
    histograms.

    Suits small batches, and thousands of images or more. Does not suit a few hundred images, of which a queue can hold
    little; nor many near-duplicates, nor data in which what tells classes apart is what the views destroy: change
    `views` then. `get_preds` decodes to the cosine of query and key.
    """

    name = "moco"
    paper = "Chen et al. 2020"
    recipes = (MOCO, MOCO)
    tells_apart = False
    passes = 2  # one of each network

    def __init__(
        self,
        temperature: float = 0.2,  # The authors' on CIFAR-10 is .1
        queue: int | None = None,  # Keys it holds; the paper's 65,536; None: a quarter of the training images
        momentum: float | None = None,  # Of the key network; the paper's .999; None: by the number of steps
        groups: int | None = None,  # Of a batch for the key network's batch norms; None: of 8 images or more, at most 8
        dim: int = 128,  # Width of the embeddings
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5}
    ):
        check_number("temperature", temperature, above=0)
        if queue is not None:
            check_number("queue", queue, 1, whole=True)
        if momentum is not None:
            check_number("momentum", momentum, 0, below=1)
        if groups is not None:
            check_number("groups", groups, 1, whole=True)
        check_number("dim", dim, 2, whole=True)
        self.check_views(views)
        self.temperature, self.queue, self.momentum, self.groups = temperature, queue, momentum, groups
        self.dim, self.views = dim, views

    def setup(self, dls, encoder):
        super().setup(dls, encoder)
        n, bs = len(dls.train_ds), dls.train.bs or 2
        if self.queue is None:
            self.queue = min(MOST_KEYS, max(1, n // 4))
            say(f"moco: the queue holds {self.queue:,} keys, for {n:,} training images.")
        elif self.queue > n:
            say(f"moco: with {self.queue:,} keys of {n:,} images the queue holds an image's own keys as negatives.")
        if self.groups is None:
            normed = any(isinstance(m, _BatchNorm) for m in encoder.modules())
            self.groups = max(1, min(MOST_GROUPS, bs // GROUP)) if normed else 1
        if bs < 2 * self.groups and self.groups > 1:
            raise TaskError(f"groups={self.groups} leave less than 2 images of a batch of {bs} to a group. Lower it.")

    def model(self, encoder):
        projector = mlp(encoder.num_features, encoder.num_features, self.dim)
        queue = FeatureQueue(self.queue, self.dim)
        return QueryAndKey(encoder, projector, queue, self.temperature, self.groups)

    def callbacks(self):
        return [EMATeacher(self.momentum, shape="constant"), KeepMemories(), FillForRates()]

    def loss(self, pred, target, reduction="mean"):
        (query, key), negatives = pred[0].unbind(1), pred[1]
        positive = (query * key.detach()).sum(-1) / self.temperature
        return per_image(torch.logaddexp(positive, negatives) - positive, reduction)


class QueryAndKey(nn.Module):
    """Two views (B, 2, C, H, W) to query and key (B, 2, D) and what the queue has against the query, (B,)."""

    def __init__(self, encoder: Encoder, projector: nn.Module, queue: FeatureQueue, temperature: float, groups: int):
        super().__init__()
        self.encoder, self.projector = encoder, projector
        self.teacher = Teacher(nn.Sequential(encoder, projector))
        self.queue, self.temperature, self.groups = queue, temperature, groups

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query = units(self.projector(self.encoder(x[:, 0])))
        key = units(self.keys(x[:, 1]))
        self.queue.note(key)
        with torch.autocast(x.device.type, enabled=False):
            similarity = query @ self.queue.rows.to(query.dtype).T / self.temperature
        return torch.stack([query, key], 1), similarity.logsumexp(1)

    def keys(self, x: Tensor) -> Tensor:
        """What the teacher makes of views (B, C, H, W); in training its batch norms see a group at a time."""
        groups = max(1, min(self.groups, len(x) // 2)) if self.training else 1
        return torch.cat([self.teacher(part) for part in x.tensor_split(groups)])
