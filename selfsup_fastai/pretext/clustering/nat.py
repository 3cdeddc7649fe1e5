"""NAT (noise as targets)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.clock import SetClocks
from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.checks import check_flag, check_number
from selfsup_fastai.data.recipes import CROP_FLIP
from selfsup_fastai.encoders.clock import Clock
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.encoders.memories import NoiseTargets
from selfsup_fastai.pretext.base import per_image
from selfsup_fastai.pretext.joint import JointTask


class NAT(JointTask):
    """Which of many random directions is this image's?

    Bojanowski & Joulin, Unsupervised Learning by Predicting Noise, 2017 (arXiv 1704.05310). As many random unit vectors
    (codes) are drawn as there are training images, and stay. Each image has one; now and then the images of a batch
    exchange theirs, so that embeddings are near their codes already. Images that look alike end up at codes that lie
    near each other, and as every code is taken by one image, the embeddings spread over the whole sphere.

    In: one view of each image, (B, 1, C, H, W): crop of 8-100 % of the area, flip; with `sobel` its edges, C = 2; and
    its place in the training set, (B,). Target: the row in the batch, (B,), for the metric alone. Prediction: embedding
    and code, (B, 2, dim) of length 1. Loss: their squared distance, summed over the numbers, 2 - 2 cos, at most 4; 2 is
    what guessing gives. In every third epoch, the first among them, the codes of a batch are dealt out anew among its
    images (Hungarian algorithm, the largest sum of cosines) before the loss is taken, and stay so. Which image has
    which is kept with the model. Codes depend on the batch, so accumulated gradients would not be exact.

    Images that are not for training have no code. Validation and `predict` show two views of an image, and the second
    takes the code's place: what they tell holds for images never seen, and cannot be compared with the training loss.
    found_pair is the share of images whose second view is nearest among those of the batch.

    Guards against one embedding for all: the codes differ. Against answers by color: Sobel's filters in front of the
    network, as in the paper, which is `sobel`; an encoder trained so carries it in its card, and eats edges downstream.
    Ours: the batch norm on the embeddings; codes of 256 numbers, the authors' code has 2048 for 1.3 million images;
    they train by SGD with a rate of 0.01 and no momentum.

    Suits small batches and memories: one view, one pass, and about 1 kB a training image for its code. Does not suit
    short runs: a code is exchanged with those that happen to be in the batch, so it takes many epochs to find its
    place.
    """

    name = "nat"
    paper = "Bojanowski & Joulin 2017"
    recipes = (CROP_FLIP, CROP_FLIP)
    needs = ("index",)
    n_inp = 2
    normalized = (True, False)
    tells_apart = False
    accumulates = False

    def __init__(
        self,
        dim: int = 256,  # Width of an embedding and its code; the authors' code: 2048
        every: int = 3,  # Codes are exchanged in the first of so many epochs
        sobel: bool = True,  # The network is fed with edges, as in the paper; False: with the images
        centered: bool = True,  # Embeddings through a batch norm without scale and shift; False: as in the paper
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'scale': [0.3, 1]} for larger crops
    ):
        check_number("dim", dim, 2, whole=True)
        check_number("every", every, 1, whole=True)
        check_flag("sobel", sobel)
        check_flag("centered", centered)
        self.check_views(views)
        self.dim, self.every, self.sobel, self.centered, self.views = dim, every, sobel, centered, views
        self.input = "sobel" if sobel else None
        self.alone = "it feeds the network with edges; with sobel=False it can." if sobel else ""
        self.n_codes = 1  # known after setup

    def setup(self, dls, encoder):
        super().setup(dls, encoder)
        self.n_codes = len(dls.train_ds)

    def make_batch(self, x, *, generator, train, idx=None):
        views = self.draw_views(x, generator, 1 if train else 2)
        return (views, idx), (torch.arange(len(x), device=x.device),)

    def model(self, encoder):
        last = "plain" if self.centered else None
        head = mlp(encoder.num_features, self.dim, self.dim, n_layers=1, last_batchnorm=last)
        return NoiseNet(encoder, head, NoiseTargets(self.n_codes, self.dim), self.every)

    def loss(self, pred, target, reduction="mean"):
        return per_image((pred[:, 0] - pred[:, 1]).square().sum(1), reduction)

    def callbacks(self):
        return [SetClocks(), KeepMemories()]


class NoiseNet(nn.Module):
    """Views (B, 1 or 2, C, S, S), places (B,) -> embeddings with codes, or of two views, (B, 2, dim)."""

    def __init__(self, encoder: nn.Module, head: nn.Module, noise: NoiseTargets, every: int):
        super().__init__()
        self.encoder, self.head, self.noise, self.every = encoder, head, noise, every
        self.clock = Clock()

    def forward(self, x: Tensor, idx: Tensor) -> Tensor:
        z = self.embed(x[:, 0])
        return torch.stack([z, self.embed(x[:, 1]) if x.shape[1] == 2 else self.codes(z, idx).to(z.dtype)], 1)

    def codes(self, z: Tensor, idx: Tensor) -> Tensor:
        """Those of training images, (B, dim), exchanged before if it is time."""
        learns = self.training and torch.is_grad_enabled()
        return self.noise.exchanged(z, idx) if learns and self.clock.epochs % self.every == 0 else self.noise(idx)

    def embed(self, x: Tensor) -> Tensor:
        """Of one view, (B, C, S, S) -> (B, dim) of length 1."""
        return F.normalize(self.head(self.encoder(x)), dim=1)
