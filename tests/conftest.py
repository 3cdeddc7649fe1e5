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
    return tmp_path_factory.mktemp("cache")


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
