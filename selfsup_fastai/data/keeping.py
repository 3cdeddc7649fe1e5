"""Decoding images once: what is kept of them, on disk or in memory, while they are checked."""

import errno
import json
import os
import sqlite3
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from hashlib import blake2b
from typing import Any

import numpy as np
import PIL
import torch
from fastcore.parallel import num_cpus
from filelock import FileLock, Timeout
from PIL import features
from tqdm.auto import tqdm

from selfsup_fastai.data.cache import CacheUnusable, PixelCache, is_damage
from selfsup_fastai.data.opening import BadImage, Facts, decode
from selfsup_fastai.data.pixelstore import PLACE, PixelStore, available_memory, padded
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say

DECODER = 1
"""Counts changes of what `decode` makes of an image: pixels that an older one made are not used."""

_DECODERS = [DECODER, PIL.__version__, features.version("jpg")]
_FLEETING = {
    "missing",
    "no_permission",
    "timeout",
    "crashed",
    "out_of_memory",
    "no_decoder",
}  # another time the file may be read
_FLUSH_BYTES, _FLUSH_SECONDS = 64 << 20, 2.0
_MANY = 2_000  # images that take a while
_SAMPLE = 64  # images after which it is clear how much room all of them take


class Keeping(ABC):
    """A `Keeper` for `check_files` that keeps pixels, and afterwards hands them out as a `PixelStore`.

    What cannot be kept is no error: `store` then returns None, and one line has said why.
    """

    def __init__(
        self,
        items: Sequence[Any],  # Files, or what else `decode` takes, or functions that return it
        size: tuple[int, int],  # Height and width of the windows that will be cut
        n_in: int | None,  # Channels to keep: 1, or None: as each image is
    ):
        self.items, self.windows, self.n_in = items, size, n_in
        self.size: tuple[int, int] | None = size
        self.n_new = len(items)  # images to be decoded, less those that turned out to be broken
        self.n_kept, self.bytes_kept, self.n_sampled = 0, 0, 0

    def known(self, number: int) -> Facts | None:
        """What the check would say of item `number`, where nothing needs to be done again."""
        return None

    def add(self, items: Sequence[Any]) -> "_More":
        """Further items, numbered on; what stands for them alone, numbered from 0, as a `Keeper`."""
        first = len(self.items)
        self.items = [*self.items, *items]
        self.n_new += len(items)
        self.n_sampled = 0  # these may be of another size
        return _More(self, first)

    @abstractmethod
    def has(self, number: int) -> bool:
        """Whether the pixels of item `number` are kept."""

    def keep(self, number: int, facts: Facts, array: np.ndarray | None) -> None:
        """Item `number` has been decoded, or not: then `facts` say why."""
        if array is None:
            self.n_new -= 1
        if array is None or self.size is None:
            return
        try:
            self._write(number, array)
            self.n_kept, self.n_sampled = self.n_kept + 1, self.n_sampled + 1
            self.bytes_kept += padded(array.nbytes)
            if self.n_sampled == min(_SAMPLE, self.n_new):
                self._make_room(int(self.bytes_kept / self.n_kept * max(self.n_new, self.n_kept)))
            self._written()
        except (OSError, sqlite3.Error) as error:
            self._fail(error)

    @abstractmethod
    def _write(self, number: int, array: np.ndarray) -> None:
        """Keep the pixels of item `number`."""

    def _written(self) -> None:  # noqa: B027  (in memory there is nothing to do)
        """After an image was written."""

    @abstractmethod
    def _make_room(self, expected: int) -> None:
        """`expected`: bytes that all new images will take."""

    def _fail(self, error: OSError | sqlite3.Error) -> None:
        self._stop(_in_words(error))

    def _stop(self, why: str) -> None:
        if self.size is not None:
            self.size = None
            say(f"Pixels are not kept: {why}. Images are decoded anew in every epoch.")

    def fill(
        self,
        numbers: Sequence[int],  # Of items that are safe to decode here
    ) -> None:
        """Decode those that are not kept yet, in threads of this process."""
        todo = [number for number in numbers if not self.has(number)]
        if not todo or self.size is None:
            return
        no_bar = False if "ipykernel" in sys.modules else None
        with tqdm(total=len(todo), desc="Decoding images", unit="image", delay=1, disable=no_bar) as bar, _silence():
            for i, found in _in_threads(self._decoded, todo):
                if found:
                    self.keep(i, *found)
                else:
                    self.n_new -= 1
                bar.update()
                if self.size is None:
                    return

    def _decoded(self, number: int) -> tuple[Facts, np.ndarray] | None:
        item = self.items[number]
        try:
            return decode(item() if callable(item) else item, self.windows, self.n_in)
        except BadImage:
            return None

    @abstractmethod
    def store(
        self,
        numbers: Sequence[int],  # Of the items, in the order of the dataset
        n_in: int,  # Channels of a batch
    ) -> PixelStore | None:
        """The images with these numbers; grey where a file vanished since it was checked."""

    def _blank(self) -> tuple:
        return (-1, 0, 1, *self.windows, 1)


