"""How much of a difference is more than chance: two sources of it, one interval.

A score would have come out otherwise with other seeds (pretraining, the draw of the labels, their order, the head), and
on other test images. Seeds alone do not tell the second: where all seeds share a small test set, their scores agree
with each other and may all be off. So test images are drawn anew, too.

The mean score over S seeds on n images has the variance (s² + r²/n)/S + i²/n: of seeds, of what is particular to a seed
and an image, and of images. The scatter of the seeds estimates the first term, redrawing images i²/n + r²/(Sn); what is
counted twice is known from redrawing each seed's images by themselves, and taken out once. The two estimates have very
different degrees of freedom, S - 1 and n - 1. They are joined as Banerjee did (1960), t² times variance summed: such an
interval covers the truth at least as often as it says, whatever the share of each. (Satterthwaite's approximation,
tried first, gives up to 12 % false alarms instead of 5 % with two seeds, 7 % with three.)

Not covered: other training images than those that labels are drawn from. With all labels in use they are the same in
all seeds.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtrit

DRAWS = 400
"""Times the test images are drawn anew: the deviation found is off by some 4 %."""

LEAST_GROUPS = 6
"""Test images (or patients) below which nothing is said: even all of one mind they leave a chance of 1 in 16."""

_LEAST_P = 1e-12


class Estimate(NamedTuple):
    """A mean over seeds, and what it is made of."""

    mean: float
    of_seeds: float  # Variance of the mean as the seeds scatter; infinite where it cannot be known
    of_images: float = 0.0  # As redrawn images have it
    in_both: float = 0.0  # Of the latter what the former has already
    seeds: int = 2
    groups: int = 2  # Of test images

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Around the mean, infinite where nothing is known."""
        half = self._half(1 - confidence)
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float:
        """How often a mean at least as far from 0 comes about by chance where the truth is 0."""
        if self.mean == 0 or not np.isfinite(self.of_seeds):
            return 1.0
        if self._half(_LEAST_P) < abs(self.mean):
            return _LEAST_P if self.of_seeds + self.of_images else 0.0
        return float(brentq(lambda alpha: self._half(alpha) - abs(self.mean), _LEAST_P, 1.0, xtol=1e-16, rtol=1e-10))

    def _half(self, alpha: float) -> float:
        """Half the width of the interval of confidence 1 - alpha."""
        if not np.isfinite(self.of_seeds):
            return np.inf
        seeds = stdtrit(self.seeds - 1, alpha / 2) ** 2 * self.of_seeds  # Student's quantiles
        images = stdtrit(self.groups - 1, alpha / 2) ** 2
        both = seeds + images * max(0.0, self.of_images - self.in_both)
        return float(max(both, images * self.of_images) ** 0.5)


def redrawn_images(
    groups: np.ndarray,  # (n,) for each test image the number of the group it belongs to: a patient, or itself alone
    draws: int = DRAWS,
    seed: int = 0,
) -> np.ndarray:  # (draws, n), each row with a mean of 1
    """Weights of the test images, whole groups at once, as if others had been drawn (Rubin's bootstrap, 1981).

    Each group gets a weight from an exponential distribution, never 0: a class of a single image does not get lost.
    """
    _, of = np.unique(groups, return_inverse=True)
    weights = np.random.default_rng(seed).exponential(size=(draws, of.max() + 1))[:, of]
    return weights / weights.mean(1, keepdims=True)


def estimate(
    scores: np.ndarray,  # (S,): one for each seed, or the difference of two starts
    redrawn: np.ndarray | None,  # (S, draws): the same on redrawn images, row by row; None: not known
    n_groups: int,  # Groups of test images
) -> Estimate:
    """The mean over the seeds with the variance that seeds and images give it (see above)."""
    scores = np.asarray(scores, float)
    n, mean = len(scores), float(np.mean(scores))
    if n < 2 or (redrawn is not None and n_groups < LEAST_GROUPS):
        return Estimate(mean, np.inf)
    of_seeds = float(scores.var(ddof=1)) / n
    if redrawn is None:  # a few seeds that agree by chance are no certainty: scores are counts, of few images often
        return Estimate(mean, of_seeds or np.inf, seeds=n)
    fair = (n_groups + 1) / (n_groups - 1)  # the exponential weights vary less than new images would
    of_images = float(redrawn.mean(0).var(ddof=1)) * fair
    in_both = max(0.0, float(redrawn.var(axis=1, ddof=1).mean()) * fair - of_images) / (n - 1)
    return Estimate(mean, of_seeds, of_images, in_both, n, n_groups)


class Corrected(NamedTuple):
    """What is left of p-values when several were looked at."""

    p: np.ndarray  # Corrected
    confidence: np.ndarray  # Of the interval that excludes 0 just where the corrected p is below the level


def holm(
    p: np.ndarray,  # One for each comparison of the family
    confidence: float = 0.95,  # That none of the differences found is chance
) -> Corrected:
    """Holm's correction (1979): the smallest p times their number, the next times one less, and so on.

    The intervals have the confidence at which each comparison was tested; those after the first that fails, that of
    the first that fails.
    """
    p, alpha = np.asarray(p, float), 1 - confidence
    order = np.argsort(p, kind="stable")
    times = np.arange(len(p), 0, -1)
    stepped = np.minimum(1, np.maximum.accumulate(p[order] * times))
    failed = np.flatnonzero(stepped >= alpha)
    if len(failed):
        times[failed[0] :] = times[failed[0]]
    corrected, levels = np.empty(len(p)), np.empty(len(p))
    corrected[order], levels[order] = stepped, 1 - alpha / times
    return Corrected(corrected, levels)


def verdict(low: float, high: float) -> str:
    """'better' or 'worse' only where the whole interval of a gain says so."""
    return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
