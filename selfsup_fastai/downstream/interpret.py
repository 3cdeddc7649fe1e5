"""Pictures of what an encoder has learned: neighbors, and where it looks. `embedding` has the map of all images."""

from collections.abc import Sequence
from typing import Any

import torch
from fastai.data.load import DataLoader
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.data.loader import spread
from selfsup_fastai.downstream.attention import attention_weights, grad_cam, looked_at, rollout, strengths
from selfsup_fastai.downstream.models import DownstreamModel
from selfsup_fastai.downstream.suited import embedder, network
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.errors import DataError, TaskError, unknown
from selfsup_fastai.features import embed, embedded_images
from selfsup_fastai.pictures import draw, grid_axes, overlay
from selfsup_fastai.seeding import preserved_rng

KINDS = ("auto", "attention", "rollout", "gradcam", "activation")
MOST_LAYERS = 5  # That are drawn where none is named


def nearest_neighbors(
    encoder: Any,  # An encoder, a learner, a saved file: whatever stands for an encoder
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
    found = embed(embedder(encoder, getattr(dl, "device", None)), dl)
    rows = torch.linspace(0, len(found.x) - 1, min(queries, len(found.x))).long().tolist()
    nearest = nearest_rows(found.x, rows, min(k, len(found.x) - 1))
    groups = [[row, *others] for row, others in zip(rows, nearest.tolist())]
    images = iter(embedded_images(dl, [at for group in groups for at in group]))
    labels = found.y if found.y is not None and found.y.ndim == 1 and not found.y.is_floating_point() else None
    axes = iter(grid_axes(len(rows) * (nearest.shape[1] + 1), None, figsize, columns=nearest.shape[1] + 1))
    drawn = []
    for row, *others in groups:
        of = f": {_named(dl, labels[row])}" if labels is not None else ""
        drawn.append(draw(next(axes), next(images), f"query{of}"))
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


def attention_map(
    encoder: Any,  # An encoder, a fine-tuned learner, a saved file: whatever stands for an encoder
    images: DataLoader | Tensor | Sequence[Tensor],  # dls.valid; or images (C, H, W), floats in [0, 1]
    layer: str | Sequence[str] | None = None,  # Of which layers; None: up to five, evenly spread, the last among them
    kind: str = "auto",  # 'attention', 'rollout', 'gradcam', 'activation'; 'auto': what suits the net
    target: int | str | None = None,  # Class that Grad-CAM explains; None: the predicted one of each image
    n: int = 4,  # Images of a loader, evenly spread
    figsize: tuple[float, float] | None = None,
) -> list[Axes]:
    """Where a network looks: a row for each image, the image and then what each layer makes of it, dark to bright.

    'attention': what a transformer's class token attends to, mean of the heads (without such a token, what all patches
    do); 'rollout': the same added up from the first layer on (Abnar & Zuidema 2020). 'gradcam': what speaks for the
    predicted class of a fine-tuned learner (Selvaraju et al. 2017). 'activation': the mean magnitude of a layer's
    maps, which every network has; it says where much happens, not what is important. Each map has its own scale.
    'auto' is attention where all patches attend to each other, else Grad-CAM for a fine-tuned learner, else activation.
    """
    check_choice("kind", kind, KINDS)
    model = getattr(encoder, "model", None) if not isinstance(encoder, nn.Module) else encoder
    model = model if isinstance(model, DownstreamModel) else None
    net = model.encoder if model else network(encoder)
    pictures = _pictures(images, n)
    rows = [_seen(encoder, model, net, picture, kind, layer, target) for picture in pictures]
    columns = len(rows[0][1]) + 1
    axes = grid_axes(len(rows) * columns, None, figsize, columns=columns)
    axes[0].figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.9, wspace=0.04, hspace=0.3)
    cells = iter(axes)
    for picture, (title, maps), truth in zip(pictures, rows, _truths(images, len(pictures))):
        draw(next(cells), picture, f"{title}\ntrue: {truth}" if title and truth else title)
        for name, heat in maps.items():
            overlay(next(cells), picture, heat[0], name)
    return axes


