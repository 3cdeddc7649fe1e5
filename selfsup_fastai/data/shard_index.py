"""What is known of the images in shards: from the index that lies beside them, or found out once and remembered.

An index is a CSV file, a row an image: shard, bytes (of the shard), offset, size, width, height, mode, format,
channels, bits, code (why the image cannot be used; empty for good ones). Whoever has it needs no shard to know what is
in them.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd

from selfsup_fastai.data.fetching import Fetch, Fetched, Local, check_fetch
from selfsup_fastai.data.files import check_files, find_files, result_folder, summary
from selfsup_fastai.data.reasons import REASONS
from selfsup_fastai.data.secret import cache_folder, secret_of
from selfsup_fastai.data.shards import MIXED, Members, ShardImage, ShardMember, Shards, members_of
from selfsup_fastai.data.usable import Usable
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say
from selfsup_fastai.writing import write_csv

INDEX = "index.csv"
FACTS = ["width", "height", "mode", "format", "channels", "bits"]
COLUMNS = ["shard", "bytes", "offset", "size", *FACTS, "code"]
NUMBERS = ["bytes", "offset", "size", "width", "height", "channels", "bits"]

_NOTES = "shards-1"  # within the cache folder: what was found in shards without an index
_AT_ONCE = 4096  # images that are tried before what was found is written down
_TRIED_FIRST = 3  # shards of which one, at least, must be within reach
_FLEETING = {"missing", "no_permission", "timeout", "crashed", "out_of_memory"}  # another time it may be decoded
_IN_PASSING = 2  # shards beside those that are mixed: others are still at the last one, or at the next


def is_shard(file: str | os.PathLike) -> bool:
    """Whether a file is a shard by its name."""
    return os.fspath(file).lower().endswith(".tar")


def all_shards(files: Iterable[Path]) -> bool:
    """Whether there are shards among these files, and nothing else but an index."""
    files = list(files)
    return any(map(is_shard, files)) and all(is_shard(file) or file.name == INDEX for file in files)


def usable_in_shards(
    path: str | os.PathLike | Iterable[str | os.PathLike],  # As for `UnlabeledDataLoaders.from_shards`
    fetch: Fetch | None = None,
    local: str | os.PathLike | None = None,
    keep_gb: float = 50.0,
    mixed: int = MIXED,
    min_side: int = 128,  # As for `check_files`
) -> Usable:
    """Images in shards that can be decoded, and the report on the others, of which one line is said.

    Each image is tried in a process with limits before it is used: when the index was made, or now.
    """
    check_fetch(fetch, local, keep_gb)
    if isinstance(mixed, bool) or not isinstance(mixed, int) or mixed < 1:
        raise DataError(f"mixed is the number of shards whose images come mixed, an integer from 1 up; got {mixed!r}.")
    named, most = _named(path, fetch), round(keep_gb * 1e9)
    place = Local(named.root) if fetch is None else Fetched(fetch, result_folder(local), named.names, most)
    tables = {name: table for name, table in named.tables.items() if _is_of(place, name, table)}
    if isinstance(place, Fetched):
        _try_fetching(place, named.names[:_TRIED_FIRST], tables)
    tables |= dict(_remembered_or_found(place, [name for name in named.names if name not in tables], min_side))
    n_bytes = [int(tables[name]["bytes"].max()) if len(tables[name]) else 0 for name in named.names]
    if isinstance(place, Fetched):
        _check_room(max(n_bytes), most, min(mixed, len(n_bytes)))
    info, report = _parted([tables[name] for name in named.names], [place.known_as(name) for name in named.names])
    shards = Shards(named.names, n_bytes, place, mixed)
    places = info[["shard", "offset", "size"]].to_numpy(int).tolist()
    info["source"] = pd.Series([ShardImage(shards, *where) for where in places], dtype=object, index=info.index)
    line = summary(report)
    if line:
        say(line)
    return Usable(info, report)


class _Named(NamedTuple):
    names: list[str]
    root: Path  # Of local ones: what the names are relative to
    tables: dict[str, pd.DataFrame]  # What an index says of each


def _named(path: object, fetch: Fetch | None) -> _Named:
    """The shards that are meant. Raises `DataError` where there are none."""
    if isinstance(path, (str, os.PathLike)):
        path = Path(path).expanduser()
        return _indexed(path, path.parent) if path.is_file() and not is_shard(path) else _in_folder(path, fetch)
    if not isinstance(path, Iterable):
        raise DataError(f"Shards are a folder, an index or a list of tar files; got {type(path).__name__}.")
    names = list(dict.fromkeys(map(os.fspath, path)))
    if not names:
        raise DataError("The list of shards is empty.")
    return _Named(names, Path(), {})


def _in_folder(folder: Path, fetch: Fetch | None) -> _Named:
    if folder.is_file():
        return _Named([folder.name], folder.parent, {})
    files = [file for file in find_files(folder) if is_shard(file)]
    known = _indexed(folder / INDEX, folder) if (folder / INDEX).is_file() else _Named([], folder, {})
    if fetch is not None and not known.names:
        fix = f"Name the index that `selfsup shards` wrote ({INDEX}), or list the names of the shards."
        raise DataError(f"There is no index in the folder {os.fspath(folder)!r}. {fix}")
    there = [] if fetch is not None else [file.relative_to(folder).as_posix() for file in files]
    names = sorted({*known.names, *there})
    if not names:
        raise DataError(f"There is no shard (.tar) in the folder {os.fspath(folder)!r}.")
    return _Named(names, folder, known.tables)


def _indexed(file: Path, root: Path) -> _Named:
    index = read_index(file)
    return _Named(list(index["shard"].unique()), root, dict(iter(index.groupby("shard", sort=False))))


def read_index(
    file: str | os.PathLike,
) -> pd.DataFrame:
    """The index of shards. Raises `DataError` where it is none."""
    try:
        index = pd.read_csv(file, dtype={"shard": str, "mode": str, "format": str, "code": str}, keep_default_na=False)
        index = index[COLUMNS].astype(dict.fromkeys(NUMBERS, np.int64))
    except (ValueError, KeyError, UnicodeDecodeError, OverflowError):  # pandas' own errors are ValueErrors
        index = None
    if index is None or not len(index) or (index[NUMBERS] < -1).any(axis=None):
        raise DataError(
            f"{Path(file).name!r} is no index of shards. `selfsup shards` writes one, with these columns: "
            f"{', '.join(COLUMNS)}."
        )
    good = index[index["code"] == ""]
    if ((good["offset"] < 0) | (good["size"] < 1) | (good["offset"] + good["size"] > good["bytes"])).any():
        raise DataError("The index names images outside of their shards. Write it anew: `selfsup shards`.")
    if any(name.startswith("-") for name in index["shard"].unique()):  # `fetch` would take it for an option
        raise DataError("The index names shards that begin with a hyphen.")
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in index["shard"].unique()):
        raise DataError("The index names shards outside of its folder: their names must be relative to it.")
    return index


def _is_of(place: Local | Fetched, name: str, table: pd.DataFrame) -> bool:
    """Whether an index tells of this very shard, as far as its size says."""
    if isinstance(place, Fetched):
        return True
    with suppress(OSError):
        return os.path.getsize(place.file(name)) == table["bytes"].iloc[0]
    return False


def _try_fetching(place: Fetched, names: list[str], tables: dict[str, pd.DataFrame]) -> None:
    """Now, where an error can be told. Raises `DataError` where none of these shards can be had."""
    for name in names:
        with suppress(OSError):
            place.file(name, int(tables[name]["bytes"].iloc[0]) if name in tables else None)
            return
    raise DataError(
        f"The first {len(names)} shards could not be fetched: {place.said}. Try `fetch` by hand with the name "
        f"{names[-1]!r} and the path of a file that it is to write."
    )


def _check_room(n_bytes: int, most: int, open_at_once: int) -> None:
    need = (open_at_once + _IN_PASSING) * n_bytes
    if need > most:
        raise DataError(
            f"keep_gb={most / 1e9:g} is too little: shards of up to {n_bytes / 1e9:.2g} GB, of which {open_at_once} "
            f"come mixed, need {need / 1e9:.2g} GB, or each would be fetched again and again. Give more, a smaller "
            "mixed, or smaller shards."
        )


# --- shards without an index ------------------------------------------------------------------------------------------


def _remembered_or_found(place: Local | Fetched, names: list[str], min_side: int) -> Iterator[tuple[str, pd.DataFrame]]:
    """A table for each shard; what is found in a shard is written down, so that it need not be found again."""
    others, todo = Counter(), []
    for name in names:
        note = _note(place, name)
        table = _read_note(note)
        if table is not None:
            yield name, table
            continue
        todo.append((name, note, *_opened(place, name)))
        others.update(todo[-1][-1].others)
        if isinstance(place, Fetched) or sum(len(members.images) for *_, members in todo) >= _AT_ONCE:
            yield from _tried(todo, min_side)
            todo = []
    yield from _tried(todo, min_side)
    if others:
        kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in others.most_common(6))
        say(f"Members of shards that are no images by their suffix are not looked at: {kinds}.")


def _opened(place: Local | Fetched, name: str) -> tuple[Path | None, Members]:
    """The tar file and what is in it; None where it cannot be had."""
    try:
        file = place.file(name)
        return file, members_of(file)
    except OSError:
        return None, Members([], Counter(), whole=False)


def _tried(
    todo: list[tuple[str, Path | None, Path | None, Members]], min_side: int
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each image decoded once, and what came of it."""
    members = [ShardMember(os.fspath(file), *where) for _, _, file, found in todo for where in found.images]
    facts = _facts_of(members, min_side)
    first = 0
    for name, note, file, found in todo:
        table = facts.iloc[first : first + len(found.images)].reset_index(drop=True)
        first += len(found.images)
        if not found.whole:
            rest = {**dict.fromkeys(NUMBERS, -1), "mode": "", "format": "", "code": "shard"}
            table = pd.concat([table, pd.DataFrame([rest])], ignore_index=True)
        with suppress(OSError):
            table["bytes"] = -1 if file is None else os.path.getsize(file)
        table = table.assign(shard=name)[COLUMNS]
        if note is not None and file is not None and not _FLEETING & set(table["code"]):
            _write_note(table, note)
        yield name, table


