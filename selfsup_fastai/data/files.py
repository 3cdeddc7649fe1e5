"""Finding the files of a folder, and trying each of them in child processes, so that no file can stop a run."""

import json
import os
import queue
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from math import prod
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from selfsup_fastai.data.opening import OF_DICOM, Facts, answer
from selfsup_fastai.data.reasons import REASONS
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say

__all__ = ["as_paths", "check_files", "find_files", "summary"]

OK_COLUMNS = ["file", "width", "height", "mode", "format", "frames", "channels", "bits", "max"]
REPORT_COLUMNS = ["file", "code", "message"]

_COMMAND = [sys.executable or "", "-m", "selfsup_fastai.data.opening"]
_START_SECONDS = 60.0  # a cold start from a network disk takes many seconds
_FILES_PER_WORKER = 32  # starting a child costs about as much as trying this many files
_listed_in = ContextVar("listed_in", default="dls.report")
_IN_WORDS = {"no_permission": "without permission", "not_a_file": "not a regular file", "dicom": "DICOM"}
_IN_WORDS |= {"shard": "damaged or missing shards"}


def find_files(
    folder: str | os.PathLike,  # Where to look
    recurse: bool = True,  # Look in its folders too, at any depth
) -> list[Path]:
    """Everything in a folder that is not a folder, whatever its name, sorted by path; [] where there is nothing.

    Links to folders are followed, each real folder once, so that loops end and no file comes twice. Folders that cannot
    be read are passed over with one warning. Raises `DataError` where `folder` is no folder that can be read.
    """
    found, n_unreadable, seen = [], 0, set()
    real, linked = [os.fspath(_existing_folder(folder))], []
    while real or linked:
        if not real:  # links last: a file is best known by its own path
            real.append(linked.pop(linked.index(min(linked))))
        try:
            folders, links, files = _entries(real.pop(), seen)
        except OSError:
            n_unreadable += 1
            continue
        found += files
        if recurse:
            real += folders
            linked += links
    if n_unreadable:
        warnings.warn(f"{n_unreadable:,} folder(s) could not be read and were passed over.", stacklevel=2)
    return [Path(path) for path in sorted(found)]


def _existing_folder(folder: str | os.PathLike) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise DataError(f"Expected the path of a folder (str or Path); got {type(folder).__name__}.")
    path = Path(folder).expanduser()
    if os.path.isdir(path):  # never raises, as `path.is_dir()` may
        if os.access(path, os.R_OK | os.X_OK):
            return path
        raise DataError(f"The folder '{path}' may not be read by this user: change its permissions.")
    if os.path.lexists(path):
        raise DataError(
            f"'{path}' is a file, but a folder was expected. For a list of files use `from_files`, "
            f"for many views of one image `from_single_image`."
        )
    where = "" if path.is_absolute() else f" (looked for in '{Path.cwd()}')"
    raise DataError(f"There is no folder '{path}'{where}. Check the spelling.")


