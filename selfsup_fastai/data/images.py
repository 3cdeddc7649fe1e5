"""`UnlabeledDataLoaders`: any pile of images, files or arrays, as fastai `DataLoaders` without labels."""

import os
import random
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import IntToFloatTensor, ToTensor
from fastai.torch_core import default_device
from fastcore.foundation import L
from fastcore.parallel import num_cpus
from PIL import Image

from selfsup_fastai.data.albumentations import wrap_albumentations
from selfsup_fastai.data.blocks import Cover, OpenChecked, OpenCovered
from selfsup_fastai.data.crops import crops, picture
from selfsup_fastai.data.fetching import Fetch
from selfsup_fastai.data.files import as_paths, find_files
from selfsup_fastai.data.keeping import Keeping, check_cache, keeping, stored
from selfsup_fastai.data.loader import IndexedDL, fit_batch_size
from selfsup_fastai.data.shard_index import all_shards, usable_in_shards
from selfsup_fastai.data.shards import MIXED
from selfsup_fastai.data.splitters import GroupSplitter, PatientSplitter, groups_of
from selfsup_fastai.data.usable import OURS, check_window, frames_in, seen_in, usable_items, with_columns
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import quiet, say
from selfsup_fastai.processes import first_here, join
from selfsup_fastai.seeding import preserved_rng

OF_SHARDS = ("shard", "offset", "size")
"""Columns that say where an image lies: `split_by` may name them, but they tell nothing of it."""

_NO_REPORT = {"file": [], "code": [], "message": []}


