"""Files to the items that loaders are made of: photographs as they are, DICOM files frame by frame."""

import ast
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from selfsup_fastai.data.files import as_paths, check_files, measure_files, summary
from selfsup_fastai.data.keeping import Keeping
from selfsup_fastai.data.opening import OF_DICOM
from selfsup_fastai.data.reasons import REASONS
from selfsup_fastai.data.volumes import slices_of
from selfsup_fastai.data.windows import WindowSetting, is_three
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say

OF_SERIES = {"MR": (0.01, 0.99), "PT": (None, 0.999), "NM": (None, 0.999)}
"""Modalities without a unit that all scanners share: the quantiles of a series' values that become 0 and 1."""

LOUD = ("no_rescale", "suspicious_range", "bad_rescale", "not_ct", "for_processing", "burned_in")
"""Flags of images that are said aloud."""

SAMPLED = 8  # frames of a series that its quantiles are taken from, evenly spread
ABOUT = ["patient", "study", "series", "instance", "modality", "body_part", "view", "laterality", "plane"]
ABOUT += ["volume", "place", "position"]
"""What items keep of the table that `scan_files` makes, and of the volumes that `slices_of` finds in it."""


OURS = {"source", "row", "file", "item", "width", "height", "mode", "format", "frames", "frame", "channels", "bits"}
OURS |= {"max", "are_scans", "is_valid", *OF_DICOM}
"""Columns that images bring themselves: a table's own of these names are left out."""


class Usable(NamedTuple):
    """What can be used of some files."""

    info: pd.DataFrame  # A row an item: `source` (what is opened), `row` (its place in `files`), `file`, and so on
    report: pd.DataFrame  # Files that cannot be used: file, code, message


def usable_items(
    files: Iterable[str | os.PathLike],
    kept: Keeping | None = None,  # Gets the pixels
    min_side: int = 128,  # As for `check_files`
    n_in: int | None = None,  # Channels wanted: 1, 3, or None
    window=None,  # Of DICOM files, as for `read_dicom`
    frames: Sequence[int] | None = None,  # Which frame of each file; None: all of them
) -> Usable:
    """Photographs and frames of DICOM files that can be decoded, and the report on the others, of which one line is
    said.

    The index of `info` is that of the items in `kept`. Of DICOM files the headers are read first: `info` then has the
    columns of `ABOUT` and `frame`, too. Raises `DataError` for files of several frames that are given several times,
    where nothing says which frame is meant.
    """
    files = as_paths(files)
    ok, report = check_files(files, keeper=kept, min_side=min_side)
    n_files, is_dicom = len(files), report["code"] == "dicom"
    left = np.setdiff1d(np.arange(n_files), ok.index)  # in the order of the report
    ok = ok.assign(source=ok["file"], row=ok.index)
    if is_dicom.any():
        of_dicom = left[is_dicom.to_numpy()]
        asked = _Asked(n_in, window, ok.empty, None if frames is None else [frames[i] for i in of_dicom])
        found, problems = _frames([files[i] for i in of_dicom], kept, n_files, min_side, asked)
        found["row"] = of_dicom[found["row"]]
        ok, report = _joined(ok, found), pd.concat([report[~is_dicom], problems])
    ok, report = _large_enough(ok, report)
    report.attrs["checked"] = n_files
    for table in (ok, report):
        table.attrs["private"] = bool(is_dicom.any())  # whether names of files may name patients
    line = summary(report)
    if line:
        say(line)
    return Usable(ok, report.reset_index(drop=True))


class _Asked(NamedTuple):
    """How DICOM files are to be seen."""

    n_in: int | None
    window: WindowSetting
    only: bool  # Whether there are no other images
    frames: list[int] | None  # One of each file


def _joined(photos: pd.DataFrame, frames: pd.DataFrame) -> pd.DataFrame:
    """Both, with what is known of the frames; of photographs that is nothing."""
    texts = [name for name in (*ABOUT, *OF_DICOM) if name in frames and frames[name].map(type).eq(str).all()]
    both = pd.concat([photos, frames]) if len(photos) else frames
    return both.fillna({**dict.fromkeys(texts, ""), "are_scans": False})


