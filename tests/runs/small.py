"""Encoders, models and folders that the tests of runs share: all of them tiny."""

from pathlib import Path

import torch

from selfsup_fastai.encoders.checkpoint import save_encoder
from selfsup_fastai.encoders.encoder import Encoder, create_encoder
from tests.conftest import write_images


def an_encoder(channels: int = 3, arch: str = "resnet10t", size: int = 24, seed: int = 0) -> Encoder:
    """With running statistics of its own, so that normalization matters."""
    torch.manual_seed(seed)
    encoder = create_encoder(arch, n_in=channels, size=size)
    encoder.mean, encoder.std = (0.4,) * channels, (0.3,) * channels
    with torch.no_grad():
        for module in encoder.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return encoder.eval()


def saved_encoder(file: Path, **kwargs) -> Encoder:
    """One that is also in a file."""
    encoder = an_encoder(**kwargs)
    save_encoder(encoder, file, task="rotation", epochs=1)
    return encoder


def photos(folder: Path, n: int = 7) -> Path:
    """Photographs at two depths, and two files that are none."""
    write_images(folder / "b", n - 3, (40, 30), seed=1)
    write_images(folder, 3, (30, 30), seed=2)
    (folder / "broken.png").write_bytes((folder / "0000.png").read_bytes()[:60])
    (folder / "notes.txt").write_text("no image")
    return folder


def classes(folder: Path, n: int = 8) -> Path:
    """Two classes that no net can mistake: dark and bright."""
    from PIL import Image

    for label, value in (("bright", 220), ("dark", 30)):
        (folder / label).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (32, 32), (value + i, value, value - i)).save(folder / label / f"{i}.png")
    return folder