class _More:
    """A `Keeper` for the items of another from one number on."""

    def __init__(self, keeper: Keeping, first: int):
        self.keeper, self.first, self.n_in = keeper, first, keeper.n_in

    @property
    def size(self) -> tuple[int, int] | None:
        return self.keeper.size

    def known(self, number: int) -> Facts | None:
        return self.keeper.known(self.first + number)

    def keep(self, number: int, facts: Facts, array: np.ndarray | None) -> None:
        self.keeper.keep(self.first + number, facts, array)


class InMemory(Keeping):
    """Pixels are kept in the memory of this process; nothing is written anywhere."""

    def __init__(self, items, size, n_in):
        super().__init__(items, size, n_in)
        self.arrays: dict[int, np.ndarray] = {}

    def has(self, number):
        return number in self.arrays

    def _write(self, number, array):
        self.arrays[number] = np.ascontiguousarray(array)

    def _make_room(self, expected):
        most = available_memory() // 2
        if expected > most:
            self._stop(f"they would take {_gb(expected)} of memory, and half of what is free is {_gb(most)}")
            self.arrays.clear()

    def store(self, numbers, n_in):
        if self.size is None:
            return None
        kept = [number for number in numbers if self.has(number)]
        order = {number: i for i, number in enumerate(kept)}
        arrays = self.arrays
        places = [
            (order[n], 0, *arrays[n].shape, arrays[n].itemsize) if n in arrays else self._blank() for n in numbers
        ]
        chunks = [arrays[n].reshape(-1).view(np.uint8) for n in kept]
        return PixelStore(chunks, np.array(places, dtype=PLACE), n_in, made_grey=self.n_in == 1)


