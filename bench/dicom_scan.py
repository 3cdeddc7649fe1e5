"""How fast headers are read: files a second on one core, ours beside pydicom's own reader in one run.

Medians over rounds in which every case has its turn, after one round that does not count. Small files, where the header
is nearly all there is: an fMRI series of 150 slices of 64 x 64 (SELFSUP_DATA names the folder it is looked for in).
Other folders of DICOM files can be named. Needs no extra.

    python bench/dicom_scan.py
    python bench/dicom_scan.py /pacs/export --out results.md
"""

import argparse
import os
import tempfile
from pathlib import Path

import pydicom
from measure import data_set, machine, markdown, spread, timed

from selfsup_fastai.data.files import find_files
from selfsup_fastai.data.headers import _KEYWORDS, read_header
from selfsup_fastai.data.scanning import scan_files

MANY = 3_000  # files that one scan is timed with: starting the child process must not be what is measured


def found_by_pydicom(files: list[Path]) -> int:
    """The elements that we read, left as they are."""
    for file in files:
        pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_KEYWORDS)
    return len(files)


def read_by_pydicom(files: list[Path]) -> int:
    """The same, and their values: pydicom makes sense of them when they are asked for."""
    for file in files:
        dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_KEYWORDS)
        for keyword in _KEYWORDS:
            dataset.get(keyword)
    return len(files)


def rows(files: list[Path]) -> int:
    """Ours in this process: a row a file, with plane, frames and whether there are pixels."""
    return len([read_header(file) for file in files])


def scanned(files: list[Path]) -> int:
    """Ours as it is used: a child process, pseudonyms, a DataFrame."""
    table, problems = scan_files(files, n_workers=1)
    return len(table) + len(problems)


def report(files: list[Path], rounds: int) -> str:
    """Files a second, the range over the rounds, and the ratio to the first case."""
    many = [files[i % len(files)] for i in range(max(MANY, len(files)))]
    cases = {
        "pydicom, elements found": lambda: found_by_pydicom(files),
        "pydicom, values read": lambda: read_by_pydicom(files),
        "ours: rows": lambda: rows(files),
        "ours: `scan_files`, one child process": lambda: scanned(many),
    }
    seconds = timed(cases, rounds)
    table = spread(1 / seconds, "{:,.0f}")
    medians = seconds.median()
    table["x pydicom"] = [f"{medians.iloc[0] / median:.1f}" for median in medians]
    return markdown(table, "files a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="of DICOM files")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        os.environ.setdefault("SELFSUP_CACHE", work)
        files = find_files(args.folder or data_set("mr_series_fmri", Path(work)))
        text = f"{machine()}\n\n{len(files):,} files\n\n{report(files, args.rounds)}\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