def _facts_of(members: list[ShardMember], min_side: int) -> pd.DataFrame:
    """A row each, with `COLUMNS` but for the shard's own."""
    table = pd.DataFrame({"offset": [m.offset for m in members], "size": [m.size for m in members]}, dtype=np.int64)
    table = table.assign(
        mode="", format="", code="", **dict.fromkeys(["bytes", "width", "height", "channels", "bits"], -1)
    )
    if members:
        ok, report = check_files(members, min_side=min_side)
        bad = np.setdiff1d(np.arange(len(members)), ok.index)  # in the order of the report
        table.loc[ok.index, FACTS] = ok[FACTS]
        table.loc[bad, "code"] = report["code"].to_numpy()
        table.loc[table["format"] == "DICOM", "code"] = "dicom"
        table.loc[(table["code"] == "") & (table[["width", "height"]].min(axis=1) < 2), "code"] = "too_small"
    return table


def _note(place: Local | Fetched, name: str) -> Path | None:
    """The file with what was found in a shard; None where it cannot be known or kept."""
    if isinstance(place, Fetched):
        return place.folder / f".{quote(name, safe='')}.csv"
    known = place.print_of(name, -1)
    try:
        digest = blake2b(known or b"", key=secret_of(cache_folder()), digest_size=16)
    except OSError:
        return None
    return None if known is None else cache_folder() / _NOTES / f"{digest.hexdigest()}.csv"


