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
from selfsup_fastai.processes import check_single
from selfsup_fastai.runs.folder import LEFT_OUT, check_out, joined, untested, write_left_out

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
    check_single("Comparing tasks")
    folders, out = [folder] if labeled is None else [folder, labeled], Path(out)
    _check_out(out, folders, resume)
    data = dict(num_workers=num_workers, cache=cache, max_gb=max_gb)
    try:
        with listed_in(str(out / LEFT_OUT)):
            kept = dict(split_by=split_by, **data)
            dls = UnlabeledDataLoaders.from_folder(folder, size=size, bs=bs, seed=seed, **kept)
            reports, tested = [dls.report], None
            if labeled is not None:
                table, report = labeled_files(labeled, valid_pct, seed, size, cache, max_gb, split_by)
                reports.append(report)
                tested = _loaders(table, size, bs, **data)
        write_left_out(joined(*reports), folders, result_folder(out), paths)
        comparison = compare_pretexts(dls, labeled=tested, out=out / STATE, **asked)
        return comparison, write_report(comparison, dls, tested, out, paths)
    except KeyboardInterrupt:
        done = f"What is done is kept in {str(out)!r}." if _is_begun(out) else "No run was finished yet."
        say(f"{done} The same command with --resume (in Python resume=True) goes on.")
        raise


def _loaders(table: pd.DataFrame, size: int, bs: int, num_workers: int | None, cache, max_gb) -> DataLoaders:
    n_test = int(table["is_valid"].sum())
    counts = f"{len(table) - n_test:,} to draw labels from, {n_test:,} to test on"
    say(f"{len(table):,} labeled images of {table['label'].nunique()} classes ({counts}).{untested(table)}")
    workers = auto_workers(len(table), table["pixels"].mean()) if num_workers is None else num_workers
    return labeled_loaders(table, int(table["channels"].max()), size, bs, workers, cache, max_gb)


def _check_out(out: Path, folders: Sequence[str | os.PathLike], resume: bool) -> None:
    for folder in folders:
        check_out(out, folder)
    if _is_begun(out) and not resume:
        raise DataError(
            f"{str(out)!r} holds a comparison. Go on with it (--resume, in Python resume=True), or choose another "
            "folder."
        )


def _is_begun(out: Path) -> bool:
    """Whether anything of a comparison is kept in this folder."""
    return (out / STATE).is_dir() and any(file.is_file() for file in (out / STATE).rglob("*"))


def summary(comparison: Comparison) -> pd.DataFrame:
    """For the screen: what each start came to; without labels, what the embeddings look like."""
    if comparison.summary is None:
        return comparison.signals.set_index("task")
    wanted = ["labels", "n_labels", "start", "score", "low", "high", "gain", "gain_low", "gain_high", "verdict"]
    return comparison.summary[[name for name in wanted if name in comparison.summary]].set_index("start")
