"""Thousands of crops of one picture, for `UnlabeledDataLoaders.from_single_image`."""

import os
import random
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from PIL import Image

from selfsup_fastai.data.opening import open_image
from selfsup_fastai.errors import DataError
from selfsup_fastai.seeding import item_seed

LEAST_SIDE = 64
CUTTER = 1
"""Counts changes of what `random_crop` makes of the same arguments."""


def picture(path: str | os.PathLike | Image.Image) -> Image.Image:
    """The image to cut crops from. A deep one on the scale of 16 bits: opening then scales every crop alike."""
    image = open_image(path)
    if min(image.size) < LEAST_SIDE:
        size = f"{image.size[0]} x {image.size[1]}"
        raise DataError(f"One picture of {size} pixels is too small to cut crops from; {LEAST_SIDE} is the least.")
    return Image.fromarray(np.rint(np.asarray(image) * 257).astype(np.int32)) if image.mode == "F" else image


@dataclass(frozen=True)
class Crop:
    """A random crop of a picture, cut when it is called for."""

    image: Image.Image  # As `picture` returns it
    digest: bytes  # Of its pixels
    seed: int
    index: int
    side: int

    def __call__(self) -> Image.Image:
        return random_crop(self.image, self.seed, self.index, self.side)

    @property
    def identity(self) -> bytes:
        """Equal for equal crops, also in another process."""
        return self.digest + f"{CUTTER}-{self.seed}-{self.index}-{self.side}".encode()


def crops(image: Image.Image, n: int, seed: int, side: int) -> list[Crop]:
    """`n` crops of a picture."""
    digest = blake2b(f"{image.mode}{image.size}".encode() + image.tobytes(), digest_size=16).digest()
    return [Crop(image, digest, seed, i, side) for i in range(n)]


def random_crop(
    image: Image.Image,  # At least 64 pixels wide and high, as `picture` returns it
    seed: int,  # Of all crops
    index: int,  # Of this one: the same index gives the same crop
    side: int,  # Pixels of the crop
) -> Image.Image:
    """Crop number `index` of `image` (see `from_single_image`), of its mode."""
    rng = random.Random(item_seed(seed, index))
    box = _random_box(image, rng)
    turn, shear = rng.uniform(-30, 30), rng.uniform(-30, 30)
    wide = round(side * 2**0.5)  # larger than needed: what turning brings in from outside is cut off again
    turned = _turn_and_shear(image.crop(box).resize((wide, wide), Image.Resampling.BILINEAR), turn, shear)
    margin = (wide - side) // 2
    return turned.crop((margin, margin, margin + side, margin + side))


def _random_box(image: Image.Image, rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a square with 1/500 to 1 of the area of one of half the shorter side."""
    half = min(image.size) // 2
    left, top = rng.randint(0, image.width - half), rng.randint(0, image.height - half)
    side = max(8, round(half * rng.uniform(1 / 500, 1) ** 0.5))
    left, top = left + rng.randint(0, half - side), top + rng.randint(0, half - side)
    return left, top, left + side, top + side


def _turn_and_shear(image: Image.Image, turn: float, shear: float) -> Image.Image:
    """Turned and sheared (degrees) about the center; the borders are filled by reflection."""
    pad = image.width // 2
    array = np.pad(np.asarray(image), ((pad, pad), (pad, pad)) + ((0, 0),) * (image.mode == "RGB"), mode="reflect")
    padded = Image.fromarray(array)
    cos, sin, slope = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn)), np.tan(np.deg2rad(shear))
    a, b, d, e = cos, cos * slope - sin, sin, sin * slope + cos  # turn x shear, output -> input
    c = padded.width / 2
    matrix = (a, b, c - a * c - b * c, d, e, c - d * c - e * c)
    warped = padded.transform(padded.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return warped.crop((pad, pad, pad + image.width, pad + image.height))
