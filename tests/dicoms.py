"""Small DICOM files for tests."""

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

KINDS = {
    "CT": CTImageStorage,
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "US": "1.2.840.10008.5.1.4.1.1.3.1",
}


def write_dicom(path: Path, array: np.ndarray, modality: str = "CT", **elements) -> Path:
    """A file of uint16 or int16 pixels, (H, W) or (N, H, W), or uint8 (H, W, 3) color; `elements` by keyword."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = KINDS[modality]
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = "1.2.3", f"1.2.3.{len(modality)}", "P0"
    ds.Modality = modality
    color = array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3
    if array.ndim == 3 and not color:
        ds.NumberOfFrames = len(array)
    ds.Rows, ds.Columns = array.shape[-3:-1] if color else array.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, "RGB") if color else (1, "MONOCHROME2")
    if color:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = ds.BitsStored = 8 * array.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(array.dtype.kind == "i")
    if modality == "CT":
        ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    for name, value in elements.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
    data = array.tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB" if array.itemsize == 1 else "OW"
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def slices(
    folder: Path, n: int, patient: str, modality: str = "CT", side: int = 24, seed: int = 0, **elements
) -> list[Path]:
    """A series of `n` slices of smooth random patterns, 2 mm apart."""
    rng = np.random.default_rng(seed)
    files = []
    for i in range(n):
        coarse = rng.integers(-800, 1200, (4, 4)) if modality == "CT" else rng.integers(0, 2000, (4, 4)) * (i + 1)
        array = np.kron(coarse, np.ones((side // 4, side // 4))).astype(np.int16)
        place = {"ImagePositionPatient": [0, 0, 2 * i], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        about = {"PatientID": patient, "InstanceNumber": i + 1, "StudyInstanceUID": f"1.9.{seed + 1}"}
        about |= {"SeriesInstanceUID": f"1.9.{seed + 1}.{len(modality)}", **place, **elements}
        files.append(write_dicom(folder / f"{modality}{i:03d}", array, modality, **about))
    return files
