"""All images of folders and files in one loader, in order: for those who look at them and do not train."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from fastai.data.core import Datasets, TfmdLists
from fastai.data.transforms import IntToFloatTensor, ToTensor
from fastai.torch_core import default_device
from fastcore.foundation import L
from fasttransform import Transform

from selfsup_fastai.data.blocks import Cover, OpenChecked, OpenCovered
from selfsup_fastai.data.files import find_files
from selfsup_fastai.data.images import as_size, auto_workers
from selfsup_fastai.data.keeping import check_cache, keeping, stored
from selfsup_fastai.data.loader import IndexedDL
from selfsup_fastai.data.usable import seen_again, seen_in, usable_items
from selfsup_fastai.errors import DataError

WHOSE = ("patient", "study", "series", "instance", "frame")
"""What tells images of DICOM files apart without naming any: pseudonyms, and the number of the frame."""


class Unsplit(NamedTuple):
    """Images as they were found."""

    dl: IndexedDL | None  # Batches (x,), x (B, C, H, W) in [0, 1], row i of `info` after row i - 1; None without images
    info: pd.DataFrame  # A row an image: nth (its file among all), file, name, channels, `WHOSE`, ...
    report: pd.DataFrame  # A row a file that cannot be used: nth, file, name, code, message

    @property
    def private(self) -> bool:
        """Whether names of files may name patients."""
        return bool(self.report.attrs.get("private"))


def named_files(
    inputs: Sequence[str | os.PathLike],  # Folders and files
) -> dict[Path, str]:  # Each file once, and what to call it
    """The files that are meant, folders looked through at any depth. In one folder files are named as from there."""
    found: dict[Path, str] = {}
    for one in map(Path, inputs):
        if not os.path.lexists(one):
            where = "" if one.is_absolute() else f" (looked for in {str(Path.cwd())!r})"
            raise DataError(f"There is no folder or file {str(one)!r}{where}. Check the spelling.")
        if not one.is_dir():
            found.setdefault(one, os.fspath(one))
            continue
        for file in find_files(one):
            found.setdefault(file, os.fspath(file.relative_to(one) if len(inputs) == 1 else file))
    if not found:
        where = f"the folder {os.fspath(inputs[0])!r}" if len(inputs) == 1 else "these folders"
        raise DataError(f"There is no file in {where}.")
    return found


def unsplit_images(
    files: dict[Path, str],  # As `named_files` returns them
    n_in: int,  # Channels to open images with
    size: int | tuple[int, int],  # Pixels: a side, or (height, width), of what is cut from the middle of each
    bs: int = 64,
    num_workers: int | None = None,  # Processes that open images where no pixels are kept; None: by the work
    cache: bool | str = True,  # Where they are kept, as in `UnlabeledDataLoaders`
    max_gb: float = 20.0,
    seen: str | None = None,  # In which windows scans are to be seen, as `seen_in` puts it; None: by modality
    resizer: Transform | None = None,  # What brings images to `size` in another way than `Cover`
) -> Unsplit:
    """Every image that can be decoded, cut as validation cuts it; each frame of a DICOM file is one.

    What is kept of images suits `Cover` alone: with another resizer they are decoded a second time.
    """
    check_cache(cache, max_gb)
    size, covers = as_size(size), resizer is None or isinstance(resizer, Cover)
    cache = covers and cache
    paths, asked = list(files), seen_again(seen) if seen else {"n_in": 1 if n_in == 1 else None}
    with keeping(cache, paths, size, 1 if n_in == 1 else None, max_gb) as kept:
        info, report = usable_items(paths, kept, max(size), **asked)
        store = stored(kept, info.index, n_in, default_device() if cache == "device" else None) if len(info) else None
    named = [_named(table, files) for table in (info, report)]
    if not len(info):
        return Unsplit(None, *named)
    opener = OpenCovered(n_in, size) if covers else OpenChecked(n_in)
    opener.seen = seen_in(info, asked.get("window"))
    opener.are_scans = opener.seen is not None
    images, pixels = TfmdLists(list(info["source"]), opener), float((info["width"] * info["height"]).mean())
    images.split_idx = images.tfms.split_idx = 1  # as in validation: nothing is random
    dl = IndexedDL(
        Datasets(tls=L([images])),
        bs=bs,
        store=store,
        rows=range(len(info)),
        after_item=[Cover(size) if covers else resizer, ToTensor()],
        after_batch=[IntToFloatTensor()],
        num_workers=auto_workers(len(info), pixels) if num_workers is None else num_workers,
        device=default_device(),
    )
    return Unsplit(dl, *named)


def _named(table: pd.DataFrame, files: dict[Path, str]) -> pd.DataFrame:
    """With the number of each file among all of them, and its name."""
    numbers = {file: i for i, file in enumerate(files)}
    named = table.assign(nth=table["file"].map(numbers), name=table["file"].map(files)).reset_index(drop=True)
    named.attrs = dict(table.attrs)
    return named
