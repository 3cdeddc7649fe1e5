"""Two heads and a bank: the embedding of a changed image is to be the image's own (PIRL)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.encoders.memories import ContrastBank


class Invariant(NamedTuple):
    """What `InvariantHeads` make of a batch; embeddings of length 1."""

    image: Tensor  # (B, dim)
    changed: Tensor  # (B, dim)
    own: Tensor  # (B, dim): the images' rows of the bank, or what stands for them
    logits: Tensor  # (B, 2, 1 + K) of the changed image and of the image


class InvariantHeads(nn.Module):
    """Features of images and of what was made of them, to embeddings and how well each is told by the bank.

    Misra & van der Maaten 2020 (PIRL): a head for the image and one for all that was made of it; the bank keeps
    embeddings of images.
    """

    def __init__(
        self,
        image: nn.Module,  # (B, n) -> (B, dim)
        changed: nn.Module,  # (B, V, n) -> (B, dim)
        bank: ContrastBank,
    ):
        super().__init__()
        self.image, self.changed, self.bank = image, changed, bank

    def forward(
        self,
        image: Tensor,  # (B, n) features
        changed: Tensor,  # (B, V, n)
        idx: Tensor,  # (B,) places of the images in the bank
        negatives: Tensor,  # (B, 2, K) places of rows drawn at random, for the changed image and for the image
        own: Tensor | None = None,  # (B, n) features that stand for the rows of images that have none; None: the rows
    ) -> Invariant:
        f, g = F.normalize(self.image(image), dim=1), F.normalize(self.changed(changed), dim=1)
        rows = self.bank.rows[idx] if own is None else F.normalize(self.image(own), dim=1)
        logits = [self.bank.logits(z, rows, negatives[:, i], measures=i == 0) for i, z in enumerate((g, f))]
        if own is None:
            self.bank.note(idx, f)
        return Invariant(f, g, rows, torch.stack(logits, 1))


def invariant_heads(
    n_in: int,  # Features of the encoder
    views: int,  # Things made of each image
    dim: int,  # Width of an embedding
    bank: ContrastBank,
    centered: bool = True,  # Embeddings through batch norms without scale and shift; False: as in the paper
) -> InvariantHeads:
    """PIRL's: one linear layer for the image; for what was made of it one for each, and one on all of them together."""

    def embedding(n: int) -> nn.Module:
        return mlp(n, dim, dim, n_layers=1, last_batchnorm="plain" if centered else None)

    each = nn.Sequential(nn.Linear(n_in, dim), nn.Flatten(), embedding(views * dim))
    return InvariantHeads(embedding(n_in), each if views > 1 else nn.Sequential(nn.Flatten(), embedding(n_in)), bank)
