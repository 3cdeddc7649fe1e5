"""Decoded images in memory, in a file or on a device, and windows of them gathered into a batch."""

import os
import threading
import weakref
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfsup_fastai.data.covering import to_channels
from selfsup_fastai.errors import DataError

ALIGNED = 64
"""Images begin at multiples of this many bytes."""

PLACE = np.dtype(
    [("chunk", "i4"), ("offset", "i8"), ("channels", "i4"), ("height", "i4"), ("width", "i4"), ("item", "i4")]
)
"""Where an image lies: the chunk (-1: nowhere, it is grey), the offset in bytes, its shape, bytes a value."""


def padded(n_bytes: int) -> int:
    """`n_bytes` up to where the next image may begin."""
    return -(-n_bytes // ALIGNED) * ALIGNED


class PixelFile:
    """The bytes of a file, read where they are asked for.

    Not a memory map: for images in random order reading is faster, what was read does not count as memory of this
    process, and a file that somebody cuts short is an error and not the end of the process.
    """

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.lock = threading.Lock()
        weakref.finalize(self, os.close, self.file)

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill `into` (bytes) from `offset` on. Raises `DataError` where the file ends before."""
        done = 0
        while done < len(into):  # a network file system may hand out less at a time
            n = self._read(offset + done, into[done:])
            if n == 0:
                fix = "Make the loaders anew, and images are decoded again."
                raise DataError(f"The pixel cache ends too early: it was changed while it was in use. {fix}")
            done += n

    def _read(self, offset: int, into: memoryview) -> int:
        """Bytes that came at once; 0 at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self.file, [into], offset)
        with self.lock:  # Windows
            os.lseek(self.file, offset, os.SEEK_SET)
            data = os.read(self.file, len(into))
        into[: len(data)] = data
        return len(data)


class PixelStore:
    """The images of a dataset as they were decoded, each (C, H, W) uint8 or uint16 of its own height and width."""

    def __init__(
        self,
        chunks: Sequence[np.ndarray | PixelFile],  # Flat bytes
        places: np.ndarray,  # (N,) of `PLACE`
        n_in: int,  # Channels of a batch
        made_grey: bool = False,  # Whether colors may have been dropped
    ):
        self.chunks, self.places, self.n_in, self.made_grey = list(chunks), places, n_in, made_grey
        self.deep = n_in == 1 and bool((places["item"] == 2).any())

    def __len__(self) -> int:
        return len(self.places)

    @property
    def nbytes(self) -> int:
        """Bytes of a copy in which every image has the channels and the depth of a batch."""
        return int(self._sizes().sum()) * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.deep else np.uint8)

    def shapes(self, rows: np.ndarray) -> np.ndarray:
        """(B, 2) heights and widths."""
        places = self.places[rows]
        return np.stack([places["height"], places["width"]], axis=1)

    def gather(
        self,
        rows: np.ndarray,  # (B,) which images
        corners: np.ndarray,  # (B, 2) top and left of the window in each
        size: tuple[int, int],  # Its height and width
        pin: bool = False,  # Page-locked memory, from which a GPU copies while the CPU goes on
    ) -> Tensor:  # (B, n_in, *size) uint8, or uint16 where `deep`
        """Windows of images as one batch."""
        kind = torch.uint16 if self.deep else torch.uint8
        out = torch.empty((len(rows), self.n_in, *size), dtype=kind, pin_memory=pin)
        into, whole = out.numpy(), (self.n_in, *size, self.dtype.itemsize)
        for i, (place, (top, left)) in enumerate(zip(self.places[rows].tolist(), corners.tolist())):
            if place[0] >= 0 and place[2:] == whole and isinstance(self.chunks[place[0]], PixelFile):
                self.chunks[place[0]].read_into(place[1], into[i].data.cast("B"))
            else:
                into[i] = self._image(*place)[:, top : top + size[0], left : left + size[1]]
        return out

    def _image(self, chunk: int, offset: int, channels: int, height: int, width: int, item: int) -> np.ndarray:
        """(n_in, height, width) of the type of a batch."""
        if chunk < 0:
            return np.broadcast_to(self.dtype.type(128 * 257 if self.deep else 128), (self.n_in, height, width))
        image = self._bytes(self.chunks[chunk], offset, channels * height * width * item)
        if item == 2:
            image = image.view(np.uint16)
        image = image.reshape(channels, height, width)
        if channels != self.n_in:
            return to_channels(image, self.n_in)
        return image * np.uint16(257) if self.deep and item == 1 else image

    @staticmethod
    def _bytes(source: np.ndarray | PixelFile, offset: int, n_bytes: int) -> np.ndarray:
        if isinstance(source, np.ndarray):
            return source[offset : offset + n_bytes]
        image = np.empty(n_bytes, np.uint8)
        source.read_into(offset, image.data)
        return image

    def with_channels(self, n_in: int) -> "PixelStore | None":
        """The same images for batches of `n_in` channels; None where colors must be dropped, or were."""
        if n_in == self.n_in:
            return self
        return PixelStore(self.chunks, self.places, n_in) if n_in == 3 and not self.made_grey else None

    def _sizes(self) -> np.ndarray:
        return self.n_in * self.places["height"].astype(np.int64) * self.places["width"]

    def on_device(self, device: torch.device) -> "DeviceStore":
        """A copy of all images in the memory of a device."""
        return DeviceStore(self, device)