class OnDisk(Keeping):
    """Pixels are kept in a `PixelCache`, from run to run.

    A context manager: another process that enters with the same images waits for this one, and finds them done.
    """

    def __init__(
        self,
        cache: PixelCache,
        items: Sequence[Any],
        size: tuple[int, int],
        n_in: int | None,
        max_gb: float,  # Of the whole cache
    ):
        super().__init__(items, size, n_in)
        self.cache, self.most = cache, int(max_gb * 1e9)
        self.settings, self.about = _settings(size, n_in)
        self.keys = [cache.key(item) for item in items]
        self.build, self.file, self.lock = None, None, None
        self.new_places: dict[bytes, tuple] = {}  # on their way to the disk
        self.new_facts: dict[bytes, Facts] = {}
        self.bytes_flushed, self.last_flush = 0, time.monotonic()

    def __enter__(self) -> "OnDisk":
        self._look()
        if self.n_new and self.cache.writable:
            self._wait_for_others()
            self._look()
            if self.n_new >= _MANY:
                say(f"{self.n_new:,} images to decode, once for all epochs and later runs.")
        return self

    def __exit__(self, *_exc) -> None:
        try:
            if self.size is not None:
                self._flush()
        except (OSError, sqlite3.Error) as error:
            self._fail(error)
        finally:
            if self.file:
                with suppress(OSError):  # what is left to write belongs to no image
                    self.file.close()
            if self.lock:
                self.lock.release()

    def _look(self) -> None:
        keys = [key for key in self.keys if key]
        try:
            facts_keys = [self._facts_key(i) for i, key in enumerate(self.keys) if key]
            self.facts, self.places = self.cache.facts(facts_keys), self.cache.places(self.settings, keys)
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            if not (self.cache.writable and is_damage(error)):
                raise CacheUnusable(f"the index of the cache cannot be read ({error})") from None
            self.cache.renew()
            self.facts, self.places = {}, {}
        self.n_new = sum(self.known(i) is None and not self.has(i) for i in range(len(self.items)))

    def _wait_for_others(self) -> None:
        digest = blake2b(self.settings.encode(), digest_size=16)
        for key in self.keys:
            digest.update(key or b"-")
        self.lock = FileLock(self.cache.folder / "locks" / f"{digest.hexdigest()}.lock", mode=0o600)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            say("Another process is decoding these images: waiting for it (cache='ram' does not wait).")
            self.lock.acquire(poll_interval=0.2)
        except (OSError, NotImplementedError):  # no locks on this file system: at worst both do the work
            self.lock = None

    def known(self, number):
        facts = self.facts.get(self._facts_key(number))
        if not facts:
            return None
        failed = "code" in facts and facts.get("decoders") == _DECODERS  # another decoder may be able to read it
        return facts if failed or self.has(number) else None

    def _facts_key(self, number: int) -> bytes | None:
        """Facts depend on the scale at which an image is decoded: noise in the colors is gone at a small one."""
        key = self.keys[number]
        channels = b"" if not hasattr(self.items[number], "settings") else bytes([self.n_in or 0])  # DICOM: read so
        return key and key + max(self.windows).to_bytes(4, "big") + channels

    def has(self, number):
        return self.keys[number] in self.places or self.keys[number] in self.new_places

    def keep(self, number, facts, array):
        same = self._is_same(number)
        if same and self._is_file(number) and facts.get("code") not in _FLEETING:
            self.new_facts[self._facts_key(number)] = {**facts, "decoders": _DECODERS} if "code" in facts else facts
        if self.has(number):  # by a run that was killed before the facts were written; or a file that is given twice
            return
        if array is not None and not same:
            return  # it changed while it was read: nobody knows which contents these are
        if array is not None and not self.cache.writable:
            self._stop("the cache folder may not be written to by this user")
        super().keep(number, facts, array)

    def add(self, items):
        self._write_what_is_there()
        self.keys = [*self.keys, *map(self.cache.key, items)]
        more = super().add(items)
        try:
            self._look()
        except CacheUnusable as error:
            self._stop(str(error))
        return more

    def _write_what_is_there(self) -> None:
        try:
            self._flush()
        except (OSError, sqlite3.Error) as error:
            self._fail(error)

    def _is_file(self, number: int) -> bool:
        return isinstance(self.items[number], (str, os.PathLike))

    def _is_same(self, number: int) -> bool:
        """Whether an item still is what it was when it got its name. Only files change."""
        key = self.keys[number]
        return key is not None and (not self._is_file(number) or key == self.cache.key(self.items[number]))

    def fill(self, numbers):
        for number in numbers:  # what changed while it was read has a new name
            if self._is_file(number) and not self.has(number):
                self.keys[number] = self.cache.key(self.items[number]) or self.keys[number]
        super().fill(numbers)

    def _write(self, number, array):
        if self.file is None:
            self.build = self.cache.new_build(self.settings, self.about)
            self.file = open(self.cache.pixels_of(self.build), "ab", buffering=1 << 20)  # noqa: SIM115
        self.file.write(array.tobytes())
        self.file.write(bytes(padded(array.nbytes) - array.nbytes))
        self.new_places[self.keys[number]] = (self.bytes_kept, *array.shape, array.itemsize)

    def _written(self):
        if self.bytes_kept - self.bytes_flushed > _FLUSH_BYTES or time.monotonic() > self.last_flush + _FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        """First the pixels to the disk, then what leads to them into the index."""
        if self.file and self.new_places:
            self._make_room(self.bytes_kept)
        if self.file and self.new_places:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.cache.add(self.settings, self.build, self.new_places)
            self.places |= {key: (self.build, *place) for key, place in self.new_places.items()}
            self.new_places = {}
        if self.new_facts and self.cache.writable:
            self.cache.remember(self.new_facts)
            self.new_facts = {}
        self.bytes_flushed, self.last_flush = self.bytes_kept, time.monotonic()

    def _make_room(self, expected):
        mine = {place[0] for place in self.places.values()} | {self.build}
        missing = expected - self.cache.size(self.build)  # some of what was written may not be on the disk yet
        if self.cache.make_room(missing, self.most, mine):
            return
        if self.cache.free() < missing:
            self._stop(f"they would take {_gb(expected)}, and the disk of the cache has too little room")
        else:
            self._stop(
                f"they would take {_gb(expected)} beside what is kept of them, and max_gb is {self.most / 1e9:g}"
            )

    def _fail(self, error):
        super()._fail(error)
        if is_damage(error):
            with suppress(OSError, sqlite3.Error):
                self.cache.renew()

    def _stop(self, why):
        super()._stop(why)
        if self.build is None:
            return
        if self.file:
            with suppress(OSError):  # writes the rest, which fails again
                self.file.close()
        with suppress(OSError, sqlite3.Error):  # what is not whole is of no use, and on a full disk it is in the way
            self.cache.drop(self.build)
        self.build, self.file, self.new_places = None, None, {}

    def store(self, numbers, n_in):
        if self.size is None or None in (self.keys[n] for n in numbers):
            return None
        try:
            self._flush()
            places = [self.places.get(self.keys[n]) for n in numbers]
            if self.size is None or any(place[2] > n_in for place in places if place):
                return None  # no room; or a grey image got colors while it was read
            chunks, table = self.cache.opened(places, self._blank())
        except (OSError, sqlite3.Error) as error:  # also where another process has dropped what is to be opened
            self._fail(error)
            return None
        self.cache.use({place[0] for place in places if place})
        if None in places:
            say(f"{places.count(None):,} images vanished while they were decoded: grey ones stand in for them.")
        if self.n_kept:
            say(f"{self.n_kept:,} images were decoded and kept for later runs ({_gb(self.bytes_kept)} in the cache).")
        return PixelStore(chunks, table, n_in, made_grey=self.n_in == 1)


