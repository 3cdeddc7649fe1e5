"""Labeled DICOM files: `DicomBlock` for a `DataBlock`, `DicomDataLoaders` from a table."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import ColReader, IntToFloatTensor

from selfsup_fastai.data.blocks import Cover, OpenChecked
from selfsup_fastai.data.images import as_size, check_classes, say_counts, say_shared, split_items
from selfsup_fastai.data.loader import IndexedDL, fit_batch_size
from selfsup_fastai.data.usable import check_window, frames_in, seen_in, usable_items, with_columns
from selfsup_fastai.errors import DataError


class OpenDicom(OpenChecked):
    """A DICOM file, or a `DicomImage` as its own settings say, to pixels as `read_dicom` makes them."""

    are_scans = True

    def __init__(
        self,
        n_in: int | None = None,  # Channels: 1 (CT: one wide window), 3 (CT: three), or None: as the image is
        window=None,  # As for `read_dicom`
    ):
        check_window(window, n_in)
        super().__init__(n_in)
        self.window = window

    def opened(self, source):
        from selfsup_fastai.data.dicom_pixels import DicomImage

        is_path = isinstance(source, (str, os.PathLike)) and not isinstance(source, DicomImage)
        return super().opened(DicomImage(os.fspath(source), window=self.window) if is_path else source)


def DicomBlock(
    n_in: int | None = 1,  # Channels: 1 (CT: one wide window), 3 (CT: three windows), or None: as each image is
    window=None,  # As for `read_dicom`; None: by modality
) -> TransformBlock:
    """The image side of a `DataBlock` for paths of DICOM files; photographs may be among them.

    `blocks=(DicomBlock, CategoryBlock)`. Of a multi-frame file the first frame; for others give `DicomImage`s. Split
    with `PatientSplitter` or `GroupSplitter`: fastai's splitters put images of one patient on both sides.
    """
    return TransformBlock(type_tfms=OpenDicom(n_in, window), batch_tfms=IntToFloatTensor)


class DicomDataLoaders(DataLoaders):
    """fastai `DataLoaders` of labeled DICOM files, split by patient. `report` lists files that were left out."""

    report: pd.DataFrame | None = None
    items_df: pd.DataFrame | None = None

    @classmethod
    def from_df(
        cls,
        df: pd.DataFrame,  # A row a file
        path: str | os.PathLike = ".",  # Folder that the file names are relative to
        fn_col: int | str = 0,  # Column of file names
        label_col: int | str | Sequence = 1,  # Column of labels; several: numbers to predict
        label_delim: str | None = None,  # Between several labels of one image
        valid_col: str | None = None,  # Column that is true for images to validate with; None: by patient
        valid_pct: float = 0.2,  # Share of the images to validate with
        seed: int = 42,  # Of the split
        split_by: str | None = None,  # As in `UnlabeledDataLoaders.from_folder`
        size: int | tuple[int, int] = 128,  # Pixels: a side, or (height, width)
        bs: int = 64,
        n_in: int | None = None,  # Channels: 1, 3, or None: 1 unless there are colors, or nothing but CTs
        window=None,  # As for `read_dicom`; None: by modality
        batch_tfms=None,
        device: str | torch.device | None = None,
        num_workers: int = 0,
    ) -> "DicomDataLoaders":
        """Loaders over the files named in a column of `df`, with labels of another.

        Each frame of a file is an image with the file's label, unless a column 'frame' says which one is meant. All
        images of a patient are on one side of the split.
        Labels of text or whole numbers are classes, numbers with a fraction are to be predicted as such.
        Raises `DataError` for columns that are not there, for rows without a label, or where nothing can be read.
        """
        names, labels = _column(df, fn_col), label_col if isinstance(label_col, (list, tuple)) else [label_col]
        label_names = [_column(df, label) for label in labels]
        _check_labels(df, label_names)
        files = [Path(path) / str(name) for name in df[names]]
        info, report = usable_items(files, None, max(as_size(size)), n_in, window, frames_in(df))
        if len(info) < 2:
            raise DataError(f"{len(info)} image(s) can be read; at least two are needed. {len(report)} were left out.")
        rows = info["row"].to_numpy(int)
        info = with_columns(info, df.drop(columns=[names, *label_names])).reset_index(drop=True)
        splits = _splits(info, df, rows, valid_col, valid_pct, seed, split_by)
        targets = [f"label: {name}" for name in label_names]  # the table's, whatever the images bring
        info[targets] = df[label_names].iloc[rows].to_numpy(object)
        target = _target(df, label_names, label_delim)
        if target is CategoryBlock:
            check_classes(info[targets[0]], np.isin(np.arange(len(info)), splits[1]), valid_col is None)
        n_in = n_in or int(info["channels"].max())
        images = DicomBlock(n_in, window)
        images.type_tfms[0].seen = seen_in(info, window)
        block = DataBlock(
            blocks=(images, target),
            get_x=ColReader("source"),
            get_y=ColReader(targets if len(targets) > 1 else targets[0], label_delim=label_delim),
            splitter=lambda _: splits,
            item_tfms=Cover(as_size(size)),
            batch_tfms=batch_tfms,
        )
        bs = fit_batch_size(bs, len(splits[0]))
        made = block.dataloaders(info, bs=bs, dl_type=IndexedDL, device=device, num_workers=num_workers)
        dls = cls(*made.loaders, path=".", device=made.device)
        dls.report, dls.items_df = report, info.drop(columns=["source", "row"])
        dls.items_df["is_valid"] = np.isin(np.arange(len(info)), splits[1])
        say_counts(*splits, n_in)
        return dls


def _column(df: pd.DataFrame, column: int | str) -> str:
    if not isinstance(df, pd.DataFrame):
        raise DataError(f"from_df takes a pandas DataFrame, got {type(df).__name__}.")
    if isinstance(column, int) and 0 <= column < df.shape[1]:
        return df.columns[column]
    if column in df.columns:
        return column
    raise DataError(f"The DataFrame has no column {column!r}; its columns: {', '.join(map(str, df.columns))}.")


def _check_labels(df: pd.DataFrame, labels: list[str]) -> None:
    missing = df[labels].isna().any(axis=1).sum()
    if missing:
        raise DataError(f"{missing:,} of {len(df):,} rows have no label: drop them, df.dropna(subset={labels!r}).")


def _splits(info: pd.DataFrame, df: pd.DataFrame, rows: np.ndarray, valid_col, valid_pct: float, seed: int, by):
    """Places to train and to validate with."""
    if valid_col is None:
        return split_items(info, valid_pct, seed, by)
    valid = df[_column(df, valid_col)].iloc[rows]
    if not valid.isin([True, False]).all():
        raise DataError(
            f"valid_col={valid_col!r} must be true or false (or 1 and 0) in every row, not text or missing."
        )
    valid = valid.to_numpy(bool)
    if valid.all() or not valid.any():
        raise DataError(f"valid_col={valid_col!r} leaves no image to {'train' if valid.all() else 'validate'} with.")
    splits = np.flatnonzero(~valid).tolist(), np.flatnonzero(valid).tolist()
    if "patient" in info:
        say_shared(info, *splits)
    return splits


def _target(df: pd.DataFrame, labels: list[str], delim: str | None) -> TransformBlock:
    """By what the labels are: numbers with a fraction, several words, or one of some."""
    numbers = [pd.api.types.is_float_dtype(df[name]) and (df[name] % 1 != 0).any() for name in labels]
    if len(labels) > 1 or numbers[0]:
        return RegressionBlock(n_out=len(labels))
    return MultiCategoryBlock if delim else CategoryBlock
