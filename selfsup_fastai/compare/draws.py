"""Which of the labeled training images have a label: drawn anew for each seed, the same for all starts.

Draws of one seed are nested: what has a label among 1 % has one among 5 %, too. So a curve over the number of labels
shows what more labels bring, not what other labels bring. Classes keep their shares; whole patients stay together.
"""

from collections.abc import Iterator, Sequence
from numbers import Integral, Real

import numpy as np
import pandas as pd
from fastai.data.core import TfmdDL

from selfsup_fastai.data.groups import LEVELS, groups_of
from selfsup_fastai.data.subsets import labels_of
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import quiet, say


def check_amounts(labels: Sequence) -> list:
    """Each a share in (0, 1], a float, or a count for each class, an int. Raises `DataError` for anything else."""
    labels = [labels] if isinstance(labels, Real) else list(labels)
    for amount in labels:
        is_count = isinstance(amount, Integral) and not isinstance(amount, bool) and amount >= 1
        is_share = isinstance(amount, Real) and not isinstance(amount, Integral) and 0 < amount <= 1
        if not (is_count or is_share):
            raise DataError(
                f"labels holds {amount!r}; each is a share of the training images, such as 0.05 (1.0: all), or a whole "
                "number of images for each class, such as 10."
            )
    if not labels or len({repr(amount) for amount in labels}) < len(labels):
        raise DataError(f"labels are different numbers, at least one; got {labels!r}.")
    return [int(amount) if isinstance(amount, Integral) else float(amount) for amount in labels]


def draw_labels(
    n: int,  # Labeled training images
    amount: float | int,  # A share of them in (0, 1], or so many for each class
    seed: int,  # Draws of one seed are nested
    classes: np.ndarray | None = None,  # (n,) class numbers; None: labels of another kind, drawn plainly at random
    groups: np.ndarray | None = None,  # (n,) numbers of patients, who stay whole; None: not known
) -> np.ndarray:  # Places in 0..n-1, in ascending order
    """The images with a label, of each class at least one. Raises `DataError` for a count without classes."""
    (amount,) = check_amounts([amount])
    if isinstance(amount, int) and classes is None:
        raise DataError(f"labels={amount} means {amount} for each class, but these labels are no classes: give shares.")
    if amount == 1 and isinstance(amount, float):
        return np.arange(n)
    rng = np.random.default_rng(seed)
    classes = np.zeros(n, int) if classes is None else np.asarray(classes)
    if groups is not None and len(np.unique(groups)) < n:
        return _whole_groups(classes, groups, amount, rng)
    chosen = []
    for c in np.unique(classes):
        order = rng.permutation(np.flatnonzero(classes == c))
        wanted = amount if isinstance(amount, int) else max(1, round(amount * len(order)))
        chosen.append(order[:wanted])
    return np.sort(np.concatenate(chosen))


def _whole_groups(classes: np.ndarray, groups: np.ndarray, amount: float | int, rng: np.random.Generator) -> np.ndarray:
    """Whole groups, in a random order in which the first ones bring every class.

    A share: as many of them as come nearest to it. A count: those that bring a class of which there are not enough yet.
    """
    _, of = np.unique(groups, return_inverse=True)
    held = pd.crosstab(of, classes).to_numpy()  # (groups, classes): images
    order = rng.permutation(len(held))
    if isinstance(amount, int):
        steps = _counted(held, order, amount)
        return np.flatnonzero(np.isin(of, steps))
    first = list(_counted(held, order, 1))
    order = np.array([*first, *(g for g in order if g not in set(first))])
    sums = held.sum(1)[order].cumsum()
    most = max(len(first), 1 + int(np.abs(sums - amount * len(classes)).argmin()))
    return np.flatnonzero(np.isin(of, order[:most]))


def _counted(held: np.ndarray, order: np.ndarray, amount: int) -> list[int]:
    """Groups until there are `amount` images of each class (or all of it); one more image of each class at a time, so
    that fewer images are always among more."""
    chosen: list[int] = []
    have, there = np.zeros(held.shape[1], int), held.sum(0)
    for level in range(1, amount + 1):
        for g in order:
            lacking = have < np.minimum(level, there)
            if not lacking.any():
                break
            if g not in chosen and (held[g][lacking] > 0).any():
                chosen.append(int(g))
                have += held[g]
    return chosen


def say_cut(classes: np.ndarray | None, amounts: Sequence, names: Sequence | None = None) -> None:
    """Says where a class has fewer images than asked for, or than its share would be."""
    if classes is None:
        return
    counts = np.unique(classes, return_counts=True)[1]
    for text in _cuts(counts, amounts):
        say(text)


def _cuts(counts: np.ndarray, amounts: Sequence) -> Iterator[str]:
    for amount in amounts:
        if isinstance(amount, int) and counts.min() < amount:
            few = int((counts < amount).sum())
            yield f"{amount} labels a class: {few} of {len(counts)} classes have fewer images, at least {counts.min()}."
        if isinstance(amount, float) and (few := int((amount * counts < 0.5).sum())):
            yield f"{amount:.3g} of the labels: {few} of {len(counts)} classes would get none; each gets one."


def classes_in(
    dl: TfmdDL,  # Labeled images
    kind: str,  # Of their labels
) -> np.ndarray | None:  # (n,)
    """The class number of each image, which is not opened; None for labels that are no classes."""
    return np.array([int(label) for label in labels_of(dl)]) if kind == "category" else None


def groups_in(
    dl: TfmdDL,
    column: str | None = None,  # That names the group; None: the patient (study, series), where that is known
) -> np.ndarray | None:  # (n,) numbers
    """Who belongs together, by the facts that the loader has of its images, or by the table it was made of; None where
    nobody knows. Raises `DataError` for a column that is not there."""
    items = getattr(dl.dataset, "items", None)
    tables = [t for t in (getattr(dl, "facts", None), items) if isinstance(t, pd.DataFrame)]
    if column is not None:
        found = next((t[column] for t in tables if column in t), None)
        if found is None:
            known = ", ".join(sorted({str(name) for t in tables for name in t})) or "none"
            raise DataError(
                f"Of these images no column {column!r} is known, which should tell who they are of: {known}."
            )
        return pd.factorize(found, use_na_sentinel=False)[0]
    table = next((t for t in tables if set(LEVELS) & set(t.columns)), None)
    if table is None:
        return None
    with quiet():
        return pd.factorize(groups_of(table.reset_index(drop=True)))[0]
