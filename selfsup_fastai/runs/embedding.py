"""Features of every image of a folder in one file, for use elsewhere: .npz (NumPy) or .parquet (pandas, R, DuckDB)."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from selfsup_fastai import __version__
from selfsup_fastai.data.unsplit import Unsplit
from selfsup_fastai.errors import DataError
from selfsup_fastai.features import Embeddings, embed
from selfsup_fastai.messages import say
from selfsup_fastai.runs.inputs import check_file_out, check_layer, find_some, saved, seen_by, side_of, which
from selfsup_fastai.writing import whole_file

FEATURES, ABOUT = "embeddings", "about"  # Names in the file


def embed_folder(
    folder: str | os.PathLike,  # Of images, at any depth
    out: str | os.PathLike,  # A file that ends in .npz or .parquet
    encoder: str | os.PathLike,  # A saved encoder or model
    layer: str | None = None,  # None: what the encoder gives; else this layer's map, averaged
    size: int | None = None,  # Side of the images in pixels; None: as the encoder was trained
    paths: bool = False,  # Write names of DICOM files, too: they may identify patients
    **data,  # bs, num_workers, cache, max_gb
) -> Path:
    """Embeds every image of a folder that can be read, and writes one row for each, in the order of their paths.

    .npz: `embeddings` (N, D) float32, an array of N for each other column, and `about`, text in JSON. No pickle.
    .parquet: the same columns, `embeddings` a list of D numbers a row, `about` in the metadata under `selfsup_fastai`.
    """
    out = check_file_out(out, [folder], (".npz", ".parquet"))
    write = {".npz": write_npz, ".parquet": write_parquet}[out.suffix.lower()]
    if write is write_parquet:
        arrow()
    net, origin, _ = saved(encoder)
    check_layer(net, layer)
    side = side_of(net, size)
    found = find_some([folder], out, net.image_channels, side, paths, seen=seen_by(net), **data)
    features = embed(net, found.dl, layers=layer)
    about = {"encoder": origin, "layer": layer or "output", "size": side, **_counts(found)}
    write(out, features, which(found.info, found.private and not paths), about)
    say(f"{len(features.x):,} images, {features.x.shape[1]:,} numbers each.")
    return out


def _counts(found: Unsplit) -> dict:
    seen = getattr(found.dl.dataset.tls[0].tfms.fs[0], "seen", None)
    counts = {"images": len(found.info), "left_out": len(found.report), "selfsup_fastai": __version__}
    return counts | ({"scans": seen} if seen else {})


def write_npz(
    out: Path,
    features: Embeddings,
    table: pd.DataFrame,  # A row an image
    about: dict,
) -> None:
    """For `np.load(file)`, which needs no pickle. (`np.savez` takes no array called 'file'.)"""
    columns = {name: _as_array(values) for name, values in table.items()}
    arrays = {FEATURES: features.x.numpy(), **columns, ABOUT: np.array(json.dumps(about))}
    with whole_file(out) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as part:
                np.lib.format.write_array(part, array, allow_pickle=False)


def write_parquet(out: Path, features: Embeddings, table: pd.DataFrame, about: dict) -> None:
    """For `pd.read_parquet(file)`, and most other programs that read tables."""
    pa, parquet = arrow()
    x = features.x.numpy()
    rows = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    columns = {name: pa.array(_as_array(values)) for name, values in table.items()} | {FEATURES: rows}
    found = pa.table(columns).replace_schema_metadata({"selfsup_fastai": json.dumps(about)})
    with whole_file(out) as file:
        parquet.write_table(found, file)


def arrow():
    """pyarrow and its module for Parquet. Raises `DataError` where it is not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        fix = "pip install pyarrow, or write a file that ends in .npz."
        raise DataError(f"Parquet files are written by pyarrow, which is not installed: {fix}") from None
    return pyarrow, parquet


def _as_array(values: pd.Series) -> np.ndarray:
    """Whole numbers or text; bytes of file names that are no text are escaped (\\xe9)."""
    if pd.api.types.is_numeric_dtype(values):
        return values.to_numpy(np.int64)
    return np.array([os.fsencode(str(value)).decode("utf-8", "backslashreplace") for value in values], dtype=str)
