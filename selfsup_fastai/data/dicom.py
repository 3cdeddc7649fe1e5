"""The one door to pydicom: DICOM files opened without trust.

Light on purpose, as `opening` is: no torch, no fastai. Nothing here quotes what a file contains: names, ids and UIDs
stand in DICOM headers, and pydicom's own warnings and errors repeat them.
"""

import logging
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import pydicom
from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from selfsup_fastai.data.opening import silence
from selfsup_fastai.data.reasons import MAX_PIXELS, bad

__all__ = ["decoded", "missing_decoder", "open_dataset", "quiet_pydicom", "tag_of", "uid_name"]

PREAMBLE = 132
"""Bytes of a file that tell what it is: 128 of anything, then 'DICM'."""

_HEAD = 1024
_CHUNK = 1 << 20
_DEFLATED = b"1.2.840.10008.1.2.1.99"

_BY_NATURE = {  # (implicit, little endian) as pydicom found the elements to be
    (True, True): ImplicitVRLittleEndian,
    (False, True): ExplicitVRLittleEndian,
    (False, False): ExplicitVRBigEndian,
}


_PLAIN = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)


def open_dataset(
    source: str | os.PathLike | BinaryIO,  # A path, or a binary file that can be sought in
    pixels: bool = False,  # Read on through the pixel data; else stop before it
    tags: Sequence[str] | None = None,  # Keywords of the elements to read; None: all of them
) -> Dataset:
    """A file's elements. Files without preamble or file meta information are read, too, if they make sense.

    Raises `BadImage`: 'not_dicom' where it is something else, 'dicomdir' for the table of contents of a medium.
    """
    with quiet_pydicom():
        dataset = _read(source, pixels, tags)
    meta = dataset.file_meta
    if meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage or "DirectoryRecordSequence" in dataset:
        raise bad("dicomdir")
    if "TransferSyntaxUID" not in meta:
        meta.TransferSyntaxUID = _BY_NATURE.get(dataset.original_encoding, ImplicitVRLittleEndian)
    return dataset


def _read(source, pixels: bool, tags: Sequence[str] | None) -> Dataset:
    wanted = None if tags is None else [*tags, "SOPClassUID", "Rows", "DirectoryRecordSequence"]
    options = {"stop_before_pixels": not pixels, "specific_tags": wanted}
    _refuse_deflation_bomb(source)
    try:
        return pydicom.dcmread(source, **options)
    except InvalidDicomError:
        pass  # no preamble: what it is must show
    if hasattr(source, "seek"):
        source.seek(0)
    dataset = pydicom.dcmread(source, force=True, **options)
    if "SOPClassUID" not in dataset and "Rows" not in dataset:  # `force` takes any text for DICOM
        raise bad("not_dicom")
    return dataset


def _refuse_deflation_bomb(source) -> None:
    """pydicom inflates all of a deflated file at once, however much that is: so count before."""
    if not hasattr(source, "seek"):
        with open(source, "rb") as file:
            _refuse_deflation_bomb(file)
        return
    start = source.tell()
    head = source.read(_HEAD)
    if _DEFLATED in head and head[128:PREAMBLE] == b"DICM" and head[132:136] == b"\x02\x00\x00\x00":
        source.seek(start + 144 + int.from_bytes(head[140:144], "little"))  # behind the file meta information
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        data = source.read(_CHUNK)
        while data:
            size += len(inflater.decompress(data, _CHUNK))
            data = inflater.unconsumed_tail or source.read(_CHUNK)
            if size > 12 * MAX_PIXELS:
                raise bad("too_large")
    source.seek(start)


_LOGGER = logging.getLogger("pydicom")
_NOWHERE = [logging.NullHandler()]
_lock = threading.Lock()
_muted: list[tuple[list, bool]] = []  # for each that works now: the handlers before, and whether they were all


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Nothing that pydicom warns of or logs gets out: it quotes the values that it cannot make sense of.

    Filters of warnings are global: in other threads than the main one they are left to those who started them, who
    hold this themselves while the threads work.
    """
    with _lock:
        _muted.append((_LOGGER.handlers, _LOGGER.propagate))
        _LOGGER.handlers, _LOGGER.propagate = _NOWHERE, False  # its children's messages end here, too
    try:
        with silence():
            yield
    finally:
        with _lock:
            before = _muted.pop()  # the last to leave finds what the first one found
            _LOGGER.handlers, _LOGGER.propagate = before


def missing_decoder(syntax: str) -> str:
    """'unsupported_syntax' for one that nothing decodes, 'no_decoder' where none of its decoders is installed, else
    ''."""
    if syntax in _PLAIN:
        return ""
    from pydicom.pixels import get_decoder  # looks for all decoders: half a second

    try:
        return "" if get_decoder(syntax).is_available else "no_decoder"
    except NotImplementedError:
        return "unsupported_syntax"


def tag_of(keyword: str) -> int:
    """The number of a standard element."""
    tag = tag_for_keyword(keyword)
    assert tag is not None, f"no element of the standard has the keyword {keyword!r}"
    return tag


def uid_name(uid: str) -> str:
    """The standard's name of a syntax or a kind of object; 'private' for one that is not in it, '' for no UID."""
    name = UID(uid).name
    return name if name != uid else "private" if uid else ""


def decoded(
    value: bytes,
    charset: list[str],  # As the element SpecificCharacterSet says
) -> str:
    """A text in the characters that it was written in; byte by byte where they are unknown."""
    with quiet_pydicom():
        try:
            return decode_bytes(value, convert_encodings(charset), set())
        except Exception:  # unknown names of character sets, broken escape sequences
            return value.decode("latin-1")
