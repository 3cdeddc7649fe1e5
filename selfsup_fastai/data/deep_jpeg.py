"""Grey JPEG of 12 bits by GDCM: the one permissive decoder of it, which pydicom does not ask."""

from importlib.util import find_spec

import numpy as np

from selfsup_fastai.data.reasons import bad

__all__ = ["DEEP_JPEG", "deep_jpeg", "deep_jpeg_available"]

DEEP_JPEG = "gdcm 12 bits"

_SYNTAX = "1.2.840.10008.1.2.4.51"


def deep_jpeg_available() -> bool:
    """Whether GDCM is installed."""
    return find_spec("gdcm") is not None


def deep_jpeg(
    source: bytes,  # A frame's JPEG
    rows: int,
    columns: int,
    bits: int,  # Stored in 16
    signed: int,
) -> np.ndarray:  # (rows, columns) 16-bit integers
    """A decoded frame. Raises `BadImage` where GDCM returns nothing, or too little."""
    import gdcm

    gdcm.Trace.WarningOff()
    gdcm.Trace.ErrorOff()  # it tells of every codec that it tries before the right one
    fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(source)
    fragments.AddFragment(fragment)
    data = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    data.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(data)
    grey = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(_SYNTAX)))
    image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, signed))
    text = image.GetBuffer()  # bytes, as text
    pixels = text.encode("utf-8", "surrogateescape") if text else b""
    if len(pixels) != 2 * rows * columns:
        raise bad("unreadable")
    return np.frombuffer(pixels, "i2" if signed else "u2").reshape(rows, columns)
