"""Where images come from: shards, files or the pixel cache; images a second of one process, all in one run.

Medians over rounds in which every case has its turn, after one round that does not count; processor time of this
process, so that others on the machine disturb less. What was read once lies in the system's memory: this compares the
work of a processor, not disks. clothing10_photos, 984 photographs of about 400 x 533 (SELFSUP_DATA names the folder it
is looked for in), or a folder that is named.

    python bench/shards.py
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import data_set, machine, markdown, spread, timed

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.shard_writing import write_shards


def processor_time(case: Callable) -> float:
    """Seconds of this process an image."""
    began = time.process_time()
    n = case()
    return (time.process_time() - began) / n


def epoch(dls: UnlabeledDataLoaders) -> int:
    """A pass over the training images."""
    return sum(len(b[0]) for b in dls.train)


def bytes_read(sources: list) -> int:
    """The encoded images, not decoded, in random order."""
    for source in random.Random(1).sample(sources, len(sources)):
        source() if callable(source) else source.read_bytes()
    return len(sources)


def report(photos: Path, folder: Path, rounds: int) -> str:
    """A table."""
    write_shards(photos, folder / "shards", 100)
    settings = dict(size=128, bs=64, num_workers=0, device="cpu")
    files = UnlabeledDataLoaders.from_folder(photos, cache=False, **settings)
    shards = UnlabeledDataLoaders.from_shards(folder / "shards", **settings)
    kept = UnlabeledDataLoaders.from_shards(folder / "shards", cache=True, **settings)
    cases = {
        "files, decoded": lambda: epoch(files),
        "shards, decoded": lambda: epoch(shards),
        "shards, their pixels in the pixel cache": lambda: epoch(kept),
        "files, bytes alone": lambda: bytes_read(list(files.train_ds.tls[0].items)),
        "shards, bytes alone": lambda: bytes_read(list(shards.train_ds.tls[0].items)),
    }
    return markdown(spread(1 / timed(cases, rounds, processor_time), "{:,.0f}"), "images a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path, nargs="?", help="folder of images")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ["SELFSUP_CACHE"] = str(Path(name) / "cache")
        photos = args.photos or data_set("clothing10_photos", Path(name))
        print(machine() + "\n\n" + report(photos, Path(name), args.rounds))


if __name__ == "__main__":
    main()