def _read_note(note: Path | None) -> pd.DataFrame | None:
    if note is None or not note.is_file():
        return None
    try:
        return read_index(note)
    except (DataError, OSError):
        return None


def _write_note(table: pd.DataFrame, note: Path) -> None:
    """The name of the shard stays out: the file lies where nothing is to be named."""
    with suppress(OSError):
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_csv(table.assign(shard="."), note)


# --- what comes of it -------------------------------------------------------------------------------------------------


def _parted(tables: list[pd.DataFrame], files: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Images that can be used, `shard` being the number of theirs; and the report on the others."""
    every = pd.concat([table.assign(shard=i, nth=range(1, len(table) + 1)) for i, table in enumerate(tables)])
    every = every.reset_index(drop=True)
    left_out = every[every["code"] != ""]
    report = pd.DataFrame(
        {
            "file": [files[i] for i in left_out["shard"]],
            "code": list(left_out["code"]),
            "message": [_message(code, nth) for code, nth in zip(left_out["code"], left_out["nth"])],
        },
        columns=["file", "code", "message"],
    )
    report.attrs["checked"] = int((every["offset"] >= 0).sum())
    info = every[every["code"] == ""].drop(columns=["bytes", "code", "nth"]).reset_index(drop=True)
    info["file"] = [files[i] for i in info["shard"]]
    return info, report


def _message(code: str, nth: int) -> str:
    why = REASONS.get(code, code)
    return f"{why} What comes before the damage is used." if code == "shard" else f"{why} (image {nth} of the shard)"