def _named(dl: DataLoader, label: Any) -> str:
    """A class by its name, where the loader knows it."""
    vocab = list(getattr(dl, "vocab", None) or [])
    return str(vocab[int(label)]) if int(label) < len(vocab) else f"class {int(label)}"


def _truths(images: DataLoader | Tensor | Sequence[Tensor], n: int) -> list[str]:
    """The true classes of the images drawn, as far as a loader knows them."""
    if not isinstance(images, DataLoader) or not getattr(images, "vocab", None):
        return [""] * n
    with preserved_rng():
        labels = [images.dataset[at][-1] for at in spread(len(images.dataset), n)]
    plain = [torch.as_tensor(label) for label in labels]
    if any(label.ndim or label.is_floating_point() for label in plain):
        return [""] * n
    return [_named(images, label) for label in plain]


def _pictures(images: DataLoader | Tensor | Sequence[Tensor], n: int) -> list[Tensor]:
    """Images (C, H, W) in [0, 1], on the CPU."""
    if isinstance(images, DataLoader):
        check_number("n", n, least=1, whole=True)
        return embedded_images(images, spread(len(images.dataset), n))
    several = [images] if isinstance(images, Tensor) and images.ndim == 3 else images
    several = list(several) if isinstance(several, Tensor | list | tuple) else []
    if not several or not all(isinstance(i, Tensor) and i.ndim == 3 and i.is_floating_point() for i in several):
        raise DataError("Expected a loader such as dls.valid, or images (C, H, W) as floats in [0, 1].")
    return [image.detach().as_subclass(Tensor).cpu() for image in several]


def _seen(source: Any, model: DownstreamModel | None, net: Encoder, picture: Tensor, kind: str, layer, target):
    """A title, and a map (1, h, w) of each layer."""
    home = next((p.device for p in net.parameters()), torch.device("cpu"))
    with torch.no_grad():
        x = net.prepare(picture[None].to(home))
    if kind in ("auto", "attention", "rollout"):
        try:
            weights = attention_weights(net, x)
        except TaskError:
            if kind != "auto":
                raise
        else:
            names, layers = _chosen(net, list(weights), layer), list(weights.values())
            steps = dict(zip(weights, rollout(layers) if kind == "rollout" else layers))
            return "", {name: looked_at(net, steps[name]) for name in names}
    names = _chosen(net, net.layer_names, layer)
    if kind == "activation" or (kind == "auto" and model is None):
        return "", strengths(net, x, names)
    if model is None:
        raise TaskError("Grad-CAM explains the prediction of a fine-tuned learner: pass one of downstream_learner.")
    vocab = list(getattr(getattr(source, "dls", None), "vocab", None) or [])
    maps, out = grad_cam(model, x, names, _number(target, vocab))
    return _predicted(source, out, vocab), maps


def _chosen(net: Encoder, known: list[str], layer: str | Sequence[str] | None) -> list[str]:
    if not known:
        raise TaskError(f"{net.arch} names no layers whose maps could be drawn. Take one of timm's networks.")
    if layer is None:
        return [known[i] for i in spread(len(known), MOST_LAYERS)]
    names = [layer] if isinstance(layer, str) else list(layer)
    for name in names:
        if name not in known:
            raise unknown(f"layer of {net.arch}", name, known)
    return [name for name in known if name in names]


def _number(target: int | str | None, vocab: list) -> int | None:
    if target is None or (isinstance(target, int) and not isinstance(target, bool)):
        return target
    if target not in vocab:
        raise unknown("class", target, map(str, vocab))
    return vocab.index(target)


def _predicted(source: Any, out: Tensor, vocab: list) -> str:
    """The class of the greatest output, with its probability where the loss knows how that is had."""
    best = int(out[0].argmax())
    name = str(vocab[best]) if best < len(vocab) else f"output {best}"
    activation = getattr(getattr(source, "loss_func", None), "activation", None)
    if activation is None or len(vocab) != out.shape[1]:
        return f"predicted: {name}"
    return f"predicted: {name} ({activation(out)[0, best]:.0%})"
