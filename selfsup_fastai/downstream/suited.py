"""An encoder to look into, and images that suit it: neither is what was given, so neither can change."""

from copy import copy
from os import PathLike
from typing import Any

import torch
from fastai.data.core import DataLoaders
from torch import nn

from selfsup_fastai.data.loader import check_dls, derive_loaders, measure_stats, n_in_of, needs_resize
from selfsup_fastai.encoders.checkpoint import get_encoder, is_fresh
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import quiet
from selfsup_fastai.seeding import preserved_rng


def suited(
    source: Any,  # Whatever stands for an encoder (see `get_encoder`); the name of a net means an untrained one
    dls: DataLoaders,  # Labeled images, those of `dls.valid` to test on
    seed: int,  # Of an untrained net's weights
) -> tuple[Encoder, DataLoaders]:
    """The encoder, and loaders that open images with its channels; resized where they differ in size and nothing does.

    An encoder without statistics is given those of the training images, in a copy. Weights are shared with the given
    encoder: they are to be read alone.
    """
    check_dls(dls)
    if len(dls.loaders) < 2 or not len(dls.valid_ds):
        raise DataError("There are no images to test on: dls.valid is empty. Make loaders with valid_pct=0.2.")
    with preserved_rng(), quiet():
        torch.manual_seed(seed)
        if is_fresh(source):
            loaders = derive_loaders(dls, n_in=n_in_of(dls), resize=128 if needs_resize(dls) else None)
            shape = loaders.valid.one_batch()[0].shape
            encoder = get_encoder(source, n_in=shape[1], size=shape[2] if shape[2] == shape[3] else None)
            encoder.to(dls.device)
        else:
            encoder = network(source, dls.device)
            side = (encoder.size or 128) if needs_resize(dls) else None
            loaders = derive_loaders(dls, n_in=encoder.image_channels, resize=side)
        if encoder.mean is None:
            encoder = copy(encoder)
            encoder.mean, encoder.std = measure_stats(loaders)
    return encoder, loaders


def network(
    source: Any,  # Whatever stands for an encoder
    device: torch.device | None = None,  # Where one from a file goes; the others stay where they are
) -> Encoder:
    """The encoder itself. A file is read, a bare network is wrapped (a copy of it)."""
    encoder = get_encoder(source)
    if isinstance(source, str | PathLike) and device is not None:
        encoder.to(device)
    return encoder


def embedder(source: Any, device: torch.device | None = None) -> nn.Module:
    """What turns images into features: as `network`, and any module that gives (B, D) as it stands."""
    own = getattr(source, "encoder", source)
    return own if isinstance(own, nn.Module) else network(source, device)
