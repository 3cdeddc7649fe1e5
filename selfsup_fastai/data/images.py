"""`UnlabeledDataLoaders`: any pile of images, files or arrays, as fastai `DataLoaders` without labels."""

import os
import random
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import IntToFloatTensor, ToTensor
from fastai.torch_core import default_device
from fastai.vision.augment import Resize
from fastcore.foundation import L
from PIL import Image

from selfsup_fastai.data.blocks import OpenChecked
from selfsup_fastai.data.files import check_files, find_files, summary
from selfsup_fastai.data.loader import IndexedDL, fit_batch_size
from selfsup_fastai.data.opening import open_image
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say
from selfsup_fastai.seeding import seeded_item

_NO_REPORT = {"file": [], "code": [], "message": []}


class UnlabeledDataLoaders(DataLoaders):
    """fastai `DataLoaders` of images without labels: batches are `(x,)`, x (B, C, H, W) float in [0, 1].

    Made by `from_folder`, `from_files`, `from_df`, `from_array` and `from_single_image`. Beside what every `DataLoaders`
    has: `report`, a DataFrame of what was left out (file, code, message), and `items_df`, one row an image.
    """

    report: pd.DataFrame | None = None
    items_df: pd.DataFrame | None = None

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike,  # Folder of images, at any depth; recognized by content, not by suffix
        size: int | tuple[int, int] | None = 128,  # Pixels; one number for squares; None: `item_tfms` see to it
        bs: int = 64,  # Batch size
        valid_pct: float = 0.1,  # Share of the images kept for validation; at least one image
        seed: int = 42,  # Of the split
        recurse: bool = True,  # Look into folders within the folder
        n_in: int | None = None,  # Channels: 1, 3, or None: 1 if all images are grey, else 3
        item_tfms=None,  # fastai or albumentations transforms of single images, before the resizing to `size`
        batch_tfms=None,  # fastai transforms of batches
        num_workers: int | None = None,  # Processes that open images; None: by the amount of work
        **kwargs,  # `device`
    ) -> "UnlabeledDataLoaders":
        """Loaders over every image in a folder. Each file is decoded once first; what cannot be read is in `dls.report`."""
        _check_settings(size, bs, valid_pct, n_in)
        files = find_files(path, recurse)
        if not files:
            raise DataError(
                f"There is no file in the folder {os.fspath(path)!r}{'' if recurse else ' itself (recurse=False)'}."
            )
        settings = dict(size=size, bs=bs, valid_pct=valid_pct, seed=seed, n_in=n_in, item_tfms=item_tfms)
        return cls.from_files(files, batch_tfms=batch_tfms, num_workers=num_workers, **settings, **kwargs)

    @classmethod
    def from_files(cls, files: Iterable[str | os.PathLike], **kwargs) -> "UnlabeledDataLoaders":
        """Loaders over the files given; arguments as in `from_folder`."""
        if isinstance(files, (str, os.PathLike)):
            raise DataError(
                "from_files takes a list of files; for one folder use from_folder, for one image from_single_image."
            )
        ok, report = usable_files([Path(f) for f in files], kwargs.get("num_workers"))
        return cls._from_items(list(ok["file"]), ok, report, OpenChecked, **kwargs)

    @classmethod
    def from_df(
        cls,
        df: pd.DataFrame,  # One row an image
        path: str | os.PathLike = ".",  # Folder that the file names are relative to
        fn_col: int | str = 0,  # Column of file names
        suff: str = "",  # Added to each file name
        **kwargs,  # As in `from_folder`
    ) -> "UnlabeledDataLoaders":
        """Loaders over the files named in a column of `df`."""
        if not isinstance(df, pd.DataFrame):
            raise DataError(f"from_df takes a pandas DataFrame, got {type(df).__name__}.")
        if isinstance(fn_col, str) and fn_col not in df.columns:
            raise DataError(f"The DataFrame has no column {fn_col!r}; its columns: {', '.join(map(str, df.columns))}.")
        names = df[fn_col] if isinstance(fn_col, str) else df.iloc[:, fn_col]
        return cls.from_files([Path(path) / f"{name}{suff}" for name in names], **kwargs)

    @classmethod
    def from_array(cls, array: np.ndarray, **kwargs) -> "UnlabeledDataLoaders":
        """Loaders over an array (N, H, W), (N, H, W, 1) or (N, H, W, 3) of uint8, as .npz data sets hold; rest as in `from_folder`."""
        if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
            got = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
            raise DataError(f"from_array takes a uint8 NumPy array, got {got}. Scale floats in [0, 1] by 255 and cast.")
        if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] not in (1, 3)):
            raise DataError(f"from_array takes N x H x W or N x H x W x C with C of 1 or 3, got shape {array.shape}.")
        height, width = array.shape[1:3]
        channels = 3 if array.ndim == 4 and array.shape[-1] == 3 else 1
        info = pd.DataFrame({"item": range(len(array)), "width": width, "height": height, "channels": channels})
        return cls._from_items(list(array), info, None, OpenChecked, **kwargs)

    @classmethod
    def from_single_image(cls, path: str | os.PathLike | Image.Image, n: int = 10_000, seed: int = 42, **kwargs):
        """`n` crops of one large picture, enough to learn early layers from (Asano, Rupprecht & Vedaldi 2020).

        Each crop: a square of half the shorter side at a random place; of it an area share of 1/500 to 1; turned and
        sheared by up to 30 degrees; its center. Crop i is the same in every epoch. The colors stay: jitter is the
        task's or the user's to add. Arguments as in `from_folder`.
        """
        image = open_image(path)
        if min(image.size) < 64:
            raise DataError(
                f"One picture of {image.size[0]} x {image.size[1]} pixels is too small to cut crops from; 64 is the least."
            )
        if not isinstance(n, int) or n < 2:
            raise DataError(f"n is the number of crops, an integer from 2 up; got {n!r}.")
        side = kwargs.get("size", 128)
        crops = [partial(random_crop, image, seed, i, max(np.atleast_1d(side or 128))) for i in range(n)]
        info = pd.DataFrame({"item": range(n), "channels": 3 if image.mode == "RGB" else 1})
        return cls._from_items(crops, info, None, OpenChecked, seed=seed, **kwargs)

    @classmethod
    def _from_items(
        cls,
        items: list,
        info: pd.DataFrame,
        report: pd.DataFrame | None,
        opener: type,
        size=128,
        bs=64,
        valid_pct=0.1,
        seed=42,
        n_in=None,
        item_tfms=None,
        batch_tfms=None,
        num_workers=None,
        device=None,
    ) -> "UnlabeledDataLoaders":
        _check_settings(size, bs, valid_pct, n_in)
        report = pd.DataFrame(_NO_REPORT) if report is None else report
        _check_count(len(items), report)
        n_in = n_in or int(info["channels"].max())
        train, valid = split(len(items), valid_pct, seed)
        side = None if size is None else int(max(np.atleast_1d(size)))
        datasets = Datasets(items, tfms=[[opener(n_in, side)]], splits=(train, valid))
        dls = datasets.dataloaders(
            dl_type=IndexedDL,
            bs=fit_batch_size(bs, len(train)),
            val_bs=bs,
            after_item=[*_item_tfms(item_tfms), *([] if size is None else [Resize(size)]), ToTensor()],
            after_batch=[IntToFloatTensor(), *_as_list(batch_tfms)],
            num_workers=auto_workers(len(items), size) if num_workers is None else num_workers,
            device=device or default_device(),
        )
        dls = cls(*dls.loaders, path=".", device=dls.device)  # never write into the folder of images
        dls.report = report.reset_index(drop=True)
        dls.items_df = info.assign(is_valid=np.isin(np.arange(len(items)), valid)).reset_index(drop=True)
        channels = "1 channel" if n_in == 1 else f"{n_in} channels"
        say(f"{len(items):,} images ({len(train):,} to train, {len(valid):,} to validate), {channels}.")
        return dls


