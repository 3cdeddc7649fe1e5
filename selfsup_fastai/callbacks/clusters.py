"""Sorting the training images into groups anew at the beginning of each epoch."""

from collections.abc import Iterable
from random import Random

import torch
from torch import Tensor, nn

from selfsup_fastai.callbacks.columns import Columns
from selfsup_fastai.callbacks.of_model import OfModel
from selfsup_fastai.data.loader import IndexedDL
from selfsup_fastai.features import embed, finite
from selfsup_fastai.processes import is_first, n_processes, of_unequal, rank, shared
from selfsup_fastai.seeding import preserved_rng

TREATMENT = "do_wd", "force_train"  # What fastai notes of a parameter for good


class Recluster(OfModel):
    """Before an epoch `Clusters` of a model are made anew from its encoder's features, with a fresh head for them.

    For models with `encoder`, `clusters`, `head` (a linear layer) and `clock`. The features are those of all training
    images without augmentation; what the optimizer remembers of the head is forgotten; and every epoch draws as often
    from each group. Of several processes each computes the features of a part of the images; the first one sorts.
    """

    order = 45  # after `Resume` brought back weights and clusters

    def before_train(self):  # `validate` and `get_preds` never come here
        model, dl = self.task_model, self.dls.train
        if model.clusters.outlived(model.clock.epochs):  # not if the run was killed in this epoch, and goes on
            with preserved_rng():  # a run that goes on from here comes here again, with generators not yet as they were
                features = finite(features_of_all(model.encoder, dl.plain))
                if is_first():
                    draws = model.clusters.renew(features, model.clock.epochs)
                    for layer in model.head.modules():
                        if isinstance(layer, nn.Linear):
                            _draw_anew(layer, draws)
                shared(model.clusters)
                shared(model.head)
            _forget(self.opt, model.head.parameters())
        if not isinstance(dl.shuffle_fn, EqualShares):
            self.own = vars(dl).get("shuffle_fn")
        dl.shuffle_fn = EqualShares(model.clusters.labels, dl.rng)

    def after_fit(self):
        dl = self.dls.train
        if isinstance(dl.shuffle_fn, EqualShares):
            del dl.shuffle_fn  # the class has one
            if self.own is not None:
                dl.shuffle_fn = self.own


def features_of_all(encoder: nn.Module, dl: IndexedDL) -> Tensor:
    """Of all images of a loader, (N, C), of which each process computes its part."""
    if n_processes() == 1:
        return embed(encoder, dl).x
    n = len(dl.dataset)
    ends = [n * k // n_processes() for k in range(n_processes() + 1)]
    own = range(ends[rank()], ends[rank() + 1])
    return of_unequal(embed(encoder, dl.over(dl, own, shuffle=False, drop_last=False)).x)


class ClusterColumns(Columns, OfModel):
    """Columns `nmi`, how much of the groups is as it was (normalized mutual information with those made before, 0..1,
    at first 0), and `clusters`, the number of those that are not empty.
    """

    names = ("nmi", "clusters")
    cheap = True

    def look(self, encoder):
        clusters = self.task_model.clusters
        return {"nmi": clusters.agreement.item(), "clusters": clusters.n_used}


def _draw_anew(layer: nn.Linear, draws: torch.Generator) -> None:
    weights = torch.randn(layer.weight.shape, generator=draws)
    with torch.no_grad():
        layer.weight.copy_(0.01 * weights)  # as in the authors' code
    nn.init.zeros_(layer.bias)


def _forget(opt: object, params: Iterable[nn.Parameter]) -> None:
    """What an optimizer remembers of its steps on some parameters; fastai keeps there, too, how it treats them.

    With it goes the gradient of an accumulated step that has begun.
    """
    wrapped = getattr(getattr(opt, "opt", None), "state", {})  # torch's own, in an `OptimWrapper`
    for p in params:
        wrapped.pop(p, None)
        if p.grad is not None:
            p.grad.zero_()
        if p in opt.state:
            opt.state[p] = {name: value for name, value in opt.state[p].items() if name in TREATMENT}


class EqualShares:
    """Instead of each image once an epoch draws as many, equally many from each group (DeepCluster, Caron et al. 2018).

    Each image of a group once before any comes twice.
    """

    def __init__(self, labels: Tensor, rng: Random):
        self.labels, self.rng = labels.tolist(), rng

    def __call__(self, idxs: list[int]) -> list[int]:
        groups: dict[int, list[int]] = {}
        for i in idxs:
            groups.setdefault(self.labels[i], []).append(i)
        share = -(-len(idxs) // len(groups))  # rounded up
        drawn = [i for group in groups.values() for i in self._from(group, share)]
        return self.rng.sample(drawn, len(idxs))

    def _from(self, group: list[int], n: int) -> list[int]:
        whole, rest = divmod(n, len(group))
        return group * whole + self.rng.sample(group, rest)