def result_folder(out: str | os.PathLike) -> Path:
    """A folder to write to, made if missing. Raises `DataError` where it cannot be."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror
    else:
        return out
    raise DataError(f"The folder {str(out)!r} for the results cannot be made ({why}). Choose another.")


def _entries(folder: str, seen: set[tuple[int, int]]) -> tuple[list[str], list[str], list[str]]:
    """Folders, links to folders, and everything else in a folder; nothing if it is among `seen`, which it joins."""
    folders, links, files = [], [], []
    info = os.stat(folder)
    if (info.st_dev, info.st_ino) in seen:
        return folders, links, files
    seen.add((info.st_dev, info.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = files if not _is_folder(entry) else links if entry.is_symlink() else folders
            kind.append(entry.path)
    return folders, links, files


def _is_folder(entry: os.DirEntry) -> bool:
    """A link to nothing, to itself or to what may not be looked at counts as a file: the check says what it is."""
    try:
        return entry.is_dir()
    except OSError:
        return False


class Keeper(Protocol):
    """Who knows files already, and wants to keep the pixels of others, now that they are decoded."""

    size: tuple[int, int] | None  # Of the windows to be cut from what is kept; None: pixels are not wanted any more
    n_in: int | None  # Channels to keep: 1, or None: as the image is

    def known(self, number: int) -> Facts | None:
        """What the check would say of file `number`, where nothing needs to be done again."""

    def keep(self, number: int, facts: Facts, array: np.ndarray | None) -> None:
        """File `number` was checked; `array` (C, H, W) is there if it could be read and pixels were wanted."""


def check_files(
    paths: Iterable[str | os.PathLike],  # The files to try
    n_workers: int | None = None,  # Child processes; None: one per CPU, at most 8, fewer for few files
    timeout: float = 20.0,  # Seconds that one file may take
    keeper: Keeper | None = None,  # Gets what is decoded, and spares files that it knows
    min_side: int = 128,  # Side that is needed later: large JPEGs are tried at a reduced scale above it
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Decode every file once, in child processes with limits: (what can be used, what cannot and why).

    The first frame has the columns file (as given: a Path or `DicomImage`), width, height, mode, format, frames,
    channels, bits, max (see `opening.describe`), the second file, code (a key of `opening.REASONS`), message. Both keep
    the order of `paths`; the index of the first is the place in it.
    A file that hangs, crashes its process or asks for more than 2 GiB gets a line in the report, and the next one its
    turn. The second frame's `attrs["checked"]` is the number of files tried, for `summary`.
    """
    files = as_paths(paths)
    if n_workers is not None and n_workers < 1:
        raise DataError(f"n_workers is the number of processes, at least 1 (None: chosen by itself); got {n_workers}.")
    found = [keeper.known(i) if keeper else None for i in range(len(files))]
    new = [i for i, facts in enumerate(found) if facts is None]
    if new:
        crew = _Crew([(i, files[i]) for i in new], n_workers or _default_workers(len(new)), timeout, keeper, min_side)
        _all_done(crew, found, "Checking images" if keeper is None else "Decoding images")
    good = [i for i, facts in enumerate(found) if "code" not in facts]
    ok = {"file": [files[i] for i in good]} | {name: [found[i][name] for i in good] for name in OK_COLUMNS[1:]}
    if any("pixel_hash" in found[i] for i in good):
        ok |= {name: [found[i].get(name, "") for i in good] for name in OF_DICOM}
    bad = [{"file": file, **facts} for file, facts in zip(files, found) if "code" in facts]
    report = pd.DataFrame(bad, columns=REPORT_COLUMNS)
    report.attrs["checked"] = len(files)
    return pd.DataFrame(ok, columns=list(ok), index=good).astype({"max": float}), report