class UnlabeledDataLoaders(DataLoaders):
    """fastai `DataLoaders` of images without labels: batches are `(x,)`, x (B, C, H, W) float in [0, 1].

    Made by `from_folder`, `from_files`, `from_df`, `from_shards`, `from_array` and `from_single_image`. Of each image
    comes the largest part of the shape that `size` asks for, resized: in training at a random place, in validation the
    center.
    Beside what every `DataLoaders` has: `report`, a DataFrame of what was left out (file, code, message), and
    `items_df`, one row an image. Making them draws one number per loader from Python's `random`, and nothing else.
    """

    report: pd.DataFrame | None = None
    items_df: pd.DataFrame | None = None

    @classmethod
    def from_folder(
        cls,
        path: str | os.PathLike,  # Folder of images, at any depth; recognized by content, not by suffix
        size: int | tuple[int, int] | None = 128,  # Pixels: a side, or (height, width); None: `item_tfms` see to it
        bs: int = 64,  # Batch size
        valid_pct: float = 0.1,  # Share of the images kept for validation; at least one image
        seed: int = 42,  # Of the split
        recurse: bool = True,  # Look into folders within the folder
        n_in: int | None = None,  # Channels: 1, 3, or None: 1 if all images are grey, else 3
        item_tfms=None,  # fastai or albumentations transforms of single images, before the resizing to `size`
        batch_tfms=None,  # fastai transforms of batches
        num_workers: int | None = None,  # Processes that open images, where no pixels are kept; None: by the work
        device: str | torch.device | None = None,  # Of the batches; None: fastai's default
        cache: bool | str = True,  # Keep decoded pixels: True: on disk, 'ram', 'device': on the GPU, too; False: no
        max_gb: float = 20.0,  # Size of all that is kept on disk; older pixels give way
        window=None,  # Of DICOM files, as for `read_dicom`; None: by modality
        split_by: str | None = None,  # 'patient', 'random' or a column; None: by patient where there are DICOM files
    ) -> "UnlabeledDataLoaders":
        """Loaders over every image in a folder. Each file is tried first; `dls.report` lists what cannot be read.

        DICOM files are images, too, each frame one of its own, with pixels as `read_dicom` makes them; a series of MR,
        PT or NM gets one scale for all its slices. All images of a patient are on one side of the split.

        While it is tried, each image is decoded once and kept, resized, in the pixel cache (`$SELFSUP_CACHE`; see
        `selfsup cache ls`): later epochs and runs read no files. `item_tfms` see whole images, so with them, and with
        `size=None`, every epoch decodes anew.

        A folder of shards (.tar files, and their index) and nothing else is read as `from_shards` does.
        """
        settings = {"size": size, "bs": bs, "valid_pct": valid_pct, "seed": seed, "n_in": n_in, "item_tfms": item_tfms}
        settings |= {"batch_tfms": batch_tfms, "num_workers": num_workers, "device": device}
        settings |= {"cache": cache, "max_gb": max_gb, "window": window, "split_by": split_by}
        _check_settings(**settings)
        files = find_files(path, recurse)
        if not files:
            where = "" if recurse else " itself (recurse=False)"
            raise DataError(f"There is no file in the folder {os.fspath(path)!r}{where}.")
        if all_shards(files):
            return cls.from_shards(path, **settings)
        return cls.from_files(files, **settings)

    @classmethod
    def from_files(
        cls,
        files: Iterable[str | os.PathLike],  # Image files
        **kwargs,  # As in `from_folder`
    ) -> "UnlabeledDataLoaders":
        """Loaders over the files given."""
        if isinstance(files, (str, os.PathLike)) or not isinstance(files, Iterable):
            _check_settings(**kwargs)
            fix = "For one folder use from_folder, for one image from_single_image."
            raise DataError(f"from_files takes a list of files, got {type(files).__name__}. {fix}")
        return cls._from_table(files, None, **kwargs)

    @classmethod
    def _from_table(
        cls,
        files: Iterable[str | os.PathLike],
        facts: pd.DataFrame | None,  # Row i: what is known of file i
        **kwargs,
    ) -> "UnlabeledDataLoaders":
        _check_settings(**kwargs)
        join()
        files, side = as_paths(files), max(as_size(kwargs.get("size", 128)) or (128,))
        on_disk = kwargs.get("cache", True) is True  # of several processes one decodes, and the others find it done
        with first_here() if on_disk else nullcontext(), _keeping(files, **kwargs) as kept:
            frames = None if facts is None else frames_in(facts)
            info, report = usable_items(files, kept, side, kwargs.get("n_in"), kwargs.get("window"), frames)
            if kept:
                kept.fill(info.index)  # what changed while it was read
            if facts is not None:
                info = with_columns(info, facts)
            return cls._from_items(list(info["source"]), info, report, kept, **kwargs)

    @classmethod
    def from_df(
        cls,
        df: pd.DataFrame,  # One row an image
        path: str | os.PathLike = ".",  # Folder that the file names are relative to
        fn_col: int | str = 0,  # Column of file names
        suff: str = "",  # Added to each file name
        **kwargs,  # As in `from_folder`
    ) -> "UnlabeledDataLoaders":
        """Loaders over the files named in a column of `df`.

        The other columns are facts: they become columns of `items_df`, and tasks may ask about them: whose image it is
        ('patient'), of which study or series; or which labels come with it. A column 'frame' says which frame of a
        DICOM file a row is about, else each frame is an image. Columns that images bring themselves stay theirs.
        """
        if not isinstance(df, pd.DataFrame):
            raise DataError(f"from_df takes a pandas DataFrame, got {type(df).__name__}.")
        if fn_col not in (range(df.shape[1]) if isinstance(fn_col, int) else df.columns):
            columns = ", ".join(map(str, df.columns)) or "none"
            raise DataError(f"The DataFrame has no column {fn_col!r}; its columns: {columns}.")
        names = df.iloc[:, fn_col] if isinstance(fn_col, int) else df[fn_col]
        if names.isna().any():
            raise DataError(f"{names.isna().sum()} of {len(names)} rows hold no file name: drop them, df.dropna().")
        facts = df.drop(columns=[df.columns[fn_col] if isinstance(fn_col, int) else fn_col])
        return cls._from_table([Path(path) / f"{name}{suff}" for name in names], facts, **kwargs)

    @classmethod
    def from_shards(
        cls,
        path: str | os.PathLike | Iterable,  # Folder of .tar files, the index of such, or a list of files or names
        fetch: Fetch | None = None,  # Where they lie elsewhere: a command with {name} and {path}, or a function of both
        local: str | os.PathLike | None = None,  # With `fetch`: folder on a local disk for the shards in use
        keep_gb: float = 50.0,  # How many GB of them may lie there; the least recently used give way
        mixed: int = MIXED,  # Shards whose images come mixed in training
        cache: bool | str = False,  # As in `from_folder`: True pays where the resized pixels of all images fit on disk
        split_by: str | None = None,  # 'shard': validate with whole shards; None: that with `fetch`, else 'random'
        **kwargs,  # As in `from_folder`
    ) -> "UnlabeledDataLoaders":
        """Loaders over images in shards: tar files, as WebDataset and `write_shards` make them.

        An image is a place in a shard. Everything else is as with files: each has an index, is tried beforehand, and is
        opened as `from_folder` opens it; what is in no image format by its suffix is never read. Without an index.csv
        beside the shards, what is found in each is remembered. In training, shards take turns in random order, and
        images come mixed from `mixed` of them, so that each shard is fetched once an epoch. DICOM is left out: whose
        images are in a shard is not known.
        """
        _check_settings(cache=cache, split_by=split_by, **kwargs)
        join()
        side = max(as_size(kwargs.get("size", 128)) or (128,))
        with first_here():  # it remembers what it found
            info, report = usable_in_shards(path, fetch, local, keep_gb, mixed, side)
        if fetch is not None and split_by is None and info["shard"].nunique() > 1:
            split_by = "shard"
        items = list(info["source"])
        with first_here() if cache is True else nullcontext(), _keeping(items, cache=cache, **kwargs) as kept:
            if kept:
                kept.fill(info.index)
            return cls._from_items(items, info, report, kept, cache=cache, split_by=split_by, **kwargs)

    @classmethod
    def from_array(
        cls,
        array: np.ndarray,  # (N, H, W), (N, H, W, 1) or (N, H, W, 3) of uint8, as .npz data sets hold
        **kwargs,  # As in `from_folder`
    ) -> "UnlabeledDataLoaders":
        """Loaders over the images of an array. Change it afterwards, and they may see the change or not.

        What is in memory only is not written to disk: `cache=True` keeps the resized images in memory, too.
        """
        _check_settings(**kwargs)
        _check_array(array)
        height, width = array.shape[1:3]
        grey = array.shape[3:] != (3,) or all((image == image[..., :1]).all() for image in array)
        facts = {"width": width, "height": height, "channels": 1 if grey else 3}
        return cls._in_memory(list(array), pd.DataFrame({"item": range(len(array)), **facts}), **kwargs)

    @classmethod
    def from_single_image(
        cls,
        path: str | os.PathLike | Image.Image,  # The picture: the larger and the richer, the better
        n: int = 10_000,  # Number of crops
        seed: int = 42,  # Of the crops and of the split
        **kwargs,  # As in `from_folder`
    ) -> "UnlabeledDataLoaders":
        """`n` crops of one large picture, enough to learn early layers from (Asano, Rupprecht & Vedaldi 2020).

        Each crop: a square of half the shorter side at a random place; of it an area share of 1/500 to 1; turned and
        sheared by up to 30 degrees; its center. Crop i is the same in every epoch. The colors stay: jitter is the
        task's or the user's to add.
        """
        _check_settings(seed=seed, **kwargs)
        if not _is_count(n, 2):
            raise DataError(f"n is the number of crops, an integer from 2 up; got {n!r}.")
        image = picture(path)
        side = max(as_size(kwargs.get("size", 128)) or (128,))
        info = pd.DataFrame(
            {"item": range(n), "width": side, "height": side, "channels": 3 if image.mode == "RGB" else 1}
        )
        make = cls._in_memory if isinstance(path, Image.Image) else cls._from_safe
        return make(crops(image, n, seed, side), info, seed=seed, **kwargs)

    @classmethod
    def _from_safe(cls, items: list, info: pd.DataFrame, **kwargs) -> "UnlabeledDataLoaders":
        """Of images that need no check."""
        with _keeping(items, **kwargs) as kept:
            if kept:
                kept.fill(info.index)
            return cls._from_items(items, info, None, kept, **kwargs)

    @classmethod
    def _in_memory(cls, items: list, info: pd.DataFrame, cache=True, **kwargs) -> "UnlabeledDataLoaders":
        """Of images that lie in no file, and are not to lie in one."""
        return cls._from_safe(items, info, cache="ram" if cache is True else cache, **kwargs)

    @classmethod
    def _from_items(
        cls,
        items: list,
        info: pd.DataFrame,  # A row an item; its index is the item's number in `kept`
        report: pd.DataFrame | None,
        kept: Keeping | None,
        size=128,
        bs=64,
        valid_pct=0.1,
        seed=42,
        n_in=None,
        item_tfms=None,
        batch_tfms=None,
        num_workers=None,
        device=None,
        cache=True,
        max_gb=20.0,
        window=None,
        split_by=None,
    ) -> "UnlabeledDataLoaders":
        report = pd.DataFrame(_NO_REPORT) if report is None else report
        _check_count(len(items), report)
        n_in, size = n_in or int(info["channels"].max()), as_size(size)
        train, valid = split_items(info, valid_pct, seed, split_by)
        _say_modalities(info, train, valid)
        pixels, item_tfms = float((info["width"] * info["height"]).mean()), _item_tfms(item_tfms)
        device = torch.device(device or default_device())
        store = stored(kept, info.index, n_in, device if cache == "device" else None)
        facts = [_facts(info.iloc[rows]) for rows in (train, valid)]
        with preserved_rng():  # fastai tries one item, with the user's random transforms
            loaders = Datasets(
                items, tfms=[[_opener(info, n_in, size, item_tfms, window)]], splits=(train, valid)
            ).dataloaders(
                dl_type=IndexedDL,
                bs=fit_batch_size(bs, len(train)),
                val_bs=bs,
                after_item=[*item_tfms, *([] if size is None else [Cover(size)]), ToTensor()],
                after_batch=[IntToFloatTensor(), *_as_list(batch_tfms)],
                num_workers=auto_workers(len(items), pixels) if num_workers is None else num_workers,
                device=device,
                dl_kwargs=[{"store": store, "rows": r, "facts": f} for r, f in zip((train, valid), facts)],
            )
        for dl in loaders:
            dl.rng.seed(random.getrandbits(62))
        dls = cls(*loaders.loaders, path=".", device=loaders.device)  # never write into the folder of images
        dls.report = report.reset_index(drop=True)
        dls.items_df = info.drop(columns=["source", "row"], errors="ignore").reset_index(drop=True)
        dls.items_df["is_valid"] = np.isin(np.arange(len(items)), valid)
        say_counts(train, valid, n_in)
        return dls


