"""NPID (instance discrimination)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.data.recipes import NPID_VIEW
from selfsup_fastai.encoders.memories import ContrastBank
from selfsup_fastai.losses import nce
from selfsup_fastai.pretext.joint import BankTask


class NPID(BankTask):
    """Which of all training images is this a view of?

    Wu, Xiong, Yu & Lin, Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018 (arXiv
    1805.01978). Every image is a class of its own. No weights stand for the classes but a bank: the embedding of each
    image, as a running average of what its views were given.

    In: one view of each image, (B, 1, C, H, W): crop of 20-100 % of the area, color jitter, grey, flip; its place in
    the training set, (B,); and the places of `negatives` images drawn at random, the same one perhaps among them,
    (B, K). Target: the row in the batch, (B,), for the metric alone. Prediction: the view's embedding and the image's
    row of the bank, (B, 2, dim) of length 1, and the logits of the row and of those drawn, (B, 1 + K). Loss:
    noise-contrastive estimation, the code's. With p = exp(cos / temperature) / Z, -log p / (p + K/N) of the own row and
    the sum of -log (K/N) / (p + K/N) over those drawn; Z is N times the mean of exp(cos / temperature) in the first
    batch (with accumulated gradients in the whole first step), and fixed. After the step a row becomes the mean of the
    old one and the new embedding, of length 1 again. The paper's proximal term is left out, as in the code. Rows begin
    with length 1 (the code's: about 1). Ours: the batch norm on the embeddings, and the temperature. A fresh network
    gives all images nearly one embedding; with thousands of images their rows follow it within a few dozen steps, and
    all move on together, never apart.

    Images that are not for training have no row. Validation and `predict` show two views of an image, and the second
    takes the row's place: what they tell holds for images never seen. found_pair is the share of images whose second
    view is nearest among those of the batch; the negatives are training images.

    Guards: color jitter and grey, without which color histograms would be enough.

    Suits the smallest batches, since the others come out of the bank, and costs half of what methods of two views do.
    A row is renewed once an epoch: it takes many epochs. Does not suit data with near duplicates, which it pushes
    apart, nor more than a few million images (a row each).
    """

    name = "npid"
    paper = "Wu et al. 2018"
    scaled = (("temperature", "0.07"),)
    recipes = (NPID_VIEW, NPID_VIEW)
    n_inp = 3
    normalized = (True, False, False)
    passes = 1

    def __init__(
        self,
        negatives: int | None = None,  # Images drawn; None: as many as training images, 4096 (the paper's) at most
        temperature: float = 0.2,  # Of the softmax; the paper's 0.07, on CIFAR-10 0.1
        dim: int = 128,  # Width of an embedding
        bank_momentum: float = 0.5,  # Share of the old row in the new one
        centered: bool = True,  # Embeddings through a batch norm without scale and shift; False: as in the paper
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5} for weaker colors
    ):
        self.negatives, self.temperature, self.dim, self.bank_momentum = negatives, temperature, dim, bank_momentum
        self.centered, self.views = centered, views
        self.check_bank()
        self.check_views(views)

    def make_batch(self, x, *, generator, train, idx=None):
        views = self.draw_views(x, generator, 1 if train else 2)
        negatives = self.draw_negatives(len(x), generator=generator)
        return (views, idx, negatives), (torch.arange(len(x), device=x.device),)

    def model(self, encoder):
        return InstanceNet(encoder, self.embedding(encoder.num_features), self.bank())

    def loss(self, pred, target, reduction="mean"):
        return nce(pred[1], reduction)


class InstanceNet(nn.Module):
    """Views (B, 1 or 2, C, S, S), places (B,) and (B, K) -> embeddings with rows (B, 2, dim), logits (B, 1 + K)."""

    def __init__(self, encoder: nn.Module, head: nn.Module, bank: ContrastBank):
        super().__init__()
        self.encoder, self.head, self.bank = encoder, head, bank

    def forward(self, x: Tensor, idx: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        z = self.embed(x[:, 0])
        own = self.embed(x[:, 1]) if x.shape[1] == 2 else self.bank.rows[idx]
        logits = self.bank.logits(z, own, negatives)
        if x.shape[1] == 1:
            self.bank.note(idx, z)
        return torch.stack([z, own], 1), logits

    def embed(self, x: Tensor) -> Tensor:
        """Of one view, (B, C, S, S) -> (B, dim) of length 1."""
        return F.normalize(self.head(self.encoder(x)), dim=1)
