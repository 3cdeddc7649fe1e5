"""Consistency on unlabeled images while labeled ones are learned: UDA, FixMatch, mean teacher, the Pi model."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.learner import ValueMetric
from fastai.losses import BCEWithLogitsLossFlat
from fastai.torch_core import TensorImage
from torch import Tensor

from selfsup_fastai.callbacks.ema import momentum_for
from selfsup_fastai.callbacks.whole_run import WholeRun
from selfsup_fastai.checks import check_number
from selfsup_fastai.data.loader import IndexedDL, are_scans, derive_loaders, float_images
from selfsup_fastai.data.recipes import STRONG, adapted, for_scans
from selfsup_fastai.data.views import random_view, shift_flip_by_share
from selfsup_fastai.encoders.teacher import Teacher
from selfsup_fastai.errors import TaskError, unknown
from selfsup_fastai.losses import confidence, fixmatch_loss, softmax_mse, uda_loss
from selfsup_fastai.messages import say

SHIFT = 1 / 8  # FixMatch: weak views are moved by up to 12.5 % of the side


class Author(NamedTuple):
    """What the authors' code takes."""

    ratio: float  # Unlabeled images for each labeled one
    weight: float | None  # Of the consistency loss; None: 100 * labeled / all images
    threshold: float  # Of the weak view's largest probability
    temperature: float  # Of the target
    ramp: float  # Share of the run in which the weight rises
    momentum: float | None  # Of the average of the weights; None: there is none


KINDS = {
    "uda": Author(7, 1, 0.8, 0.4, 0, 0.9999),
    "fixmatch": Author(7, 1, 0.95, 1, 0, 0.999),
    "mean_teacher": Author(3, None, 0, 1, 5 / 180, 0.999),
    "pi": Author(3, None, 0, 1, 80 / 300, None),
}
STRONG_KINDS = ("uda", "fixmatch")