class DeviceStore(PixelStore):
    """All images in the memory of a device: a batch is one gather there."""

    def __init__(self, store: PixelStore, device: torch.device):
        sizes = store._sizes()
        self.places, self.n_in, self.deep, self.device, self.host = store.places, store.n_in, store.deep, device, store
        self.n_kept = store.n_in  # planes of each image; grey ones are shared by batches of three channels
        kind = torch.int16 if store.deep else torch.uint8  # uint16 knows few operations; the bits are the same
        self.flat = torch.empty(int(sizes.sum()), dtype=kind, device=device)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        for place, start, n in zip(store.places.tolist(), starts.tolist(), sizes.tolist()):
            image = store._image(*place).flatten()  # a copy: torch takes no arrays that are read-only
            self.flat[start : start + n] = torch.from_numpy(image.view(np.int16) if store.deep else image)
        self.starts = torch.from_numpy(starts).to(device)
        self.heights, self.widths = (
            torch.from_numpy(store.places[name].astype(np.int64)).to(device) for name in ("height", "width")
        )

    def with_channels(self, n_in):
        if n_in == self.n_in:
            return self
        host = self.host.with_channels(n_in)
        if host is None or self.deep:
            return host and host.on_device(self.device)
        new = copy(self)
        new.host, new.n_in = host, n_in
        return new

    def gather(self, rows, corners, size, pin=False) -> Tensor:
        """Windows of images as one batch on the device; int16 with the bits of uint16 where `deep`."""
        rows, corners = (torch.from_numpy(np.asarray(a, np.int64)).to(self.device) for a in (rows, corners))
        width, area = self.widths[rows], self.heights[rows] * self.widths[rows]
        y = corners[:, :1] + torch.arange(size[0], device=self.device)
        x = corners[:, 1:] + torch.arange(size[1], device=self.device)
        planes = self.starts[rows, None] + area[:, None] * (torch.arange(self.n_in, device=self.device) % self.n_kept)
        places = planes[:, :, None, None] + (y * width[:, None])[:, None, :, None] + x[:, None, None, :]
        return self.flat[places]


def deep_to_255(
    x: Tensor,  # uint16, or int16 with the same bits
) -> Tensor:  # float32 on the 0..255 scale
    """Values of 16 bits as every deep image has them."""
    return (x.view(torch.int16).int() & 0xFFFF).float() / 257


def available_memory() -> int:
    """Bytes of memory that can be had without swapping; a guess of 4 GiB where the system does not say."""
    try:
        with open("/proc/meminfo") as info:
            return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 << 30
