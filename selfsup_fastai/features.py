"""An encoder run over loaders, and what is computed from its embeddings.

train, test = embed(encoder, dls.train), embed(encoder, dls.valid)
knn_accuracy(train, test)          # is the neighborhood in feature space the right one?
effective_rank(train.x)            # how many directions are in use?
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL, TfmdLists
from fastai.data.load import DataLoader
from fastai.data.transforms import Normalize
from fasttransform import Pipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from selfsup_fastai.errors import DataError, TaskError
from selfsup_fastai.seeding import preserved_rng

_KNN_CELLS = 2**24  # Similarities held at once: 64 MB


class Embeddings(NamedTuple):
    """Features of N images, row i from image i of the data set, and their labels where the data set has any."""

    x: Tensor  # (N, C) float32 on the CPU
    y: Tensor | None  # (N, ...) on the CPU


def embed(
    encoder: nn.Module,  # (B, C, H, W) -> (B, D); its `prepare` is applied to the [0, 1] images first, if it has one
    dl: DataLoader,  # fastai loader of images, labeled or not
    layers: str | list[str] | None = None,  # None: what `encoder(x)` returns; else the averaged maps of these layers
    device: str | torch.device | None = None,  # None: where the encoder is
) -> Embeddings:
    """One row for every image of the loader's data set, in its order.

    Nothing is shuffled, dropped or augmented: item and batch transforms run as they do in validation, a `Normalize`
    is left out. The loader, the encoder's train/eval modes and the random generators are afterwards as before.
    Raises `DataError` for something that is no loader, `TaskError` for pretext batches or an unsuitable encoder.
    """

    def whole(x: Tensor) -> dict[str, Tensor]:
        return {"": _rows(encoder(x))}

    def averaged(x: Tensor) -> dict[str, Tensor]:
        return {"": torch.cat([m.mean(dim=(2, 3)) for m in _maps(encoder, x, layers).values()], dim=1)}

    return _run(encoder, dl, whole if layers is None else averaged, device)[""]


def embedded_images(
    dl: DataLoader,  # fastai loader of images, labeled or not
    rows: list[int],  # Of the loader's data set, in any order
) -> list[Tensor]:  # (C, H, W) each, on the CPU
    """The very images that `embed` gives the encoder for these rows, before its `prepare`: floats in [0, 1]."""
    images = []
    with preserved_rng(), _plain(dl) as loader, loader.fake_l.no_multiproc():
        loader.get_idxs = lambda: rows
        for batch in loader:
            images += list(_images(batch)[0].cpu())
    return images


def embed_layers(
    encoder: nn.Module,  # With `feature_maps(x, layers) -> {name: (B, C, h, w)}`
    dl: DataLoader,  # fastai loader of images, labeled or not
    layers: str | list[str] | None = None,  # None: all that the encoder names
    max_dim: int = 4096,  # Numbers kept of each layer
    device: str | torch.device | None = None,  # None: where the encoder is
) -> dict[str, Embeddings]:
    """The feature maps of each layer, averaged to the largest s x s grid with C·s² <= `max_dim`, in one pass."""

    def flattened(x: Tensor) -> dict[str, Tensor]:
        return {name: _to_grid(m, max_dim).flatten(1) for name, m in _maps(encoder, x, layers).items()}

    return _run(encoder, dl, flattened, device)


def _to_grid(x: Tensor, max_dim: int) -> Tensor:
    """(B, C, h, w) -> (B, C, s, s)"""
    _, c, h, w = x.shape
    side = max(1, min(h, w, int((max_dim / c) ** 0.5 + 1e-9)))
    return F.adaptive_avg_pool2d(x, side)


def _maps(encoder: nn.Module, x: Tensor, layers: str | list[str] | None) -> dict[str, Tensor]:
    if not hasattr(encoder, "feature_maps"):
        raise TaskError(
            f"A {type(encoder).__name__} names no layers. Wrap it with create_encoder, which finds its feature maps."
        )
    return encoder.feature_maps(x, [layers] if isinstance(layers, str) else layers)


def _rows(z: Tensor) -> Tensor:
    if z.ndim != 2:
        raise TaskError(
            f"The encoder turned a batch into {tuple(z.shape)}; embeddings are (B, D). "
            f"Wrap the network with create_encoder, or pass `layers`."
        )
    return z


def _run(encoder: nn.Module, dl: DataLoader, features: Callable, device=None) -> dict[str, Embeddings]:
    """`features(x)` of every batch; rows of all batches one under the other."""
    _check(encoder, dl)
    xs: dict[str, list[Tensor]] = {}
    ys: list[Tensor] = []
    with preserved_rng(), torch.no_grad(), _evaluating(encoder, device) as home, _plain(dl) as loader:
        for batch in tqdm(loader, desc="features", delay=1, disable=None, leave=False):
            x, y = _images(batch)
            x = x.to(home)
            for name, z in features(encoder.prepare(x) if hasattr(encoder, "prepare") else x).items():
                xs.setdefault(name, []).append(z.float().cpu())
            if isinstance(y, Tensor):
                ys.append(y.as_subclass(Tensor).cpu())
    if not xs:
        raise DataError("The loader has no images to compute features of.")
    y = torch.cat(ys) if ys else None
    return {name: Embeddings(torch.cat(rows), y) for name, rows in xs.items()}


def _check(encoder: nn.Module, dl: DataLoader) -> None:
    if not isinstance(encoder, nn.Module):
        raise TaskError(
            f"Features are computed by an encoder (an nn.Module), not by a {type(encoder).__name__}. "
            f"The encoder of a learner is `learn.encoder`, of a fine-tuned one `learn.model.encoder`."
        )
    if isinstance(dl, DataLoaders):
        raise DataError("These are several loaders; pass one of them: dls.train or dls.valid.")
    if not isinstance(dl, DataLoader):
        raise DataError(f"Expected a fastai loader such as dls.valid, got a {type(dl).__name__}.")


def _images(batch) -> tuple[Tensor, object]:
    """Images (B, C, H, W) and the target, None where there is none."""
    x, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
    if not isinstance(x, Tensor) or x.ndim != 4:
        what = f"{tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TaskError(
            f"Features need batches of plain images (B, C, H, W); the first element of this loader's batch is {what}. "
            f"Pass the loaders of the images themselves, not those of a pretext learner."
        )
    if not x.is_floating_point():
        raise TaskError(f"Features need images as floats in [0, 1], not {x.dtype}; IntToFloatTensor makes them so.")
    return x.as_subclass(Tensor), rest[0] if rest else None


@contextmanager
def _evaluating(encoder: nn.Module, device) -> Iterator[torch.device]:
    """The encoder in eval mode, on `device` if given; every module's mode (frozen parts have their own) comes back."""
    modes = {module: module.training for module in encoder.modules()}
    home = next((t.device for t in [*encoder.parameters(), *encoder.buffers()]), torch.device("cpu"))
    try:
        encoder.eval()
        if device is not None:
            encoder.to(device)
        yield home if device is None else torch.device(device)
    finally:
        if device is not None:
            encoder.to(home)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _plain(dl: DataLoader) -> Iterator[DataLoader]:
    """A copy of the loader: every image once, in order, as in validation, not normalized."""
    with _as_validation(dl.dataset):
        pipelines = {}
        if isinstance(dl, TfmdDL):  # `new` would share the transforms with the given loader
            kept = [copy(f) for f in dl.after_batch.fs if not (isinstance(f, Normalize) or hasattr(f, "prepares"))]
            pipelines = {"after_batch": Pipeline(kept)}
        yield copy(dl).new(shuffle=False, drop_last=False, **pipelines)  # `new` may leave marks on what it is asked of


