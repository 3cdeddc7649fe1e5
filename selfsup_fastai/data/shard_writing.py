"""A folder of images as shards: few large files instead of many small ones."""

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from selfsup_fastai.data.files import check_files, find_files, listed_in, result_folder, summary
from selfsup_fastai.data.reasons import diagnosis
from selfsup_fastai.data.shard_index import COLUMNS, FACTS, INDEX
from selfsup_fastai.data.shards import SUFFIXES
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say
from selfsup_fastai.writing import whole_file, write_csv

_SUFFIX_OF = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2", "PPM": "ppm"}


def write_shards(
    folder: str | os.PathLike,  # Of images, at any depth; recognized by content, not by suffix
    out: str | os.PathLike,  # Folder for the shards and their index; made if missing
    images_per_shard: int = 1000,
    seed: int = 42,  # Of the order of the images
    overwrite: bool = False,  # Replace what an earlier call left in `out`
) -> pd.DataFrame:  # What was left out: file, code, message
    """Shards of all images in a folder that can be decoded: shard-000000.tar and so on, and index.csv.

    They are tar files as WebDataset reads them, images in random order under running numbers: no name of a file gets
    into them. The bytes of the images are copied as they are, with all that cameras write into them. The same folder
    and seed give the same bytes. DICOM files are left out, as their headers name patients.
    """
    _check(folder, out, images_per_shard, overwrite)
    files = find_files(folder)
    ok, report = check_files(files)
    report.attrs["checked"] = len(files)
    ok = ok[ok[["width", "height"]].min(axis=1) >= 2]
    if ok.empty:
        raise DataError(f"None of the {len(files):,} files in the folder {os.fspath(folder)!r} is an image to read.")
    out = result_folder(out)
    for old in [*out.glob("shard-*.tar"), out / INDEX]:
        old.unlink(missing_ok=True)
    ok = ok.iloc[np.random.default_rng(seed).permutation(len(ok))]
    index, gone = _written(ok, out, images_per_shard)
    write_csv(index, out / INDEX)  # last: where it is, all shards are
    report = pd.concat([report, gone], ignore_index=True)
    report.attrs["checked"] = len(files)
    with listed_in("the table that write_shards returns"):
        line = summary(report)
    n = index["shard"].nunique()
    say(f"{len(index):,} images in {n:,} shard{'s' * (n != 1)}.{f' {line}.' if line else ''}")
    return report


def _check(folder: object, out: object, images_per_shard: object, overwrite: bool) -> None:
    """Raises `DataError` where nothing can be written, before anything is read."""
    if isinstance(images_per_shard, bool) or not isinstance(images_per_shard, int) or images_per_shard < 1:
        raise DataError(f"images_per_shard is an integer from 1 up; got {images_per_shard!r}.")
    out = Path(out)
    if Path(folder).resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(f"{str(out)!r} lies in the folder of images; choose another for the shards.")
    if not overwrite and any(out.glob("*.tar")):
        raise DataError(
            f"There are shards in {str(out)!r} already. Choose another folder, or have them "
            "overwritten (--overwrite, in Python overwrite=True)."
        )


def _written(ok: pd.DataFrame, out: Path, images_per_shard: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The index of what was written, and the report on files that were gone by then."""
    rows, gone = [], []
    images = _images(ok, gone)
    with tqdm(total=len(ok), desc="Writing shards", unit="image", delay=1, disable=None) as bar:
        for number in range(-(-len(ok) // images_per_shard)):
            name = f"shard-{number:06d}.tar"
            some = [image for _, image in zip(range(images_per_shard), images)]
            if some:
                rows += _write_one(out / name, number * images_per_shard, some)
                bar.update(len(some))
    return pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(gone, columns=["file", "code", "message"])


def _images(ok: pd.DataFrame, gone: list[dict]) -> Iterator[tuple[bytes, dict]]:
    """Contents and facts of each file; a line in `gone` for one that cannot be read any more."""
    for file, *facts in ok[["file", *FACTS]].itertuples(index=False):
        try:
            data = file.read_bytes()
        except OSError as error:
            reason = diagnosis(error)
            gone.append({"file": file, "code": reason.code, "message": str(reason)})
            continue
        yield data, dict(zip(FACTS, facts))


def _write_one(file: Path, first: int, images: Sequence[tuple[bytes, dict]]) -> list[dict]:
    """One shard, whole or not at all, and its rows of the index."""
    rows = []
    with whole_file(file) as raw, tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (data, facts) in enumerate(images, start=first):
            member = tarfile.TarInfo(f"{i:09d}.{_suffix(facts['format'])}")  # no owner, no date: the same bytes again
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
            offset = tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            rows.append({"shard": file.name, "offset": offset, "size": len(data), **facts, "code": ""})
    n_bytes = file.stat().st_size
    return [{**row, "bytes": n_bytes} for row in rows]


def _suffix(form: str | None) -> str:
    suffix = _SUFFIX_OF.get(form, str(form).lower())
    return suffix if suffix in SUFFIXES else "img"
