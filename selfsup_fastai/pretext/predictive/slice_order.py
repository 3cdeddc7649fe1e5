"""The order of slices (Shuffle and Learn)."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.data.companions import FixedCompanions
from selfsup_fastai.data.draws import draw_views
from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.data.views import apply_views, square_view
from selfsup_fastai.encoders.heads import linear_head, mlp
from selfsup_fastai.errors import TaskError
from selfsup_fastai.messages import say
from selfsup_fastai.metrics import OfSums, share
from selfsup_fastai.pictures import draw_rows
from selfsup_fastai.pretext.base import PretextTask
from selfsup_fastai.pretext.facts import need_facts, numbers, texts
from selfsup_fastai.transfer import constant

UNKNOWN = -1  # In targets
ORDERS = ((1, 0, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0), (0, 1, 2), (2, 1, 0))  # 0 before, 1 the slice, 2 after
IN_ORDER = 4  # From here on the slice lies in the middle
FEW = 0.1  # Share of the training images below which there is nothing to learn
EQUAL = 0.05  # Steps from slice to slice that differ by less count as equal


def _ordered(pred: Tensor, order: Tensor, *_) -> tuple[Tensor, Tensor]:
    asked = order != UNKNOWN
    return (pred[:, :2].argmax(1) == order)[asked].sum(), asked.sum()


def _off(pred: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """How far the answers are from the places, 0 where these are not known, and which are, both (B, slices)."""
    known = places != UNKNOWN
    return (pred[:, -places.shape[1] :].sigmoid() - places) * known, known


def _squares(pred: Tensor, *targets: Tensor) -> tuple[Tensor, ...]:
    off, known = _off(pred, targets[-1])
    truth = targets[-1][known]
    return off.square().sum(), known.sum(), truth.sum(), truth.square().sum()


def _explained(error: Tensor, n: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    variance = squares - total.square() / n.clamp(min=1)
    return torch.where(variance > 1e-6, 1 - error / variance.clamp(min=1e-6), 0.0)


order = share("order", _ordered)
"""Share of right answers about the order, of those that were asked."""

position = OfSums("position", _squares, _explained)
"""Share of the variance of the known positions that the answers explain; 0 where there is none."""


class SliceOrder(PretextTask):
    """Are these three slices of a volume in order, and where in the volume do they lie?

    After Misra, Zitnick & Hebert, Shuffle and Learn: Unsupervised Learning using Temporal Order Verification, 2016
    (arXiv 1603.08561), with slices in place of frames of a film. To answer, the network must know how anatomy goes on
    from one slice to the next, and which anatomy lies where.

    In: each slice with the one before and the one after it in its volume, (B, 3, C, S, S), in one of six orders, all
    three cut by the same draw: crop in training, else the center square. Targets: whether the middle one lies between
    the others, forwards or backwards, (B,), 0 or 1, both equally often; and where each of the three lies along the axis
    of the volume, 0..1, (B, 3). -1 stands for what is not known: of the first and last slice of a volume, and of images
    without neighbors, which come three times, the order is not asked; of images that belong to no volume, neither is
    the position. What is not known weighs nothing. Prediction: (B, 5), two logits of the order,
    from the features of the three in turn, and the position of each by its own features. Loss: cross-entropy plus
    `weight` times the mean absolute error. With `ask='position'` a slice comes alone, (B, 1, C, S, S).
    Ours: the wrong orders have the same three slices as the right ones (in the paper the middle frame is from elsewhere
    in the film), and the position.

    The facts say which images are slices: columns `volume` and `place` (0, 1, ... along the axis); and `position`,
    0..1, without which it is the share of places. Neighbors are at the next places, by equal steps where positions are
    given, and on the same side of the split.

    Guards: one crop for all three, so that its edges say nothing. Where brightness is scaled slice by slice, as MR may
    be, that could give the order away: scale by series.

    Suits CT and MR of thin slices, a few dozen volumes or more. Does not suit X-rays and photographs, which have no
    neighbors. Position is easy where volumes show the same stretch of the body, and means little where they do not.
    """

    name = "slice_order"
    paper = "Misra et al. 2016"
    needs = ("facts",)
    n_known = 4  # positions of the slice before, the slice and the one after; whether there are both

    def __init__(
        self,
        ask: str = "both",  # 'order', 'position' or 'both'
        weight: float = 1.0,  # Of the position's error beside the order's
        min_area: float = 0.5,  # Least share of the image in a crop, in training; 1: the center square
        hidden: int = 512,  # Width of the layer that sees three slices
    ):
        check_choice("ask", ask, ("both", "order", "position"))
        check_number("weight", weight, above=0)
        check_number("min_area", min_area, above=0, most=1)
        check_number("hidden", hidden, 1, whole=True)
        self.ask, self.weight, self.min_area, self.hidden = ask, weight, min_area, hidden
        self.n_targets = 2 if ask == "both" else 1
        self.metrics = {"both": (order, position), "order": (order,), "position": (position,)}[ask]
        self.passes = 1 if ask == "position" else 3
        if ask == "position":
            self.check_idle("ask='position'", "hidden")
        else:
            self.items, self.alone = "companions", "it shows the slices before and after each image beside it."
        if ask == "order":
            self.check_idle("ask='order'", "weight")
        self._ends: dict[str, tuple[float, float]] = {}  # first and last place of each volume; known after setup

    # --- what is known of the slices ----------------------------------------------------------------------------------

    def setup(self, dls, encoder):
        need_facts(self.name, dls, ("volume", "place"), "to know which images are slices of one volume")
        everyone = pd.concat([dl.facts for dl in dls.loaders])
        slices = pd.DataFrame({"volume": texts(everyone["volume"]), "place": numbers(everyone["place"])}).dropna()
        ends = slices[slices["volume"] != ""].groupby("volume")["place"].agg(["min", "max"])
        self._ends = dict(zip(ends.index, ends.itertuples(index=False, name=None)))
        for dl in dls.loaders:
            self._check(self.known(dl.facts), dl is dls.train)

    def _check(self, known: Tensor, train: bool) -> None:
        """Raises `TaskError` where nearly nothing can be asked about the training images; of others it is said."""
        alone = self.ask == "position"
        usable = ~known[:, 1].isnan() if alone else known[:, 3] == 1
        if usable.float().mean() >= FEW:
            return
        what = "a place in a volume" if alone else "the slice before and the one after on their side of the split"
        side = "training" if train else "validation"
        said = f"slice_order: {int(usable.sum()):,} of {len(usable):,} {side} images have"
        if not train:
            say(f"{said} {what}: the validation loss says little.")
            return
        fix = "The facts `volume` and `place` say which slices belong together; split by patient keeps them together."
        fix += "" if alone else " With ask='position' slices are asked about one by one."
        raise TaskError(f"{said} {what}: too few to learn from. {fix}")

    def known(self, facts):
        places, (before, after) = self.positions(facts), self.neighbors(facts).T
        both = before != after
        return torch.from_numpy(np.stack([places[before], places, places[after], both], 1)).float()

    def companions(self, facts):
        return FixedCompanions(self.neighbors(facts)) if self.items == "companions" else None

    def positions(self, facts: pd.DataFrame) -> np.ndarray:
        """(N,) of each image along the axis of its volume, 0..1; NaN where nobody knows."""
        if "position" in facts:
            given = numbers(facts["position"])
            if ((given < 0) | (given > 1)).any():
                raise TaskError("slice_order: `position` is a share of the volume, 0 to 1; some lie outside of that.")
            return np.where(texts(facts["volume"]) == "", np.nan, given)
        ends = np.array([self._ends.get(v, (np.nan, np.nan)) for v in texts(facts["volume"])]).reshape(-1, 2)
        length = ends[:, 1] - ends[:, 0]
        return (numbers(facts["place"]) - ends[:, 0]) / np.where(length > 0, length, np.nan)

    def neighbors(self, facts: pd.DataFrame) -> np.ndarray:
        """(N, 2): the images before and after each one; twice the image itself where it does not have both."""
        volume, place = texts(facts["volume"]), numbers(facts["place"])
        at = np.flatnonzero((volume != "") & ~np.isnan(place))
        at = at[np.lexsort((place[at], volume[at].astype(str)))]
        found = np.repeat(np.arange(len(facts))[:, None], 2, 1)
        before, middle, after = at[:-2], at[1:-1], at[2:]
        good = (volume[before] == volume[middle]) & (volume[middle] == volume[after])
        good &= (place[middle] - place[before] == 1) & (place[after] - place[middle] == 1)
        if "position" in facts:
            where = numbers(facts["position"])
            steps = where[middle] - where[before], where[after] - where[middle]
            good &= np.isnan(steps[0] + steps[1]) | np.isclose(*steps, rtol=EQUAL)
        found[middle[good]] = np.stack([before[good], after[good]], 1)
        return found

    # --- the question -------------------------------------------------------------------------------------------------

    def make_batch(self, x, *, generator, train, idx=None, known=None, others=None):
        known = x.new_full((len(x), 4), torch.nan) if known is None else known
        places = torch.where(known.isnan(), UNKNOWN, known)
        if self.ask == "position":
            return (self.cut(x, generator, train).unsqueeze(1),), (places[:, 1:2],)
        others = x.unsqueeze(1).expand(-1, 2, -1, -1, -1) if others is None else others
        slices = self.cut(torch.stack([others[:, 0], x, others[:, 1]], 1), generator, train)
        right = torch.rand(len(x), generator=generator, device=x.device) < 0.5
        which = torch.rand(len(x), generator=generator, device=x.device)
        which = torch.where(right, IN_ORDER + (2 * which).long(), (IN_ORDER * which).long())
        shuffled = constant(ORDERS, torch.long, x.device)[which]  # (B, 3)
        row = torch.arange(len(x), device=x.device).unsqueeze(1)
        answers = torch.where(known[:, 3] == 1, right.long(), UNKNOWN), places[row, shuffled]
        return (slices[row, shuffled],), {"both": answers, "order": answers[:1]}[self.ask]

    def cut(self, x: Tensor, generator: torch.Generator, train: bool) -> Tensor:
        """Squares of (B, C, H, W) or (B, 3, C, H, W), the three of an image by one draw."""
        slices, side = x.unbind(1) if x.ndim == 5 else (x,), min(x.shape[-2:])
        if train:
            recipe = Recipe(scale=(self.min_area, 1.0), flip=0, jitter_p=0, grey_p=0)
            views = draw_views(recipe, tuple(slices[0].shape), generator, side)
            slices = [apply_views(one, views) for one in slices]
        else:
            slices = [square_view(one, side, None, generator) for one in slices]
        return torch.stack(slices, 1) if x.ndim == 5 else slices[0]

    def model(self, encoder):
        return SliceNet(encoder, self.ask, self.hidden)

    def loss(self, pred, *targets, reduction="mean"):
        each = 0
        if self.ask != "position":
            asked = targets[0] != UNKNOWN
            each = F.cross_entropy(pred[:, :2], targets[0].clamp(min=0), reduction="none") * asked
        if self.ask != "order":
            each = each + self.weight * _off(pred, targets[-1])[0].abs().mean(1)
        return each.mean() if reduction == "mean" else each

    def activation(self, pred):
        """Probabilities of the wrong and the right order, and positions."""
        n = 0 if self.ask == "position" else 2
        return torch.cat([pred[:, :n].softmax(1), pred[:, n:].sigmoid()], 1)

    def decode(self, pred):
        """0 or 1 for the order, and positions."""
        return pred if self.ask == "position" else torch.cat([pred[:, :2].argmax(1, keepdim=True), pred[:, 2:]], 1)

    def chance(self):
        return 0.0 if self.ask == "position" else 0.5

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """The slices as the network sees them, titled with what is true and, after training, with what it said."""
        n = min(max_n, len(inputs[0]))
        known = [self._said([t[i].flatten() for t in targets]) for i in range(n)]
        if pred is None:
            return draw_rows(inputs[0][:n], known, ctxs, figsize)
        cuts = {"both": (1, 3), "order": (1,), "position": (1,)}[self.ask]
        named = [self._said(pred[i].split(cuts)) for i in range(n)]
        right = [None] * n
        if self.ask != "position":
            right = [None if t == UNKNOWN else bool(p[0] == t) for t, p in zip(targets[0], pred[:n])]
        titles = [f"{truth},\nnamed {answer}" for truth, answer in zip(known, named)]
        return draw_rows(inputs[0][:n], titles, ctxs, figsize, right)

    def _said(self, parts) -> str:
        words = []
        if self.ask != "position":
            words.append({UNKNOWN: "no neighbors", 0: "not in order", 1: "in order"}[int(parts[0])])
        if self.ask != "order":
            words.append("at " + " ".join("?" if v == UNKNOWN else f"{v:.2f}" for v in parts[-1].tolist()))
        return ", ".join(words)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ends": {}}  # names of volumes do not travel


class SliceNet(nn.Module):
    """Slices (B, 1 or 3, C, S, S) to two logits of their order, from all three, and one of the position of each."""

    def __init__(self, encoder: nn.Module, ask: str, hidden: int):
        super().__init__()
        self.encoder, d = encoder, encoder.num_features
        self.order = None if ask == "position" else mlp(3 * d, hidden, 2)
        self.position = None if ask == "order" else linear_head(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # (B, 1 or 3, d)
        said = [] if self.order is None else [self.order(features.flatten(1))]
        return torch.cat(said if self.position is None else [*said, self.position(features)[..., 0]], 1)
