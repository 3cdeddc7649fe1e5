"""Where shards lie: in a folder, or elsewhere, from where they are brought to one as they are needed."""

import glob
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock

from selfsup_fastai.errors import DataError

Fetch = str | Callable[[str, Path], object]
"""A command with {name} and {path} in it, or a function of both: it brings the shard of that name to that path."""

FETCH_SECONDS = 1200.0  # a command may take for a shard: then it hangs. Less than processes wait for each other
_PAUSES = (0, 1, 4)  # seconds before each attempt
_FAILED_SECONDS = 600.0  # until a shard that could not be had is tried again


class Local:
    """Shards in a folder."""

    def __init__(self, root: Path):
        self.root = root

    def known_as(self, name: str) -> Path:
        """What stands for the shard in reports."""
        return self.root / name

    def file(self, name: str, n_bytes: int | None = None) -> Path:
        """The tar file of a shard."""
        return self.root / name

    def print_of(self, name: str, n_bytes: int) -> bytes | None:
        """What changes when the shard does; None where it is gone."""
        try:
            info = os.stat(self.root / name)
        except OSError:
            return None
        return repr((os.path.abspath(self.root / name), info.st_size, info.st_mtime_ns)).encode()


class Fetched:
    """Shards that lie elsewhere: each is fetched when it is needed first, and the least recently used gives way.

    Any number of processes of a machine may share the folder: one of them fetches, others wait for it. Only what was
    fetched is ever removed.
    """

    def __init__(
        self,
        fetch: Fetch,
        folder: str | os.PathLike,
        names: Sequence[str],  # Of all shards
        max_bytes: int,  # Of the shards that lie in the folder
    ):
        self.fetch, self.folder, self.max_bytes = fetch, Path(folder), max_bytes
        self.files = {name: self.folder / quote(name, safe="") for name in names}
        self.failed: dict[str, float] = {}  # when they could not be had, in this process
        self.said = "another process has tried in vain"  # Why the last one could not

    def known_as(self, name: str) -> Path:
        """What stands for the shard in reports."""
        return Path(name)

    def file(self, name: str, n_bytes: int | None = None) -> Path:
        """The tar file of a shard, fetched if it is not there. Raises `OSError` where it cannot be had.

        `n_bytes`: how large it is, if that is known; a file of another size is none.
        """
        file = self.files[name]
        if not _is_there(file, n_bytes):
            if time.monotonic() - self.failed.get(name, -_FAILED_SECONDS) < _FAILED_SECONDS:
                raise OSError("the shard could not be fetched a while ago")
            began = time.time()
            with FileLock(self._beside(file, "lock")):
                if not _is_there(file, n_bytes):
                    self._bring(name, file, n_bytes, began)
        with suppress(OSError):  # another process has just removed it: whoever opens it sees
            os.utime(file)  # in use now
        return file

    def print_of(self, name: str, n_bytes: int) -> bytes | None:
        """What tells the shard from others. Its time of change is that of the copy, and says nothing."""
        return repr((os.path.abspath(self.files[name]), n_bytes)).encode()

    def _beside(self, file: Path, kind: str) -> Path:
        return self.folder / f".{file.name}.{kind}"

    def _bring(self, name: str, file: Path, n_bytes: int | None, began: float) -> None:
        """`began`: when this process began to wait for its turn; what another one tried since is not tried again."""
        in_vain = self._beside(file, "failed")
        try:
            if not (in_vain.exists() and in_vain.stat().st_mtime >= began):
                for pause in _PAUSES:
                    time.sleep(pause)
                    if self._attempt(name, file, n_bytes):
                        self._make_room(file)
                        return
                in_vain.touch()
        except subprocess.TimeoutExpired:
            self.said = f"the command took more than {FETCH_SECONDS / 60:g} minutes"
            in_vain.touch()  # once is enough
        self.failed[name] = time.monotonic()
        raise OSError("the shard could not be fetched")

    def _attempt(self, name: str, file: Path, n_bytes: int | None) -> bool:
        """Whether it went well. Raises `TimeoutExpired` where a command has hung, and ended it."""
        for left in self.folder.glob(f".{glob.escape(file.name)}.*.part"):  # by one that was killed: it may write on
            left.unlink(missing_ok=True)
        part = self._beside(file, f"{os.getpid()}-{time.monotonic_ns()}.part")
        try:
            if self._run(name, part):
                if _is_there(part, n_bytes):
                    os.replace(part, file)
                    return True
                size = " of the size that the index tells" if n_bytes else ""
                self.said = f"it went well, but there was no file{size} then"
            return False
        finally:
            part.unlink(missing_ok=True)

    def _run(self, name: str, part: Path) -> bool:
        try:
            if callable(self.fetch):
                self.fetch(name, part)
                return True
            with tempfile.TemporaryFile() as said:
                streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": said}
                done = subprocess.run(command(self.fetch, name, part), timeout=FETCH_SECONDS, **streams)
                said.seek(max(0, said.seek(0, os.SEEK_END) - 1000))
                lines = said.read().decode(errors="replace").split("\n")
            self.said = f"{next(filter(str.strip, reversed(lines)), 'nothing was said')} (exit code {done.returncode})"
            return done.returncode == 0
        except subprocess.TimeoutExpired:
            raise
        except Exception as error:  # it does not start; or whatever a user's function raises: the run goes on without
            self.said = f"{type(error).__name__}: {error}"
            return False

    def _make_room(self, fresh: Path) -> None:
        """Remove shards, the least recently used first, until the rest fit. Whoever has one open reads on."""
        there = []
        for file in self.files.values():
            with suppress(OSError):
                info = file.stat()
                there.append((info.st_mtime_ns, info.st_size, file))
        total = sum(size for _, size, _ in there)
        for _, size, file in sorted(there):
            if total > self.max_bytes and file != fresh:
                with suppress(OSError):  # Windows: while it is read it stays
                    file.unlink(missing_ok=True)
                    total -= size


