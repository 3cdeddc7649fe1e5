"""A look at a folder before anything is trained on it: what is in it, in words, tables and pictures.

    scan.csv           a row an image: pseudonyms in place of ids, no paths
    problems.csv       what cannot be used, and why
    contact_sheet.png  images of all kinds

Nothing of it names a file unless paths are asked for: paths and file names may identify patients. `place` is that of a
file among all files of the folder, sorted by path.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from selfsup_fastai.data.auditing import about_dicoms, about_photos, about_problems, suspects
from selfsup_fastai.data.files import check_files, find_files, result_folder
from selfsup_fastai.data.opening import Facts
from selfsup_fastai.data.scanning import headers, tables
from selfsup_fastai.errors import DataError

__all__ = ["Scan", "check_out", "contact_sheet", "scan_folder", "write_scan"]

TABLE, PROBLEMS, SHEET = "scan.csv", "problems.csv", "contact_sheet.png"
_MOST = 24  # pictures on a contact sheet
_SIDE = 160  # pixels of the shorter side of each


class Scan(NamedTuple):
    """What is in a folder."""

    dicoms: pd.DataFrame  # As `scan_dicoms` returns it
    photos: pd.DataFrame  # Other images, as `check_files` returns them
    problems: pd.DataFrame  # What cannot be used: file, code, message; the index is the place among all files
    n_files: int

    def __str__(self) -> str:
        """A summary without any name."""
        parts = [f"{self.n_files:,} file{'' if self.n_files == 1 else 's'}"]
        parts += [about_dicoms(self.dicoms)] if len(self.dicoms) else []
        parts += [about_photos(self.photos)] if len(self.photos) else []
        parts += [about_problems(self.problems)] if len(self.problems) else []
        return "\n\n".join(parts)


def scan_folder(
    folder: str | os.PathLike,
    recurse: bool = True,  # Look into folders within the folder
    n_workers: int | None = None,  # Child processes; None: by the number of files
) -> Scan:
    """Read the headers of all DICOM files, and decode all other images.

    Raises `DataError` where there is no file.
    """
    files = find_files(folder, recurse)
    if not files:
        raise DataError(f"There is no file in the folder {os.fspath(folder)!r}.")
    found = headers(files, n_workers=n_workers)
    others = [i for i, facts in enumerate(found) if "image" in facts or facts.get("code") == "not_dicom"]
    dicoms, _ = tables(files, found)
    photos, bad_photos = check_files([files[i] for i in others], n_workers)
    photos = photos.set_axis([others[i] for i in photos.index])
    places = {file: i for i, file in enumerate(files)}
    seen = set(others)
    rest = [{"file": files[i], **facts} for i, facts in enumerate(found) if "code" in facts and i not in seen]
    problems = pd.concat([pd.DataFrame(rest, columns=bad_photos.columns), bad_photos])
    return Scan(dicoms, photos, problems.set_axis([places[file] for file in problems["file"]]).sort_index(), len(files))


def check_out(
    out: str | os.PathLike,
    folder: str | os.PathLike,  # That is scanned
) -> None:
    """Raises `DataError` where what is written to `out` would be taken for images of `folder` the next time."""
    if Path(folder).resolve() in (Path(out).resolve(), *Path(out).resolve().parents):
        raise DataError(
            f"{str(out)!r} lies in the folder of images: the contact sheet would be taken for one. Choose another."
        )


def write_scan(
    scan: Scan,
    out: str | os.PathLike,  # Folder, made if missing
    paths: bool = False,  # Write paths into the tables: they may identify patients
) -> None:
    """Tables and contact sheet of a scan into a folder. Text that is burned into images is seen on the sheet."""
    out = result_folder(out)
    left_out = [] if paths else ["file"]
    for name, table in ((TABLE, _as_one(scan)), (PROBLEMS, scan.problems)):
        table = table.drop(columns=left_out).rename_axis("place")
        table.to_csv(out / name, errors="surrogateescape")  # file names may be no text
    (out / SHEET).unlink(missing_ok=True)
    if contact_sheet(scan):
        from selfsup_fastai.pictures import save_picture

        save_picture(out / SHEET)


def _as_one(scan: Scan) -> pd.DataFrame:
    """DICOM files and other images in one table."""
    flags = suspects(scan.dicoms)
    notes = [" ".join(flags.columns[row]) for row in flags.to_numpy()]
    dicoms = scan.dicoms.assign(format="DICOM", look_at=pd.Series(notes, index=scan.dicoms.index, dtype=object))
    photos = scan.photos.assign(color=scan.photos["channels"] == 3).rename(columns={"channels": "samples"})
    parts = [part for part in (dicoms, photos.drop(columns=["mode", "max"])) if len(part)]
    return pd.concat(parts).sort_index() if parts else dicoms


def contact_sheet(
    scan: Scan,
    n: int = _MOST,  # Images at most
) -> bool:
    """Draw images spread over modalities and series, titled with modality or format and size; whether there are any.

    They are decoded in child processes with limits, as everything that nobody has looked at yet.
    """
    chosen = _chosen(scan, n)
    shown = _Shown()
    check_files([item for item, _ in chosen], keeper=shown, min_side=_SIDE)
    if not shown.images:
        return False
    import torch  # takes longer than a scan

    from selfsup_fastai.pictures import draw, grid_axes

    axes = grid_axes(len(shown.images), columns=min(6, len(shown.images)))
    for ax, (place, image) in zip(axes, sorted(shown.images.items())):
        draw(ax, torch.from_numpy(image), chosen[place][1])
    return True


def _chosen(scan: Scan, n: int) -> list[tuple[os.PathLike, str]]:
    """What to open, and a title for each."""
    from selfsup_fastai.data.dicom_pixels import DicomImage  # brings pydicom

    found = []
    for kind, place in _spread(_kinds(scan), n):
        if place in scan.dicoms.index:
            row = scan.dicoms.loc[place]
            channels = 3 if row["color"] else 1  # a CT's three windows would be shown as colors
            what: os.PathLike = DicomImage(os.fspath(row["file"]), int(row["frames"]) // 2, n_in=channels)
        else:
            row = scan.photos.loc[place]
            what = row["file"]
        frames = f", {row['frames']} frames" if row["frames"] > 1 else ""
        found.append((what, f"{kind or 'not said'} {row['height']} x {row['width']}{frames}"))
    return found


def _kinds(scan: Scan) -> dict[str, list[list[int]]]:
    """Of each modality, or format, the places of images, series by series."""
    kinds: dict[str, list[list[int]]] = {}
    for name in scan.dicoms["modality"].value_counts().index:
        part = scan.dicoms[scan.dicoms["modality"] == name]
        own = part["series"].where(part["series"] != "", part.index.to_series().astype(str))
        ordered = part.sort_values("number", kind="stable")
        kinds[name] = [list(rows.index) for _, rows in ordered.groupby(own, sort=False)]
    for name in scan.photos["format"].value_counts().index:
        kinds[name] = [[place] for place in scan.photos.index[scan.photos["format"] == name]]
    return kinds


def _spread(kinds: dict[str, list[list[int]]], n: int) -> list[tuple[str, int]]:
    """`n` images: as many of each kind as there is room for, from series evenly spread, of each the middle one."""
    counts = dict.fromkeys(kinds, 0)
    while sum(counts.values()) < n:
        open_kinds = [kind for kind, series in kinds.items() if counts[kind] < sum(map(len, series))]
        if not open_kinds:
            break
        counts[min(open_kinds, key=counts.get)] += 1
    chosen = []
    for kind, series in kinds.items():
        chosen += [(kind, place) for place in _of_series(series, counts[kind])]
    return chosen


def _of_series(series: Sequence[Sequence[int]], n: int) -> list[int]:
    """`n` images: of `n` series spread over all of them the middle one; of fewer series several, evenly spread."""
    if n <= len(series):
        picked = np.linspace(0, len(series) - 1, n).round().astype(int) if n > 1 else [len(series) // 2][:n]
        return [series[i][len(series[i]) // 2] for i in picked]
    places = [place for one in series for place in one]
    return [places[i] for i in np.linspace(0, len(places) - 1, n).round().astype(int)]


class _Shown:
    """A `Keeper` that keeps small pictures."""

    size, n_in = (_SIDE, _SIDE), None

    def __init__(self):
        self.images: dict[int, np.ndarray] = {}

    def known(self, number: int) -> None:
        """Nothing is known before."""

    def keep(self, number: int, facts: Facts, array: np.ndarray | None) -> None:
        """(C, H, W) in [0, 1]."""
        if array is not None:
            self.images[number] = array.astype(np.float32) / np.iinfo(array.dtype).max
