"""What several test files use: folders of small images, and the real data sets where they are at hand."""

import os
import tarfile
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

matplotlib.use("Agg")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def _cache(tmp_path_factory):
    """A folder for decoded pixels. Its key is always the same: splits by patient go by pseudonyms, and these by it."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "SECRET").write_bytes(bytes(range(32)))
    return folder


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch, _cache):
    """Each test in a folder of its own (fastai writes models/ into the current one), without figures of others.

    Decoded pixels go to a cache of this test run, not to the user's.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SELFSUP_CACHE", str(_cache))
    yield
    from matplotlib import pyplot as plt

    plt.close("all")


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory):
    """`shared_data(name)` unpacks a real data set and returns its folder; where it is absent, the test is skipped."""
    base = Path(os.environ.get("SELFSUP_DATA", ROOT.parent / "shared" / "data"))
    unpacked: dict[str, Path] = {}

    def unpack(name: str) -> Path:
        if name in unpacked:
            return unpacked[name]
        archives = [*(base / name).glob("*.zip"), *(base / name).glob("*.tar.xz")]
        if not archives:
            pytest.skip(f"the data set {name} is not at hand (SELFSUP_DATA names the folder it is looked for in)")
        folder = tmp_path_factory.mktemp(name)
        if archives[0].suffix == ".zip":
            zipfile.ZipFile(archives[0]).extractall(folder)
        else:
            with tarfile.open(archives[0]) as archive:
                archive.extractall(folder, filter="data")
        unpacked[name] = folder
        return folder

    return unpack


def write_images(folder: Path, n: int, size=(32, 32), channels: int = 3, seed: int = 0) -> Path:
    """`n` PNGs with a smooth random pattern each: not symmetric under turns, different from one another."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        coarse = rng.integers(0, 256, (5, 5, channels), dtype=np.uint8)
        image = Image.fromarray(coarse if channels == 3 else coarse[..., 0]).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
        image.save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="session")
def color_folder(tmp_path_factory) -> Path:
    """64 color PNGs of 40x40 pixels."""
    return write_images(tmp_path_factory.mktemp("color"), 64, (40, 40))


@pytest.fixture(scope="session")
def grey_folder(tmp_path_factory) -> Path:
    """40 grey PNGs of 40x40 pixels."""
    return write_images(tmp_path_factory.mktemp("grey"), 40, (40, 40), channels=1)


def write_scans(folder: Path, n_patients: int = 6, depth: int = 4, size: int = 48) -> Path:
    """DICOM files: of each patient a CT or MR series of some slices, which change from one to the next."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    rng = np.random.default_rng(0)
    for patient in range(n_patients):
        is_ct, study, series = patient % 2 == 0, generate_uid(), generate_uid()
        kind = "1.2.840.10008.5.1.4.1.1.2" if is_ct else "1.2.840.10008.5.1.4.1.1.4"
        ends = rng.integers(0, 255, (2, 5, 5), dtype=np.uint8)
        pixels = [np.asarray(Image.fromarray(e).resize((size, size), Image.Resampling.BICUBIC), float) for e in ends]
        for place in range(depth):
            share, meta = place / (depth - 1), FileMetaDataset()
            meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = kind, ExplicitVRLittleEndian
            meta.MediaStorageSOPInstanceUID = generate_uid()
            file = folder / f"p{patient}" / f"{place}"
            file.parent.mkdir(parents=True, exist_ok=True)
            ds = FileDataset(file, {}, file_meta=meta, preamble=bytes(128))
            ds.SOPClassUID, ds.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
            ds.PatientID, ds.StudyInstanceUID, ds.SeriesInstanceUID = f"patient{patient}", study, series
            ds.Modality, ds.BodyPartExamined = ("CT", "CHEST") if is_ct else ("MR", "HEAD")
            ds.InstanceNumber, ds.ImagePositionPatient = place + 1, [0, 0, 5 * place]
            ds.ImageOrientationPatient, ds.PixelSpacing, ds.SliceThickness = [1, 0, 0, 0, 1, 0], [1, 1], 5
            ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = size, size, 1, "MONOCHROME2"
            ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
            ds.RescaleSlope, ds.RescaleIntercept = 1, -1024 if is_ct else 0
            values = (1 - share) * pixels[0] + share * pixels[1]
            ds.PixelData = (values * 8).astype("<u2").tobytes()
            ds.save_as(file, enforce_file_format=True)
    return folder
