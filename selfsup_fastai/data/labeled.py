"""A folder of classes as a table (which file, which label, to train or to validate with), and a table as loaders."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.data.core import DataLoaders, Datasets, TfmdLists
from fastai.data.transforms import Categorize, IntToFloatTensor, ToTensor
from fastai.torch_core import default_device
from fastcore.foundation import L

from selfsup_fastai.data.blocks import Cover, OpenCovered
from selfsup_fastai.data.files import check_files, find_files
from selfsup_fastai.data.images import check_classes, say_shared, split, split_items
from selfsup_fastai.data.keeping import check_cache, keeping, stored
from selfsup_fastai.data.loader import IndexedDL
from selfsup_fastai.data.pixelstore import PixelStore
from selfsup_fastai.data.usable import seen_in, usable_items
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import quiet

VALID_NAMES = ("valid", "val", "validation", "test")


def class_table(files: list[Path], root: Path) -> pd.DataFrame:
    """Columns file and label: the name of the first folder below `root`. Files that lie in `root` itself have none."""
    within = [(file, file.relative_to(root).parts) for file in files]
    return pd.DataFrame([(file, parts[0]) for file, parts in within if len(parts) > 1], columns=["file", "label"])


def labeled_files(
    folder: str | Path,  # A folder of images for each class; or train/ and valid/ (val/, test/) with such folders
    valid_pct: float = 0.2,  # Share of each class to validate with, at least one image; without train/ and valid/
    seed: int = 42,  # Of that choice
    size: int | None = None,  # Side of the images later; None: not known yet, and no pixels are kept
    cache: bool | str = True,  # Where they are kept, as in `UnlabeledDataLoaders`
    max_gb: float = 20.0,
    split_by: str | None = None,  # 'patient' or 'random'; None: by patient where there are DICOM files
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table (file, source: what is opened, label, is_valid, channels, pixels) and the report on the files that are
    left out.

    Folders within a class's folder belong to the class; images outside of all classes are left out. Each frame of a
    DICOM file is an image, and where there are such, whole patients are validated with, not a share of each class.
    Raises `DataError` unless there are two classes or more, each with an image to train with.
    """
    check_cache(cache, max_gb)
    root = Path(folder)
    found = find_files(root)
    with keeping(size is not None and cache in (True, "device"), found, (size, size), None, max_gb) as kept:
        ok, report = usable_items(found, kept, size or 128)
    ok = ok.assign(pixels=ok["width"] * ok["height"])
    parts = _parts(root)
    if parts:
        tables = [_with_classes(ok[_within(ok, root / part)], root / part) for part in parts]
        table = pd.concat([t.assign(is_valid=i == 1) for i, t in enumerate(tables)], ignore_index=True)
    else:
        table = _with_classes(ok, root).reset_index(drop=True)
        table = table.assign(is_valid=np.isin(table.index, _valid_rows(table, valid_pct, seed, split_by)))
    _check_classes(table, root)
    if parts and "patient" in table:
        valid = table["is_valid"].to_numpy(bool)
        say_shared(table, np.flatnonzero(~valid).tolist(), np.flatnonzero(valid).tolist())
    outside = ok["file"][~ok["file"].isin(table["file"])].drop_duplicates()
    message = "Lies outside of the folders of classes."
    report = pd.concat([report, pd.DataFrame({"file": outside, "code": "no_class", "message": message})])
    known = [name for name in ("patient", "instance", "frame", "modality", "are_scans") if name in ok]
    table = table[["file", "source", "label", "is_valid", "channels", "pixels", *known]]
    report = report.reset_index(drop=True)
    table.attrs["private"] = report.attrs["private"] = bool(known)
    return table, report


def _within(ok: pd.DataFrame, folder: Path) -> list[bool]:
    return [folder in file.parents for file in ok["file"]]


def _with_classes(ok: pd.DataFrame, root: Path) -> pd.DataFrame:
    """The rows that lie in a folder of a class, and its name."""
    labels = class_table(list(dict.fromkeys(ok["file"])), root).set_index("file")["label"]
    return ok.assign(label=ok["file"].map(labels)).dropna(subset="label")