def _is_there(file: Path, n_bytes: int | None) -> bool:
    """Whether there is a file, of that size: another one is of an earlier version of the shard, or half of it."""
    try:
        return n_bytes in (None, file.stat().st_size)
    except OSError:
        return False


def command(
    template: str,  # Such as 'aws s3 cp s3://bucket/{name} {path}'
    name: str,
    path: Path,
) -> list[str]:
    """The words of a command; no shell sees them, unless the command is one itself (`sh -c`)."""
    return [word.replace("{name}", name).replace("{path}", os.fspath(path)) for word in shlex.split(template)]


def _words(fetch: str) -> list[str]:
    try:
        return shlex.split(fetch)
    except ValueError as error:
        raise DataError(f"fetch is no command: {str(error)[:1].lower()}{str(error)[1:]}.") from error


def check_fetch(fetch: object, local: object, keep_gb: object) -> None:
    """Raises `DataError` for settings that make no sense."""
    if fetch is None:
        if local is not None:
            raise DataError("local is the folder for shards that are fetched, and nothing says how: fetch=.")
        return
    if not callable(fetch) and not (isinstance(fetch, str) and "{name}" in fetch and "{path}" in fetch):
        example = "'aws s3 cp s3://bucket/{name} {path}'"
        raise DataError(
            f"fetch is a command with {{name}} and {{path}} in it, such as {example}, or a function of both."
        )
    if isinstance(fetch, str) and shutil.which(_words(fetch)[0]) is None:
        raise DataError(f"There is no command {_words(fetch)[0]!r} here to fetch shards with.")
    if local is None:
        raise DataError("Shards that are fetched need a folder of their own on a local disk: local=.")
    if isinstance(keep_gb, bool) or not isinstance(keep_gb, (int, float)) or not keep_gb > 0:
        raise DataError(f"keep_gb is how many GB of shards may lie in `local`, a number above 0; got {keep_gb!r}.")