def _large_enough(ok: pd.DataFrame, report: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    thin = ok[["width", "height"]].min(axis=1) < 2
    if not thin.any():
        return ok, report
    left_out = pd.DataFrame({"file": ok["file"][thin], "code": "too_small", "message": REASONS["too_small"]})
    return ok[~thin], pd.concat([report, left_out.drop_duplicates("file")])


def _frames(files: list[Path], kept: Keeping | None, first: int, min_side: int, asked: _Asked):
    """A row for each frame of DICOM files that can be decoded, and the problems."""
    from selfsup_fastai.data.scanning import scan_files  # brings pydicom

    table, problems = scan_files(files)
    several = table["file"].duplicated() & (table["frames"] > 1)
    if asked.frames is None and several.any():
        fix = "A column 'frame' (0, 1, ...) says which frame a row is about."
        raise DataError(f"{several.sum():,} rows name a file of several frames that another row names, too. {fix}")
    items, rows = _items(table, asked)
    keeper = kept.add(items) if kept else None
    ok, failed = check_files(items, keeper=keeper, min_side=min_side)
    failed = failed.assign(file=failed["file"].map(lambda item: Path(item))).drop_duplicates("file")
    known = _in_volumes(table).loc[rows].set_axis(range(len(items)))
    known["frame"], known["row"] = [item.frame for item in items], rows
    known["are_scans"] = ~known["color"].astype(bool)
    ok = ok.drop(columns="frames").assign(source=ok["file"], file=ok["file"].map(lambda item: Path(item)))
    _say_flags(ok)
    about = [name for name in ABOUT if name in known]
    ok = ok.join(known[[*about, "frames", "frame", "are_scans", "row"]])
    return ok.set_axis(ok.index + first), pd.concat([problems, failed], ignore_index=True)


def _say_flags(ok: pd.DataFrame) -> None:
    """What should be looked at before these pixels are believed."""
    from selfsup_fastai.data.dicom_info import FLAGS

    counts = Counter(flag for flags in ok.get("flags", []) for flag in flags.split(", "))
    for flag in LOUD:
        if counts[flag]:
            say(f"{counts[flag]:,} of {len(ok):,} images: {FLAGS[flag]} (flag {flag!r} in dls.items_df).")


def _in_volumes(table: pd.DataFrame) -> pd.DataFrame:
    """With the volume, place and position (0 to 1) of each slice in place of its position in mm."""
    places = slices_of(table).set_index("row")
    return table.drop(columns="position").join(places)


def _items(table: pd.DataFrame, asked: _Asked):
    """A `DicomImage` for each frame, and the row of the table that each is of."""
    from selfsup_fastai.data.dicom_pixels import DicomImage

    window, of_ct = asked.window, ct_channels(table, asked.n_in, asked.only, asked.window)
    if window is None and (table["modality"] == "CT").any():
        _say_ct(table, of_ct, asked.n_in)
    limits = series_limits(table) if window is None else {}
    items, rows = [], []
    for row, file, frames, modality, series in table[["file", "frames", "modality", "series"]].itertuples():
        channels = of_ct if modality == "CT" else 3 if is_three(window) else None
        rest = {"window": window, "limits": limits.get(series or row), "n_in": channels}
        wanted = range(frames) if asked.frames is None else [asked.frames[row]]
        items += [DicomImage(os.fspath(file), frame, **rest) for frame in wanted]
        rows += [row] * len(wanted)
    return items, rows


def ct_channels(
    table: pd.DataFrame,  # As `scan_files` makes it
    n_in: int | None,  # Channels wanted
    only: bool = True,  # Whether there are no other images
    window=None,  # As for `read_dicom`
) -> int:
    """3 (windows) where all images are CTs, or where three channels are asked for; else 1, one wide window.

    A folder of mixed modalities gets one number of channels: a CT's windows are no colors, and a radiograph has none.
    """
    if n_in is not None:
        return n_in
    if is_three(window):
        return 3
    return 3 if only and (table["modality"] == "CT").all() else 1


def _say_ct(table: pd.DataFrame, channels: int, n_in: int | None) -> None:
    if channels == 3:
        say("CT: three windows (lung, mediastinum, bone) as channels; n_in=1 takes one wide window.")
    elif n_in is None:
        say("CT beside other images: seen in one wide window; n_in=3 takes three windows of CTs.")


def series_limits(
    table: pd.DataFrame,  # As `scan_files` makes it
) -> dict[str | int, tuple[float, float]]:
    """(black, white) of each series of `OF_SERIES`, from frames spread over it; a file without a series by its row.

    One scale for all slices of a series, where each slice's own would make a slice of air as bright as one of brain.
    """
    from selfsup_fastai.data.dicom_pixels import DicomImage

    relative = table[table["modality"].isin(OF_SERIES)]
    keys = relative["series"].where(relative["series"] != "", relative.index.to_series())
    asked, of_series = [], []
    for key, rows in relative.groupby(keys, sort=False):
        frames = [(file, i) for file, n in rows[["file", "frames"]].itertuples(index=False) for i in range(n)]
        if len(frames) > 1:
            chosen = [frames[i] for i in np.linspace(0, len(frames) - 1, min(SAMPLED, len(frames))).astype(int)]
            asked += chosen
            of_series += [(key, rows["modality"].iloc[0])] * len(chosen)
    found: dict = {}
    for series, values in zip(
        of_series, measure_files([DicomImage(os.fspath(file), frame) for file, frame in asked]), strict=True
    ):
        if values is not None:
            found.setdefault(series, []).append(values)
    return {key: _limits(np.concatenate(values), *OF_SERIES[modality]) for (key, modality), values in found.items()}


def _limits(values: np.ndarray, low: float | None, high: float) -> tuple[float, float]:
    black = 0.0 if low is None else float(np.quantile(values, low))
    white = float(np.quantile(values, high))
    return black, white if white > black else black + 1.0


def seen_in(info: pd.DataFrame, window=None) -> str | None:
    """In which windows the scans among these images are seen, in words; None where there are none."""
    if "are_scans" not in info or not info["are_scans"].any():
        return None
    of_dicom = info[[hasattr(source, "n_in") for source in info["source"]]]
    cts = [source for source, modality in zip(of_dicom["source"], of_dicom["modality"]) if modality == "CT"]
    wide = {source.n_in == 1 for source in cts}
    of_ct = "" if not cts else ", CT in one wide window" if wide == {True} else ", CT in three windows"
    return f"window {window}" if window is not None else f"by modality{of_ct}"


def seen_again(
    seen: str,  # As `seen_in` puts it
) -> dict:  # Arguments of `usable_items`
    """What to ask for so that scans are seen in these windows again. Other words than `seen_in`'s ask for nothing."""
    if seen.startswith("window "):
        text = seen.removeprefix("window ")
        with suppress(ValueError, SyntaxError):  # a name is no literal
            return {"window": ast.literal_eval(text)}
        return {"window": text}
    ways = {"CT in one wide window": 1, "CT in three windows": 3}
    return {"n_in": next((n for words, n in ways.items() if words in seen), None)}


def check_window(window, n_in: int | None = None) -> None:
    """Raises `DataError` for what is no window, and `UnknownNameError` for a name that does not exist."""
    if n_in == 1 and is_three(window):
        raise DataError(f"Three windows are three channels, and n_in=1 asks for one; got window={window!r}.")


def frames_in(
    table: pd.DataFrame,
) -> list[int] | None:
    """The column 'frame' of a user's table; None where there is none. Raises `DataError` unless it counts frames."""
    if "frame" not in table:
        return None
    numbers = pd.to_numeric(table["frame"], errors="coerce")
    if not ((numbers >= 0) & (numbers % 1 == 0)).all():
        raise DataError("The column 'frame' holds the number of a frame in its file: 0, 1, ... in every row.")
    return numbers.astype(int).tolist()


def with_columns(
    info: pd.DataFrame,  # A row an item, with `row`
    table: pd.DataFrame,  # A row a file, in their order
) -> pd.DataFrame:
    """`info` with what else a table says of its rows. Columns that images bring themselves stay; it says so."""
    more = [name for name in table if name not in OURS and name not in info]
    lost = [str(name) for name in table if name not in more and name not in ("file", "frame")]
    if lost:
        say(f"Columns of the table that the images bring themselves are not taken from it: {', '.join(lost)}.")
    return info.join(table[more].iloc[info["row"].to_numpy(int)].set_axis(info.index))
