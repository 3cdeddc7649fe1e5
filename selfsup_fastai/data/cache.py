"""The folder in which decoded pixels are kept from run to run.

    SECRET            random bytes: names in the index are hashes keyed with them, never paths
    index-1.sqlite    which image lies where; what is known of files
    pixels-1/         one file for each build: images one after another
    locks/            of builds that are going on

The number is that of the format: versions with another one keep theirs beside it. The folder is `$SELFSUP_CACHE`, else
`selfsup_fastai` within the user's cache folder, and only its owner may look into it. An image is known by its path,
size and time of change, so a file that changes is decoded anew, and pixels of files that are gone are dropped when
their turn comes: the least recently used build first, as soon as `max_gb` is reached. Images enter the index only after
their pixels are on the disk: a run that is killed leaves nothing half done.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from selfsup_fastai.data.opening import Facts
from selfsup_fastai.data.pixelstore import PLACE, PixelFile
from selfsup_fastai.data.secret import SECRET, cache_folder, ensure_secret
from selfsup_fastai.errors import DataError, unknown
from selfsup_fastai.messages import say

FORMAT = 1
"""Of the index and of the pixels: another one has its own, and neither touches the other's."""

_STRAY_SECONDS = 86_400  # a younger file may belong to a build whose row is on its way
_TABLES = """
CREATE TABLE IF NOT EXISTS builds (name TEXT PRIMARY KEY, settings TEXT, about TEXT, created REAL, used REAL);
CREATE TABLE IF NOT EXISTS images (settings TEXT, key BLOB, build TEXT, offset INTEGER, channels INTEGER,
    height INTEGER, width INTEGER, item INTEGER, PRIMARY KEY (settings, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS images_of_build ON images (build);
CREATE TABLE IF NOT EXISTS files (key BLOB PRIMARY KEY, facts TEXT) WITHOUT ROWID;
"""


class CacheUnusable(DataError):
    """The folder cannot be used; the text says why, and names no image."""


def is_damage(error: Exception) -> bool:
    """Whether what was read from an index makes no sense; not, whether it is busy, out of reach or wrongly asked."""
    undecodable = isinstance(error, sqlite3.OperationalError) and "decode" in str(error)  # as SQLite, or as JSON
    return undecodable or isinstance(error, (ValueError, TypeError)) or type(error) is sqlite3.DatabaseError