@contextmanager
def _as_validation(dataset) -> Iterator[None]:
    """Transforms for the training set only (augmentation) rest: a training image is looked at as a test image is."""
    lists = [t for t in getattr(dataset, "tls", [dataset]) if isinstance(t, TfmdLists) and t.tfms.split_idx == 0]
    before = [t.split_idx for t in lists]
    try:
        for t in lists:
            t.split_idx = t.tfms.split_idx = 1
        yield
    finally:
        for t, split_idx in zip(lists, before):
            t.split_idx, t.tfms.split_idx = split_idx, 0


def knn_predict(
    train: Embeddings,  # With class numbers
    test_x: Tensor,  # (N, C)
    k: int = 20,  # Neighbors; cut to the number of training rows
    temperature: float = 0.07,  # τ
) -> tuple[Tensor, Tensor]:  # classes (N,) int64, shares of the vote (N, n_classes) that sum to 1
    """The k training rows of largest cosine similarity s vote for their class with weight exp(s / τ).

    Wu et al. 2018; DINO (Caron et al. 2021) uses the same rule with k = 10, 20, 100 or 200.
    """
    scores = knn_means(train.x, F.one_hot(_classes(train.y)).float(), test_x, k, temperature)
    return scores.argmax(dim=1), scores


def knn_means(
    train_x: Tensor,  # (N, C)
    values: Tensor,  # (N, V) float, what is known of each training row
    test_x: Tensor,  # (M, C)
    k: int = 20,  # Neighbors; cut to the number of training rows
    temperature: float = 0.07,  # τ
) -> Tensor:  # (M, V)
    """The mean over the k training rows of largest cosine similarity s, weighted by exp(s / τ)."""
    if k < 1 or not temperature > 0:
        raise TaskError(f"Nearest neighbors need k >= 1 and a temperature above 0; got {k} and {temperature}.")
    bank = F.normalize(finite(train_x).float(), dim=1)
    queries = F.normalize(finite(test_x).float(), dim=1)
    chunks = queries.split(max(1, _KNN_CELLS // len(bank)))
    return torch.cat([_weighted(q @ bank.T, values, min(k, len(bank)), temperature) for q in chunks])


def _weighted(similarity: Tensor, values: Tensor, k: int, temperature: float) -> Tensor:
    """(n, N) and (N, V) -> (n, V)"""
    nearest, rows = similarity.topk(k, dim=1)
    weights = (nearest / temperature).softmax(dim=1)  # exp(s / τ) over their sum, without overflow at a small τ
    return torch.zeros_like(similarity).scatter_(1, rows, weights) @ values


def knn_accuracy(
    train: Embeddings,
    test: Embeddings,
    k: int = 20,  # Neighbors
    temperature: float = 0.07,
) -> float:  # Share of the test rows in [0, 1]
    """How often the vote of the nearest training rows is right; see `knn_predict`."""
    predictions, _ = knn_predict(train, test.x, k, temperature)
    return (predictions == _classes(test.y)).float().mean().item()


def _classes(y: Tensor | None) -> Tensor:
    """Class numbers (N,) int64."""
    if y is None:
        raise TaskError("These embeddings carry no labels. Embed a labeled loader.")
    if y.ndim != 1 or y.is_floating_point():
        raise TaskError(f"Neighbors and probes need one class number an image; these are {tuple(y.shape)} {y.dtype}.")
    return y.long()


def finite(x: Tensor) -> Tensor:
    """The same embeddings. Raises `TaskError` if one of their numbers is NaN or infinite."""
    if not torch.isfinite(x).all():
        raise TaskError("The embeddings hold NaN or infinite numbers: the encoder has diverged. Train at a lower rate.")
    return x


def effective_rank(
    x: Tensor,  # (N, C) embeddings, raw and not centered
    eps: float = 1e-7,  # Added to each share
) -> float:  # 1 .. min(N, C); 0 if every number is 0
    """RankMe (Garrido et al. 2023): exp of the entropy of the singular values as shares of their sum.

    Compares runs of one method at one width; the paper takes about 25,600 images.
    """
    if x.ndim != 2 or 0 in x.shape:
        raise TaskError(f"The effective rank is that of embeddings (N, C); got {tuple(x.shape)}.")
    singular = torch.linalg.svdvals(finite(x.detach().cpu().double()))
    if singular.sum() == 0:
        return 0.0
    p = singular / singular.sum() + eps
    return torch.exp(-(p * p.log()).sum()).item()


def feature_std(
    x: Tensor,  # (N, C) embeddings, any scale
) -> float:  # 0 where all are alike, about 1 where they lie in all directions
    """How different the directions of embeddings are (Chen & He 2020, figure 2): the mean deviation of the coordinates
    of rows scaled to length 1, times the root of their number.
    """
    return direction_std(finite(_rows_of_two(x))).item()


def direction_std(
    x: Tensor,  # (N, C) embeddings, any scale
) -> Tensor:  # scalar
    """`feature_std` for metrics: nothing is checked, so that no batch waits for a GPU, and of one embedding it is 0."""
    z = F.normalize(x.float(), dim=1)
    return z.std(0, correction=min(1, len(z) - 1)).mean() * z.shape[1] ** 0.5


def alignment(
    x: Tensor,  # (N, C) embeddings of images
    y: Tensor,  # (N, C) embeddings of other views of them
) -> float:  # 0 .. 4
    """How far apart two views of an image are: the mean squared distance of embeddings of length 1 (Wang & Isola 2020,
    arXiv 2005.10242, with their exponent of 2). Less is better, but of one and the same answer for everything it is 0.
    """
    a, b = (F.normalize(finite(z).float(), dim=1) for z in (x, y))
    return (a - b).square().sum(1).mean().item()


def uniformity(
    x: Tensor,  # (N, C) embeddings
    t: float = 2.0,
) -> float:  # -4 t .. 0
    """How evenly embeddings of length 1 lie on the sphere: the logarithm of the mean over all pairs of
    exp(-t * squared distance) (Wang & Isola 2020). Less is better, 0 if all are alike.
    """
    z = F.normalize(finite(_rows_of_two(x)).float(), dim=1)
    return torch.pdist(z).square().mul(-t).exp().mean().log().item()


def _rows_of_two(x: Tensor) -> Tensor:
    if x.ndim != 2 or len(x) < 2:
        raise TaskError(f"How images differ takes embeddings (N, C) of at least two of them; got {tuple(x.shape)}.")
    return x
