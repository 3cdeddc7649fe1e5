"""What a race works with, in names and numbers."""

import platform
from typing import Any, NamedTuple

import fastai
import numpy as np
import timm
import torch
from fastai.data.core import DataLoaders

from selfsup_fastai import __version__
from selfsup_fastai.compare.draws import check_amounts, classes_in, groups_in
from selfsup_fastai.compare.scores import score_for
from selfsup_fastai.compare.trial import check_length, check_tested
from selfsup_fastai.data.loader import n_in_of
from selfsup_fastai.downstream.targets import kind_of


class Labeled(NamedTuple):
    """What is known of the labeled images."""

    dls: DataLoaders
    kind: str
    metric: str
    classes: np.ndarray | None
    groups: np.ndarray | None
    amounts: list
    curve: dict  # Further arguments of `label_curve`


def known_of(labeled, labels, metric, groups, steps, epochs) -> Labeled:
    """Raises where labels, amounts, metric or length do not go together: before hours are spent on pretraining."""
    check_length(steps, epochs)
    check_tested(labeled)
    kind, amounts = kind_of(labeled), check_amounts(labels)
    curve = {"steps": steps, "epochs": epochs, "metric": metric, "groups": groups}
    classes, whose = classes_in(labeled.train, kind), groups_in(labeled.train, groups)
    return Labeled(labeled, kind, score_for(kind, metric).name, classes, whose, amounts, curve)


def granted_in_words(grants: dict[str, int]) -> str:
    """Images through the encoder, of the task that gets fewest to the one that gets most."""
    grants = sorted(set(grants.values()))
    if not grants:
        return "none"
    return f"{grants[0]:,} images" if len(grants) == 1 else f"{grants[0]:,} to {grants[-1]:,} images"


def data_facts(dls: DataLoaders, known: Labeled | None) -> dict:
    """Counts and sizes; nothing that leads back to a person or a file."""
    image = dls.valid.one_batch() if len(dls.loaders) > 1 and len(dls.valid_ds) else dls.train.one_batch()
    image = image[0] if isinstance(image, tuple | list) else image
    facts = {"n_unlabeled": len(dls.train_ds), "channels": n_in_of(dls), "size": int(image.shape[-1])}
    if known is None:
        return facts
    facts |= {"n_labeled": len(known.dls.train_ds), "n_test": len(known.dls.valid_ds), "labels": known.kind}
    facts["groups"] = "not known" if known.groups is None else f"{len(np.unique(known.groups)):,} to train with"
    if known.classes is not None:
        vocab = list(getattr(known.dls, "vocab", []) or range(known.classes.max() + 1))
        facts["classes"] = {str(vocab[c]): int((known.classes == c).sum()) for c in np.unique(known.classes)}
    return facts


def name_of(arch: Any) -> str:
    """Of a net."""
    return arch if isinstance(arch, str) else getattr(arch, "__name__", type(arch).__name__)


def versions() -> dict[str, str]:
    """Of the libraries whose figures may differ from one to the next."""
    packages = {"torch": torch, "fastai": fastai, "timm": timm}
    known = {"selfsup_fastai": __version__, "Python": platform.python_version()}
    return {**known, **{name: str(package.__version__) for name, package in packages.items()}}
