"""Sorting the training images into groups anew at the beginning of each epoch."""

from random import Random

import torch
from fastai.torch_core import get_model
from torch import Tensor, nn

from selfsup_fastai.callbacks.columns import Columns
from selfsup_fastai.callbacks.of_model import OfModel
from selfsup_fastai.features import embed


class Recluster(OfModel):
    """Before an epoch `Clusters` of a model are made anew from its encoder's features, with a fresh head for them.

    For models with `encoder`, `clusters`, `head` (a linear layer) and `clock`. The features are those of all training
    images without augmentation; what the optimizer remembers of the head is forgotten; and every epoch draws as often
    from each group.
    """

    order = 45  # after `Resume` brought back what there was, before it notes what is drawn from now on

    def before_train(self):  # `validate` and `get_preds` never come here
        model, dl = self.task_model, self.dls.train
        if model.clusters.outlived(model.clock.epochs):  # not if the run was killed in this epoch, and goes on
            seed = int(torch.randint(2**31, ()))
            model.clusters.renew(embed(model.encoder, dl.plain).x, model.clock.epochs, seed)
            model.head.apply(_draw_anew)
            for p in model.head.parameters():
                if p in self.opt.state:
                    self.opt.state[p] = {}
        if not isinstance(dl.shuffle_fn, EqualShares):
            self.own = vars(dl).get("shuffle_fn")
        dl.shuffle_fn = EqualShares(model.clusters.labels, dl.rng)

    def after_fit(self):
        dl = self.dls.train
        if isinstance(dl.shuffle_fn, EqualShares):
            del dl.shuffle_fn  # the class has one
            if self.own is not None:
                dl.shuffle_fn = self.own


class ClusterColumns(Columns):
    """Columns `nmi`, how much of the groups is as it was (normalized mutual information with those made before, 0..1,
    at first 0), and `clusters`, the number of those that are not empty.
    """

    names = ("nmi", "clusters")
    cheap = True

    def look(self, encoder):
        clusters = get_model(self.learn.model).clusters
        return {"nmi": clusters.agreement.item(), "clusters": clusters.n_used}


def _draw_anew(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)  # as in the authors' code
        nn.init.zeros_(module.bias)


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