def usable_files(files: list[Path], num_workers: int | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The files that can be decoded, with their sizes and so on, and the report on the others; one line is said of these."""
    ok, report = check_files(files, n_workers=num_workers or None)
    thin = ok[["width", "height"]].min(axis=1) < 2
    if thin.any():
        message = "One pixel wide or high: nothing to learn from."
        left_out = pd.DataFrame({"file": ok["file"][thin], "code": "too_small", "message": message})
        ok, report = ok[~thin], pd.concat([report, left_out])
        report.attrs["checked"] = len(files)
    line = summary(report)
    if line:
        say(line)
    return ok.reset_index(drop=True), report.reset_index(drop=True)


def split(n: int, valid_pct: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train and to validate with: shuffled by `seed` alone, at least one of each."""
    n_valid = min(max(1, round(n * valid_pct)), n - 1)
    order = np.random.default_rng(seed).permutation(n).tolist()
    return sorted(order[n_valid:]), sorted(order[:n_valid])


def auto_workers(n_items: int, size) -> int:
    """Worker processes for `n_items`: none where starting them each epoch costs more than they save."""
    return 0 if n_items < 1000 else min(8, os.cpu_count() or 1)


def random_crop(image: Image.Image, seed: int, index: int, side: int) -> Image.Image:
    """Crop number `index` of `image`: see `from_single_image`."""
    with seeded_item(seed, index):
        half = min(image.size) // 2
        left, top = random.randint(0, image.width - half), random.randint(0, image.height - half)
        share = random.uniform(1 / 500, 1) ** 0.5
        inner = max(8, round(half * share))
        left, top = left + random.randint(0, half - inner), top + random.randint(0, half - inner)
        wide = image.crop((left, top, left + inner, top + inner)).resize(
            (round(side * 2**0.5),) * 2, Image.Resampling.BILINEAR
        )
        turned = _turn_and_shear(wide, random.uniform(-30, 30), random.uniform(-30, 30))
    margin = (turned.width - side) // 2
    return turned.crop((margin, margin, margin + side, margin + side))


def _turn_and_shear(image: Image.Image, turn: float, shear: float) -> Image.Image:
    """Turned and sheared (degrees) about the center; the borders are filled by reflection."""
    pad = image.width // 2
    array = np.pad(np.asarray(image), ((pad, pad), (pad, pad)) + ((0, 0),) * (image.mode == "RGB"), mode="reflect")
    padded = Image.fromarray(array)
    cos, sin, slope = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn)), np.tan(np.deg2rad(shear))
    a, b, d, e = cos, cos * slope - sin, sin, sin * slope + cos  # turn x shear, output -> input
    c = padded.width / 2
    matrix = (a, b, c - a * c - b * c, d, e, c - d * c - e * c)
    warped = padded.transform(padded.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return warped.crop((pad, pad, pad + image.width, pad + image.height))


def _check_settings(size, bs, valid_pct, n_in) -> None:
    sides = [] if size is None else list(np.atleast_1d(size))
    if any(not isinstance(s, (int, np.integer)) or s < 8 for s in sides) or len(sides) > 2:
        raise DataError(
            f"size is the side of the images in pixels, an integer from 8 up (or two: height, width); got {size!r}."
        )
    if not isinstance(bs, int) or bs < 1:
        raise DataError(f"bs is the batch size, an integer from 1 up; got {bs!r}.")
    if not 0 <= valid_pct < 1:
        raise DataError(
            f"valid_pct is the share of images to validate with, from 0 up to but not including 1; got {valid_pct!r}."
        )
    if n_in not in (None, 1, 3):
        raise DataError(f"n_in is 1 (grey), 3 (color) or None (as the images are); got {n_in!r}.")


def _check_count(n: int, report: pd.DataFrame) -> None:
    if n >= 2:
        return
    found = "no image" if n == 0 else "one image"
    left_out = f" {len(report)} files were left out: {dict(report['code'].value_counts())}." if len(report) else ""
    one = " For thousands of crops of one picture use from_single_image." if n == 1 else ""
    raise DataError(f"Found {found} to read; at least two are needed, one of them to validate with.{left_out}{one}")


def _as_list(tfms: object | Iterable | None) -> list:
    if tfms is None:
        return []
    return list(tfms) if isinstance(tfms, (list, tuple, L)) else [tfms]  # a bare albumentations Compose iterates, too


def _item_tfms(tfms) -> list:
    tfms = _as_list(tfms)
    if not any(type(t).__module__.startswith("albumentations") for t in tfms):
        return tfms
    from selfsup_fastai.data.albumentations import wrap_albumentations  # only here: importing it takes a second

    return list(wrap_albumentations(tfms))
