"""Pictures of what an encoder has learned."""

from typing import Any

import torch
from fastai.data.load import DataLoader
from matplotlib.axes import Axes
from torch.nn import functional as F

from selfsup_fastai.features import embed, embedded_images
from selfsup_fastai.pictures import draw, grid_axes


def nearest_neighbors(
    encoder: Any,  # An Encoder, or anything with `.encoder`, such as a learner
    dl: DataLoader,  # Images, labeled or not: `dls.train`, `dls.valid`
    queries: int = 6,  # How many images to find neighbors of, spread evenly over the data
    k: int = 6,  # Neighbors of each
    figsize: tuple[float, float] | None = None,
) -> list[Axes]:
    """A row for each query: the image, then its `k` nearest by the cosine of their embeddings, nearest first.

    Look for rows that show the same kind of thing; rows that merely share brightness or background say that the encoder
    has learned little. With classes as labels, neighbors are marked: of the query's class, or of another. The images
    are those that were embedded: cut as validation cuts them.
    """
    found = embed(getattr(encoder, "encoder", encoder), dl)
    rows = torch.linspace(0, len(found.x) - 1, min(queries, len(found.x))).long().tolist()
    nearest = nearest_rows(found.x, rows, min(k, len(found.x) - 1))
    groups = [[row, *others] for row, others in zip(rows, nearest.tolist())]
    images = iter(embedded_images(dl, [at for group in groups for at in group]))
    labels = found.y if found.y is not None and found.y.ndim == 1 and not found.y.is_floating_point() else None
    axes = iter(grid_axes(len(rows) * (nearest.shape[1] + 1), None, figsize, columns=nearest.shape[1] + 1))
    drawn = []
    for row, *others in groups:
        drawn.append(draw(next(axes), next(images), "query"))
        for at in others:
            same = None if labels is None else bool(labels[at] == labels[row])
            cosine = F.cosine_similarity(found.x[at], found.x[row], dim=0)
            drawn.append(draw(next(axes), next(images), f"{cosine:.2f}", same))
    return drawn


def nearest_rows(x: torch.Tensor, rows: list[int], k: int) -> torch.Tensor:
    """For each of `rows` the `k` other rows of x (N, C) with the greatest cosine, (len(rows), k)."""
    z = F.normalize(x, dim=1)
    similar = z[rows] @ z.T
    similar[torch.arange(len(rows)), rows] = -torch.inf
    return similar.topk(k, dim=1).indices
