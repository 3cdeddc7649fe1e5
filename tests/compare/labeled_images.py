"""Small labeled loaders with a known truth."""

import numpy as np
import pandas as pd
from fastai.data.core import DataLoaders
from PIL import Image

from selfsup_fastai.data.labeled import labeled_loaders


def striped(rng: np.random.Generator, kind: int, size: int) -> np.ndarray:
    """Stripes across or down, of a random width and phase, under noise."""
    x = np.arange(size) * rng.uniform(0.6, 1.2) + rng.uniform(0, 6)
    image = 128 + 60 * np.sin(x)[:, None] + rng.normal(0, 25, (size, size))
    return np.clip(image if kind == 0 else image.T, 0, 255).astype(np.uint8)


def stripes_table(folder, n_train: int, n_test: int, seed: int = 0, size: int = 32, labels: str = "true"):
    """Files and a table (file, label, is_valid). `labels` 'random': they have nothing to do with the images."""
    rng, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n_train + n_test):
        kind = i % 2
        Image.fromarray(striped(rng, kind, size)).save(folder / f"{i:04d}.png")
        label = int(rng.integers(2)) if labels == "random" else kind
        rows.append({"file": folder / f"{i:04d}.png", "label": "ab"[label], "is_valid": i >= n_train})
    return pd.DataFrame(rows)


def stripes(folder, n_train: int = 40, n_test: int = 40, bs: int = 8, **kwargs) -> DataLoaders:
    return labeled_loaders(stripes_table(folder, n_train, n_test, **kwargs), 1, 32, bs)
