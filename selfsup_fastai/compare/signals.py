"""What embeddings say without labels: how many directions are in use, how near views of one image lie."""

from typing import Any

import numpy as np
from fastai.data.core import DataLoaders

from selfsup_fastai.callbacks.collapse import Pairs
from selfsup_fastai.data.loader import IndexedDL, are_scans, derive_loaders
from selfsup_fastai.data.recipes import for_scans
from selfsup_fastai.data.subsets import subset
from selfsup_fastai.encoders.checkpoint import get_encoder
from selfsup_fastai.features import alignment, effective_rank, embed, feature_std, uniformity
from selfsup_fastai.messages import quiet

RELIABILITY = (
    "They compare runs of one task; across tasks they hardly agree with how useful encoders are (bench/signals.py), so "
    "nothing is chosen by them."
)


def signals_of(
    encoder: Any,  # A saved one, for one
    dls: DataLoaders,  # Unlabeled images
    n: int = 1024,  # Of the training images, evenly spread
) -> dict[str, float]:
    """Effective rank, deviation of directions, alignment and uniformity: see `callbacks.collapse.Signals`."""
    net = get_encoder(encoder)
    with quiet():
        plain = derive_loaders(dls, dl_type=IndexedDL, inputs_only=True, n_in=net.image_channels)
    total = len(plain.train.dataset)
    places = np.linspace(0, total - 1, min(n, total)).astype(int)
    like = plain.valid if len(plain.loaders) > 1 else plain.train
    some = subset(plain.train, places, like=like, shuffle=False, drop_last=False)
    pairs = Pairs(net, for_scans(None) if are_scans(plain) else None)
    x, y = embed(pairs, some).x.chunk(2, 1)
    found = {"effective rank": effective_rank(x), "deviation of directions": feature_std(x)}
    return found | {"alignment": alignment(x, y), "uniformity": uniformity(x)}
