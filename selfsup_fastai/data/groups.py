"""Who belongs to whom: the patient behind each row of a table, and what two sides of a split have in common.

Everything here works on a table (what `scan_dicoms` returns); no file is opened, and no id, pseudonym or path is said
or raised.
"""

import os
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pandas as pd

from selfsup_fastai.data.pixels import pixel_hash
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say

__all__ = ["LEVELS", "assert_disjoint", "duplicates_across", "groups_of", "pixel_hash", "texts_of"]

_MOST_NAMES = 2
"""Patient ids that one patient may go by."""

LEVELS = ("patient", "study", "series")
"""Columns that tell whom an image is of, the best first: where one is blank, the next stands in."""

_TIES = (*LEVELS, "instance", "pixel_hash", "file")  # what two rows of one group have in common
_COPIES = ("instance", "pixel_hash")  # of these, what two copies of an image have in common
_IN_WORDS = {
    "patient": "patient(s)",
    "study": "study(s)",
    "series": "series",
    "instance": "instance(s)",
    "pixel_hash": "identical image(s)",
    "file": "file(s)",
}


def groups_of(
    table: pd.DataFrame,  # What `scan_dicoms` returns; rows may repeat a file, once for each frame
    pixel_hashes: pd.Series | None = None,  # `pixel_hash` by the table's index; None: the column pixel_hash, if any
) -> pd.Series:
    """Which rows belong together, as a Series of group names with the table's index.

    A group is what one patient ties together. A row without patient id is tied by its study, without that by its
    series; a row without any of them is a group of its own (all of the nameless are not one patient). One line says how
    many files that concerns, one more how many patients are tied to others.

    Duplicates are merged before any split: rows that share an instance, a file or the same pixels are in one group even
    under two patient ids. The same picture under two names is most often one patient with two names; merging keeps
    every image and makes a leak impossible, where leaving out one of the two would only do so for the copies found. A
    study or series under two patient ids ties these, too. What is found under more than two patients is no copy of a
    patient's image but a start screen, a test pattern or a number that never changes, and ties nobody.
    """
    table = _with_hashes(table, pixel_hashes)
    if not set(LEVELS) & set(table.columns):
        raise DataError(f"The table has none of the columns {', '.join(LEVELS)}. For another one use GroupSplitter.")
    ties = {name: texts_of(table[name]) for name in _TIES if name in table.columns}
    if "patient" in ties:
        ties |= {name: _of_few(ties[name], ties["patient"]) for name in _COPIES if name in ties}
    _say_nameless(ties, len(table))
    names = _names(ties, table.index)
    groups = names.groupby(_tied(ties, len(table))).transform("min")
    _say_tied(ties.get("patient", np.full(len(table), "", object)), groups)
    return groups


def _with_hashes(table: pd.DataFrame, pixel_hashes: pd.Series | None) -> pd.DataFrame:
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"Expected a table (DataFrame) as `scan_dicoms` returns; got {type(table).__name__}.")
    if pixel_hashes is None:
        return table
    if not pixel_hashes.index.is_unique:
        raise DataError("pixel_hashes has rows with the same index: it needs one hash for each row of the table.")
    return table.assign(pixel_hash=pixel_hashes.reindex(table.index))


def texts_of(column: pd.Series) -> np.ndarray:
    """Texts, '' where there is nothing but blanks."""
    blank = column.isna().to_numpy()
    return np.array(["" if b else str(value).strip() for value, b in zip(column, blank)], object)


def _of_few(values: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """The values, '' for those that more than two patients have."""
    pairs = pd.DataFrame({"value": values, "patient": patients}).query("patient != ''").drop_duplicates()
    counts = pairs["value"].value_counts()
    return np.where(pd.Series(values).isin(counts.index[counts > _MOST_NAMES]), "", values)


def _say_nameless(ties: dict[str, np.ndarray], n: int) -> None:
    blank = np.full(n, "", object)
    told = np.select([ties.get(name, blank) != "" for name in LEVELS], LEVELS, "file")
    files = pd.Series(told)[~pd.Series(ties.get("file", np.arange(n))).duplicated()]
    counts = files.value_counts()
    nameless = len(files) - counts.get("patient", 0)
    if nameless:
        ways = {"study": "by study", "series": "by series", "file": "each file on its own"}
        how = ", ".join(f"{counts[name]:,} {way}" for name, way in ways.items() if name in counts)
        say(f"{nameless:,} of {len(files):,} files have no patient id. Kept together instead: {how}.")


def _say_tied(patients: np.ndarray, groups: pd.Series) -> None:
    pairs = pd.DataFrame({"patient": patients, "group": groups.to_numpy()})
    sizes = pairs[pairs["patient"] != ""].drop_duplicates()["group"].value_counts()
    tied = int(sizes[sizes > 1].sum())
    if tied:
        say(f"{tied:,} patients share a study, a series or a picture with another one: those are kept together, too.")


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
            sides = [list(side.index[texts_of(side[kind]) == value]) for side in (one, other)]
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
    return (set(texts_of(one[name])) & set(texts_of(other[name]))) - {""}
