"""Some of the images of a loader, as a loader of the same kind."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from fastai.data.core import DataLoaders, Datasets, TfmdDL, TfmdLists
from fastcore.foundation import L

from selfsup_fastai.data.loader import IndexedDL, fit_batch_size, items_at
from selfsup_fastai.errors import DataError
from selfsup_fastai.seeding import preserved_rng

DRAWS, NEAR = 20, 0.1  # Of patients to hold out; how far their images may be from the share that was asked for


def subset(
    dl: TfmdDL,  # A loader over fastai's Datasets or TfmdLists
    places: Iterable[int],  # Of its dataset
    like: TfmdDL | None = None,  # Whose transforms and split the new loader has; None: its own
    split: int | None = None,  # In place of that: 1 for images to validate with
    **kwargs,  # What else is to be new: bs, shuffle, ...
) -> TfmdDL:
    """A loader over these images. Raises `DataError` for datasets other than fastai's: their items are hidden."""
    like, places = dl if like is None else like, [int(i) for i in places]
    if isinstance(dl, IndexedDL) and isinstance(like, IndexedDL):
        return like.over(dl, places, split, **kwargs)
    images = dl.dataset
    if not isinstance(images, (Datasets, TfmdLists)):
        raise DataError(f"Images can be chosen from fastai's Datasets only, not from {type(images).__name__}.")
    split = getattr(like.dataset, "split_idx", None) if split is None else split
    if like is dl and hasattr(dl, "wgts"):  # fastai's WeightedDL
        kwargs = {"wgts": dl.wgts[places], **kwargs}
    parts = images.tls if isinstance(images, Datasets) else [images]
    parts = [part._new(items_at(part, places), split_idx=split) for part in parts]
    chosen = Datasets(tls=L(parts), n_inp=images.n_inp) if isinstance(images, Datasets) else parts[0]
    with preserved_rng():
        return like.new(chosen, n=len(places), **kwargs)


def labels_of(dl: TfmdDL) -> list:
    """The label of each image, as the dataset has it (a category: its number); images are not opened."""
    labels = _labels(dl)
    return [labels[i] for i in range(len(labels))]


def _labels(dl: TfmdDL) -> TfmdLists:
    dataset = dl.dataset
    if not isinstance(dataset, Datasets) or len(dataset.tls) <= dataset.n_inp:
        raise DataError("These images have no labels that can be told without opening them.")
    return dataset.tls[dataset.n_inp]


def hold_out(
    dls: DataLoaders,  # Labeled images
    share: float,  # Of the training images
    seed: int = 42,  # Of the choice
) -> DataLoaders:
    """Loaders that train on some of the training images and validate on the others, at least one of each class.

    Classes keep their shares; whole patients (the loader's facts) stay together. `dls.valid` is not in it.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise DataError(f"holdout is the share of training images to hold out, above 0 and below 1; got {share!r}.")
    out = _held_out(dls.train, share, np.random.default_rng(seed))
    rest = sorted(set(range(len(dls.train_ds))) - set(out))
    if not rest or not out:
        raise DataError(f"{len(dls.train_ds)} training images are too few to hold some out: pass holdout=0, best=None.")
    train = subset(dls.train, rest, bs=fit_batch_size(dls.train.bs, len(rest)))
    like = dls.valid if len(dls.loaders) > 1 else dls.train
    valid = subset(dls.train, out, like, 1, shuffle=False, drop_last=False)
    return DataLoaders(train, valid, path=dls.path, device=dls.device)


def _held_out(dl: TfmdDL, share: float, rng: np.random.Generator) -> list[int]:
    facts, labels = getattr(dl, "facts", None), pd.Series(_classes(dl))
    if facts is not None and "patient" in facts and facts["patient"].nunique() > 1:
        return _patients_out(facts["patient"], labels, share, rng)
    out = []
    for _, places in labels.groupby(labels):
        some = max(1, round(share * len(places))) if len(places) > 1 else 0
        out += rng.permutation(places.index)[:some].tolist()
    return sorted(out)


def _patients_out(patients: pd.Series, labels: pd.Series, share: float, rng: np.random.Generator) -> list[int]:
    """Whole patients, such that each class is left to train with and their share is near; the best of some draws."""
    draws = []
    for _ in range(DRAWS):
        some = rng.permutation(patients.unique())[:-1]
        sizes = patients.value_counts()[some].cumsum()
        out = patients.isin(some[: 1 + int((sizes - share * len(patients)).abs().argmin())]).to_numpy()
        lost = labels.nunique() - labels[~out].nunique()
        draws.append((lost, bool(abs(out.mean() - share) > NEAR), len(draws), np.flatnonzero(out).tolist()))
    return min(draws)[-1]


def _classes(dl: TfmdDL) -> list[int]:
    """The class of each image; all alike where labels are something else, such as masks, which are not opened."""
    labels = _labels(dl)
    first = labels[0]
    is_class = getattr(first, "ndim", None) == 0 and not first.is_floating_point()
    return [int(labels[i]) for i in range(len(labels))] if is_class else [0] * len(labels)
