"""The nearest images to the same queries, in the eyes of a network before and after pretraining."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from fastai.data.load import DataLoader
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from selfsup_fastai.compare.report_pictures import Picture, as_data, as_jpeg
from selfsup_fastai.downstream.interpret import nearest_rows
from selfsup_fastai.encoders.checkpoint import get_encoder
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.features import Embeddings, embed, embedded_images
from selfsup_fastai.messages import quiet
from selfsup_fastai.seeding import preserved_rng

THUMB = 96  # Pixels of an image


class Neighbor(NamedTuple):
    """An image among the nearest to a query."""

    picture: Picture
    cosine: str
    same: bool | None  # Of the query's class? None: nobody knows


class Query(NamedTuple):
    """An image, and its neighbors."""

    picture: Picture
    label: str
    before: list[Neighbor]
    after: list[Neighbor]


class Neighbors(NamedTuple):
    """Queries, and of all their neighbors that are shown the share of the query's class."""

    queries: list[Query]
    before: float | None
    after: float | None


def find_neighbors(
    encoder: Any,  # Pretrained: whatever `get_encoder` takes
    dl: DataLoader,  # Images, labeled or not
    vocab: list | None = None,  # Names of the classes, where each image has one
    queries: int = 6,
    k: int = 5,
) -> Neighbors:
    """The `k` nearest images to each query, by an untrained network and by the pretrained one."""
    trained = get_encoder(encoder)
    with quiet():
        seen = [embed(network, dl) for network in (untrained(trained), trained)]
    labels = _classes(seen[0].y) if vocab else None
    rows = query_rows(len(seen[0].x), labels, queries)
    near = [nearest_rows(part.x, rows, min(k, len(part.x) - 1)).tolist() for part in seen]
    places = sorted({*rows, *(at for part in near for row in part for at in row)})
    shown = Shown(dict(zip(places, embedded_images(dl, places))), labels, vocab)
    parts = [
        [_neighbors(part, row, others, shown) for row, others in zip(rows, near[i])] for i, part in enumerate(seen)
    ]
    made = [Query(shown.picture(row, "Query"), shown.name(row), *both) for row, *both in zip(rows, *parts)]
    return Neighbors(made, *(_agreement(part) for part in parts))


def _classes(labels: Tensor | None) -> Tensor | None:
    """Labels, if they are one class an image."""
    return labels if labels is not None and labels.ndim == 1 and not labels.is_floating_point() else None


class Shown(NamedTuple):
    """Images by their place, and what they are."""

    images: dict[int, Tensor]
    labels: Tensor | None
    vocab: list | None

    def name(self, at: int) -> str:
        return "" if self.labels is None else str(self.vocab[int(self.labels[at])])

    def picture(self, at: int, what: str) -> Picture:
        return Picture(thumb(self.images[at]), ": ".join(filter(None, [what, self.name(at)])))

    def same(self, at: int, other: int) -> bool | None:
        return None if self.labels is None else bool(self.labels[at] == self.labels[other])


def _neighbors(seen: Embeddings, row: int, others: list[int], shown: Shown) -> list[Neighbor]:
    cosines = F.cosine_similarity(seen.x[others], seen.x[row : row + 1]).tolist()
    made = zip(others, cosines)
    return [Neighbor(shown.picture(at, "Neighbor"), f"{c:.2f}", shown.same(at, row)) for at, c in made]


def _agreement(part: list[list[Neighbor]]) -> float | None:
    known = [neighbor.same for row in part for neighbor in row if neighbor.same is not None]
    return sum(known) / len(known) if known else None


def query_rows(n: int, labels: Tensor | None, queries: int) -> list[int]:
    """Which images to ask about: class by class in turn, else spread evenly."""
    if labels is None:
        return torch.linspace(0, n - 1, min(queries, n)).long().tolist()
    turn: dict[int, int] = {}
    order = []
    for at, label in enumerate(labels.tolist()):
        turn[label] = turn.get(label, 0) + 1
        order.append((turn[label], label, at))
    return [at for _, _, at in sorted(order)[:queries]]


def untrained(encoder: Encoder) -> Encoder:
    """The same network with the random weights that it would begin with; images are prepared for it as before."""
    fresh = copy.deepcopy(encoder)
    with preserved_rng():
        torch.manual_seed(0)
        if encoder.source.endswith("timm"):
            made = get_encoder(encoder.arch, encoder.in_chans, encoder.size, split=encoder.split)
            if _same_shapes(made, fresh):
                fresh.load_state_dict(made.state_dict())
                return fresh
        for module in fresh.modules():
            reset: Callable | None = getattr(module, "reset_parameters", None)
            if reset:
                reset()
    return fresh


def _same_shapes(one: Encoder, other: Encoder) -> bool:
    shapes = [{key: value.shape for key, value in e.state_dict().items()} for e in (one, other)]
    return shapes[0] == shapes[1]


def thumb(image: Tensor) -> str:
    """(C, H, W) in [0, 1], small, for a page."""
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    made = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    side = max(made.size)
    if side > THUMB:
        made = made.resize([round(edge * THUMB / side) for edge in made.size], Image.Resampling.LANCZOS)
    return as_data("image/jpeg", as_jpeg(made))