class PixelCache:
    """The cache folder, opened. Use it as a context manager.

    Raises `CacheUnusable` where the folder can be neither made nor read. Any number of processes may use it at once.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder) if folder else cache_folder()
        self.index, self.pixels = self.folder / f"index-{FORMAT}.sqlite", self.folder / f"pixels-{FORMAT}"
        try:
            self._prepare()
            self.db = self._opened()
            if self.writable:
                self._remove_strays()
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise CacheUnusable(f"the cache folder cannot be used ({reason})") from None

    def __enter__(self) -> "PixelCache":
        return self

    def __exit__(self, *_exc) -> None:
        self.db.close()

    def _prepare(self) -> None:
        if os.path.isdir(self.folder) and not os.access(self.folder, os.W_OK):
            return  # what is in it can be read
        for folder in (self.folder, self.pixels, self.folder / "locks"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ensure_secret(self.folder)

    def _opened(self) -> sqlite3.Connection:
        self.writable = os.access(self.folder, os.W_OK)
        if not self.writable:
            return self._read_only()
        try:
            return self._connected()
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
        return self._emptied()

    def _read_only(self) -> sqlite3.Connection:
        target = f"{self.index.absolute().as_uri()}?mode=ro"
        try:
            return _connect(target, "PRAGMA schema_version")
        except sqlite3.OperationalError:  # no locks there, or a journal that cannot be played back: as if nobody wrote
            return _connect(f"{target}&immutable=1", "PRAGMA schema_version")

    def renew(self) -> None:
        """Throw away a damaged index, and all pixels with it: nobody knows any more whose they are."""
        self.db.close()
        self.db = self._emptied()

    def _emptied(self) -> sqlite3.Connection:
        say("The index of the pixel cache was damaged: it is made anew, and images are decoded once more.")
        for file in self.folder.glob(f"{self.index.name}*"):
            file.unlink(missing_ok=True)  # with its journal, which would be played back into the new one
        _remove(self.pixels.glob("*.pixels"))
        return self._connected()

    def _connected(self) -> sqlite3.Connection:
        if not self.index.exists():
            self.index.touch(mode=0o600)
        return _connect(self.index, _TABLES)  # where they are there, nothing is written: the disk may be full

    def _remove_strays(self) -> None:
        """Pixels that no build leads to, as a system leaves them that keeps files while they are in use."""
        with suppress(OSError, sqlite3.Error):  # damage shows where the index is needed, and is mended there
            known = {build for (build,) in self.db.execute("SELECT name FROM builds")}
            strays = [file for file in self.pixels.glob("*.pixels") if file.stem not in known]
            _remove(file for file in strays if time.time() - file.stat().st_mtime > _STRAY_SECONDS)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    # --- names ------------------------------------------------------------------------------------------------------

    @cached_property
    def _secret(self) -> bytes:
        return (self.folder / SECRET).read_bytes()

    def key(self, item: Any) -> bytes | None:
        """The name of an image: a keyed hash of a file's path, size and time of change, or of an array's contents.

        An object with an `identity` (bytes) is known by that; a path with one (a frame of a file) by both. None for
        what has no identity, or a file that is missing.
        """
        if isinstance(item, (str, os.PathLike)):
            try:
                info = os.stat(item)
            except OSError:
                return None
            path, within = os.fsencode(os.path.abspath(item)), getattr(item, "identity", None)
            parts = [path, str((info.st_size, info.st_mtime_ns)).encode()]
            return self._hash(b"file", *parts, *([] if within is None else [within]))
        if isinstance(item, np.ndarray):
            return self._hash(b"array", str((item.shape, item.dtype.str)).encode(), np.ascontiguousarray(item).data)
        identity = getattr(item, "identity", None)
        return self._hash(b"item", identity) if isinstance(identity, bytes) else None

    def _hash(self, kind: bytes, *parts) -> bytes:
        digest = hashlib.blake2b(digest_size=16, key=self._secret, person=kind)
        for part in parts:
            digest.update(part)
            digest.update(b"\0")
        return digest.digest()

    # --- what is known ----------------------------------------------------------------------------------------------

    def facts(self, keys: Iterable[bytes]) -> dict[bytes, Facts]:
        """What the check said of files that were seen before."""
        known: dict[str, Facts] = {}  # many files have the same, and one object for them all
        rows = self._rows("SELECT key, facts FROM files WHERE key IN", keys)
        return {key: known.setdefault(facts, known.get(facts) or json.loads(facts)) for key, facts in rows}

    def places(self, settings: str, keys: Iterable[bytes]) -> dict[bytes, tuple]:
        """Build, offset, channels, height, width and bytes a value of those images that are there."""
        what = "SELECT key, build, offset, channels, height, width, item FROM images WHERE settings = ? AND key IN"
        found = {key: place for key, *place in self._rows(what, keys, settings)}
        sizes = {build: self.size(build) for build in {place[0] for place in found.values()}}
        ends = ((key, place[0], place[1] + math.prod(place[2:])) for key, place in found.items())
        lost = {key for key, build, end in ends if end > sizes[build]}
        return {key: tuple(place) for key, place in found.items() if key not in lost}

    def _rows(self, query: str, keys: Iterable[bytes], *arguments) -> Iterator[tuple]:
        keys = list(dict.fromkeys(keys))
        for i in range(0, len(keys), 500):
            some = keys[i : i + 500]
            yield from self.db.execute(f"{query} ({','.join('?' * len(some))})", (*arguments, *some)).fetchall()

    def opened(self, places: Sequence[tuple | None], missing: tuple) -> tuple[list[PixelFile], np.ndarray]:
        """Files, and where in them each image lies, (N,) of `PLACE`; `missing` for None."""
        builds = list(dict.fromkeys(place[0] for place in places if place))
        numbers = {build: i for i, build in enumerate(builds)}
        table = np.array([(numbers[p[0]], *p[1:]) if p else missing for p in places], dtype=PLACE)
        return [PixelFile(self.pixels_of(build)) for build in builds], table

    def pixels_of(self, build: str) -> Path:
        """The file that holds the pixels of a build."""
        return self.pixels / f"{build}.pixels"

    def size(self, build: str) -> int:
        """Bytes of a build that are on the disk."""
        try:
            return self.pixels_of(build).stat().st_size
        except OSError:
            return 0

    # --- changes ----------------------------------------------------------------------------------------------------

    def remember(self, facts: dict[bytes, Facts]) -> None:
        """Keep what the check said of files."""
        with self._transaction():
            rows = [(key, json.dumps(what)) for key, what in facts.items()]
            self.db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?)", rows)

    def new_build(self, settings: str, about: str) -> str:
        """The name of a build that images can be added to; `about` says in words what `settings` are."""
        name = secrets.token_hex(4)
        now = time.time()
        self.db.execute("INSERT INTO builds VALUES (?, ?, ?, ?, ?)", (name, settings, about, now, now))
        self.pixels_of(name).touch(mode=0o600)
        return name

    def add(self, settings: str, build: str, images: dict[bytes, tuple]) -> None:
        """Images (offset, channels, height, width, bytes a value) whose pixels are on the disk by now."""
        rows = [(settings, key, build, *place) for key, place in images.items()]
        with self._transaction():
            self.db.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def use(self, builds: Iterable[str]) -> None:
        """These builds are in use now: others are dropped before them."""
        with suppress(sqlite3.Error):  # read-only, or a full disk: that must not cost the pixels
            self.db.executemany("UPDATE builds SET used = ? WHERE name = ?", [(time.time(), b) for b in builds])

    def free(self) -> int:
        """Bytes free on the disk, less a twentieth of it, at most 1 GB, that is left to others."""
        usage = shutil.disk_usage(self.folder)
        return usage.free - min(10**9, usage.total // 20)

    def total(self) -> int:
        """Bytes of all pixels."""
        return sum(self.size(file.stem) for file in self.pixels.glob("*.pixels"))

    def make_room(self, n_bytes: int, max_bytes: int, keep: Iterable[str]) -> bool:
        """Drop builds, the least recently used first, until `n_bytes` more fit; whether they do. `keep` stay.

        Nothing is dropped where all of it would not be enough.
        """
        keep = set(keep)
        names = [b for (b,) in self.db.execute("SELECT name FROM builds ORDER BY used") if b not in keep]
        old = [(name, self.size(name)) for name in names]
        while (missing := max(self.total() + n_bytes - max_bytes, n_bytes - self.free())) > 0:
            if sum(size for _, size in old) < missing:
                return False
            self.drop(old.pop(0)[0])
        return True

    def drop(self, build: str) -> bool:
        """Remove a build; False, and it stays whole, where its file cannot be removed (Windows: while it is in use).

        Elsewhere runs that use it go on: they hold its file open.
        """
        try:
            self.pixels_of(build).unlink(missing_ok=True)  # first: on a full disk the index cannot be written to before
        except OSError:
            return False
        with self._transaction():
            self.db.execute("DELETE FROM images WHERE build = ?", (build,))
            self.db.execute("DELETE FROM builds WHERE name = ?", (build,))
        return True

    def table(self) -> pd.DataFrame:
        """A row a build: what was decoded, images, GB, when it was made and last used."""
        query = """SELECT name, about, COUNT(key), created, used FROM builds LEFT JOIN images ON build = name
                   GROUP BY name ORDER BY used DESC"""
        rows = [
            (name, about, n, self.size(name) / 1e9, _date(created), _date(used))
            for name, about, n, created, used in self.db.execute(query)
        ]
        return pd.DataFrame(rows, columns=["build", "what", "images", "GB", "made", "used"])

    def clear(self, builds: Iterable[str] | None = None) -> int:
        """Remove the builds named, or everything that is known; the bytes that were freed.

        Raises `UnknownNameError`, and removes nothing, where one of the names is none.
        """
        before = self.total()
        if builds is None:
            self._clear_all()
        else:
            self._clear_some(list(builds))
        return before - self.total()

    def _clear_some(self, builds: list[str]) -> None:
        known = [b for (b,) in self.db.execute("SELECT name FROM builds")]
        for build in builds:
            if build not in known:
                raise unknown("build in the cache", build, known)
        for build in builds:
            self.drop(build)

    def _clear_all(self) -> None:
        _remove(self.pixels.glob("*.pixels"))  # first: on a full disk the index cannot be written to before
        with self._transaction():
            for table in "images", "builds", "files":
                self.db.execute(f"DELETE FROM {table}")
        with suppress(sqlite3.OperationalError):  # no room for a copy, or another process reads: the rows are gone
            self.db.execute("VACUUM")


def _connect(
    target: Path | str,  # A file, or a URI
    first: str,  # Statements that show whether it can be read: until then SQLite does not look
) -> sqlite3.Connection:
    db = sqlite3.connect(target, timeout=60, isolation_level=None, uri=isinstance(target, str))
    try:
        db.executescript(first)
        return db
    except BaseException:
        db.close()
        raise


def _remove(files: Iterable[Path]) -> None:
    """All that can be: Windows keeps files that are in use."""
    for file in files:
        with suppress(OSError):
            file.unlink()


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
