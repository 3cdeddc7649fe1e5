"""All images of a loader on one sheet, near to each other where an encoder finds them alike."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.data.load import DataLoader
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.transforms import ScaledTranslation
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch.nn import functional as F

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.downstream.suited import embedder
from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.features import embed, embedded_images, finite
from selfsup_fastai.plots import BLACK, COLORS, MARKERS
from selfsup_fastai.seeding import preserved_rng

KINDS = ("pca", "tsne", "umap")
MOST_CLASSES = 12  # With looks of their own; the rest are grey
SIDE = 30  # Points (1/72 inch) of a thumbnail's longer side
GREY = "#8C8C8C"
PALETTE = (*COLORS, BLACK, "#F0E442")  # Okabe and Ito's eight, their yellow last: points have a dark rim


def embedding_map(
    encoder: Any,  # An encoder, a learner, a saved file: whatever stands for an encoder
    dl: DataLoader,  # Images, labeled or not: `dls.train`, `dls.valid`
    kind: str = "pca",  # 'pca', 'tsne'; 'umap' where umap-learn is installed
    color_by: str | Sequence | None = None,  # A value for each image, or a column of the loader's facts; None: classes
    thumbnails: int = 60,  # Images that are shown where they lie, at most; none hides another
    seed: int = 42,
    figsize: tuple[float, float] = (8.5, 7.0),
) -> Axes:
    """A point for each image, by its embedding scaled to length 1: near points are images that the encoder finds alike.

    'pca' shows the two directions in which the images differ most, distances as they are. 'tsne' and 'umap' keep
    neighbors together and bend the rest: how far groups lie apart, and how large they are, then means nothing.
    """
    check_choice("kind", kind, KINDS)
    check_number("thumbnails", thumbnails, least=0, whole=True)
    found = embed(embedder(encoder, getattr(dl, "device", None)), dl)
    if len(found.x) < 3:
        raise DataError(f"A map of {len(found.x)} image(s) says nothing; at least three are needed.")
    x = F.normalize(finite(found.x).double(), dim=1).numpy()
    with preserved_rng():
        at, names = flattened(x, kind, seed)
    values = _values(color_by, dl, found.y, len(x))
    _, ax = plt.subplots(figsize=figsize, layout="constrained")
    colors, markers = _draw_points(ax, at, values)
    ax.set(xlabel=names[0], ylabel=names[1], xticks=[], yticks=[])
    ax.margins(0.06)
    ax.figure.draw_without_rendering()  # only then is it known where on the sheet the points are
    rows = apart(ax.transData.transform(at), SIDE * ax.figure.dpi / 72 * 1.2, thumbnails, seed)
    for row, image in zip(rows, embedded_images(dl, rows) if rows else []):
        _pin(ax, at[row], image, colors[row], markers[row])
    return ax


def flattened(
    x: np.ndarray,  # (N, C)
    kind: str,  # One of `KINDS`
    seed: int,
) -> tuple[np.ndarray, tuple[str, str]]:  # (N, 2), names of the two axes
    """Embeddings in two dimensions."""
    n = len(x)
    pca = PCA(min(50, *x.shape), svd_solver="full").fit(x)
    parts = pca.transform(x)
    if kind == "pca":
        shares = [
            f"component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(pca.explained_variance_ratio_)
        ]
        at = np.zeros((n, 2))
        at[:, : parts.shape[1]] = parts[:, :2]
        return at, (shares[0], shares[1] if len(shares) > 1 else "")
    if kind == "tsne":
        at = TSNE(perplexity=min(30, (n - 1) / 3), init="random" if parts.shape[1] < 2 else "pca", random_state=seed)
        return at.fit_transform(parts), ("t-SNE, first", "t-SNE, second")
    return _umap(x, seed), ("UMAP, first", "UMAP, second")


def _umap(x: np.ndarray, seed: int) -> np.ndarray:
    try:
        import umap
    except ImportError:
        raise TaskError("kind='umap' needs the package umap-learn (pip install umap-learn); 'tsne' does not.") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed leaves one thread, and what numba thinks of it
        reducer = umap.UMAP(n_neighbors=min(15, len(x) - 1), metric="cosine", random_state=seed, init="pca")
        return reducer.fit_transform(x)


def _values(color_by: str | Sequence | None, dl: DataLoader, y: torch.Tensor | None, n: int) -> pd.Series | None:
    """What the points are colored by: names, or numbers."""
    if isinstance(color_by, str):
        facts = dl.__dict__.get("facts")
        if facts is None or color_by not in facts:
            known = "no facts" if facts is None else f"facts {', '.join(map(str, facts.columns))}"
            raise DataError(f"The loader knows nothing called {color_by!r} of its images; it has {known}.")
        color_by = facts[color_by]
    if color_by is not None:
        values = pd.Series(list(color_by))
        if len(values) != n:
            raise DataError(f"color_by has {len(values)} values, and there are {n} images.")
        return values if _are_numbers(values) else values.astype(str)
    if y is None or y.ndim != 1:
        return None
    if y.is_floating_point():
        return pd.Series(y.numpy())
    vocab = list(getattr(dl, "vocab", None) or [])
    return pd.Series([str(vocab[c]) if c < len(vocab) else f"class {c}" for c in y.tolist()])


def _are_numbers(values: pd.Series) -> bool:
    return pd.api.types.is_float_dtype(values) or (
        pd.api.types.is_integer_dtype(values) and values.nunique() > MOST_CLASSES
    )


def class_looks(names: Sequence[str]) -> dict[str, dict]:
    """Color and marker by name; eight colors, and where they begin anew the markers are others."""
    n = len(PALETTE)
    return {
        name: {"color": PALETTE[i % n], "marker": MARKERS[(i + i // n) % len(MARKERS)]} for i, name in enumerate(names)
    }


def _draw_points(ax: Axes, at: np.ndarray, values: pd.Series | None) -> tuple[list, list]:
    """The points, and the color and marker of each; no marker where classes are not told apart."""
    if values is None:
        ax.scatter(*at.T, s=16, color=GREY, linewidths=0)
        return [GREY] * len(at), [None] * len(at)
    if values.dtype.kind in "fiu":
        drawn = ax.scatter(*at.T, c=values, s=22, cmap="cividis", linewidths=0)
        ax.figure.colorbar(drawn, ax=ax, shrink=0.7)
        return list(drawn.to_rgba(values)), [None] * len(at)
    names = list(values.value_counts().index)
    looks = class_looks(sorted(names[:MOST_CLASSES]))
    for name, look in looks.items():
        chosen = (values == name).to_numpy()
        ax.scatter(*at[chosen].T, s=26, alpha=0.85, linewidths=0.4, edgecolors="#333333", label=name, **look)
    rest = (~values.isin(list(looks))).to_numpy()
    if rest.any():
        ax.scatter(*at[rest].T, s=10, color=GREY, marker=".", linewidths=0, label=f"{len(names) - MOST_CLASSES} others")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    of_rest = {"color": GREY, "marker": None}
    found = [looks.get(name, of_rest) for name in values]
    return [look["color"] for look in found], [look["marker"] for look in found]


def apart(
    places: np.ndarray,  # (N, 2), in pixels
    side: float,  # Of a square on each, in pixels
    most: int,  # How many are chosen
    seed: int,
) -> list[int]:
    """Rows, looked at in a random order, whose squares do not touch one chosen before."""
    chosen: list[int] = []
    for row in np.random.default_rng(seed).permutation(len(places)).tolist():
        if len(chosen) == most:
            break
        if not chosen or (np.abs(places[chosen] - places[row]).max(1) >= side).all():
            chosen.append(row)
    return chosen


def _pin(ax: Axes, place: np.ndarray, image: torch.Tensor, color: Any, marker: str | None) -> None:
    """A small picture, framed in the color of its point, with the point's marker on its corner."""
    pixels = image.float().clamp(0, 1).permute(1, 2, 0).numpy()
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    smooth = {"interpolation": "hanning", "resample": True}  # small pictures of noise would be other noise
    shown = OffsetImage(pixels, zoom=SIDE / max(pixels.shape[:2]), cmap="gray", **smooth)
    shown.image.set_clim(0, 1)
    frame = {"edgecolor": color, "linewidth": 2, "boxstyle": "square,pad=0.0"}
    ax.add_artist(AnnotationBbox(shown, place, pad=0.0, bboxprops=frame))
    if marker is not None:
        shift = ScaledTranslation(SIDE / 2 / 72, SIDE / 2 / 72, ax.figure.dpi_scale_trans)
        rim = {"markeredgecolor": "#333333", "markeredgewidth": 0.6, "markersize": 8, "zorder": 4}
        ax.plot(*place, marker, color=color, transform=ax.transData + shift, **rim)
