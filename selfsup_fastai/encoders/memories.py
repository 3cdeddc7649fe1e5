"""What a method remembers of earlier batches: a queue of embeddings, or a bank with a row for each image."""

import math
from abc import ABC, abstractmethod

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.processes import gathered

NEGATIVES = 4096  # Rows of a bank that are drawn, at most: NPID's


class Memory(nn.Module, ABC):
    """Something that changes with each step and is no parameter.

    A model calls `note` in its forward pass; the loss is that of the memory as it was. `callbacks.memories` calls
    `commit` once the optimizer has taken the step, and `forget` where there was none (validation, `get_preds`). So
    with accumulated gradients all parts of a step meet the same memory. Buffers: saved, resumed and moved with the
    model.
    """

    def __init__(self):
        super().__init__()
        self._noted: list[tuple[Tensor, ...]] = []
        self._settled = False

    def note(self, *values: Tensor) -> None:
        """Remember this, (B, ...) each, when the step is taken; nothing outside of training."""
        if self.training and torch.is_grad_enabled():
            self._noted.append(tuple(v.detach() for v in values))

    @torch.no_grad()
    def commit(self) -> None:
        """What was noted, of all processes, becomes part of the memory."""
        if self._noted:  # the parts of an accumulated batch enter as one
            self.remember(*(gathered(torch.cat(parts)) for parts in zip(*self._noted)))
        self.forget()

    def forget(self) -> None:
        """Drop what was noted and not remembered."""
        self._noted = []

    @abstractmethod
    def remember(self, *values: Tensor) -> None:
        """Change the buffers."""

    def settled(self) -> bool:
        """Whether `settles` is so. Once it is, a GPU is not waited for again, until `look_again`."""
        self._settled = self._settled or bool(self.settles())
        return self._settled

    def settles(self) -> Tensor:
        """What becomes true of the buffers while it is trained, and stays true."""
        return torch.tensor(True)

    def look_again(self) -> None:
        """The buffers may be others now: those of a file."""
        self._settled = False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_noted": [], "_settled": False}  # half a step is not worth keeping


class FeatureQueue(Memory):
    """The last `size` embeddings, first in, first out (MoCo, He et al. 2020): `rows` (size, dim), of length 1.

    Starts with random directions, as the authors' code does. Batches of any size may enter, the latest rows of a batch
    larger than the queue.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("place", torch.tensor(0))  # where the next row goes
        self.register_buffer("entered", torch.tensor(0))  # rows that ever entered

    @property
    def is_full(self) -> bool:
        """Whether all rows are embeddings, none a random start."""
        return bool(self.settles())

    def settles(self) -> Tensor:
        return self.entered >= len(self.rows)

    def remember(self, z: Tensor) -> None:
        self.entered += len(z)
        z = z[-len(self.rows) :].to(self.rows.dtype)
        places = (self.place + torch.arange(len(z), device=z.device)) % len(self.rows)
        self.rows[places] = F.normalize(z, dim=1)
        self.place.copy_((self.place + len(z)) % len(self.rows))

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """The row of greatest cosine for each embedding, both (..., dim)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.rows[(z.to(self.rows.dtype) @ self.rows.T).argmax(-1)]


class FeatureBank(Memory):
    """An embedding of each training image, `rows` (images, dim) of length 1 (NPID, Wu et al. 2018).

    A visit mixes the old row with the new one and normalizes again. Starts with random directions.
    """

    def __init__(
        self,
        images: int,
        dim: int,
        momentum: float = 0.5,  # Share of the old row
    ):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("rows", F.normalize(torch.randn(images, dim), dim=1))

    def remember(self, idx: Tensor, z: Tensor) -> None:
        mixed = torch.lerp(F.normalize(z, dim=1).to(self.rows.dtype), self.rows[idx], self.momentum)
        self.rows[idx] = F.normalize(mixed, dim=1)


