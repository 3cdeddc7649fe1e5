"""Splitting by patient, or by any other group, so that nobody is on both sides.

Two images of one patient are alike beyond what a task is about: with one in training and one in validation, what is
measured is memory. `data/groups.py` says who belongs together.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

import numpy as np
import pandas as pd

from selfsup_fastai.data.groups import assert_disjoint, duplicates_across, groups_of, pixel_hash, texts_of
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say

__all__ = ["GroupSplitter", "PatientSplitter", "assert_disjoint", "duplicates_across", "groups_of", "pixel_hash"]

_MANY_GROUPS = 1_000  # above, the best sum is looked for at the end only
_LAST_IMAGES = 2_000  # as many are left for it

Split = tuple[list[int], list[int]]


class PatientSplitter:
    """Whole patients to train with, whole patients to validate with: `splitter(table)` gives two lists of places.

    As fastai's `splitter=` it takes a DataFrame of that kind, or, made with `table`, items that are paths (what has a
    path, such as `DicomImage`) and gives places among them. How rows are grouped: `groups_of`, duplicates included.
    A share of the rows as near to `valid_pct` as whole groups allow, at least one group on each side.

    The split depends on the seed, the ids and how many images each has: groups are taken in the order of a hash of seed
    and name, so the order of rows (of files on a disk) does not matter. The ids of a table are pseudonyms with a
    key of this machine: another key, another split.
    """

    def __init__(
        self,
        valid_pct: float = 0.2,  # Share of the images to validate with
        seed: int = 42,  # Of the split
        table: pd.DataFrame | None = None,  # Tells of whom the items are, where these are paths
        pixel_hashes: pd.Series | None = None,  # As for `groups_of`
    ):
        _check(valid_pct, seed)
        self.valid_pct, self.seed, self.table, self.pixel_hashes = valid_pct, seed, table, pixel_hashes

    def __call__(
        self,
        items: pd.DataFrame | Sequence,  # A table, or the items of a data set
    ) -> Split:
        """Places to train and to validate with."""
        if isinstance(items, pd.DataFrame):
            return split_groups(groups_of(items, self.pixel_hashes), self.valid_pct, self.seed, "patient")
        if self.table is None:
            what = "a table (DataFrame) as `scan_dicoms` returns"
            raise DataError(f"PatientSplitter splits {what}; for a list of items make it with that: table=...")
        groups = groups_of(self.table, self.pixel_hashes)
        known = dict(zip((os.fspath(file) for file in self.table["file"]), groups))
        found = [known.get(os.fspath(item) if isinstance(item, (str, os.PathLike)) else None) for item in items]
        missing = sum(group is None for group in found)
        if missing:
            raise DataError(f"{missing:,} of {len(found):,} items are not in the table: scan the folder they are in.")
        return split_groups(pd.Series(found, dtype=object), self.valid_pct, self.seed, "patient")


class GroupSplitter:
    """Whole groups to train with, whole groups to validate with: photographs of one slide, or person, stay together.

    For fastai's `splitter=`: in a DataBlock over a DataFrame with the name of a column, over files with a function.
    Missing and blank values are a group each. The split depends on the seed and the groups, not on the order of rows.
    """

    def __init__(
        self,
        groups: str | int | Callable | Iterable,  # Column; a function of an item; or a group for each item, in order
        valid_pct: float = 0.2,  # Share of the images to validate with
        seed: int = 42,  # Of the split
    ):
        _check(valid_pct, seed)
        self.groups, self.valid_pct, self.seed = groups, valid_pct, seed

    def __call__(
        self,
        items: pd.DataFrame | Sequence,  # A DataFrame, or the items of a data set
    ) -> Split:
        """Places to train and to validate with."""
        groups = self._groups(items)
        values = _texts_of_numbers(groups)
        missing = values == ""
        if missing.any():
            say(f"{missing.sum():,} of {len(values):,} images have no group: each is one of its own.")
        labels = pd.Series(groups.index.map(str), dtype=object)
        alone = labels + " " + labels[missing].groupby(labels[missing]).cumcount().reindex(labels.index).map(str)
        keys = ["alone " + label if gone else "group " + value for value, gone, label in zip(values, missing, alone)]
        return split_groups(pd.Series(keys, dtype=object), self.valid_pct, self.seed, "group")

    def _groups(self, items) -> pd.Series:
        """A value for each item."""
        if callable(self.groups):
            rows = (row for _, row in items.iterrows()) if isinstance(items, pd.DataFrame) else items
            return pd.Series([self.groups(item) for item in rows], dtype=object)
        if isinstance(self.groups, (str, int)):
            return _column(items, self.groups)
        groups = self.groups if isinstance(self.groups, pd.Series) else pd.Series(list(self.groups), dtype=object)
        if len(groups) != len(items):
            raise DataError(f"Expected a group for each of the {len(items):,} items; got {len(groups):,} groups.")
        return groups


def _column(items, name: str | int) -> pd.Series:
    if not isinstance(items, pd.DataFrame):
        fix = "give GroupSplitter a function of an item, or a list of groups"
        raise DataError(f"A column of groups needs a DataFrame; got {type(items).__name__}: {fix}.")
    if name in items.columns:
        return items[name]
    raise DataError(f"The DataFrame has no column {name!r}; its columns: {', '.join(map(str, items.columns))}.")


def _texts_of_numbers(groups: pd.Series) -> np.ndarray:
    """Texts; whole numbers are the same as floats, which pandas makes of them where one is missing."""
    whole = [int(v) if isinstance(v, (float, np.floating)) and float(v).is_integer() else v for v in groups]
    return texts_of(pd.Series(whole, dtype=object))


def _check(valid_pct: object, seed: object) -> None:
    if isinstance(valid_pct, bool) or not isinstance(valid_pct, (int, float)) or not 0 <= valid_pct < 1:
        what = "the share of images to validate with, from 0 up to but not including 1"
        raise DataError(f"valid_pct is {what}; got {valid_pct!r}.")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise DataError(f"seed is an integer from 0 up; got {seed!r}.")


def split_groups(keys: pd.Series, valid_pct: float, seed: int, what: str = "group") -> Split:
    """Places to train and to validate with: rows of one key on one side, keys in the order of a hash with the seed."""
    sizes = keys.value_counts()
    if len(sizes) < 2:
        fix = "Choose the random split by name, if nothing is to be concluded from its validation, or add images"
        other = " (or GroupSplitter('study'), if the ids are placeholders)" if what == "patient" else ""
        raise DataError(f"All {len(keys):,} images are of one {what}, which cannot be on both sides. {fix}{other}.")
    order = sorted(sizes.index, key=lambda key: blake2b(f"{seed} {key}".encode("utf-8", "surrogateescape")).digest())
    target = min(max(1, round(len(keys) * valid_pct)), len(keys) - 1)
    chosen = {order[i] for i in nearest_sum([int(sizes[key]) for key in order], target)}
    is_valid = keys.isin(chosen).to_numpy()
    if abs(is_valid.mean() - valid_pct) > 0.05:
        say(f"{is_valid.mean():.0%} of the images are to validate with, not {valid_pct:.0%}: no {what} is divided.")
    return np.flatnonzero(~is_valid).tolist(), np.flatnonzero(is_valid).tolist()


def nearest_sum(sizes: list[int], target: int) -> list[int]:
    """Places of sizes that add up as nearly as can be to `target`, neither none nor all of them; early ones first.

    With more than a thousand sizes the first of them are taken as they come, up to 2,000 short of the target.
    """
    taken, total = [], 0
    if len(sizes) > _MANY_GROUPS:
        for i, size in enumerate(sizes):
            if total + size <= target - _LAST_IMAGES:
                taken.append(i)
                total += size
    left = sorted(set(range(len(sizes))) - set(taken))
    return sorted(taken + [left[i] for i in _subset([sizes[i] for i in left], target - total, none=bool(taken))])


def _subset(sizes: list[int], target: int, none: bool) -> list[int]:
    """`nearest_sum` by dynamic programming: for each sum, the first size with which it can be reached."""
    limit = min(sum(sizes) - 1, 2 * target + min(sizes))
    by = np.full(limit + 1, -1)  # the last of the sizes that make a sum; -1: none do
    reached = np.zeros(limit + 1, bool)
    reached[0], uses = True, Counter()
    for i, size in enumerate(sizes):
        uses[size] += 1
        if size > limit or uses[size] > limit // size:  # so many of one size never fit
            continue
        new = np.flatnonzero(reached[: limit + 1 - size] & ~reached[size:]) + size
        reached[new], by[new] = True, i
        if reached[target]:
            break
    sums = np.flatnonzero(reached)[0 if none else 1 :]
    total, chosen = int(sums[np.abs(sums - target).argmin()]), []
    while total:
        chosen.append(int(by[total]))
        total -= sizes[chosen[-1]]
    return chosen