def say_counts(train: list[int], valid: list[int], n_in: int) -> None:
    """How many images there are, and with how many channels."""
    channels = "1 channel" if n_in == 1 else f"{n_in} channels"
    n = len(train) + len(valid)
    say(f"{n:,} images ({len(train):,} to train, {len(valid):,} to validate), {channels}.")


def split(n: int, valid_pct: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train and to validate with: shuffled by `seed` alone, at least one of each."""
    n_valid = min(max(1, round(n * valid_pct)), n - 1)
    order = np.random.default_rng(seed).permutation(n).tolist()
    return sorted(order[n_valid:]), sorted(order[:n_valid])


def split_items(
    info: pd.DataFrame,  # A row an item
    valid_pct: float,
    seed: int,
    by: str | None = None,  # 'patient', 'random' or a column; None: by patient, where patients are known
) -> tuple[list[int], list[int]]:
    """Places to train and to validate with. Raises `DataError` for a column that is not there."""
    by = by or _default_split(info)
    if by == "random":
        return split(len(info), valid_pct, seed)
    if by in OURS:
        raise DataError(f"The images cannot be split by {by!r}: that column is their own. Give yours another name.")
    if by not in info:
        why = "Only DICOM files tell it." if by == "patient" else f"There are: {', '.join(map(str, info.columns))}."
        raise DataError(f"The images cannot be split by {by!r}: nothing is known of it. {why}")
    splitter = PatientSplitter if by == "patient" else partial(GroupSplitter, by)
    return splitter(valid_pct=valid_pct, seed=seed)(info.reset_index(drop=True))


def say_shared(info: pd.DataFrame, train: list[int], valid: list[int]) -> None:
    """Says how many patients are on both sides of a split that somebody else made."""
    known = info["patient"].where(info["patient"] != "")
    shared = len(set(known.iloc[train].dropna()) & set(known.iloc[valid].dropna()))
    if shared:
        say(f"{shared:,} patients are among the images to train and to validate with: figures will be too good.")


def _say_modalities(info: pd.DataFrame, train: list[int], valid: list[int]) -> None:
    """Says where training and validation have no modality in common."""
    if "modality" in info and not set(info["modality"].iloc[train]) & set(info["modality"].iloc[valid]):
        one, other = ("/".join(sorted(set(info["modality"].iloc[part]))) or "others" for part in (train, valid))
        say(f"Only {one} to train and only {other} to validate with: validation says little (split_by='random' mixes).")


def check_classes(labels: pd.Series, valid: np.ndarray, by_patient: bool) -> None:
    """Says which classes there are none of to validate with. Raises `DataError` where a split by patient leaves none of
    a class to train with."""
    every, train, held = set(labels), set(labels[~valid]), set(labels[valid])
    few = ", ".join(sorted(map(str, every - train)))
    if few and by_patient and held:
        fix = "split_by='random' splits image by image, and validation then looks better than it is."
        raise DataError(f"All patients with images of {few} are among those to validate with: none is left. {fix}")
    lost = ", ".join(sorted(map(str, every - held)))
    if lost and held:
        say(f"No image of {lost} is among those to validate with: figures say nothing of it.")


def _default_split(info: pd.DataFrame) -> str:
    if "patient" not in info:
        return "random"
    with quiet():  # the splitter says it
        n_groups = groups_of(info).nunique()
    if n_groups > 1:
        return "patient"
    one = info["patient"].replace("", np.nan).nunique() <= 1
    who = "of one patient" if one else "tied to each other (by a study, a series or a picture that patients share)"
    say(f"All images are {who}: they are split at random, and validation will look better than it is.")
    return "random"


def _facts(info: pd.DataFrame) -> pd.DataFrame | None:
    """The columns that tell more than what the files are; None where there are none."""
    facts = info.drop(columns=[*(OURS - {"frame", "are_scans", "flags"}), *OF_SHARDS], errors="ignore")
    return facts if len(facts.columns) else None


def auto_workers(
    n_items: int,  # Images in an epoch
    pixels: float,  # Of an image, on average
) -> int:
    """Worker processes that open the images: none where starting them each epoch costs more than they save.

    Measured on 2 shared CPUs: an image takes 0.5 ms and 6 ns a pixel; an epoch of 2.5 s took 3.2 s with two workers.
    """
    seconds = n_items * (0.5e-3 + 6e-9 * pixels)
    cpus = num_cpus()
    return 0 if seconds < 5 or cpus == 1 else min(8, cpus)


def _opener(info: pd.DataFrame, n_in: int, size: tuple[int, int] | None, item_tfms: list, window) -> OpenChecked:
    if size and not item_tfms:
        opener = OpenCovered(n_in, size)
    else:
        blank = int(info["width"].median()), int(info["height"].median())
        opener = OpenChecked(n_in, max(size) if size else None, blank)
    opener.seen = seen_in(info, window)
    opener.are_scans = opener.seen is not None
    return opener


def _keeping(items: list, size=128, n_in=None, item_tfms=None, cache=True, max_gb=20.0, **_):
    """Where the pixels of items go, with the settings of `from_folder`: a context manager."""
    if cache and _as_list(item_tfms):
        say("item_tfms see whole images, so these are decoded anew in every epoch. batch_tfms work on kept pixels.")
        cache = False
    return keeping(size is not None and cache, items, as_size(size), 1 if n_in == 1 else None, max_gb)


def _check_settings(
    size=128,
    bs=64,
    valid_pct=0.1,
    seed=42,
    n_in=None,
    item_tfms=None,
    batch_tfms=None,
    num_workers=None,
    device=None,
    cache=True,
    max_gb=20.0,
    window=None,
    split_by=None,
) -> None:
    """Before any file is looked at: what is no setting raises `TypeError`, one that makes no sense `DataError`."""
    sides = [] if size is None else list(np.atleast_1d(size))
    if size is not None and (len(sides) not in (1, 2) or not all(_is_count(s, 8) for s in sides)):
        what = "the side of the images in pixels, an integer from 8 up, or two (height, width)"
        raise DataError(f"size is {what}; got {size!r}.")
    if not _is_count(bs, 1):
        raise DataError(f"bs is the batch size, an integer from 1 up; got {bs!r}.")
    if not isinstance(valid_pct, (int, float)) or not 0 <= valid_pct < 1:
        what = "the share of images to validate with, from 0 up to but not including 1"
        raise DataError(f"valid_pct is {what}; got {valid_pct!r}.")
    if not _is_count(seed, 0):
        raise DataError(f"seed is an integer from 0 up; got {seed!r}.")
    if n_in not in (None, 1, 3):
        raise DataError(f"n_in is 1 (grey), 3 (color) or None (as the images are); got {n_in!r}.")
    if num_workers is not None and not _is_count(num_workers, 0):
        raise DataError(f"num_workers is the number of processes, 0 for none, or None; got {num_workers!r}.")
    check_cache(cache, max_gb)
    check_window(window, n_in)
    if split_by is not None and not isinstance(split_by, str):
        raise DataError(f"split_by is 'patient', 'random' or the name of a column; got {type(split_by).__name__}.")


def _check_array(array: object) -> None:
    """Raises `DataError` unless it is a stack of images."""
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        got = f"dtype {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise DataError(f"from_array takes a uint8 NumPy array, got {got}. Scale floats in [0, 1] by 255 and cast.")
    if array.ndim not in (3, 4) or array.shape[3:] not in ((), (1,), (3,)) or 0 in array.shape[1:]:
        raise DataError(f"from_array takes N x H x W or N x H x W x C with C of 1 or 3, got shape {array.shape}.")
    if array.ndim == 3 and array.shape[2] <= 4:
        fix = "Is it one image? from_single_image(Image.fromarray(array)), or array[None] as a stack of one."
        raise DataError(f"from_array takes many images, got shape {array.shape}. {fix}")
    if min(array.shape[1:3]) < 2:
        height, width = array.shape[1:3]
        raise DataError(f"from_array takes images of at least 2 x 2 pixels, got {height} x {width}.")


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least


def as_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width, as plain integers: fastai takes no others."""
    if size is None:
        return None
    sides = [int(s) for s in np.atleast_1d(size)]
    return (sides[0], sides[-1])


def _check_count(n: int, report: pd.DataFrame) -> None:
    if n >= 2:
        return
    found = "no image" if n == 0 else "one image"
    counts = ", ".join(f"{n} {code}" for code, n in report["code"].value_counts().items())
    left_out = f" {len(report)} files were left out: {counts}." if len(report) else ""
    one = " For thousands of crops of one picture use from_single_image." if n == 1 else ""
    raise DataError(f"Found {found} to read; at least two are needed, one of them to validate with.{left_out}{one}")


def _as_list(tfms: object | Iterable | None) -> list:
    if tfms is None:
        return []
    return list(tfms) if isinstance(tfms, (list, tuple, L)) else [tfms]  # a bare albumentations Compose iterates, too


def _item_tfms(tfms) -> list:
    return wrap_albumentations(_as_list(tfms))
