"""DeepCluster."""

import torch
from torch import Tensor, nn

from selfsup_fastai.callbacks.clock import SetClocks
from selfsup_fastai.callbacks.clusters import ClusterColumns, Recluster
from selfsup_fastai.checks import check_flag, check_number
from selfsup_fastai.data.recipes import CROP_FLIP
from selfsup_fastai.data.views import center_square
from selfsup_fastai.encoders.clock import Clock
from selfsup_fastai.encoders.clusters import Clusters
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.heads import linear_head
from selfsup_fastai.encoders.inputs import to_input
from selfsup_fastai.errors import TaskError
from selfsup_fastai.messages import say
from selfsup_fastai.metrics import share
from selfsup_fastai.pictures import draw_rows
from selfsup_fastai.pretext.base import class_loss
from selfsup_fastai.pretext.joint import JointTask

MOST, LEAST, TO_A_CLUSTER = 10_000, 10, 100  # Clusters: the paper's, and what is chosen for small data
TO_A_DIRECTION = 10  # Images: with fewer, whitened features are as far from each other as noise is
STEPS = 30  # At least, from one clustering to the next


def named_rightly(pred: tuple[Tensor, Tensor], *_) -> tuple[Tensor, Tensor]:
    """Images whose cluster is thought likeliest, and all."""
    logits, clusters = pred
    return (logits.argmax(1) == clusters).sum(), torch.tensor(len(clusters))


