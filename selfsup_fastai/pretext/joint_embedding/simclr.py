"""SimCLR."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from selfsup_fastai.data.recipes import simclr_recipe
from selfsup_fastai.data.views import random_view
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.errors import TaskError
from selfsup_fastai.losses import nt_xent
from selfsup_fastai.messages import say
from selfsup_fastai.pictures import draw_rows
from selfsup_fastai.pretext.base import PerView, PretextTask, check_flag, check_number, per_image


def found_pair(pred, target):
    """Share of images whose second view is nearest to the first among all second views of the batch.

    An image alone in its batch counts as not found: there was nothing to find it among.
    """
    if len(pred) == 1:
        return pred.new_zeros((), dtype=torch.float32)
    z = F.normalize(pred.float(), dim=-1)
    return ((z[:, 0] @ z[:, 1].T).argmax(1) == target).float().mean()


class SimCLR(PretextTask):
    """Which of the other images is the other view of this one?

    Chen, Kornblith, Norouzi & Hinton, A Simple Framework for Contrastive Learning of Visual Representations, 2020
    (arXiv 2002.05709). Two random views of an image are pulled together, those of all other images in the batch are
    pushed away; what survives cropping and recoloring is what the image is of.

    In: two views of each image, one input (B, 2, C, H, W): crop of 8-100 % of the area, flip, color jitter, grey, blur
    (none under 64 pixels, as the paper does on CIFAR). Target: the row of its partner, (B,). Prediction: projections
    (B, 2, dim); loss: NT-Xent, the paper's mean over the 2B views (the authors' code adds the means of the two
    directions: twice as much). The projector is the code's, not the paper's, in that its hidden layer has a batch norm;
    the code's further one on the projections is left out. Validation draws the same views every time, in batches of
    one image more where one would be left over: alone, an image has nobody to be told from, and a loss of 0.

    Guards: color jitter and grey, without which color histograms would be enough to find the partner; on images of one
    channel only brightness and contrast are left of them. Noise and traces of compression are not hidden below 64
    pixels, where nothing is blurred.

    Suits most data once there are a thousand images and a batch of 64 or more. Does not suit data in which what tells
    classes apart is what the views destroy (color of stains, tiny lesions): change the recipe then. Large batches help;
    validation loss depends on the batch size. `get_preds` decodes to the cosine of an image's two views.
    """

    name = "simclr"
    paper = "Chen et al. 2020"
    passes = 2
    metrics = (found_pair,)

    def __init__(
        self,
        temperature: float = 0.1,  # Of NT-Xent; the paper's is 0.1, on CIFAR-10 0.5
        dim: int = 128,  # Width of the projection
        strength: float = 1.0,  # Of the color jitter; the paper's is 1, on CIFAR-10 0.5
        min_area: float = 0.08,  # Smallest share of the image's area in a view
        flip: float = 0.5,  # Probability of a mirror image; 0 where left and right matter
        blur: bool | None = None,  # None: from 64 pixels up
    ):
        check_number("temperature", temperature, above=0)
        check_number("dim", dim, 1, whole=True)
        check_number("strength", strength, 0, 2.5)  # beyond it hue would turn by more than half of the wheel
        check_number("min_area", min_area, above=0, most=1)
        check_number("flip", flip, 0, 1)
        if blur is not None:
            check_flag("blur", blur)
        self.temperature, self.dim, self.strength = temperature, dim, strength
        self.min_area, self.flip, self.blur = min_area, flip, blur

    def setup(self, dls, encoder):
        if dls.train.bs is not None and dls.train.bs < 2:
            raise TaskError("simclr tells images of a batch apart: it needs a batch size of 2 or more, not 1.")
        for dl in dls.loaders[1:]:
            if dl.n == 1:
                say("simclr: one validation image has nobody to be told from; its validation loss of 0 says nothing.")
            dl.bs = _none_alone(dl.n, dl.bs)

    def recipe(self, side: int):
        """The random views for images of `side` pixels."""
        blur = side >= 64 if self.blur is None else self.blur
        return replace(simclr_recipe(self.strength, blur=blur), scale=(self.min_area, 1.0), flip=self.flip)

    def make_batch(self, x, *, generator, train, idx=None):
        recipe = self.recipe(min(x.shape[-2:]))
        views = [random_view(x, recipe, generator) for _ in range(2)]
        return (torch.stack(views, 1),), (torch.arange(len(x), device=x.device),)

    def model(self, encoder):
        return PerView(encoder, mlp(encoder.num_features, encoder.num_features, self.dim, batchnorm=True))

    def loss(self, pred, target, reduction="mean"):
        if len(pred) == 1 and not torch.is_grad_enabled():  # the last batch of a validation set, or `predict`
            return per_image(pred.new_zeros(1), reduction)  # the formula's value where there is nobody else
        return nt_xent(pred[:, 0], pred[:, 1], self.temperature, reduction)

    def activation(self, pred):
        return F.normalize(pred, dim=-1)

    def decode(self, pred):
        """Cosine of the two views of each image, (B,)."""
        return F.cosine_similarity(pred[:, 0], pred[:, 1], dim=-1)

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """The two views of each image side by side; after training with their cosine."""
        views = inputs[0][:max_n]
        titles = [f"two views of image {i}" if pred is None else f"cosine {pred[i]:.2f}" for i in range(len(views))]
        return draw_rows(views, titles, ctxs, figsize)


def _none_alone(n: int, bs: int) -> int:
    """The smallest batch size from `bs` up that leaves no batch of one image (unless there is only one)."""
    while n > 1 and n % bs == 1 % bs:
        bs += 1
    return bs