def as_paths(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """A list of paths; raises `DataError` for anything else."""
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise DataError("Expected a list of paths; got one. For a folder use `find_files` first, or pass [path].")
    files = list(paths)
    wrong = next((type(file).__name__ for file in files if not isinstance(file, (str, os.PathLike))), None)
    if wrong:
        raise DataError(f"Expected a list of paths (str or Path); got one with {wrong} in it.")
    return [file if hasattr(file, "settings") else Path(file) for file in files]  # a `DicomImage` is a path, too


def _default_workers(n_files: int) -> int:
    return max(1, min(8, usable_cpus(), n_files // _FILES_PER_WORKER))


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_files(
    frames: Sequence[os.PathLike],  # `DicomImage`s
    n_workers: int | None = None,  # As in `check_files`
    timeout: float = 20.0,
) -> list[np.ndarray | None]:
    """Quantiles of the values of each frame outside of its padding (`quantiles_of`), from child processes with limits;
    None for one that cannot be read."""
    found = ask_files("quantiles", frames, "Measuring series", n_workers or _default_workers(len(frames)), timeout)
    return [np.array(facts["quantiles"], np.float32) if "quantiles" in facts else None for facts in found]


def ask_files(
    what: str,  # A key of `opening.ANSWERS`
    files: Sequence[os.PathLike],  # A `DicomImage` or a batch brings `settings` for the request
    doing: str,  # Over the progress bar
    n_workers: int,  # Child processes
    timeout: float,  # Seconds for one of `files`
) -> list[Facts]:
    """What child processes with limits answer about each; code and message where one hangs or crashes."""
    found: list[Facts | None] = [None] * len(files)
    if len(files):
        _all_done(_Crew(list(enumerate(files)), n_workers, timeout, None, 128, what), found, doing)
    return found


def _all_done(crew: "_Crew", found: list[Facts | None], what: str) -> None:
    """Fills in what is found of the files that the crew is to try."""
    notebook = "ipykernel" in sys.modules  # its stderr is no terminal, yet can show a bar
    bar = tqdm(total=sum(crew.sizes.values()), desc=what, unit="file", delay=1, disable=False if notebook else None)
    with bar, crew, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files that threads of this process try: filters are global
        for _ in range(crew.n_jobs):
            i, found[i], array = crew.result()
            if crew.keeper:
                crew.keeper.keep(i, found[i], array)
            bar.update(crew.sizes[i])


class _Crew:
    """Threads that take file after file to a child process each; leaving the block ends them all, whatever they do."""

    def __init__(
        self,
        jobs: list[tuple[int, Path]],
        n_workers: int,
        timeout: float,
        keeper: Keeper | None,
        min_side: int,
        what: str = "image",  # What is wanted of each file: a key of `opening.ANSWERS`
    ):
        self.keeper, self.min_side, self.what, self.n_jobs = keeper, min_side, what, len(jobs)
        self.sizes = {i: getattr(file, "n_files", 1) for i, file in jobs}
        self.todo: queue.SimpleQueue = queue.SimpleQueue()
        self.done: queue.Queue = queue.Queue(maxsize=64)  # pixels wait here: no more than are soon taken
        for job in jobs:
            self.todo.put(job)
        self.one_here, self.said = threading.Lock(), False
        self.children = [_Child(timeout) for _ in range(n_workers)]
        self.threads = [threading.Thread(target=self._work, args=(child,), daemon=True) for child in self.children]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_exc):
        for child in self.children:
            child.end()
        with suppress(queue.Empty):  # threads that wait with a result may go
            while True:
                self.done.get_nowait()
        for thread in self.threads:
            thread.join(timeout=10)  # a limit for files that are tried in this process and hang

    def result(self) -> tuple[int, Facts, np.ndarray | None]:
        """The number of the next file to be finished, what is known of it, and its pixels if they are wanted."""
        i, facts, array = self.done.get()
        if isinstance(facts, BaseException):
            raise facts
        return i, facts, array

    def _work(self, child: "_Child"):
        try:
            while not (child.ended or self.todo.empty()):
                i, file = self.todo.get_nowait()
                self.done.put((i, *self._check(child, file)))
        except queue.Empty:  # another thread was faster
            pass
        except BaseException as err:  # for the main thread, which would wait forever
            self.done.put((-1, err, None))
        finally:
            child.clean_up()

    def _check(self, child: "_Child", file: Path) -> tuple[Facts, np.ndarray | None]:
        size, n_in = (self.keeper.size, self.keeper.n_in) if self.keeper else (None, None)
        asked = {"what": self.what, "size": size, "channels": n_in, "min_side": self.min_side}
        try:
            return child.check(file, asked)
        except _NoChild:
            return ({}, None) if child.ended else self._check_here(file, asked)

    def _check_here(self, file: Path, asked: dict) -> tuple[Facts, np.ndarray | None]:
        with self.one_here:  # one at a time, as they have no limits here
            if not self.said:
                self.said = True
                say("Child processes cannot be started here: files are checked in this process, without a time limit.")
            return answer(_request(file, asked))


def _request(file: Path, asked: dict) -> dict:
    """What a child is asked about a file; a `DicomImage` brings its settings."""
    return {"path": os.path.abspath(file), **getattr(file, "settings", {}), **asked}


class _NoChild(Exception):
    """The child process does not start."""


class _Child:
    """A process that tries files (`opening.main`), started when there is one to try, and again after one that ended it.

    It belongs to one thread, which calls `check` and at last `clean_up`; `end` is for any other.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.ended, self.startable = False, True
        self.process: subprocess.Popen | None = None
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.changing = threading.Lock()  # so that no process starts after `end`

    def check(self, file: Path, asked: dict) -> tuple[Facts, np.ndarray | None]:
        """What the process says of a file. Raises `_NoChild` where no process can be started."""
        request = json.dumps(_request(file, asked)).encode() + b"\n"
        facts, pixels = self._ask(request)
        if facts.get("code") == "crashed":  # again in a fresh process: it may not have been this file's doing
            facts, pixels = self._ask(request)
        return facts, pixels

    def end(self):
        """Kill the process, wherever its thread is, and start no other."""
        with self.changing:
            self.ended, process = True, self.process
        if process:
            process.kill()

    def clean_up(self):
        """Kill the process and give back its pipes."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # a process stuck in the kernel cannot be waited for
            process.wait(timeout=5)
        with suppress(OSError):  # what it did not read
            process.stdin.close()

    def _ask(self, request: bytes) -> tuple[Facts, np.ndarray | None]:
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(request)
            self.process.stdin.flush()
            return _parted(self.answers.get(timeout=self.timeout))
        except queue.Empty:
            code = "timeout"
        except (OSError, ValueError):  # a broken pipe; half an answer or none
            code = "crashed"
        self.clean_up()
        return {"code": code, "message": REASONS[code]}, None

    def _start(self):
        try:
            with self.changing:
                if self.ended or not self.startable:
                    raise _NoChild
                self.process = _popen()
            self.answers = queue.SimpleQueue()
            threading.Thread(target=_pass_on, args=(self.process.stdout, self.answers), daemon=True).start()
            if _parted(self.answers.get(timeout=_START_SECONDS))[0] != {"ready": True}:
                raise _NoChild
        except (OSError, ValueError, queue.Empty, _NoChild):
            self.startable = False
            self.clean_up()
            raise _NoChild from None


def _popen() -> subprocess.Popen:
    """A child that waits for requests. It finds this package where it is; the current folder can shadow nothing."""
    home = os.fspath(Path(__file__).parents[2])
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")])),
        "PYTHONUTF8": "1" if sys.getfilesystemencoding() == "utf-8" else "0",  # else names are other bytes there
        "OMP_NUM_THREADS": "1",  # threads that NumPy would reserve memory for
        "OPENBLAS_NUM_THREADS": "1",
    }
    pipe = subprocess.PIPE
    return subprocess.Popen(_COMMAND, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=env, cwd=home)


def _pass_on(stdout: BinaryIO, answers: queue.SimpleQueue):
    """Answers from a pipe to a queue, which can be waited on for a limited time on every system; b"" at the end."""
    with stdout, suppress(ValueError):
        for line in stdout:
            stored = json.loads(line).get("stored")
            answers.put((line, stdout.read(prod(stored)) if stored else b""))
    answers.put((b"", b""))


def _parted(answer: tuple[bytes, bytes]) -> tuple[Facts, np.ndarray | None]:
    """Facts and pixels, if any. Raises `ValueError` for half an answer."""
    facts = json.loads(answer[0])
    if "stored" not in facts:
        return facts, None
    *shape, itemsize = facts.pop("stored")
    return facts, np.frombuffer(answer[1], f"u{itemsize}").reshape(shape)


def summary(
    report: pd.DataFrame,  # The second frame that `check_files` returns
) -> str | None:
    """Such as "3 of 1,200 files left out: 2 truncated, 1 not an image (dls.report lists them)"; None where none was.

    Inside of `listed_in` another place is named.
    """
    if report.empty:
        return None
    counts = Counter(report["code"]).most_common()
    reasons = ", ".join(f"{n:,} {_IN_WORDS.get(code, code.replace('_', ' '))}" for code, n in counts)
    of = f" of {report.attrs['checked']:,}" if "checked" in report.attrs else ""
    return f"{len(report):,}{of} files left out: {reasons} ({_listed_in.get()} lists them)"


@contextmanager
def listed_in(name: str) -> Iterator[None]:
    """Where files that are left out will be listed, for what is said of them inside; else that is `dls.report`."""
    token = _listed_in.set(name)
    try:
        yield
    finally:
        _listed_in.reset(token)
