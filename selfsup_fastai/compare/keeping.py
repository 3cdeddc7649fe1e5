"""Finished runs in files, so that a comparison that was killed goes on where it stood.

A file is written whole or not at all. Its name is a sum over everything that the run depends on: a run with other
settings, other images or another encoder has another name, and is never taken for it.
"""

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from fastai.data.core import DataLoaders

from selfsup_fastai.compare.comparison import plain
from selfsup_fastai.data.files import result_folder
from selfsup_fastai.data.loader import image_sources
from selfsup_fastai.features import embedded_images
from selfsup_fastai.writing import write_whole

LOOKED_AT = 16  # Images of each loader that its print is made of


def key_of(**settings: Any) -> str:
    """A name for a run with these settings."""
    return hashlib.sha256(json.dumps(plain(settings), sort_keys=True).encode()).hexdigest()[:24]


def data_print(
    dls: DataLoaders,
    *labels: np.ndarray,  # Numbers that are known of all images
) -> str:
    """A sum over the number of images, batch size, transforms, size and time of each file, some pixels, these labels.

    Where images are no files, only the pixels of some are looked at.
    """
    digest = hashlib.sha256()
    for dl in dls.loaders:
        n = len(dl.dataset)
        tfms = [repr(t) for part in ("after_item", "before_batch", "after_batch") for t in getattr(dl, part).fs]
        digest.update(f"{n} {dl.bs} {[re.sub(r'0x[0-9a-f]+', '', text) for text in tfms]}".encode())
        for source in image_sources(dl.dataset) or ():
            digest.update(_stamp(source))
        rows = np.linspace(0, n - 1, min(n, LOOKED_AT)).astype(int).tolist()
        for image in embedded_images(dl, rows) if n else []:
            digest.update(image.contiguous().numpy().tobytes())
    for values in labels:
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:24]


def _stamp(source: object) -> bytes:
    """When a file was written last, and how long it is: nothing of its name, which may be a patient's."""
    try:
        found = os.stat(os.fspath(source))
    except (TypeError, OSError):  # no file, or one that is opened in another way
        return b""
    return f"{found.st_size} {found.st_mtime_ns};".encode()


class Runs:
    """Predictions and facts of finished runs, in a folder or in memory."""

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else result_folder(folder)
        self.held: dict[str, np.ndarray | Path] = {}

    def facts(self, key: str) -> dict | None:
        """What was written down of a finished run; None if there is none."""
        file = self._file(key)
        if file is None or not file.exists():
            return None
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
                facts = json.loads(str(arrays["facts"]))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None  # a damaged file is a run that was not made
        self.held[key] = file
        return facts

    def keep(self, key: str, predicted: np.ndarray, facts: dict) -> None:
        """Writes a finished run down."""
        self.held[key] = predicted
        if (file := self._file(key)) is not None:
            out = io.BytesIO()
            np.savez_compressed(out, predicted=predicted, facts=np.array(json.dumps(plain(facts))))
            write_whole(file, out.getvalue())
            self.held[key] = file

    def _file(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.npz"