def _valid_rows(table: pd.DataFrame, valid_pct: float, seed: int, by: str | None) -> list[int]:
    """Rows to validate with: whole patients where they are known, else a share of each class."""
    if by not in (None, "patient", "random"):
        raise DataError(f"split_by is 'patient' or 'random'; got {by!r}.")
    if by == "patient" or (by is None and "patient" in table):
        return _whole_patients(table, valid_pct, seed)
    rows = [part.index[split(len(part), valid_pct, seed)[1]] for _, part in table.groupby("label") if len(part) > 1]
    return [row for part in rows for row in part]


def _whole_patients(table: pd.DataFrame, valid_pct: float, seed: int, tries: int = 20) -> list[int]:
    """Patients to validate with such that each class is left to train with; if that cannot be had, any."""
    for i in range(tries):
        with quiet() if i else nullcontext():
            train, valid = split_items(table, valid_pct, seed + i)
        if table["label"].iloc[train].nunique() == table["label"].nunique():
            break
    return valid


def labeled_loaders(
    table: pd.DataFrame,  # Columns file, label, is_valid; and channels, if `labeled_files` made it
    n_in: int,  # Channels to open the files with
    size: int,  # Side of the images in pixels
    bs: int,
    num_workers: int = 0,  # Processes that open images where no pixels are kept
    cache: bool | str = True,  # As in `UnlabeledDataLoaders`
    max_gb: float = 20.0,
) -> DataLoaders:
    """Labeled loaders over the files of a table; classes in sorted order. Its other columns are the loaders' facts.

    Where pixels are kept, raises `DataError` for files that cannot be read.
    """
    check_cache(cache, max_gb)
    files, valid = _sources(table), table["is_valid"].to_numpy(bool)
    splits = [np.flatnonzero(part).tolist() for part in (~valid, valid)]
    opener = OpenCovered(n_in, (size, size))
    opener.seen = seen_in(table) if "source" in table else None
    opener.are_scans = opener.seen is not None
    images = TfmdLists(files, opener, splits=splits)
    labels = TfmdLists(list(table["label"]), Categorize(vocab=sorted(table["label"].unique())), splits=splits)
    store = _store(table, n_in, size, cache, max_gb)
    known = table.drop(columns=["file", "source", "label", "is_valid", "channels", "pixels"], errors="ignore")
    return Datasets(tls=L(images, labels)).dataloaders(
        dl_type=IndexedDL,
        bs=bs,
        after_item=[Cover((size, size)), ToTensor()],
        after_batch=[IntToFloatTensor()],
        num_workers=num_workers,
        device=default_device(),
        dl_kwargs=[{"store": store, "rows": rows, "facts": known.iloc[rows]} for rows in splits],
    )


def _sources(table: pd.DataFrame) -> list:
    return list(table["source"] if "source" in table else table["file"])


def _store(table: pd.DataFrame, n_in: int, size: int, cache: bool | str, max_gb: float) -> PixelStore | None:
    files = _sources(table)
    all_grey = "channels" in table and table["channels"].max() == 1  # then they were kept as they are
    with keeping(cache, files, (size, size), 1 if n_in == 1 and not all_grey else None, max_gb) as kept:
        if kept is None:
            return None
        report = check_files(files, keeper=kept, min_side=size)[1]
        if len(report):
            codes = ", ".join(f"{n} {code}" for code, n in report["code"].value_counts().items())
            raise DataError(f"Labeled images that cannot be read: {codes}. `labeled_files` leaves such out.")
        return stored(kept, range(len(files)), n_in, default_device() if cache == "device" else None)


def _parts(root: Path) -> list[str]:
    """['train', 'valid'] where the folder is split already, else []."""
    valid = next((name for name in VALID_NAMES if (root / name).is_dir()), None)
    return ["train", valid] if valid and (root / "train").is_dir() else []


def _check_classes(table: pd.DataFrame, root: Path) -> None:
    wanted = f"Expected a folder of images for each class in {str(root)!r}, or train/ and valid/ with such folders"
    classes = sorted(table["label"].unique())
    if len(classes) < 2:
        raise DataError(f"{wanted}; found {len(classes)} such folder{'s' * (len(classes) != 1)} with images.")
    check_classes(table["label"], table["is_valid"].to_numpy(bool), "patient" in table)
    missing = sorted(set(classes) - set(table["label"][~table["is_valid"]]))
    if missing or not table["is_valid"].any():
        what = f"no image of {', '.join(missing)} to train with" if missing else "no image to validate with"
        raise DataError(f"{wanted}; there is {what}.")