@contextmanager
def keeping(
    cache: bool | str,  # True or 'device': on disk; 'ram': in memory; False: not at all
    items: Sequence[Any],
    size: tuple[int, int],
    n_in: int | None,
    max_gb: float,
) -> Iterator[Keeping | None]:
    """A `Keeping` to be filled inside; None where nothing is kept, or nothing can be."""
    if not cache:
        yield None
        return
    if cache == "ram":
        yield InMemory(items, size, n_in)
        return
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(PixelCache())
            kept = stack.enter_context(OnDisk(folder, items, size, n_in, max_gb))
        except (CacheUnusable, OSError, sqlite3.Error) as error:
            why = error if isinstance(error, CacheUnusable) else _in_words(error)
            say(f"Pixels are not kept: {why}. Images are decoded anew in every epoch.")
            kept = None
        yield kept


def stored(
    kept: Keeping | None,
    numbers: Sequence[int],  # Of the items, in the order of the dataset
    n_in: int,  # Channels of a batch
    device: torch.device | None = None,  # Where all pixels are to lie, if there is room; None: where they were kept
) -> PixelStore | None:
    """The pixels that were kept, as loaders use them; None where there are none."""
    store = kept.store(list(numbers), n_in) if kept else None
    if store is None or device is None:
        return store
    if device.type == "cpu":
        say("cache='device' is for GPUs: on this CPU pixels are read from the cache on disk.")
        return store
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory() // 2
    if store.nbytes > free // 2:
        say(f"The pixels would take {_gb(store.nbytes)}, and {_gb(free)} are free on the device: they stay on disk.")
        return store
    return store.on_device(device)


def check_cache(cache: object, max_gb: object) -> None:
    """Raises `DataError` for arguments that make no sense."""
    if not isinstance(cache, bool) and cache not in ("ram", "device"):
        raise DataError(f"cache is True (on disk), 'ram', 'device' (on the GPU) or False; got {cache!r}.")
    if isinstance(max_gb, bool) or not isinstance(max_gb, (int, float)) or not max_gb > 0:
        raise DataError(f"max_gb is the size of the cache on disk in GB, above 0; got {max_gb!r}.")


def _settings(size: tuple[int, int], n_in: int | None) -> tuple[str, str]:
    """What the pixels depend on, beside the image; and the same in words."""
    settings = json.dumps({"size": size, "n_in": n_in, "decoders": _DECODERS})
    return settings, f"{size[1]} x {size[0]} pixels and more" + (", grey" if n_in == 1 else "")


def _in_threads(work: Callable[[int], Any], numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Number and result, in order; no more results wait than are soon taken."""
    with ThreadPoolExecutor(min(8, num_cpus())) as pool:
        waiting = []
        for number in numbers:
            waiting.append((number, pool.submit(work, number)))
            if len(waiting) == 64:
                done, future = waiting.pop(0)
                yield done, future.result()
        for number, future in waiting:
            yield number, future.result()


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings of decoders. Filters are global: threads must not change them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _in_words(error: OSError | sqlite3.Error) -> str:
    """What went wrong, without the names of files."""
    if isinstance(error, OSError):
        return (
            "the disk of the cache is full" if error.errno == errno.ENOSPC else f"the cache failed ({error.strerror})"
        )
    return "the disk of the cache is full" if "full" in str(error) else f"the index of the cache failed ({error})"


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes > 1e8 else f"{n_bytes / 1e6:.2f} MB"
