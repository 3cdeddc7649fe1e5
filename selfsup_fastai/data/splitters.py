"""Splitting by patient, or by any other group, so that nobody is on both sides.

Two images of one patient are alike beyond what a task is about: with one in training and one in validation, what is
measured is memory. Everything here works on a table (what `scan_dicoms` returns, or any DataFrame); no file is opened,
and no id, pseudonym or path is said or raised.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

import numpy as np
import pandas as pd

from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say

__all__ = ["GroupSplitter", "PatientSplitter", "assert_disjoint", "duplicates_across", "groups_of", "pixel_hash"]

LEVELS = ("patient", "study", "series")
"""Columns that tell whom an image is of, the best first: where one is blank, the next stands in."""

_TIES = (*LEVELS, "instance", "pixel_hash", "file")  # what two rows of one group have in common
_IN_WORDS = {
    "patient": "patient(s)",
    "study": "study(s)",
    "series": "series",
    "instance": "instance(s)",
    "pixel_hash": "identical image(s)",
    "file": "file(s)",
}
_MANY_GROUPS = 1_000  # above, the best sum is looked for at the end only
_LAST_IMAGES = 2_000  # as many are left for it

Split = tuple[list[int], list[int]]


def pixel_hash(
    array: np.ndarray,  # Decoded pixels of one image, of any shape
) -> str:
    """32 hex digits that two arrays share if shape, dtype and values are the same; '' where all values are one.

    Byte order in memory does not count. An empty picture (slices above the head are) tells of no patient, so it ties
    none to another.
    """
    if array.size == 0 or (array == array.flat[0]).all():
        return ""
    plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    digest = blake2b(f"{plain.shape} {plain.dtype.str}".encode(), digest_size=16)
    digest.update(plain.view(np.uint8).data)
    return digest.hexdigest()


def groups_of(
    table: pd.DataFrame,  # What `scan_dicoms` returns; rows may repeat a file, once for each frame
    pixel_hashes: pd.Series | None = None,  # `pixel_hash` by the table's index; None: the column pixel_hash, if any
) -> pd.Series:
    """Which rows belong together, as a Series of group names with the table's index.

    A group is what one patient ties together. A row without patient id is tied by its study, without that by its
    series; a row without any of them is a group of its own (all of the nameless are not one patient). One line says how
    many files that concerns.

    Duplicates are merged before any split: rows that share an instance, a file or the same pixels are in one group even
    under two patient ids. The same picture under two names is most often one patient with two names; merging keeps
    every image and makes a leak impossible, where leaving out one of the two would only do so for the copies found. A
    study or series under two patient ids ties these, too.
    """
    table = _with_hashes(table, pixel_hashes)
    if not set(LEVELS) & set(table.columns):
        raise DataError(f"The table has none of the columns {', '.join(LEVELS)}. For another one use GroupSplitter.")
    ties = {name: _filled(table[name]) for name in _TIES if name in table.columns}
    _say_nameless(ties, len(table))
    names = _names(ties, table.index)
    return names.groupby(_tied(ties, len(table))).transform("min")


def _with_hashes(table: pd.DataFrame, pixel_hashes: pd.Series | None) -> pd.DataFrame:
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"Expected a table (DataFrame) as `scan_dicoms` returns; got {type(table).__name__}.")
    if pixel_hashes is None:
        return table
    if not pixel_hashes.index.is_unique:
        raise DataError("pixel_hashes has rows with the same index: it needs one hash for each row of the table.")
    return table.assign(pixel_hash=pixel_hashes.reindex(table.index))


def _filled(column: pd.Series) -> np.ndarray:
    """Texts, '' where there is nothing but blanks."""
    blank = column.isna().to_numpy()
    return np.array(["" if b else str(value).strip() for value, b in zip(column, blank)], object)


def _say_nameless(ties: dict[str, np.ndarray], n: int) -> None:
    files = ties.get("file", np.arange(n))
    rows = pd.DataFrame({name: ties.get(name, [""] * n) for name in LEVELS}).assign(file=files)
    rows = rows.drop_duplicates("file") if "file" in ties else rows
    stood_in = Counter(
        next((name for name in LEVELS if row[name]), "file") for row in rows[list(LEVELS)].to_dict("records")
    )
    nameless = len(rows) - stood_in["patient"]
    if nameless:
        ways = {"study": "by study", "series": "by series", "file": "each file on its own"}
        how = ", ".join(f"{stood_in[name]:,} {way}" for name, way in ways.items() if stood_in[name])
        say(f"{nameless:,} of {len(rows):,} files have no patient id. Kept together instead: {how}.")


def _names(ties: dict[str, np.ndarray], index: pd.Index) -> pd.Series:
    """A name for each row that does not depend on where in the table it stands."""
    names = np.array([""] * len(index), object)
    for level in (*LEVELS, "instance"):
        values = ties.get(level, names)
        names = np.where((names == "") & (values != ""), np.array([f"{level} {v}" for v in values], object), names)
    last = ties.get("file", np.array([str(label) for label in index], object))
    short = [name or f"file {_digest(value)}" for name, value in zip(names, last)]  # a path tells too much
    return pd.Series(short, index=index, dtype=object)


def _digest(text: str) -> str:
    return blake2b(os.fsencode(text), digest_size=16).hexdigest()


def _tied(ties: dict[str, np.ndarray], n: int) -> np.ndarray:
    """A number for each row, the same for rows that are tied, directly or through others (union-find)."""
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for values in ties.values():
        first: dict[str, int] = {}
        for i, value in enumerate(values):
            if value and first.setdefault(value, i) != i:
                parent[root(i)] = root(first[value])
    return np.array([root(i) for i in range(n)], int)


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
            raise DataError(f"{missing:,} of {len(found):,} items are not in the table: scan the folder that they are in.")
        return split_groups(pd.Series(found, dtype=object), self.valid_pct, self.seed, "patient")


class GroupSplitter:
    """Whole groups to train with, whole groups to validate with: all photographs of one slide, or person, stay together.

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
        values = _filled_numbers(groups)
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


