"""What a scan makes one look at twice, and the whole of it in words: never a name, an id or a path."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from selfsup_fastai.data.reasons import REASONS

__all__ = ["SUSPICIONS", "about_dicoms", "about_photos", "about_problems", "same_contents", "suspects"]

SUSPICIONS = {
    "burned_in": "text may be burned into the pixels, perhaps a name: look at them (nothing here removes it)",
    "duplicate": "the same image (SOPInstanceUID) is there more than once",
    "no_rescale": "CT without a rescale: its values may not be Hounsfield units",
    "odd_window": "CT whose window lies above 500 HU altogether: its values may not be Hounsfield units",
    "for_processing": "FOR PROCESSING: values of the detector, not meant to be looked at",
}
"""Columns of `suspects`, and what each means."""

_OFTEN_WITH_TEXT = {"US", "SC", "ES", "XA"}
_SECOND_HAND = r"\b(?:SECONDARY|DERIVED|SCREEN)\b"
_MOST_KINDS = 6


def suspects(
    table: pd.DataFrame,  # As `scan_files` returns it
) -> pd.DataFrame:
    """Of each row of the table, whether each of `SUSPICIONS` holds.

    A file that says itself that nothing is burned in is believed; most say nothing.
    """
    risky = table["modality"].isin(_OFTEN_WITH_TEXT) | table["image_type"].astype(str).str.contains(_SECOND_HAND)
    ct = table["modality"] == "CT"
    window_begins = table["window_center"] - table["window_width"] / 2
    flags = {
        "burned_in": (table["burned_in"] == "YES") | (risky & (table["burned_in"] != "NO")),
        "duplicate": (table["instance"] != "") & table["instance"].duplicated(keep=False),
        "no_rescale": ct & (table["slope"].isna() | table["intercept"].isna()),
        "odd_window": ct & (window_begins >= 500),
        "for_processing": table["intent"] == "FOR PROCESSING",
    }
    return pd.DataFrame(flags, index=table.index, columns=list(SUSPICIONS)).astype(bool)


def about_dicoms(
    table: pd.DataFrame,  # As `scan_files` returns it
) -> str:
    """Counts in a few lines: modalities, sizes, patients, and what is suspicious."""
    ids = {name: table[name][table[name] != ""].nunique() for name in ("patient", "study", "series")}
    frames = int(table["frames"].sum())
    said = f"{_count(len(table), 'DICOM image')} ({_count(frames, 'frame')}): {_count(ids['patient'], 'patient')}, "
    lines = [said + f"{ids['study']:,} studies, {ids['series']:,} series", "", *_by_modality(table), ""]
    for name, what in (("body_part", "body part"), ("view", "view"), ("plane", "plane"), ("syntax", "compression")):
        lines.append(f"  {what:<12} {_kinds(table[name])}")
    lines.append(f"  {'color':<12} {_kinds(table['color'].map({True: 'color', False: 'grey'}))}")
    for name, what in (("patient", "patient id"), ("series", "series"), ("instance", "instance id")):
        missing = (table[name] == "").sum()
        if missing:
            lines.append(f"  {_count(missing, 'image')} without {what}")
    return "\n".join([*lines, *_looked_at(table)])


def _by_modality(table: pd.DataFrame) -> list[str]:
    """A line for each modality: files, frames, series, sizes."""
    rows = [("modality", "files", "frames", "series", "height x width")]
    for name, part in sorted(table.groupby("modality"), key=lambda group: -len(group[1])):
        series = part["series"][part["series"] != ""].nunique()
        numbers = (f"{n:,}" for n in (len(part), part["frames"].sum(), series))
        rows.append((name or "not said", *numbers, _sizes(part)))
    return _aligned(rows)


def _looked_at(table: pd.DataFrame) -> list[str]:
    counts = suspects(table).sum()
    if not counts.any():
        return []
    found = [f"  {_count(int(n), 'image')}: {SUSPICIONS[name]}" for name, n in counts.items() if n]
    return ["", "Look at:", *found]


def about_photos(
    photos: pd.DataFrame,  # The first frame that `check_files` returns
) -> str:
    """Counts in a few lines: formats, sizes, color, exact duplicates."""
    copies = same_contents(photos["file"])
    lines = [_count(len(photos), "image")]
    lines.append(f"  {'format':<12} {_kinds(photos['format'])}")
    lines.append(f"  {'size':<12} {_sizes(photos)} (height x width)")
    lines.append(f"  {'color':<12} {_kinds(photos['channels'].map({1: 'grey', 3: 'color'}))}")
    deep = (photos["bits"] > 8).sum()
    if deep:
        lines.append(f"  {_count(deep, 'image')} of more than 8 bits")
    if copies:
        n = sum(len(group) - 1 for group in copies)
        lines += ["", "Look at:", f"  {_count(n, 'file')}: an exact copy of another one"]
    return "\n".join(lines)


def about_problems(
    problems: pd.DataFrame,  # Columns `code`, `message`; the second frame that `scan_files` or `check_files` returns
) -> str:
    """How many files cannot be used, and why; '' where all can."""
    if problems.empty:
        return ""
    rows = [(f"{n:,}", code, REASONS[code]) for code, n in problems["code"].value_counts().items()]
    decoders = problems["message"][problems["code"] == "no_decoder"].unique()
    return "\n".join([f"Cannot be used: {_count(len(problems), 'file')}", *_aligned(rows), *map(str, decoders)])


def same_contents(files: Iterable[str | os.PathLike]) -> list[list[Path]]:
    """Groups of files that are the same byte for byte."""
    by_size = defaultdict(list)
    for file in map(Path, files):
        try:
            by_size[file.stat().st_size].append(file)
        except OSError:  # gone by now
            continue
    by_hash = defaultdict(list)
    for file in (file for group in by_size.values() if len(group) > 1 for file in group):
        try:
            by_hash[_digest(file)].append(file)
        except OSError:
            continue
    return [group for group in by_hash.values() if len(group) > 1]


def _digest(file: Path) -> bytes:
    digest = hashlib.blake2b()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.digest()


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _kinds(values: pd.Series) -> str:
    """'CHEST 12, HEAD 6, not said 3', the most frequent first, not too many."""
    counts = values.replace("", "not said").fillna("not said").value_counts()
    said = [f"{name} {n:,}" for name, n in counts.head(_MOST_KINDS).items()]
    rest = len(counts) - _MOST_KINDS
    return ", ".join(said) + (f" and {rest} other{'s' if rest > 1 else ''}" if rest > 0 else "")


def _sizes(table: pd.DataFrame) -> str:
    """The most frequent sizes; of many the smallest and the largest, too."""
    names = table["height"].astype(str) + " x " + table["width"].astype(str)
    if names.nunique() <= 3:
        return _kinds(names)
    area = table["height"] * table["width"]
    return f"{_kinds(names.where(names == names.mode()[0]).dropna())}, {names[area.idxmin()]} to {names[area.idxmax()]}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    numeric = [all(cell.replace(",", "").isdigit() for cell in column[1:] or column) for column in zip(*rows)]
    return [
        "  " + "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric)).rstrip()
        for row in rows
    ]
