"""SimCLR."""

import torch

from selfsup_fastai.checks import check_number
from selfsup_fastai.data.recipes import SIMCLR
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.losses import nt_xent
from selfsup_fastai.pretext.base import PerView, per_image
from selfsup_fastai.pretext.joint import JointTask
from selfsup_fastai.processes import n_rows


class SimCLR(JointTask):
    """Which of the other images is the other view of this one?

    Chen, Kornblith, Norouzi & Hinton, A Simple Framework for Contrastive Learning of Visual Representations, 2020
    (arXiv 2002.05709). Two random views of an image are pulled together, those of all other images in the batch are
    pushed away; what survives cropping and recoloring is what the image is of.

    In: two views of each image, one input (B, 2, C, H, W): crop of 8-100 % of the area, flip, color jitter, grey, blur
    (none under 64 pixels, as the paper does on CIFAR). Target: the row of its partner, (B,). Prediction: projections
    (B, 2, dim); loss: NT-Xent, the paper's mean over the 2B views (the authors' code adds the means of the two
    directions: twice as much). The projector is the code's, not the paper's, in that its hidden layer and the
    projections have batch norms. Validation draws the same views every time, in batches of one image more where one
    would be left over: alone, an image has nobody to be told from, and a loss of 0.

    Guards: color jitter and grey, without which color histograms would be enough to find the partner; on images of one
    channel only brightness and contrast are left of them. Noise and traces of compression are not hidden below 64
    pixels, where nothing is blurred.

    Suits most data once there are a thousand images and a batch of 64 or more. Does not suit data in which what tells
    classes apart is what the views destroy (color of stains, tiny lesions): change `views` then. Large batches help;
    validation loss depends on the batch size. `get_preds` decodes to the cosine of an image's two views.
    """

    name = "simclr"
    paper = "Chen et al. 2020"
    recipes = (SIMCLR, SIMCLR)
    passes = 2
    accumulates = False  # images of a batch are told apart

    def __init__(
        self,
        temperature: float = 0.1,  # Of NT-Xent; the paper's is 0.1, on CIFAR-10 0.5
        dim: int = 128,  # Width of the projection
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5} as the paper's on CIFAR
    ):
        check_number("temperature", temperature, above=0)
        check_number("dim", dim, 1, whole=True)
        self.check_views(views)
        self.temperature, self.dim, self.views = temperature, dim, views

    def model(self, encoder):
        sizes = encoder.num_features, encoder.num_features, self.dim
        return PerView(encoder, mlp(*sizes, batchnorm=True, last_batchnorm="affine"))

    def loss(self, pred, target, reduction="mean"):
        if n_rows(pred) == 1 and not torch.is_grad_enabled():  # the last batch of a validation set, or `predict`
            return per_image(pred.new_zeros(1), reduction)  # the formula's value where there is nobody else
        return nt_xent(pred[:, 0], pred[:, 1], self.temperature, reduction)
