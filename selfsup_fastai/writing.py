"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, data: bytes) -> None:
    """A neighbor is written, flushed to the disk and renamed: who reads `path` finds the old file or the new one."""
    with whole_file(path) as out:
        out.write(data)


def write_csv(
    table,  # A DataFrame
    path: Path,
) -> None:
    """As CSV without the index. File names that are no text keep their bytes."""
    write_whole(path, table.to_csv(index=False).encode("utf-8", "surrogateescape"))


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """The same for what is written bit by bit: `path` is there once the block has ended without an error."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
