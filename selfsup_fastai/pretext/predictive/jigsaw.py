"""Jigsaw puzzles."""

from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from fastai.metrics import accuracy
from torch import Tensor, nn

from selfsup_fastai.checks import check_choice, check_flag, check_number
from selfsup_fastai.data.colors import FRINGES, some_grey, without_fringes
from selfsup_fastai.data.patches import random_tiles
from selfsup_fastai.data.views import center_square
from selfsup_fastai.encoders.crops import check_takes_parts
from selfsup_fastai.messages import say
from selfsup_fastai.pictures import draw_rows, mosaic
from selfsup_fastai.pretext.base import PretextTask, class_loss
from selfsup_fastai.transfer import sent

TAKEN = 2**30  # More tiles than any order can have in common with all others
MANY = 2000  # Orders whose choice takes long enough to be announced


@lru_cache
def distant_permutations(n: int, seed: int = 42) -> np.ndarray:
    """`n` orders of nine tiles, (n, 9): a random one first, then again and again the one with the greatest mean Hamming
    distance to those chosen. Far apart, so that no single tile gives the answer away."""
    everything = np.array(list(permutations(range(9))), dtype=np.int8)  # (362,880, 9)
    same = [[everything[:, place] == tile for tile in range(9)] for place in range(9)]
    chosen = [int(np.random.default_rng(seed).integers(len(everything)))]
    alike = np.zeros(len(everything), dtype=np.int32)  # tiles in the place that they have in the chosen ones
    for _ in range(n - 1):
        for place, tile in enumerate(everything[chosen[-1]]):
            alike += same[place][tile]
        alike[chosen[-1]] = TAKEN
        chosen.append(int(alike.argmin()))
    return everything[chosen].astype(np.int64)