class ContrastBank(FeatureBank):
    """A bank that says how much likelier an image is its own row than one drawn at random (NPID, Wu et al. 2018; PIRL).

    The model's probability of a row is exp(cos / temperature) / Z. Z, which would be a sum over all rows, is estimated
    from the first batch of training and fixed from then on, as in the authors' code: the buffer `log_z`, minus infinity
    until then. Of an accumulated batch it is estimated from all parts; each of them meets the estimate of those so far.
    `losses.nce` makes a loss of what `logits` gives.
    """

    def __init__(
        self,
        images: int,
        dim: int,
        momentum: float = 0.5,  # Share of the old row
        temperature: float = 0.07,
    ):
        super().__init__(images, dim, momentum)
        self.temperature = temperature
        self.register_buffer("log_z", torch.tensor(-math.inf))
        self._measured: list[tuple[Tensor, int]] = []  # of the first step: logarithms of sums of exponentials, numbers

    def logits(
        self,
        z: Tensor,  # (B, dim) of length 1
        own: Tensor,  # (B, dim): the image's row, or what stands for it
        negatives: Tensor,  # (B, K) places of rows that were drawn uniformly from all
        measures: bool = True,  # Whether Z is estimated from these; False: from those of the batch that came before
    ) -> Tensor:  # (B, 1 + K), the own row first
        """log(p / (K / N)) of the image's own row and of K rows drawn at random, where N rows are in the bank."""
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            rows, own, (n, k) = self.rows.to(z.dtype), own.to(z.dtype), (len(self.rows), negatives.shape[1])
            drawn = (z @ rows.T).gather(1, negatives)  # to fetch the rows that were drawn would take 50 times as long
            scores = torch.cat([(z * own).sum(1, keepdim=True), drawn], 1) / self.temperature
            return scores - self._log_z(scores.detach(), measures) - math.log(k / n)

    @torch.no_grad()
    def commit(self) -> None:
        if self._measured:
            self.log_z.copy_(self._estimate(self._measured))
        super().commit()

    def settles(self) -> Tensor:
        return self.log_z.isfinite()

    def forget(self) -> None:
        super().forget()
        self._measured = []

    def _log_z(self, scores: Tensor, measures: bool) -> Tensor:
        """log Z as it was fixed; until then the estimate from the step at hand, outside of training from the batch."""
        if self.settled():
            return self.log_z.to(scores.dtype)
        training = self.training and torch.is_grad_enabled()
        measured = self._measured if training else []
        if measures or not measured:
            scores = gathered(scores)
            measured = [*measured, (scores.flatten().logsumexp(0), scores.numel())]
        if training:
            self._measured = measured
        return self._estimate(measured).to(scores.dtype)

    def _estimate(self, measured: list[tuple[Tensor, int]]) -> Tensor:
        """Logarithm of as many times the mean of the exponentials as there are rows."""
        sums, counts = zip(*measured)
        return torch.stack(sums).logsumexp(0) - math.log(sum(counts)) + math.log(len(self.rows))

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_measured": []}


class NoiseTargets(Memory):
    """A random direction for each training image, and which image has which (NAT, Bojanowski & Joulin 2017).

    `codes` (images, dim), of length 1, stay as they are drawn; `places` (images,) says which of them an image has: a
    permutation, at first the identity.
    """

    def __init__(self, images: int, dim: int):
        super().__init__()
        self.register_buffer("codes", F.normalize(torch.randn(images, dim), dim=1))
        self.register_buffer("places", torch.arange(images))

    def forward(self, idx: Tensor) -> Tensor:
        """The codes of images, (B, dim)."""
        return self.codes[self.places[idx]]

    def exchanged(self, z: Tensor, idx: Tensor) -> Tensor:
        """The codes (B, dim) that images `idx` have once those of the batch are dealt out anew among its images, so
        that embeddings z (B, dim) and codes have the largest sum of products. Kept when the step is taken.

        With several processes their images are one batch; an image that comes twice has one code.
        """
        batch, rows = gathered(idx).unique(return_inverse=True)  # in rising order
        z = gathered(z.detach()).to(self.codes.dtype)
        total = self.codes.new_zeros(len(batch), z.shape[1]).index_add_(0, rows, z)
        places = self.places[batch]
        with torch.autocast(z.device.type, enabled=False):
            scores = total @ self.codes[places].T
        _, best = linear_sum_assignment(scores.cpu().numpy(), maximize=True)
        places = places[torch.as_tensor(best, device=places.device)]
        self.note(batch, places)
        return self.codes[places[torch.searchsorted(batch, idx)]]

    def remember(self, idx: Tensor, places: Tensor) -> None:
        self.places[idx] = places
