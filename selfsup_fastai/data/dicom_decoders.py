"""Compressed frames to arrays: the fastest decoder that is installed, then the others.

Nothing here quotes what a file contains: errors name standard syntaxes only.
"""

import zlib
from functools import cache
from typing import NamedTuple

import numpy as np

from selfsup_fastai.data.codestreams import Codestream, codestream
from selfsup_fastai.data.deep_jpeg import DEEP_JPEG, deep_jpeg, deep_jpeg_available
from selfsup_fastai.data.reasons import BadImage, bad

__all__ = ["Decoded", "decoded", "is_known", "is_supported", "native_order", "plugins", "syntax_name"]

_ORDER = ("pyjpegls", "pillow", "pylibjpeg", "pydicom", "gdcm")
"""Decoders from the fastest to the slowest, as measured; each is tried where those before it fail."""

_JPEG_2000 = "1.2.840.10008.1.2.4.9", "1.2.840.10008.1.2.4.20"  # how their UIDs begin
_DEFLATED_FRAMES = "1.2.840.10008.1.2.8.1"
_NATIVE = "1.2.840.10008.1.2.1"
_JPEG_LS = (".4.80", ".4.81")
_LIBJPEG = (".4.51", ".4.57", ".4.70")


class Decoded(NamedTuple):
    """One frame."""

    array: np.ndarray  # (H, W) or (H, W, 3), of this machine's byte order
    photometric: str  # What the values are now
    decoder: str
    wrong_syntax: bool  # The bytes are of another compression than the file claims


def decoded(
    source: bytes,  # A frame's compressed bytes
    syntax: str,  # What the file claims that they are
    options: dict,  # The pixels' form, as pydicom's decoders take it
) -> Decoded:
    """A frame, decoded. Raises `BadImage`."""
    options = {**options, "number_of_frames": 1}
    if syntax == _DEFLATED_FRAMES:
        return _inflated(source, options)
    stream = codestream(source)
    if stream and not stream.is_of(options["rows"], options["columns"]):  # larger, it may be a bomb
        raise bad("unreadable", "(The compressed image is not of the size that the file states.)")
    wrong = bool(stream) and not stream.fits(syntax)
    syntax = stream.syntax if wrong else syntax
    failures = []
    for plugin in [*plugins(syntax), *_deep(syntax, options)]:
        try:
            array, photometric = _decoded_by(plugin, syntax, source, options, stream)
            return Decoded(array, photometric, plugin.removesuffix(" 12 bits"), wrong)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as err:  # decoders raise anything, and those in Rust what is no `Exception`
            failures.append(type(err))
    raise _undecodable(failures, syntax)


def _decoded_by(
    plugin: str, syntax: str, source: bytes, options: dict, stream: Codestream | None
) -> tuple[np.ndarray, str]:
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder

    if plugin == DEEP_JPEG:
        size = options["rows"], options["columns"], options["bits_stored"], options["pixel_representation"]
        return deep_jpeg(source, *size), options["photometric_interpretation"]
    data = encapsulate([source], has_bot=False)
    array, about = get_decoder(syntax).as_array(data, index=0, raw=True, decoding_plugin=plugin, **options)
    photometric = about["photometric_interpretation"]
    if stream and stream.adobe == 1 and options["samples_per_pixel"] == 3:  # Pillow has undone what is stated there
        photometric = {"pillow": "RGB", "gdcm": "YBR_FULL"}.get(plugin, photometric)
    return native_order(array), photometric


def _deep(syntax: str, options: dict) -> list[str]:
    """pydicom does not let GDCM decode JPEG of 12 bits, which it can: it is asked without pydicom."""
    grey = options["samples_per_pixel"] == 1 and options["bits_allocated"] == 16 and options["bits_stored"] > 8
    return [DEEP_JPEG] if grey and syntax.endswith(".4.51") and deep_jpeg_available() else []


def _inflated(source: bytes, options: dict) -> Decoded:
    from pydicom.pixels import get_decoder

    bits = options["rows"] * options["columns"] * options["samples_per_pixel"] * options["bits_allocated"]
    data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(source, -(-bits // 8) + 1)
    array, about = get_decoder(_NATIVE).as_array(data, index=0, raw=True, **options)
    return Decoded(array, about["photometric_interpretation"], "zlib", False)


def _undecodable(failures: list[type], syntax: str) -> BadImage:
    name = syntax_name(syntax)
    if not is_supported(syntax):
        return bad("unsupported_syntax", f"({name})")
    if all(issubclass(kind, NotImplementedError) for kind in failures):
        fix = 'pip install "selfsup_fastai[dicom]"'
        if failures or syntax.endswith(_LIBJPEG):
            fix += " or, under the GPL, pip install pylibjpeg-libjpeg"
        return bad("no_decoder", f"({name}) {fix}")
    return bad("out_of_memory" if MemoryError in failures else "unreadable", f"({name})")


def plugins(syntax: str) -> list[str]:
    """The decoders that are installed for a syntax, the fastest first.

    GDCM ends the process at some broken files: it is asked where there is no other, and for JPEG-LS, where it reads
    some files that the other does not.
    """
    from pydicom.pixels import get_decoder

    if not is_supported(syntax):
        return []
    order = ("pylibjpeg", *_ORDER) if syntax.startswith(_JPEG_2000) else _ORDER  # Pillow: no odd color in JPEG 2000
    available = get_decoder(syntax).available_plugins if syntax != _DEFLATED_FRAMES else ()
    names = sorted(available, key=lambda name: order.index(name) if name in order else len(order))
    return [name for name in names if name != "gdcm" or len(names) == 1 or syntax.endswith(_JPEG_LS)]


def is_supported(syntax: str) -> bool:
    """Whether there may be a decoder, installed or not."""
    from pydicom.pixels import get_decoder

    try:
        return syntax == _DEFLATED_FRAMES or bool(get_decoder(syntax))
    except NotImplementedError:
        return False


def is_known(syntax: str) -> bool:
    """Whether a transfer syntax is one of the standard; the ones of single vendors may mean anything."""
    return syntax in _known()


def syntax_name(syntax: str) -> str:
    """The standard's name for a transfer syntax; 'private syntax' for one that is not in the standard."""
    from pydicom.uid import UID

    return UID(syntax).name if is_known(syntax) else "private syntax"


@cache
def _known() -> frozenset[str]:
    from pydicom.uid import AllTransferSyntaxes

    return frozenset(map(str, AllTransferSyntaxes)) | {_DEFLATED_FRAMES}


def native_order(array: np.ndarray) -> np.ndarray:
    """The same values in this machine's byte order."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
