"""A folder of classes as a table (which file, which label, to train or to validate with), and a table as loaders."""

from pathlib import Path

import numpy as np
import pandas as pd
from fastai.data.core import DataLoaders, Datasets, TfmdLists
from fastai.data.transforms import Categorize, IntToFloatTensor, ToTensor
from fastai.torch_core import default_device
from fastcore.foundation import L

from selfsup_fastai.data.blocks import Cover, OpenCovered
from selfsup_fastai.data.files import check_files, find_files
from selfsup_fastai.data.images import split, usable_files
from selfsup_fastai.data.keeping import check_cache, keeping, stored
from selfsup_fastai.data.loader import IndexedDL
from selfsup_fastai.data.pixelstore import PixelStore
from selfsup_fastai.errors import DataError

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
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A table (file, label, is_valid, channels, pixels) and the report on the files that are left out.

    Folders within a class's folder belong to the class; images outside of all classes are left out. Raises `DataError`
    unless there are two classes or more, each with an image to train with.
    """
    check_cache(cache, max_gb)
    root = Path(folder)
    found = find_files(root)
    with keeping(size is not None and cache in (True, "device"), found, (size, size), None, max_gb) as kept:
        ok, report = usable_files(found, kept, size or 128)
    files, parts = list(ok["file"]), _parts(root)
    if parts:
        tables = [class_table([f for f in files if root / part in f.parents], root / part) for part in parts]
        table = pd.concat([t.assign(is_valid=i == 1) for i, t in enumerate(tables)], ignore_index=True)
    else:
        table = class_table(files, root).assign(is_valid=False)
        for _, rows in table.groupby("label"):
            if len(rows) > 1:
                table.loc[rows.index[split(len(rows), valid_pct, seed)[1]], "is_valid"] = True
    _check_classes(table, root)
    size = ok.assign(pixels=ok["width"] * ok["height"])[["file", "channels", "pixels"]]
    outside = ok["file"][~ok["file"].isin(table["file"])]
    message = "Lies outside of the folders of classes."
    report = pd.concat([report, pd.DataFrame({"file": outside, "code": "no_class", "message": message})])
    return table.merge(size, on="file", how="left"), report.reset_index(drop=True)


def labeled_loaders(
    table: pd.DataFrame,  # Columns file, label, is_valid; and channels, if `labeled_files` made it
    n_in: int,  # Channels to open the files with
    size: int,  # Side of the images in pixels
    bs: int,
    num_workers: int = 0,  # Processes that open images where no pixels are kept
    cache: bool | str = True,  # As in `UnlabeledDataLoaders`
    max_gb: float = 20.0,
) -> DataLoaders:
    """Labeled loaders over the files of a table; classes in sorted order.

    Where pixels are kept, raises `DataError` for files that cannot be read.
    """
    check_cache(cache, max_gb)
    files, valid = list(table["file"]), table["is_valid"].to_numpy(bool)
    splits = [np.flatnonzero(part).tolist() for part in (~valid, valid)]
    images = TfmdLists(files, OpenCovered(n_in, (size, size)), splits=splits)
    labels = TfmdLists(list(table["label"]), Categorize(vocab=sorted(table["label"].unique())), splits=splits)
    store = _store(table, n_in, size, cache, max_gb)
    return Datasets(tls=L(images, labels)).dataloaders(
        dl_type=IndexedDL,
        bs=bs,
        after_item=[Cover((size, size)), ToTensor()],
        after_batch=[IntToFloatTensor()],
        num_workers=num_workers,
        device=default_device(),
        dl_kwargs=[{"store": store, "rows": rows} for rows in splits],
    )


def _store(table: pd.DataFrame, n_in: int, size: int, cache: bool | str, max_gb: float) -> PixelStore | None:
    files = list(table["file"])
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
    missing = sorted(set(classes) - set(table["label"][~table["is_valid"]]))
    if missing or not table["is_valid"].any():
        what = f"no image of {', '.join(missing)} to train with" if missing else "no image to validate with"
        raise DataError(f"{wanted}; there is {what}.")