class ConsistencyLoss(WholeRun):
    """What the network says of an unlabeled image is to stay the same when the image is changed.

    `learn.fine_tune(10, cbs=ConsistencyLoss(unlabeled_dls, kind='fixmatch'))`. Each step takes `ratio` unlabeled images
    for each labeled one, and adds to the loss:

    - `'uda'` (Xie et al. 2020, arXiv 1904.12848): KL of the strong view to the weak view's sharpened answer (softmax at
      0.4), where the weak view is more than 0.8 sure.
    - `'fixmatch'` (Sohn et al. 2020, arXiv 2001.07685): cross-entropy of the strong view with the weak view's class,
      where it is at least 0.95 sure.
    - `'mean_teacher'` (Tarvainen & Valpola 2017, arXiv 1703.01780): squared difference between the probabilities of the
      network and of a running average of it, each with a weak view of its own, labeled images included; the weight
      rises as exp(-5 (1 - t)²) to 100 times the share of labeled images, as in the authors' TensorFlow code; their
      PyTorch code takes 100, which with few labels drowns them.
    - `'pi'` (Laine & Aila 2017, arXiv 1610.02242): the same between two passes of one network.

    Labeled, weak and strong images pass through the network together, so that norm layers see them as one batch.
    Weak views are shifted by up to an eighth and mirrored; labeled images are changed likewise where their label is a
    class. The strong views of the papers are RandAugment and cutout; here they are crops, turned, sheared, with other
    colors and cutout, drawn for each image (`data.recipes.STRONG`); those of scans and of grey images are `GREY_SCAN`,
    without cutout and mirroring. Rates are those of `fine_tune`, not the papers'. Their averages of the weights, which
    validation and the finished model use (uda, fixmatch, mean_teacher), are made for hundreds of thousands of steps: in
    shorter runs the momentum is the one that suits the number of steps.

    With several labels an image each answer counts by itself; with masks each pixel, strong views then only have other
    colors; numbers go with 'mean_teacher' and 'pi'. These are ours, not the papers'. Points are refused: a moved image
    has moved points.

    Columns: `consistency` (the loss before its weight), `confident` (share of the unlabeled images that count),
    `agreement` (share of these to which the other view gives the same answer); `history` has them by epoch. With
    'mean_teacher' and 'pi' all images count, the labeled ones, too. While nothing is confident, as in the first epochs
    of a new head, `consistency` is 0 and `agreement` empty; a line after the run says in how many epochs that was so.
    """

    order = 5.5  # in after_loss before gradient accumulation (6) divides, and mixed precision (10) leaves its context

    def __init__(
        self,
        unlabeled: DataLoaders,  # Images without labels (labels are ignored); their training part is used
        kind: str = "fixmatch",  # 'uda', 'fixmatch', 'mean_teacher' or 'pi'
        ratio: float | None = None,  # Unlabeled images for each labeled one; None here and below: the authors'
        weight: float | None = None,  # Of the loss beside that of the labeled images
        threshold: float | None = None,  # How sure the weak view must be, 0..1
        temperature: float | None = None,  # uda: of the target
        ramp: float | None = None,  # Share of the run in which the weight rises, 0..1
        momentum: float | None = None,  # Of the average of the weights, 0..1; 0: none
        views: str | Mapping | None = None,  # 'photo', 'scan', 'microscopy', or a recipe's fields; None: by the images
    ):
        if kind not in KINDS:
            raise unknown("kind of consistency", kind, KINDS)
        if not isinstance(unlabeled, DataLoaders):
            fix = "Give unlabeled loaders, such as UnlabeledDataLoaders.from_folder(path)."
            raise TaskError(f"ConsistencyLoss got {type(unlabeled).__name__} for its unlabeled images. {fix}")
        given = dict(ratio=ratio, weight=weight, threshold=threshold, temperature=temperature, ramp=ramp)
        given["momentum"] = momentum
        _check(given)
        self.unlabeled, self.kind, self.views, self.given = unlabeled, kind, views, given
        self.own = KINDS[kind]._replace(**{name: value for name, value in given.items() if value is not None})
        self.history, self.rows, self.columns, self.teacher = pd.DataFrame(), [], [], None

    # --- the run ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        model = self.learn.model
        if not hasattr(getattr(model, "encoder", None), "prepare"):
            raise TaskError("ConsistencyLoss goes with a learner of downstream_learner: it needs the model's encoder.")
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.batches, self.steps = None, 0
        self.momentum, self.swapped, self.rows = self._momentum(), False, []
        self.teacher = Teacher(model) if self.momentum else None
        self._reset()
        names, old = ("consistency", "confident", "agreement"), self.columns  # of a fit that was broken off
        self.columns = [ValueMetric(lambda name=name: self._mean(name), name) for name in names]
        self.learn.metrics = [*(m for m in self.learn.metrics if m not in old), *self.columns]

    def _momentum(self) -> float:
        steps = max(1, self.run_epochs * len(self.learn.dls.train))
        if self.given["momentum"] is not None or not self.own.momentum:
            return self.own.momentum or 0
        return min(self.own.momentum, momentum_for(steps))

    def end(self) -> None:
        if self.teacher is not None:
            self._stand_in()
            self.teacher = None
        self.learn.metrics = [m for m in self.learn.metrics if m not in self.columns]
        self.history, self.batches = pd.DataFrame(self.rows), None
        self._say_unsure()

    def _say_unsure(self) -> None:
        """Whether there were epochs in which no unlabeled image counted, or the loss did nothing at all."""
        none = sum(1 for row in self.rows if self.kind in STRONG_KINDS and not row["confident"])
        if none and none == len(self.rows):
            fix = f"Lower threshold, train longer, or take kind='mean_teacher'; {len(self.unlabeled.train_ds):,} images"
            say(
                f"{self.kind} did nothing: no unlabeled image was ever as sure as the threshold, "
                f"{self.own.threshold:g}. {fix} without labels were seen in vain."
            )
        elif none:
            say(
                f"{self.kind}: in {none} of {len(self.rows)} epochs no unlabeled image was as sure as the threshold, "
                f"{self.own.threshold:g}, so that consistency was 0 and there was no agreement."
            )

    def before_train(self):
        self._step_back()
        self._reset()

    def before_validate(self):
        self._stand_in()

    def after_epoch(self):
        if self.totals["n"]:
            names = ("consistency", "confident", "agreement", "weight")
            self.rows.append({"epoch": len(self.rows), **{name: self._mean(name) for name in names}})

    def _stand_in(self) -> None:
        """The average of the weights takes the place of the weights."""
        if self.teacher is not None and not self.swapped:
            self._exchange()

    def _step_back(self) -> None:
        if self.teacher is not None and self.swapped:
            self._exchange()

    def _exchange(self) -> None:
        """Values change places, tensors stay where the optimizer knows them."""
        a, b = self.learn.model, self.teacher.net
        pairs = list(zip(a.parameters(), b.parameters()))
        if self.kind == "mean_teacher":  # whose norm layers track batches of their own
            pairs += list(zip(a.buffers(), b.buffers()))
        with torch.no_grad():
            for p, q in pairs:
                kept = p.clone()
                p.copy_(q)
                q.copy_(kept)
        self.swapped = not self.swapped

    # --- a step -------------------------------------------------------------------------------------------------------

    def before_batch(self):
        if not self.training:
            return
        labeled, target = self.learn.xb[0].as_subclass(Tensor), self.learn.yb[0]
        self._check_target(target)
        self.n, self.dense = len(labeled), target.ndim >= 3
        views = self._two_views(self._next(labeled))
        first, second = (self.learn.model.encoder.prepare(view) for view in views)
        # A mask would have to be moved, too; and a number may be of where things are
        moved = self._weak if self.is_class and not self.dense else lambda x: x
        if self.kind in STRONG_KINDS:
            parts = moved(labeled), first, second
        else:
            parts, self.again = (moved(labeled), first), torch.cat([moved(labeled), second])
        self.learn.xb = (torch.cat(parts).as_subclass(TensorImage),)

    def after_pred(self):
        if not self.training:
            return
        pred = self.learn.pred
        self.learn.pred, rest = pred[: self.n], pred[self.n :].as_subclass(Tensor)
        if self.kind in STRONG_KINDS:
            weak, strong = rest.chunk(2)
        else:
            weak, strong = pred.as_subclass(Tensor), self._second_pass()
        self.value, self.weight = self._loss(weak, strong), self._weight()
        self._note(weak.detach(), strong.detach())

    def after_loss(self):
        if self.training:
            self.learn.loss_grad = self.learn.loss_grad + self.weight * self.value
            self.learn.loss = self.learn.loss_grad.clone()

    def after_step(self):
        self.steps += 1
        if self.teacher is not None:
            self.teacher.follow(min(1 - 1 / (self.steps + 1), self.momentum))
            if self.kind != "mean_teacher":
                for own, students in zip(self.teacher.net.buffers(), self.learn.model.buffers()):
                    own.copy_(students)

    def _second_pass(self) -> Tensor:
        """What the teacher, or for 'pi' the network itself, says of other views of all images."""
        if self.kind == "pi":
            return self.learn.model(self.again).as_subclass(Tensor)
        for own, students in zip(self.teacher.net.modules(), self.learn.model.modules()):
            own.training = students.training  # frozen norm layers hold still in both
        return self.teacher(self.again).as_subclass(Tensor)

    def _loss(self, weak: Tensor, strong: Tensor) -> Tensor:
        if self.kind == "uda":
            return uda_loss(weak, strong, self.own.threshold, self.own.temperature, self.several)
        if self.kind == "fixmatch":
            return fixmatch_loss(weak, strong, self.own.threshold, self.several)
        return softmax_mse(weak, strong, self.several) if self.is_class else F.mse_loss(weak.float(), strong.float())

    def _weight(self) -> float:
        """At this step."""
        full = self.own.weight
        if full is None:
            labeled, all_ = len(self.learn.dls.train_ds), len(self.unlabeled.train_ds)
            full = 100 * labeled / (labeled + all_)
        t = min(1.0, self.progress / self.own.ramp) if self.own.ramp else 1.0
        return full * math.exp(-5 * (1 - t) ** 2)

    # --- images -------------------------------------------------------------------------------------------------------

    def _next(self, labeled: Tensor) -> Tensor:
        """Unlabeled images (B, C, H, W) in [0, 1], of the labeled images' size."""
        wanted = max(1, round(self.own.ratio * len(labeled)))
        if self.batches is None:
            self.batches = self._endless(wanted, labeled)
        parts, n = [], 0
        while n < wanted:  # the first batch may be of fewer labeled images than later ones
            parts.append(next(self.batches).to(labeled.device))
            n += len(parts[-1])
        return torch.cat(parts)[:wanted]

    def _endless(self, bs: int, labeled: Tensor) -> Iterator[Tensor]:
        encoder, size = self.learn.model.encoder, labeled.shape[-2:]
        loaders = derive_loaders(
            self.unlabeled, dl_type=IndexedDL, inputs_only=True, n_in=encoder.image_channels, resize=min(size)
        )
        if len(loaders.train_ds) < bs:
            say(
                f"There are {len(loaders.train_ds)} unlabeled images, fewer than the {bs} of a step: they repeat in it."
            )
        self.recipe = adapted(STRONG, self._views(), encoder.image_channels, min(size))
        loader = loaders.train.new(bs=min(bs, len(loaders.train_ds)), shuffle=True, drop_last=True)
        while True:
            for batch in loader:
                x = (batch[0] if isinstance(batch, (tuple, list)) else batch).as_subclass(Tensor)
                float_images(x)
                yield _sized(x, labeled)

    def _views(self) -> str | Mapping | None:
        return for_scans(self.views) if are_scans(self.unlabeled) else self.views

    def _two_views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weak and strong ones; for the kinds that have no strong ones two weak ones."""
        weak = self._weak(x)
        if self.kind not in STRONG_KINDS:
            return weak, weak if self.dense else self._weak(x)
        if self.dense:  # what lies where must stay
            still = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, vertical_flip=0.0, turn=0.0, shear=0.0)
            size = max(x.shape[-2:])
            square = F.interpolate(weak, (size, size), mode="bilinear").clamp(0, 1)
            return weak, _sized(random_view(square, replace(self.recipe, **still), self.generator), x)
        return weak, _sized(random_view(x, self.recipe, self.generator), x)

    def _weak(self, x: Tensor) -> Tensor:
        return shift_flip_by_share(x.as_subclass(Tensor), self.generator, SHIFT, self.recipe.flip)

    def _check_target(self, target: Tensor) -> None:
        """What kind of answers the network gives: the learner says, or else its loss and the labels do."""
        kind = getattr(getattr(self.learn, "target", None), "kind", None)
        self.several = kind == "multicategory" or isinstance(self.learn.loss_func, BCEWithLogitsLossFlat)
        self.is_class = self.several or not target.is_floating_point()
        if kind == "points":
            raise TaskError("ConsistencyLoss does not go with points: a moved image has moved points.")
        if not self.is_class and self.kind in STRONG_KINDS:
            fix = "Take kind='mean_teacher' or 'pi'."
            raise TaskError(f"{self.kind} asks how sure the network is of a class; these labels are numbers. {fix}")

    # --- what is recorded ---------------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self.totals = {"n": 0, "consistency": 0.0, "confident": 0.0, "agreement": 0.0, "weight": 0.0, "sure": 0}

    def _note(self, weak: Tensor, strong: Tensor) -> None:
        totals = self.totals
        totals["n"] += 1
        totals["consistency"] += self.value.detach()
        totals["weight"] += self.weight
        if self.is_class:
            sure, alike = confidence(weak, strong, self.own.threshold, self.several)
            totals["confident"] += sure
            totals["agreement"] += torch.nan_to_num(alike) * (sure > 0)
            totals["sure"] += sure > 0

    def _mean(self, name: str) -> float | None:
        n = self.totals["sure" if name == "agreement" else "n"]
        return float(self.totals[name] / n) if n else None


def _sized(x: Tensor, like: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1] at the size of others."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return F.interpolate(x, like.shape[-2:], mode="bilinear", antialias=True).clamp(0, 1)


def _check(given: dict) -> None:
    limits = {"ratio": {"above": 0}, "weight": {"least": 0}, "threshold": {"least": 0, "most": 1}}
    limits |= {"temperature": {"above": 0}, "ramp": {"least": 0, "most": 1}, "momentum": {"least": 0, "below": 1}}
    for name, value in given.items():
        if value is not None:
            check_number(f"{name} of ConsistencyLoss", value, **limits[name])
