"""Images in shards: tar files, as WebDataset has them. What is in one, its images' bytes, and in which order they come.

Nothing is unpacked and nothing but images is read: an image is a place in a tar file, and a `seek` leads there. Members
that are no images by their suffix (labels, texts, pickles) are left where they are.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import numpy as np

from selfsup_fastai.data.fetching import Fetched, Local
from selfsup_fastai.data.reasons import bad

MIXED = 8
"""Shards whose images come mixed."""

SUFFIXES = frozenset(
    "avif bmp dcm dib gif heic heif img j2c j2k jfif jp2 jpe jpeg jpg jpx mpo pbm pcx pgm png pnm ppm psd sgi tga tif "
    "tiff webp".split()
)
"""Suffixes of members that are images; what they really are their contents say."""

_BLOCK = 512  # bytes; a tar file ends with empty blocks


class Members(NamedTuple):
    """What is in a tar file."""

    images: list[tuple[int, int]]  # Offset and size in bytes of each
    others: Counter  # Suffixes of what is not looked at
    whole: bool  # Whether the file ends as it should


def members_of(
    file: str | os.PathLike,
) -> Members:
    """The images in a tar file, those before the damage where it is damaged. Raises `OSError` if it cannot be opened.

    Only the headers between the images are read.
    """
    images, others, whole = [], Counter(), False
    size = os.path.getsize(file)
    try:
        with tarfile.open(file, "r:") as tar:
            before = -1
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset <= before:  # tarfile would go round in circles
                    raise tarfile.ReadError("forged")
                before = tar.offset
                tar.members = []  # which would keep all headers
                suffix = member.name.rpartition(".")[2].lower()
                if member.isreg() and not member.issparse() and suffix in SUFFIXES:
                    images.append((member.offset_data, member.size))
                elif member.isreg():
                    others[suffix if len(suffix) < 10 and "/" not in suffix else "?"] += 1
            tar.fileobj.seek(tar.offset)
            whole = tar.fileobj.read(_BLOCK) == bytes(_BLOCK)
    except OSError:
        raise
    except Exception:  # damaged headers make tarfile raise anything
        pass
    return Members([(offset, n) for offset, n in images if n > 0 and offset + n <= size], others, whole)


class Shards:
    """Some tar files, and where they lie."""

    def __init__(
        self,
        names: Sequence[str],
        n_bytes: Sequence[int],  # Of each
        place: Local | Fetched,
        mixed: int = MIXED,  # Shards whose images come mixed
    ):
        self.names, self.n_bytes, self.place, self.mixed = list(names), list(n_bytes), place, mixed

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of one member. Raises `BadImage` where the shard is gone or too short.

        The file is opened each time: nothing is shared between processes or threads, and a shard may be removed and
        fetched again at any moment.
        """
        try:
            data = self._part(self.names[shard], self.n_bytes[shard], offset, size)
        except OSError:
            data = None
        if data is None:  # here, as the error would name the file
            raise bad("shard")
        if len(data) < size:
            raise bad("truncated")
        return data

    def _part(self, name: str, n_bytes: int, offset: int, size: int) -> bytes:
        for attempt in range(3):
            try:
                with open(self.place.file(name, n_bytes), "rb", buffering=0) as file:
                    file.seek(offset)
                    return file.read(size)
            except FileNotFoundError:  # another process has removed it since
                if attempt == 2 or isinstance(self.place, Local):
                    raise
        raise AssertionError("the last attempt returns or raises")


@dataclass(frozen=True, slots=True, eq=False)
class ShardImage:
    """An image in a shard, read when it is called for: an item of a data set."""

    shards: Shards = field(repr=False)
    shard: int
    offset: int
    size: int

    def __call__(self) -> bytes:
        return self.shards.read(self.shard, self.offset, self.size)

    @property
    def identity(self) -> bytes | None:
        """Which image it is, for the pixel cache."""
        print_ = self.shards.place.print_of(self.shards.names[self.shard], self.shards.n_bytes[self.shard])
        return None if print_ is None else print_ + repr((self.offset, self.size)).encode()


@dataclass(frozen=True, eq=False)
class ShardMember(os.PathLike):
    """The same for the processes that check files: they open the tar file themselves."""

    path: str = field(repr=False)
    offset: int
    size: int

    def __fspath__(self) -> str:
        return self.path

    @property
    def settings(self) -> dict:
        """All but the path, as JSON can hold it."""
        return {"offset": self.offset, "bytes": self.size}


def mixed_order(
    items: Sequence,  # Of a data set
    indices: Sequence[int],
    rng: Random,
) -> list[int] | None:
    """`indices` in a random order that goes from shard to shard; None where the items lie in no shards.

    Shards take turns in random order, and at every moment images come mixed from `Shards.mixed` of them: each shard is
    needed for a while, then not again. With no more shards than that it is a shuffle like any other. It depends on
    `rng` alone.
    """
    if hasattr(items, "iloc") or not len(indices) or not isinstance(first := items[indices[0]], ShardImage):
        return None
    draw = np.random.default_rng(rng.getrandbits(62))
    names, shard = np.unique([items[i].shard for i in indices], return_inverse=True)
    turn, last = draw.permutation(len(names))[shard], max(0, len(names) - first.shards.mixed)
    begin = np.clip(turn - first.shards.mixed + 1, 0, last)  # at each step from 0 to `last` so many shards are open
    end = np.clip(turn, 0, last) + 1
    when = begin + (end - begin) * draw.random(len(indices))
    return [indices[i] for i in np.argsort(when, kind="stable")]