class DeepCluster(JointTask):
    """Into which group of similar images was this one sorted?

    Caron, Bojanowski, Joulin & Douze, Deep Clustering for Unsupervised Learning of Visual Features, 2018
    (arXiv 1807.05520). Before an epoch the features of all training images are sorted into clusters by k-means, and
    the network is then trained to name them as if they were classes; better features give better clusters.

    In: one view of each image, (B, 1, C, H, W): crop of 8-100 % of the area, flip; with `sobel` its edges, C = 2; in
    validation the whole center square beside it, (B, 2, C, H, W); and its place in the training set, (B,). Target: the
    row in the batch, (B,), which nobody asks for. Prediction: logits, (B, K), and the clusters, (B,). Loss:
    cross-entropy. Columns: `nmi`, how much of the clusters is as it was before they were last made (normalized
    mutual information, 1: all, at first 0), and `clusters`, how many are not empty.

    Images that are not for training were not sorted: in validation and for `predict` an image is in the cluster that
    the network names for the whole of it, and accuracy is the share of crops for which it names the same.

    Clusters: pooled features in evaluation mode, without augmentation; centered, whitened along at most 256 principal
    directions (ours: no more than one for ten images), of length 1; 20 rounds of k-means from random images on. Then
    the head is drawn anew (deviation 0.01) and what the optimizer knew of it is forgotten. How many there are follows
    the data: one for 100 images, 10 to 10,000 (ours; the paper has 10,000 for 1.3 million, and found ten times as many
    as classes to be best). Where an epoch has too few steps for a new head to learn anything, clusters and head live
    for several epochs, until 30 steps are done (ours).

    Guards against one cluster for all: an epoch draws equally often from each cluster, so the largest is not worth
    more than any other; a cluster that loses its last image gets the one that is farthest from its center
    (scikit-learn's rule; the authors' code splits a large one). Against answers by color: Sobel's filters in front of
    the network, as in the paper, which is `sobel`; an encoder trained so carries it in its card, and eats edges
    downstream. Ours: ResNets have no layer before the last ReLU that the paper clusters by, so these are the pooled
    features; and the head has the optimizer of the rest, where the paper's has SGD without momentum. The authors train
    at a constant rate.

    Suits a thousand images or more of things that differ as wholes, and small batches. Does not suit very unequal
    classes, which clusters of one size cut to pieces, nor fewer than a few hundred images. Costs, beside one pass for
    each image, another in evaluation for each clustering, and k-means, one thread's work. With several processes each
    computes the features of a part of the images, and the first one sorts them all.
    """

    name = "deep_cluster"
    paper = "Caron et al. 2018"
    recipes = (CROP_FLIP,)
    needs = ("index",)
    n_inp = 2
    normalized = (True, False)
    passes = 2
    metrics = (share("accuracy", named_rightly),)
    tells_apart = False
    alone = "it draws images by their clusters."
    collapse_hint = ""

    def __init__(
        self,
        clusters: int | None = None,  # None: by the number of images; the paper's: 10000
        every: int | None = None,  # Epochs from one clustering to the next; None: 1 where an epoch has 30 steps
        dim: int = 256,  # Principal directions of the features, at most; no more than one for ten images
        sobel: bool = True,  # The network is fed with edges, as in the paper; False: with the images
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'scale': [0.3, 1]} for larger crops
    ):
        if clusters is not None:
            check_number("clusters", clusters, 2, whole=True)
        if every is not None:
            check_number("every", every, 1, whole=True)
        check_number("dim", dim, 1, whole=True)
        check_flag("sobel", sobel)
        self.check_views(views)
        self.clusters, self.every, self.dim, self.sobel, self.views = clusters, every, dim, sobel, views
        self.input = "sobel" if sobel else None
        self.n_images, self.n_dim = 1, dim
        self.n_clusters, self.lasts = clusters or LEAST, every or 1  # these four are known after `setup`

    def setup(self, dls, encoder):
        super().setup(dls, encoder)
        self.n_images = len(dls.train_ds)
        self.n_dim = min(self.dim, max(2, self.n_images // TO_A_DIRECTION))
        if self.clusters is None:
            self.n_clusters = min(MOST, self.n_images, max(LEAST, self.n_images // TO_A_CLUSTER))
        if self.every is None:
            self.lasts = -(-STEPS // max(1, len(dls.train)))  # rounded up
        self.passes = 1 + 1 / self.lasts
        when = "each epoch" if self.lasts == 1 else f"every {self.lasts} epochs"
        say(f"deep_cluster: {self.n_clusters:,} clusters for {self.n_images:,} images, anew {when}.")
        if self.n_clusters > self.n_images:
            raise TaskError(
                f"deep_cluster cannot sort {self.n_images} images into {self.n_clusters} clusters. Take fewer clusters."
            )

    def make_batch(self, x, *, generator, train, idx=None):
        views = self.draw_views(x, generator)
        if not train:
            whole = center_square(x)
            views = torch.cat([views, (to_input(whole, self.input) if self.input else whole).unsqueeze(1)], 1)
        return (views, idx), (torch.arange(len(x), device=x.device),)

    def model(self, encoder):
        return ClusterNet(encoder, Clusters(self.n_images, self.n_clusters, self.n_dim, self.lasts))

    def loss(self, pred, target, reduction="mean"):
        return class_loss(*pred, reduction)

    def callbacks(self):
        return [SetClocks(), Recluster(), ClusterColumns()]

    def embedded(self, pred):
        return None

    def activation(self, pred):
        logits, clusters = pred
        return logits.softmax(-1), clusters

    def decode(self, pred):
        """The cluster that is named and the one it is, (B, 2)."""
        named, clusters = pred
        return torch.stack([named.argmax(-1), clusters], 1)

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """The crops, in validation with the whole images; after training with the cluster that each is in and named."""
        if pred is None:
            return super().show(inputs, targets, None, ctxs, max_n, figsize)
        pairs = pred[:max_n].tolist()
        said = [f"cluster {cluster}, named {named}" for named, cluster in pairs]
        right = [named == cluster for named, cluster in pairs]
        return draw_rows(self.pictured(inputs[0][:max_n]), said, ctxs, figsize, right)


class ClusterNet(nn.Module):
    """Views (B, 1 or 2, C, S, S), places (B,) -> logits (B, K) of the first views, and clusters (B,)."""

    def __init__(self, encoder: Encoder, clusters: Clusters):
        super().__init__()
        self.encoder, self.clusters = encoder, clusters
        self.head = linear_head(encoder.num_features, clusters.n)
        self.clock = Clock()

    def forward(self, x: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.encoder(x[:, 0]))
        if x.shape[1] == 1:
            return logits, self.clusters.labels[idx]
        return logits, self.head(self.encoder(x[:, 1])).argmax(1)
