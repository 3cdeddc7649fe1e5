"""What frozen features know, by the labels: a linear classifier on each layer, neighbors, and few shots.

Each returns a table that draws itself (`table.show()`). Models are fitted on `dls.train` and scored on `dls.valid`;
nothing is chosen by the labels of the latter. Neither the encoder, the loaders nor the random generators change.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fastai.data.core import DataLoaders, TfmdDL
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F
from tqdm.auto import tqdm

from selfsup_fastai.checks import check_number
from selfsup_fastai.data.groups import LEVELS, groups_of
from selfsup_fastai.downstream.few_shots import classes_score, labels_score, most_shots
from selfsup_fastai.downstream.linear_models import chosen_strength, fitted, folds_of, in_own_span, score_of
from selfsup_fastai.downstream.suited import suited
from selfsup_fastai.downstream.targets import KINDS, kind_of
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.errors import TaskError
from selfsup_fastai.features import Embeddings, embed, embed_layers, finite, knn_means
from selfsup_fastai.messages import quiet, say
from selfsup_fastai.plots import ShownFrame, plot_probe

METRICS = {kind: KINDS[kind].score for kind in ("category", "multicategory", "regression")}
SEVERAL = (1, 5, 20, 200)  # Neighbors that vote where nothing is said
WHOLE = "features"  # What a net is said to have for a layer where it names none: what it gives


def linear_probe(
    encoder: Any,  # An encoder, a learner, a saved file, an nn.Module; the name of a net means an untrained one
    dls: DataLoaders,  # Labeled: classes, several labels an image, or numbers
    layers: str | Sequence[str] = "all",  # 'all', or names of layers
    C: float | None = None,  # Inverse strength of the L2 penalty, as in scikit-learn; None: chosen on the training part
    max_dim: int = 4096,  # Numbers kept of each layer
    seed: int = 42,  # Of the folds, and of an untrained net
) -> ShownFrame:  # Columns layer, dim, C, score, metric, n_test; one row a layer
    """How well a linear model on the frozen features of each layer does on the test images.

    The protocol of the classic pretext papers: a layer's map is averaged to the largest grid that `max_dim` allows, and
    standardized on the training images. Classes: logistic regression, accuracy. Several labels an image: one for each
    label, mAP. Numbers: ridge regression, R2.

    `C` is chosen by cross-validation on the training images, patients kept together where the loader knows them, by
    the same score; of as many folds as the smallest class allows, up to five (three from a thousand images on). With
    one image a class nothing can be held out: it is 0.01 then.
    """
    net, loaders, kind = _asked(encoder, dls, seed)
    if C is not None:
        check_number("C", C, above=0)
    train, test = (_layers(net, dl, layers, max_dim) for dl in (loaders.train, loaders.valid))
    y, y_test = (_labels(next(iter(part.values())), kind) for part in (train, test))
    _check_labels(kind, y, y_test)
    folds = folds_of(kind, y, _groups(dls.train), seed) if C is None else []
    rows = []
    for name in tqdm(train, desc="linear probes", delay=1, disable=None, leave=False):
        x, x_test = _standardized(train[name], test[name])
        strength = chosen_strength(kind, x, y, folds) if C is None else C
        score = score_of(kind, fitted(kind, name, x, y, strength).predict(x_test), y_test)
        rows.append((name, train[name].x.shape[1], strength, score, METRICS[kind], len(y_test)))
    return _shown(rows, ["layer", "dim", "C", "score", "metric", "n_test"], guessing(kind, y, y_test))


def knn_probe(
    encoder: Any,  # As for `linear_probe`
    dls: DataLoaders,  # Labeled: classes, several labels an image, or numbers
    k: int
    | Sequence[int]
    | None = None,  # Neighbors; cut to the training images. None: of 1, 5, 20, 200 what says much
    temperature: float = 0.07,  # τ
    seed: int = 42,  # Of an untrained net
) -> ShownFrame:  # Columns k, score, metric, n_test; one row a k
    """How well the nearest training images tell the labels of the test images: nothing is trained.

    By the cosine s of the features, each of the k nearest votes with weight exp(s / τ) (Wu et al. 2018). Several labels
    an image, and numbers: the weighted mean of the neighbors'; mAP and R2.

    Where nothing is said of `k`, it stays below the smallest class and at most an eighth of the training images: a vote
    of nearly all of them says little of who is near.
    """
    net, loaders, kind = _asked(encoder, dls, seed)
    ks = list(SEVERAL) if k is None else [k] if isinstance(k, int) else list(k)
    for number in ks:
        check_number("k", number, least=1, whole=True)
    check_number("temperature", temperature, above=0)
    train, test = (embed(net, dl) for dl in (loaders.train, loaders.valid))
    y, y_test = _labels(train, kind), _labels(test, kind)
    _check_labels(kind, y, y_test, few=True)
    values = torch.from_numpy(np.eye(y.max() + 1)[y] if kind == "category" else y).float()
    if k is None:
        most = len(y) // 8 if kind != "category" else min(len(y) // 8, np.unique(y, return_counts=True)[1].min() - 1)
        ks = [number for number in ks if number <= max(1, most)]
    rows = []
    for number in sorted({min(number, len(y)) for number in ks}):
        means = knn_means(train.x, values, test.x, number, temperature)
        predictions = (means.argmax(1) if kind == "category" else means).numpy()
        rows.append((number, score_of(kind, predictions, y_test), METRICS[kind], len(y_test)))
    return _shown(rows, ["k", "score", "metric", "n_test"], guessing(kind, y, y_test))


def svm_probe(
    encoder: Any,  # As for `linear_probe`
    dls: DataLoaders,  # Labeled: classes, or several labels an image
    shots: int | Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 96),  # Images a class; more than the smallest has: left out
    draws: int = 5,  # Times they are drawn from the training images
    layer: str | None = None,  # Name of a layer; None: what the net gives
    max_dim: int = 4096,  # Numbers kept of a layer
    seed: int = 42,  # Of the draws, the folds, and an untrained net
) -> ShownFrame:  # Columns shots, score, std, draws, metric, n_test; one row a number of shots
    """How well a linear SVM does after a few images of each class: the mean over draws, and their deviation.

    The protocol of VOC07 (Goyal et al. 2019): features scaled to length 1, squared hinge, L2 penalty, accuracy, or mAP
    where images have several labels. Costs are chosen by threefold cross-validation on the images drawn (two images a
    class: twofold; one: the cost is 1). The draws for few shots are not parts of those for more.
    """
    net, loaders, kind = _asked(encoder, dls, seed)
    if kind == "regression":
        raise TaskError("The labels are numbers, and shots are images of a class. See linear_probe and knn_probe.")
    asked = [shots] if isinstance(shots, int) else list(shots)
    for number in asked:
        check_number("shots", number, least=1, whole=True)
    check_number("draws", draws, least=1, whole=True)
    parts = loaders.train, loaders.valid
    found = [embed(net, dl) if layer is None else _layers(net, dl, layer, max_dim)[layer] for dl in parts]
    y, y_test = (_labels(part, kind) for part in found)
    _check_labels(kind, y, y_test)
    x, x_test = (F.normalize(finite(part.x).double(), dim=1).numpy() for part in found)
    score = classes_score if kind == "category" else labels_score
    rows = []
    for k in tqdm(_possible(asked, most_shots(kind, y, y_test)), desc="shots", delay=1, disable=None, leave=False):
        rng = np.random.default_rng([seed, k])
        scores = [score(x, y, x_test, y_test, k, rng, seed) for _ in range(draws)]
        deviation = float(np.std(scores, ddof=1)) if draws > 1 else np.nan
        rows.append((k, float(np.mean(scores)), deviation, draws, METRICS[kind], len(y_test)))
    return _shown(rows, ["shots", "score", "std", "draws", "metric", "n_test"], guessing(kind, y, y_test))


def _possible(shots: list[int], most: int) -> list[int]:
    possible = sorted({k for k in shots if k <= most})
    if not possible:
        raise TaskError(f"The smallest class has {most} training images, and {min(shots)} a class were asked for.")
    if max(shots) > most:
        say(f"svm probe: the smallest class has {most} training images, so more shots are left out.")
    return possible


def _asked(source: Any, dls: DataLoaders, seed: int) -> tuple[Encoder, DataLoaders, str]:
    kind = kind_of(dls)
    if kind == "mask":
        raise TaskError("The labels are masks. Probes predict a label an image: classes, several of them, or numbers.")
    net, loaders = suited(source, dls, seed)
    return net, loaders, "regression" if kind == "points" else kind


def _layers(net: Encoder, dl: TfmdDL, layers: str | Sequence[str], max_dim: int) -> dict[str, Embeddings]:
    check_number("max_dim", max_dim, least=1, whole=True)
    if layers == "all" and not net.layer_names:
        return {WHOLE: embed(net, dl)}
    names = None if layers == "all" else [layers] if isinstance(layers, str) else list(layers)
    return embed_layers(net, dl, names, max_dim)


def _labels(found: Embeddings, kind: str) -> np.ndarray:
    """Classes (N,), or labels and values (N, n)."""
    y = found.y
    if kind == "category":
        return y.long().numpy()
    return y.reshape(len(y), -1).double().numpy()


def _check_labels(kind: str, y: np.ndarray, y_test: np.ndarray, few: bool = False) -> None:
    if kind == "category" and not few and len(np.unique(y)) < 2:
        raise TaskError("All training images of the probe have one label; a classifier needs at least two.")
    if kind == "regression" and (len(y_test) < 2 or len(y) < 2):
        raise TaskError("R2 needs two images or more to train with, and two to test on.")
    if kind == "regression" and not (np.isfinite(y).all() and np.isfinite(y_test).all()):
        raise TaskError("Some labels are not finite numbers. Leave the images without a label out.")


def _standardized(train: Embeddings, test: Embeddings) -> tuple[np.ndarray, np.ndarray]:
    """By the training images; in fewer coordinates where there are few of them."""
    scaler = StandardScaler().fit(finite(train.x).double().numpy())
    return in_own_span(*(scaler.transform(finite(part.x).double().numpy()) for part in (train, test)))


def _groups(dl: TfmdDL) -> np.ndarray | None:
    """Whose each image is, where the loader knows."""
    facts = dl.__dict__.get("facts")
    if facts is None or not set(LEVELS) & set(facts.columns):
        return None
    with quiet():
        return groups_of(facts.reset_index(drop=True)).to_numpy()


def guessing(kind: str, y: np.ndarray, y_test: np.ndarray) -> float:
    """The score of an answer that does not look at the image: the most frequent class, any order, the mean."""
    if kind == "category":
        return float((y_test == np.bincount(y).argmax()).mean())
    if kind == "multicategory":
        told = (y_test.min(0) == 0) & (y_test.max(0) == 1)
        return float(y_test[:, told].mean()) if told.any() else 0.0
    return 0.0


def _shown(rows: list[tuple], columns: list[str], chance: float) -> ShownFrame:
    table = ShownFrame(rows, columns=columns, plot=plot_probe)
    table.attrs["chance"] = chance
    return table
