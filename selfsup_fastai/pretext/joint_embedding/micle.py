"""MICLe (multi-instance contrastive learning)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.data.companions import DrawnCompanions
from selfsup_fastai.data.recipes import SIMCLR
from selfsup_fastai.data.views import random_view
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.errors import TaskError
from selfsup_fastai.losses import nt_xent
from selfsup_fastai.messages import say
from selfsup_fastai.pretext.base import PerView, per_image
from selfsup_fastai.pretext.facts import groups, need_facts
from selfsup_fastai.pretext.joint import JointTask, embeddings
from selfsup_fastai.processes import n_rows


def found_group(pred: Tensor, target: Tensor, owner: Tensor) -> Tensor:
    """Share of images to whose view the nearest of all second views is one of the same patient (study, series).

    An image alone in its batch counts as not found: there was nothing to find it among.
    """
    z = F.normalize(embeddings(pred).float(), dim=-1)
    if len(z) == 1:
        return z.new_zeros(())
    nearest = (z[:, 0] @ z[:, 1].T).argmax(1)
    return (owner[nearest] == owner).float().mean()


class MICLe(JointTask):
    """Which of the other images is of the same patient?

    Azizi et al., Big Self-Supervised Models Advance Medical Image Classification, 2021 (arXiv 2101.05224). SimCLR whose
    two views are of two different images of one patient: what survives is not what a crop leaves, but what another
    exposure, view or day leaves. With `by='study'` the two are of one study, which MedAug found best (Vu et al. 2021,
    arXiv 2102.10663); with `by='series'` of one series.

    In: a view of each image and one of another image of the same patient, drawn anew each time, one input
    (B, 2, C, H, W); of an image that is its patient's only one, or has no patient, two views of itself. Views as in
    `simclr`. Targets: the row, (B,), and a number for the patient, (B,), by which images of one are known. Prediction:
    projections (B, 2, dim); loss: NT-Xent, as in `simclr`. Ours: other images of the same patient in a batch are no
    negatives (if a batch has one pair of each patient, there are none anyway). Which images
    belong together says a column of the facts, `patient`, `study` or `series`, as DICOM files bring it along. An image
    never meets one from the other side of the split. Validation draws the same pairs and views every time.

    Guards: those of `simclr`. Against what all images of a patient share beside the patient (scanner, collimation,
    burned-in text, markers) there is none but the crop.

    Suits data in which most patients have two images or more that show the same thing, such as X-rays from several
    sides or photographs of one lesion; best as a further round after `simclr` on the same images, as in the paper. Does
    not suit patients whose images show different things (a knee and a chest become alike: take `by='series'`), nor
    labels that differ between the images of a patient. Large batches help; validation loss depends on the batch size.
    """

    name = "micle"
    paper = "Azizi et al. 2021"
    recipes = (SIMCLR, SIMCLR)
    n_targets = 2
    needs = ("facts",)
    items = "companions"
    n_known = 1
    passes = 2
    accumulates = False  # images of a batch are told apart
    alone = "it shows another image of the same patient beside each image."
    metrics = (found_group,)

    def __init__(
        self,
        by: str = "patient",  # What the two images have in common: 'patient', 'study' (MedAug's best) or 'series'
        temperature: float = 0.1,  # Of NT-Xent
        dim: int = 128,  # Width of the projection
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5} for weaker colors
    ):
        check_choice("by", by, ("patient", "study", "series"))
        check_number("temperature", temperature, above=0)
        check_number("dim", dim, 1, whole=True)
        self.check_views(views)
        self.by, self.temperature, self.dim, self.views = by, temperature, dim, views

    def setup(self, dls, encoder):
        need_facts(self.name, dls, (self.by,), f"to know which images are of one {self.by}")
        super().setup(dls, encoder)
        owner = torch.from_numpy(groups(dls.train.facts[self.by]))
        n, n_paired = len(owner), int((owner.bincount()[owner] > 1).sum())
        if len(owner.unique()) < 2:
            what = f"images of two or more, and all {n} training images are of one"
            raise TaskError(f"micle tells one {self.by} from another: it needs {what}. Take simclr.")
        if n_paired == 0:
            say(f"micle: no {self.by} has two training images: with views of one image only, it is simclr.")
        elif n_paired < n:
            say(f"micle: {n_paired:,} of {n:,} training images have another of the same {self.by}.")

    def known(self, facts):
        return torch.from_numpy(groups(facts[self.by])).float().unsqueeze(1)

    def companions(self, facts):
        return DrawnCompanions(groups(facts[self.by]))

    def make_batch(self, x, *, generator, train, idx=None, known=None, others=None):
        pair = (x, x if others is None else others[:, 0])
        channels, side = x.shape[1], min(x.shape[-2:])
        views = [random_view(image, self.recipe(v, channels, side), generator) for v, image in enumerate(pair)]
        row = torch.arange(len(x), device=x.device)
        return (torch.stack(views, 1),), (row, row if known is None else known[:, 0].long())

    def model(self, encoder):
        sizes = encoder.num_features, encoder.num_features, self.dim
        return PerView(encoder, mlp(*sizes, batchnorm=True, last_batchnorm="affine"))

    def loss(self, pred, target, owner, reduction="mean"):
        if n_rows(pred) == 1 and not torch.is_grad_enabled():  # the last batch of a validation set, or `predict`
            return per_image(pred.new_zeros(1), reduction)  # the formula's value where there is nobody else
        return nt_xent(pred[:, 0], pred[:, 1], self.temperature, reduction, alike=owner)

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """The two views of each pair side by side; after training with their cosine."""
        axes = super().show(inputs, targets, pred, ctxs, max_n, figsize)
        if pred is None:
            for ax in axes:
                ax.set_title(f"one {self.by}", fontsize=9)
        return axes
