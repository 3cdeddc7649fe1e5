"""Images of a folder and those nearest to them in feature space, as a picture and as a table."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup_fastai.data.unsplit import Unsplit
from selfsup_fastai.errors import DataError
from selfsup_fastai.features import embed, embedded_images, finite
from selfsup_fastai.messages import say
from selfsup_fastai.pictures import draw, grid_axes, save_picture
from selfsup_fastai.runs.inputs import check_file_out, check_layer, find_some, saved, seen_by, side_of, which
from selfsup_fastai.writing import whole_file, write_csv

QUERIES = 6  # Images of the folder that are asked about where nobody names any


class Nearest(NamedTuple):
    """Of each query the rows that are nearest to it, the nearest first."""

    queries: list[int]  # Rows
    rows: Tensor  # (queries, k)
    cosines: Tensor  # (queries, k)


def neighbors_of_folder(
    folder: str | os.PathLike,  # Of images, at any depth
    out: str | os.PathLike,  # A file that ends in .png; the table goes beside it
    encoder: str | os.PathLike,  # A saved encoder or model
    queries: Sequence[str | os.PathLike] = (),  # Image files, of the folder or not; none: some of the folder
    k: int = 6,  # Neighbors of each
    layer: str | None = None,  # None: what the encoder gives; else this layer's map, averaged
    size: int | None = None,  # Side of the images in pixels; None: as the encoder was trained
    paths: bool = False,  # Write names of DICOM files, too: they may identify patients
    **data,  # bs, num_workers, cache, max_gb
) -> Path:
    """Draws a row for each query: the image, then its nearest by the cosine of their features. Returns the picture.

    Numbers above the images are places of files among all of the folder, as the table counts them; those of files that
    do not lie in the folder come after these.
    """
    out = check_file_out(out, [folder], (".png",))
    net = saved(encoder).encoder
    check_layer(net, layer)
    inputs = [folder, *_outside(folder, queries)]
    found = find_some(inputs, out, net.image_channels, side_of(net, size), paths, seen=seen_by(net), **data)
    asked = _asked(found, folder, queries)
    nearest = nearest_to(embed(net, found.dl, layers=layer).x, asked, _inside(found, folder), k)
    write_csv(_table(nearest, which(found.info, found.private and not paths)), out.with_suffix(".csv"))
    _draw(nearest, found)
    with whole_file(out) as file:
        save_picture(file)
    say(f"{len(found.info):,} images; the table is {out.with_suffix('.csv').name}.")
    return out


def nearest_to(
    x: Tensor,  # (N, C) features
    queries: list[int],  # Rows of x
    allowed: Tensor,  # (N,) bool: which rows may be neighbors; of a query all others of these
    k: int,
) -> Nearest:
    """The `k` allowed rows with the greatest cosine, fewer where there are no more."""
    z = F.normalize(finite(x), dim=1)
    similar = z[queries] @ z.T
    similar[:, ~allowed] = -torch.inf
    similar[torch.arange(len(queries)), queries] = -torch.inf
    others = min(int(allowed.sum()) - int(allowed[q]) for q in queries)
    cosines, rows = similar.topk(min(k, others), dim=1)
    return Nearest(queries, rows, cosines)


def _outside(folder: str | os.PathLike, queries: Sequence[str | os.PathLike]) -> list[Path]:
    """Queries that do not lie in the folder."""
    home = Path(folder).resolve()
    for query in map(Path, queries):
        if not query.is_file():
            raise DataError(f"There is no image {str(query)!r} to find neighbors of.")
    return [Path(query) for query in queries if home not in Path(query).resolve().parents]


def _inside(found: Unsplit, folder: str | os.PathLike) -> Tensor:
    return torch.tensor([Path(folder) in file.parents for file in found.info["file"]])


def _asked(found: Unsplit, folder: str | os.PathLike, queries: Sequence[str | os.PathLike]) -> list[int]:
    """Rows of the queries: of each file its middle frame; without queries, rows evenly spread over the folder."""
    if not queries:
        n = len(found.info)
        return torch.linspace(0, n - 1, min(QUERIES, n)).long().tolist()
    rows: dict[Path, list[int]] = {}
    for row, file in enumerate(found.info["file"]):
        rows.setdefault(file.resolve(), []).append(row)
    of_each = [rows.get(Path(query).resolve()) for query in queries]
    if None in of_each:
        nth = of_each.index(None) + 1
        raise DataError(
            f"Query {nth} of {len(queries)} cannot be read as an image; the list beside the result says why."
        )
    return [of_one[len(of_one) // 2] for of_one in of_each]


def _table(nearest: Nearest, names: pd.DataFrame) -> pd.DataFrame:
    """A row a neighbor: of which query, which rank, which image, how similar."""
    n, k = nearest.rows.shape
    asked = names.iloc[[q for q in nearest.queries for _ in range(k)]].add_prefix("query_").reset_index(drop=True)
    others = names.iloc[nearest.rows.flatten().tolist()].reset_index(drop=True)
    rank = pd.DataFrame({"rank": [r + 1 for _ in range(n) for r in range(k)]})
    return pd.concat([asked, rank, others], axis=1).assign(cosine=nearest.cosines.flatten().numpy())


def _draw(nearest: Nearest, found: Unsplit) -> None:
    columns = nearest.rows.shape[1] + 1
    groups = [[q, *rows] for q, rows in zip(nearest.queries, nearest.rows.tolist())]
    images = iter(embedded_images(found.dl, [row for group in groups for row in group]))
    axes = iter(grid_axes(len(groups) * columns, columns=columns))
    for (query, *rows), cosines in zip(groups, nearest.cosines.tolist()):
        draw(next(axes), next(images), f"query: {_number(found, query)}")
        for row, cosine in zip(rows, cosines):
            draw(next(axes), next(images), f"{_number(found, row)}: {cosine:.2f}")


def _number(found: Unsplit, row: int) -> str:
    """The place of an image's file, and of several frames which one it is."""
    one = found.info.iloc[row]
    return f"{one['nth']}" + (f"/{one['frame']}" if one.get("frames", 1) > 1 and "frame" in one else "")
