"""A comparison of pretext tasks on two folders, and its report."""

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from fastai.data.core import DataLoaders

from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.compare.race import compare_pretexts
from selfsup_fastai.compare.report import write_report
from selfsup_fastai.data.files import listed_in, result_folder
from selfsup_fastai.data.images import UnlabeledDataLoaders, auto_workers
from selfsup_fastai.data.labeled import labeled_files, labeled_loaders
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say
from selfsup_fastai.runs.folder import LEFT_OUT, check_out, joined, write_left_out

STATE = "comparison"  # Folder below `out` with encoders and runs, from which a stopped comparison goes on


def compare_folders(
    folder: str | os.PathLike,  # Of images without labels
    labeled: str | os.PathLike | None,  # A folder of images for each class; or train/ and valid/ (the test images)
    out: str | os.PathLike,  # Folder for the report, tables and encoders, made if missing
    size: int = 128,  # Side of the images in pixels
    bs: int = 64,
    valid_pct: float = 0.3,  # Share of the labeled images to test on, where there is no valid/
    split_by: str | None = None,  # 'patient' or 'random', as in `labeled_files`
    resume: bool = False,  # Go on with the comparison that was stopped in `out`
    num_workers: int | None = None,
    cache: bool | str = True,
    max_gb: float = 20.0,
    paths: bool = False,  # Write names of DICOM files, too: they may identify patients
    seed: int = 42,  # Of the splits
    **asked,  # For `compare_pretexts`: tasks, budget, seeds, labels, arch, command
) -> tuple[Comparison, Path]:
    """Compares, and writes the page; returns both. Encoders and runs are kept in `out`: a stopped one can go on."""
    folders = [folder] if labeled is None else [folder, labeled]
    _check_out(Path(out), folders, resume)
    data = dict(cache=cache, max_gb=max_gb)
    with listed_in(LEFT_OUT):
        kept = dict(num_workers=num_workers, split_by=split_by, **data)
        dls = UnlabeledDataLoaders.from_folder(folder, size=size, bs=bs, seed=seed, **kept)
        reports, tested = [dls.report], None
        if labeled is not None:
            table, report = labeled_files(labeled, valid_pct, seed, size, cache, max_gb, split_by)
            reports.append(report)
            tested = _loaders(table, size, bs, num_workers, **data)
    out = result_folder(out)
    write_left_out(joined(*reports), folders, out, paths)
    comparison = compare_pretexts(dls, labeled=tested, out=out / STATE, **asked)
    page = write_report(comparison, dls, tested, out, paths)
    return comparison, page


def _loaders(table: pd.DataFrame, size: int, bs: int, num_workers: int | None, **data) -> DataLoaders:
    n_test = int(table["is_valid"].sum())
    counts = f"{len(table) - n_test:,} to draw labels from, {n_test:,} to test on"
    say(f"{len(table):,} labeled images of {table['label'].nunique()} classes ({counts}).")
    workers = auto_workers(len(table), table["pixels"].mean()) if num_workers is None else num_workers
    return labeled_loaders(table, int(table["channels"].max()), size, bs, workers, **data)


def _check_out(out: Path, folders: Sequence[str | os.PathLike], resume: bool) -> None:
    for folder in folders:
        check_out(out, folder)
    if (out / STATE).exists() and not resume:
        raise DataError(f"{str(out)!r} holds a comparison. Go on with it (--resume), or choose another folder.")


def summary(comparison: Comparison) -> pd.DataFrame:
    """For the screen: what each start came to; without labels, what the embeddings look like."""
    if comparison.summary is None:
        return comparison.signals.set_index("task")
    wanted = ["labels", "n_labels", "start", "score", "low", "high", "gain", "gain_low", "gain_high", "verdict"]
    return comparison.summary[[name for name in wanted if name in comparison.summary]].set_index("start")