class Jigsaw(PretextTask):
    """In which of a fixed set of orders were the nine tiles of the image shuffled?

    Noroozi & Favaro, Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles, 2016 (arXiv
    1603.09246). To answer, the network must know the parts of things and how they are placed.

    In: a 3 x 3 grid on the center square, one tile of 3/4 of its cell at a random place in each cell; the tiles,
    shuffled, as one input (B, 9, C, t, t): tile j of the puzzle is tile `permutations[target][j]` of the image. Target:
    the number of the permutation, (B,). Prediction: (B, n_permutations) logits; chance is 1 / n_permutations.

    Guards against answers without understanding: random gaps (edges that continue), each tile standardized by channel
    (brightness gradients), the whole image grey for 30 % (color), each color channel shifted by up to 1/32 of the tile
    (chromatic aberration; the paper's 2 of 64 pixels), at least by one pixel, which is much of a small tile. Against
    wide fringes this is not enough: where red lay half a pixel of 54 off at the borders, a net that sees 9 pixels named
    16 % of 8 orders (guessing: 13 %), at one pixel 33 %, at two 61 %. Reduced photographs have less; for others there
    is `color='drop'` (ours; 15 % at one and two pixels), with which no tile has more than one channel. `'project'` is
    against fringes between green and magenta only. No mirror images, as in the authors' data.
    The released set has 100 permutations, the paper's best run 1000; 64 is ours, for thousands of images rather than a
    million, and so are the narrower layers after the encoder (the paper's: 1024 a tile, then 4096).

    Suits images of things with parts, centered or not, of at least 33 pixels (tiles of 8), better 48 (tiles of 12) or
    more. Does not suit textures. An encoder of fixed input size (ViT) sees every tile enlarged to that size: nine
    passes for each image, not half of one.
    """

    name = "jigsaw"
    paper = "Noroozi & Favaro 2016"
    of_color = ("grey", "color")
    normalized = (False,)  # the tiles are standardized already
    min_side = 33  # tiles of 8 pixels
    metrics = (accuracy,)

    def __init__(
        self,
        n_permutations: int = 64,  # Size of the set of orders; 2 to 10,000
        grey: float = 0.3,  # Share of color images made grey; 0 turns the guard off
        gap: bool = True,  # Tiles smaller than their cells, at random places; False: tiles touch
        standardize: bool = True,  # Each channel of each tile to mean 0, deviation 1
        shift: bool = True,  # Channels shifted against each other
        color: str = "keep",  # 'drop': one channel of each tile kept; 'project': green to magenta taken away; 'keep'
        tile_features: int = 256,  # Width per tile after the encoder
        hidden: int = 1024,  # Width of the layer that sees all tiles
        dropout: float = 0.5,  # Share of the features dropped, of each tile and of the hidden layer
    ):
        for name, flag in {"gap": gap, "standardize": standardize, "shift": shift}.items():
            check_flag(name, flag)
        check_choice("color", color, FRINGES)
        check_number("n_permutations", n_permutations, 2, 10_000, whole=True)
        check_number("grey", grey, 0, 1)
        check_number("tile_features", tile_features, 1, whole=True)
        check_number("hidden", hidden, 1, whole=True)
        check_number("dropout", dropout, 0, below=1)
        self.n_permutations, self.grey, self.gap = n_permutations, grey, gap
        self.standardize, self.shift, self.color = standardize, shift, color
        self.tile_features, self.hidden, self.dropout = tile_features, hidden, dropout
        self.passes = self._area()

    def setup(self, dls, encoder):
        check_takes_parts(encoder, self._side(encoder.side), self.name)
        self.passes = 9 if encoder.fixed_size else self._area()
        if self.n_permutations >= MANY:
            say(f"jigsaw: {self.n_permutations:,} orders of the tiles are being chosen, which takes a while.")
        distant_permutations(self.n_permutations)  # now, not in the first batch

    def _side(self, side: int) -> int:
        """Of tiles of images of this side, in pixels."""
        return side // 3 * 3 // 4 if self.gap else side // 3

    def _area(self) -> float:
        """Of the nine tiles together, as a share of the image."""
        return 9 * (0.75 / 3) ** 2 if self.gap else 1.0

    @property
    def permutations(self) -> Tensor:
        """The set of orders, (n_permutations, 9)."""
        return torch.from_numpy(distant_permutations(self.n_permutations))

    def make_batch(self, x, *, generator, train, idx=None):
        x = center_square(x)
        target = torch.randint(self.n_permutations, (len(x),), generator=generator, device=x.device)
        tiles = self.cut(some_grey(x, self.grey, generator), generator)
        tiles = without_fringes(tiles, self.color, generator)
        order = sent(self.permutations, x.device)[target]  # (B, 9)
        tiles = tiles[torch.arange(len(x), device=x.device).unsqueeze(1), order]
        return (_standardized(tiles) if self.standardize else tiles,), (target,)

    def cut(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """(B, C, S, S) -> tiles (B, 9, C, t, t), row by row, at random places in their cells."""
        size = self._side(x.shape[-1])
        reach = max(1, round(size / 32)) if self.shift and x.shape[1] == 3 else 0
        return random_tiles(x, size, generator, reach)

    def model(self, encoder):
        return JigsawNet(encoder, self.n_permutations, self.tile_features, self.hidden, self.dropout)

    def loss(self, pred, target, reduction="mean"):
        return class_loss(pred, target, reduction)

    def chance(self):
        return 1 / self.n_permutations

    def solve(self, tiles: Tensor, number: int) -> Tensor:
        """Tiles (9, C, t, t) of a puzzle put back in the order that permutation `number` says they came from."""
        return tiles[self.permutations[number].argsort()]

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """The tiles as posed, (as the network would put them together,) and in their places."""
        tiles, numbers = inputs[0][:max_n], targets[0][:max_n].tolist()
        rows = [[_mosaic(puzzle), _mosaic(self.solve(puzzle, number))] for puzzle, number in zip(tiles, numbers)]
        titles, gap = [f"shuffled | true (order {number})" for number in numbers], tiles.shape[-1] // 2
        if pred is None:
            return draw_rows(rows, titles, ctxs, figsize, gap=gap)
        named = pred[: len(tiles)].tolist()
        for row, puzzle, number in zip(rows, tiles, named):
            row.insert(1, _mosaic(self.solve(puzzle, number)))
        titles = [f"shuffled | as named (order {guess}) | true (order {known})" for guess, known in zip(named, numbers)]
        return draw_rows(rows, titles, ctxs, figsize, [guess == known for guess, known in zip(named, numbers)], gap)


class JigsawNet(nn.Module):
    """One encoder on each of nine tiles, then a classifier that sees them in order: (B, 9, C, t, t) -> (B, n)."""

    def __init__(self, encoder: nn.Module, n_permutations: int, tile_features: int, hidden: int, dropout: float):
        super().__init__()
        self.encoder = encoder
        self.tile = nn.Sequential(nn.Linear(encoder.num_features, tile_features), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Sequential(
            nn.Linear(9 * tile_features, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, n_permutations)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tile(self.encoder(x.flatten(0, 1))).view(len(x), -1))


def _standardized(tiles: Tensor) -> Tensor:
    """Each channel of each tile with mean 0 and deviation 1 (a flat one: 0)."""
    return (tiles - tiles.mean((-2, -1), keepdim=True)) / tiles.std((-2, -1), keepdim=True).clamp(min=1e-2)


def _mosaic(tiles: Tensor) -> Tensor:
    """Tiles (9, C, t, t) in a 3 x 3 grid, each stretched to [0, 1]."""
    low, high = tiles.amin((1, 2, 3), keepdim=True), tiles.amax((1, 2, 3), keepdim=True)
    return mosaic((tiles - low) / (high - low).clamp(min=1e-6))
