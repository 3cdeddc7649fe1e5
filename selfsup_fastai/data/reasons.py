"""Why an image cannot be used: the codes, their meaning, and the error that carries them. No text here names a file."""

import errno

from PIL import Image, UnidentifiedImageError

from selfsup_fastai.errors import DataError

__all__ = ["MAX_PIXELS", "REASONS", "BadImage", "bad", "diagnosis"]

MAX_PIXELS = 89_478_485
"""The most pixels an image may have: 1 GiB / 4 bytes / 3 channels, Pillow's own limit against decompression bombs."""

REASONS = {
    "missing": "The file does not exist (it was removed, or it is a link to nothing).",
    "no_permission": "The file may not be read by this user.",
    "not_a_file": "This is a folder, pipe, socket or device, not a regular file.",
    "empty": "The file has no bytes.",
    "not_an_image": "The contents are in no image format that Pillow reads.",
    "dicom": "This is a DICOM file, which is read in another way.",
    "not_dicom": "The contents are neither DICOM nor in an image format that Pillow reads.",
    "dicomdir": "This is a DICOMDIR, the table of contents of a medium: it has no pixels of its own.",
    "excluded": "This DICOM object holds no image to learn from (a report, a plan, a mask, a dose, a waveform, ...).",
    "no_pixels": "This DICOM file has no pixel data.",
    "missing_tag": "This DICOM file lacks an element without which pixels cannot be told.",
    "bad_tag": "An element of this DICOM file that pixels depend on makes no sense.",
    "bad_frames": "The number of frames that this DICOM file claims does not fit its pixel data.",
    "no_decoder": "No decoder for this DICOM file's compression is installed.",
    "unsupported_syntax": "This DICOM file's compression is one that nothing here decodes, such as video.",
    "truncated": "The image ends too early: copy or download it again.",
    "unreadable": "The format is known, but the contents are damaged or of a kind that Pillow cannot decode.",
    "too_large": f"The image has more than {MAX_PIXELS:,} pixels: cut it into tiles or make it smaller.",
    "too_small": "The image is one pixel wide or high: there is nothing to learn from.",
    "unsupported": "The image is of a kind that cannot be turned into grey or RGB pixels.",
    "shard": "The tar file that images are in is damaged, incomplete, compressed or out of reach.",
    "timeout": "Decoding took too long and was stopped.",
    "crashed": "The decoder crashed on this file.",
    "out_of_memory": "Decoding needs more memory than there is (or than the check allows).",
}
"""Every `BadImage.code` and what it means, in one sentence."""


class BadImage(DataError):
    """An image that cannot be used. `code` is a key of `REASONS`; the message holds neither path nor file contents."""

    # The message alone must do as an argument: that is how a loader's worker process hands an exception over.
    def __init__(self, message: str, code: str = "unreadable"):
        super().__init__(message)
        self.code = code


def bad(
    code: str,  # A key of `REASONS`
    detail: str = "",  # Added to the sentence: never a file name, never what a file contains
) -> BadImage:
    """The error for a reason."""
    return BadImage(f"{REASONS[code]} {detail}".strip(), code)


def diagnosis(err: Exception) -> BadImage:
    """The reason for an error of the operating system or of Pillow. Its text is left out: it may quote the file."""
    gone = isinstance(err, OSError) and err.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
    short = isinstance(err, EOFError) or "truncated" in str(err).lower() or "not enough image data" in str(err)
    causes = {
        "missing": gone,
        "no_permission": isinstance(err, PermissionError),
        "out_of_memory": isinstance(err, MemoryError),
        "too_large": isinstance(err, Image.DecompressionBombError),
        "not_an_image": isinstance(err, UnidentifiedImageError),
        "unsupported": isinstance(err, NotImplementedError),
        "truncated": short,
    }
    code = next((code for code, holds in causes.items() if holds), "unreadable")
    return bad(code, f"({type(err).__name__})" if code == "unreadable" else "")