def _filled_numbers(groups: pd.Series) -> np.ndarray:
    """Texts; whole numbers are the same as floats, which pandas makes of them where one is missing."""
    whole = [int(v) if isinstance(v, (float, np.floating)) and float(v).is_integer() else v for v in groups]
    return _filled(pd.Series(whole, dtype=object))


def _check(valid_pct: object, seed: object) -> None:
    if isinstance(valid_pct, bool) or not isinstance(valid_pct, (int, float)) or not 0 <= valid_pct < 1:
        what = "the share of images to validate with, from 0 up to but not including 1"
        raise DataError(f"valid_pct is {what}; got {valid_pct!r}.")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise DataError(f"seed is an integer from 0 up; got {seed!r}.")


def split_groups(keys: pd.Series, valid_pct: float, seed: int, what: str = "group") -> Split:
    """Places to train and to validate with: rows of one key on one side, groups in the order of a hash of seed and key."""
    sizes = keys.value_counts()
    if len(sizes) < 2:
        fix = "Choose the random split by name, if nothing is to be concluded from its validation, or add images"
        other = f" (or GroupSplitter('{LEVELS[1]}'), if the ids are placeholders)" if what == "patient" else ""
        raise DataError(f"All {len(keys):,} images are of one {what}, which cannot be on both sides. {fix}{other}.")
    order = sorted(sizes.index, key=lambda key: blake2b(f"{seed} {key}".encode("utf-8", "surrogateescape")).digest())
    target = min(max(1, round(len(keys) * valid_pct)), len(keys) - 1)
    chosen = {order[i] for i in nearest_sum([int(sizes[key]) for key in order], target)}
    is_valid = keys.isin(chosen).to_numpy()
    if abs(is_valid.mean() - valid_pct) > 0.05:
        say(f"{is_valid.mean():.0%} of the images are to validate with, not {valid_pct:.0%}: no {what} is on both sides.")
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
    left = [i for i in range(len(sizes)) if i not in set(taken)] if taken else list(range(len(sizes)))
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


def assert_disjoint(
    table: pd.DataFrame,  # All images; or those to train with, where `valid` is not given
    train: Sequence[int] | pd.DataFrame,  # Places in the table to train with; or the table to validate with
    valid: Sequence[int] | None = None,  # Places in the table to validate with
    pixel_hashes: pd.Series | None = None,  # As for `groups_of`
) -> None:
    """Raises `DataError`, with counts only, if a patient, study, series, instance, file or picture is on both sides."""
    one, other = _sides(table, train, valid, pixel_hashes)
    shared = {name: len(_shared(one, other, name)) for name in _TIES}
    found = [f"{n:,} {_IN_WORDS[name]}" for name, n in shared.items() if n]
    if found:
        fix = "Split with PatientSplitter, which keeps them together"
        raise DataError(f"On both sides of the split, training and validation: {', '.join(found)}. {fix}.")


def duplicates_across(
    table: pd.DataFrame,  # As for `assert_disjoint`
    train: Sequence[int] | pd.DataFrame,  # As for `assert_disjoint`
    valid: Sequence[int] | None = None,  # As for `assert_disjoint`
    pixel_hashes: pd.Series | None = None,  # As for `groups_of`
) -> pd.DataFrame:
    """The same instance, or the same pixels, on both sides: a row for each, columns kind, train, valid (index labels).

    Empty after a `PatientSplitter` that knew the hashes: it merges duplicates before it splits.
    """
    one, other = _sides(table, train, valid, pixel_hashes)
    rows = []
    for kind in ("instance", "pixel_hash"):
        for value in sorted(_shared(one, other, kind)):
            sides = [list(side.index[_filled(side[kind]) == value]) for side in (one, other)]
            rows.append({"kind": "instance" if kind == "instance" else "pixels", "train": sides[0], "valid": sides[1]})
    return pd.DataFrame(rows, columns=["kind", "train", "valid"])


def _sides(table, train, valid, pixel_hashes) -> tuple[pd.DataFrame, pd.DataFrame]:
    if valid is None:
        if pixel_hashes is not None:
            raise DataError("Of two tables give the hashes as a column pixel_hash in each.")
        return _with_hashes(table, None), _with_hashes(train, None)
    table = _with_hashes(table, pixel_hashes)
    return table.iloc[list(train)], table.iloc[list(valid)]


def _shared(one: pd.DataFrame, other: pd.DataFrame, name: str) -> set[str]:
    if name not in one.columns or name not in other.columns:
        return set()
    return (set(_filled(one[name])) & set(_filled(other[name]))) - {""}
