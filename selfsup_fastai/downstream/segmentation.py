"""Masks: a decoder that goes from an encoder's coarsest map to the image's own pixels, every finer map beside it.

A U-Net (Ronneberger, Fischer & Brox 2015) on the maps of any encoder.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from fastai.callback.core import Callback
from torch import Tensor, nn

from selfsup_fastai.downstream.pyramid import Level, Pyramid, resized
from selfsup_fastai.encoders.decoders import group_norm
from selfsup_fastai.errors import DataError

EVERY = 50  # Batches after which a GPU is waited for, to see whether masks were right
FINE, WIDEST = 32, 256  # Channels of the decoder at the finest level, twice as many at each coarser one, and at most


class UNetDecoder(nn.Module):
    """Maps of an encoder and the images themselves to numbers for each pixel, (B, n_out, H, W), raw.

    From the coarsest map up: bilinear to the next finer one, beside it, two convolutions. At last the image itself is
    seen, so that borders are as sharp as its own. Group norms: batches of masks are small.
    """

    def __init__(
        self,
        levels: Sequence[Level],  # The encoder's, fine to coarse
        in_chans: int,  # Channels of the images
        n_out: int,  # Classes
        dropout: float = 0.0,  # Share of the channels dropped before the last layer in training
    ):
        super().__init__()
        widths = [min(FINE * 2**i, WIDEST) for i in range(len(levels))]
        self.pyramid = Pyramid(levels, widths)
        self.ups = nn.ModuleList(_mixed(w + coarse, w) for w, coarse in pairwise(widths))
        self.image = _mixed(in_chans, FINE // 2)
        self.last = nn.Sequential(_mixed(FINE + FINE // 2, FINE), nn.Dropout2d(dropout), nn.Conv2d(FINE, n_out, 1))

    @property
    def layers(self) -> list[str]:
        """The layers of the encoder whose maps are looked at."""
        return self.pyramid.layers

    def forward(
        self,
        x: Tensor,  # Images (B, in_chans, H, W), as the encoder is given them
        maps: dict[str, Tensor],  # What the encoder made of them, by layer
    ) -> Tensor:
        *finer, coarse = self.pyramid(maps)
        for up, skip in zip(reversed(self.ups), reversed(finer)):
            coarse = up(torch.cat([skip, resized(coarse, skip.shape[-2:])], 1))
        return self.last(torch.cat([resized(coarse, x.shape[-2:]), self.image(x)], 1))


def _mixed(n_in: int, n_out: int) -> nn.Sequential:
    """Two 3x3 convolutions, each normalized and rectified."""
    layers = []
    for width in (n_in, n_out):
        layers += [nn.Conv2d(width, n_out, 3, padding=1, bias=False), group_norm(n_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class KnownCodes(Callback):
    """Says which values masks hold beyond the codes, before the loss fails on them in words of its own.

    On a GPU, which would have to be waited for, foreign values are taken for code 0 at first, and said within some
    batches.
    """

    run_after_fit = False

    def __init__(
        self,
        n: int,  # How many codes there are
        ignored: int | None = None,  # A value that the loss leaves out
        every: int | None = None,  # Batches between two looks at what was found; None: 1 on a CPU, else 50
    ):
        self.n, self.ignored, self.every, self.found = n, ignored, every, []

    def before_batch(self):
        """Every mask is looked at: those looked at before may not hold all values."""
        every = self.every or (1 if self.learn.xb[0].device.type == "cpu" else EVERY)
        if every == 1:
            self.found = [self._foreign(y)[1] for y in self.learn.yb]
            self._say()
            return
        looked = [self._foreign(y) for y in self.learn.yb]
        self.learn.yb = tuple(y.masked_fill(foreign, 0) for y, (foreign, _) in zip(self.learn.yb, looked))
        self.found += [value for _, value in looked]
        if self.iter % every == every - 1:
            self._say()

    def after_train(self):
        self._say()

    def after_validate(self):
        self._say()

    def _foreign(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Where a mask holds a value that is no code, and one such value; 0, which is a code, if there is none."""
        foreign = (y < 0) | (y >= self.n)
        if self.ignored is not None:
            foreign &= y != self.ignored
        values = torch.where(foreign, y, 0).flatten()
        return foreign, values[values.abs().argmax()]

    def _say(self) -> None:
        found, self.found = self.found, []
        values = [value for value in (torch.stack(found).tolist() if found else []) if value]
        if values:
            value = int(values[0])
            raise DataError(f"A mask holds the value {value}; expected 0 to {self.n - 1}, the number of a code.")
