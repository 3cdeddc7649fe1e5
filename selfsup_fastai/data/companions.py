"""Companions: which other images of its dataset come with each image, such as the slices before and after it."""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from fastai.torch_core import TensorImage

from selfsup_fastai.seeding import item_seed


class TensorCompanion(TensorImage):
    """Images (B, C, H, W) of which row i comes with image i of the batch. Transforms treat both alike."""


class Companions(ABC):
    """Which images of a dataset come with each of them. What is drawn depends on the pass and the image alone."""

    n: int  # How many come with each image

    @abstractmethod
    def of(
        self,
        samps: Sequence[int],  # Places of B images in their dataset
        seed: int,  # Of the pass
    ) -> np.ndarray:  # (B, n) places in the same dataset; an image's own where it has no companion
        """The companions of some images."""


class FixedCompanions(Companions):
    """The same ones in every pass."""

    def __init__(self, places: np.ndarray):  # (N, n)
        self.places, self.n = np.asarray(places), places.shape[1]

    def of(self, samps, seed):
        return self.places[np.asarray(samps)]


class DrawnCompanions(Companions):
    """One other image of the same group, drawn anew in every pass."""

    n = 1

    def __init__(self, groups: np.ndarray):  # (N,) int: images with the same number belong together
        self.order = np.argsort(groups, kind="stable")
        counts = np.bincount(groups)
        self.first, self.count = (np.cumsum(counts) - counts)[groups], counts[groups]  # of each image's group
        self.rank = np.empty_like(self.order)
        self.rank[self.order] = np.arange(len(groups))
        self.rank -= self.first  # of each image within its group

    def of(self, samps, seed):
        drawn, rng = np.array(samps).reshape(-1, 1), random.Random()
        for i, s in enumerate(samps):
            if self.count[s] > 1:
                rng.seed(f"{item_seed(seed, s)}-companion")  # not what the image itself is cut by
                other = int(rng.random() * (self.count[s] - 1))
                drawn[i] = self.order[self.first[s] + other + (other >= self.rank[s])]
        return drawn
