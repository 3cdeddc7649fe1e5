"""Small DICOM files, made for tests."""

import io

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

KINDS = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "MG": "1.2.840.10008.5.1.4.1.1.1.2",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
    "OT": "1.2.840.10008.5.1.4.1.1.7",
}


def dataset(
    array: np.ndarray | None,  # ([N,] H, W[, 3]) stored values; None: no pixel data
    modality: str = "OT",
    syntax: str = ExplicitVRLittleEndian,
    frames: list[bytes] | None = None,  # Compressed
    **elements,  # By keyword; None: the element is left out
) -> Dataset:
    """Elements and pixels. The color of an array is told by its last axis."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = KINDS.get(modality, KINDS["OT"]), generate_uid(), modality
    if array is not None:
        color = array.ndim > 2 and array.shape[-1] == 3
        shape = array.shape[:-1] if color else array.shape
        bits = 8 * array.dtype.itemsize
        ds.Rows, ds.Columns = shape[-2:]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if color else (1, "MONOCHROME2")
        if color:
            ds.PlanarConfiguration = 0
        if len(shape) > 2:
            ds.NumberOfFrames = shape[0]
        ds.BitsAllocated = ds.BitsStored = bits
        ds.HighBit, ds.PixelRepresentation = bits - 1, int(array.dtype.kind == "i")
        if frames is None:
            ds.PixelData = array.tobytes() + b"\0" * (array.nbytes % 2)
        else:
            ds.PixelData = encapsulate(frames)
        ds["PixelData"].VR = "OB" if bits == 8 or frames else "OW"
    for keyword, value in elements.items():
        if value is None:
            delattr(ds, keyword)
        elif isinstance(value, Dataset):
            setattr(ds, keyword, Sequence([value]))
        else:
            setattr(ds, keyword, value)
    return ds


def written(ds: Dataset) -> io.BytesIO:
    """The file, in memory."""
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    file.seek(0)
    return file


def dicom(array: np.ndarray | None, modality: str = "OT", **kwargs) -> io.BytesIO:
    """As `dataset`, written."""
    return written(dataset(array, modality, **kwargs))


def item(**elements) -> Dataset:
    """An item of a sequence."""
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, Sequence([value]) if isinstance(value, Dataset) else value)
    return ds
