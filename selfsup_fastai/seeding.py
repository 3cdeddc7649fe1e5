"""The one rule of randomness.

Everything random about an image while it is opened and cut (item level) draws from Python's `random`, seeded here for
that item alone; everything random about a batch (turns, permutations, views) draws from the `Generator` of the loader's
`PretextTransform`, on the device of the images, or on the CPU what the program has to know. Both seeds come from
`dl.rng` at the start of each pass over the data, and `dl.rng` itself from Python's `random` when the loader is made. So
`set_seed(42)` before the loaders are made fixes a whole run, with any number of worker processes; a validation pass
always draws the same. Of several processes that train one model all have the same seeds for items and the order, and
each its own for batches.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

VALID_SEED = 42  # of every validation pass


class Generator(torch.Generator):
    """What a batch is drawn from: on the device of the images, and beside it on the CPU, the `host`.

    From the host come the numbers that the program itself has to know, such as which images are blurred: to ask a GPU
    for them is to wait until it has done all that it was given. On the CPU both are one.
    """

    host: torch.Generator

    def __new__(cls, device: torch.device | str, seed: int):
        self = super().__new__(cls, device)
        self.manual_seed(seed)
        on_cpu = self.device.type == "cpu"
        self.host = self if on_cpu else torch.Generator().manual_seed(part_seed(seed, "host"))
        return self


def host_of(generator: torch.Generator) -> torch.Generator:
    """Its generator on the CPU; itself where it has none."""
    return getattr(generator, "host", generator)


def rng_state() -> dict:
    """The state of the global generators of Python, NumPy and torch (CPU and every CUDA device in use)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict) -> None:
    """Put back what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """What happens inside (looking at a batch, measuring statistics) leaves the global generators as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def item_seed(seed: int, index: int) -> str:
    """What Python's `random` is seeded with for item `index` of a pass with `seed`."""
    return f"{seed}-{index}"


def part_seed(seed: int, part: int | str) -> int:
    """What one of several processes draws its batches by in a pass with `seed`."""
    return random.Random(f"{seed}-{part}").getrandbits(62)


@contextmanager
def seeded_item(seed: int, index: int) -> Iterator[None]:
    """Python's `random` seeded for item `index` of a pass with `seed`; afterwards it goes on as if nothing happened."""
    state = random.getstate()
    random.seed(item_seed(seed, index))
    try:
        yield
    finally:
        random.setstate(state)
