"""BYOL."""

from torch import Tensor

from selfsup_fastai.callbacks.ema import EMATeacher
from selfsup_fastai.checks import check_number
from selfsup_fastai.data.recipes import BYOL_1, BYOL_2
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.losses import units
from selfsup_fastai.pretext.base import per_image
from selfsup_fastai.pretext.joint import JointTask, StudentTeacher, found_pair, spread


class BYOL(JointTask):
    """What does a slower copy of this network make of the image's other view?

    Grill et al., Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning, 2020 (arXiv 2006.07733). The
    network (student) predicts from one view what its teacher makes of the other. The teacher is a running average of
    the student's weights and gets no gradient. No image is pushed away from another.

    In: two views of each image, one input (B, 2, C, H, W), with the paper's two recipes: crop of 8-100 % of the area,
    flip, color jitter, grey; the first always blurred (from 64 pixels up), the second seldom, but in one of five images
    solarized. Target: the image's row, (B,). Prediction: the student's predictions and the teacher's projections of
    both views, (B, 2, dim) each; loss: |p - t|^2 = 2 - 2 cos between the prediction from each view and the projection
    of the other, the sum of the two, 0..8: 4 where nothing is known. Projector and predictor are the code's: linear,
    batch norm, ReLU, linear without bias. Each view goes through the networks by itself. After each step the teacher
    follows, with a momentum that goes from `momentum` to 1 along half a cosine. The student's encoder is kept.

    Ours: a hidden layer of 1,024, twice the features of a ResNet-18 as the paper's 4,096 is of a ResNet-50; and a
    momentum that suits the run's length, for which the authors have numbers too: .97 for 40 epochs of theirs, .99 for
    300, .996 for 1000. The authors train with LARS and batches of 4,096; small batches do with the learner's Adam.

    Guards against the collapse to one answer for all images, at which the loss would be 0: the predictor, the teacher's
    lag, and batch norms. None of them is a proof, so look at the metric `spread`: it falls to 0 in a collapse, whatever
    the loss says. Color jitter and grey hide color histograms.

    Suits batches that are too small for SimCLR, and data with many near-duplicates, which SimCLR would push apart. Does
    not suit runs of a few hundred steps, in which the teacher has hardly learned, nor data in which what tells classes
    apart is what the views destroy: change `views` then. `get_preds` decodes to the cosine of an image's predictions.
    """

    name = "byol"
    collapse_hint = (
        "one embedding for all images. What keeps that from happening is the predictor and a teacher that follows "
        "slowly: raise the momentum, lower the rate, or take larger batches; barlow_twins and vicreg are safer on "
        "small data."
    )
    paper = "Grill et al. 2020"
    scaled = (("hidden", "4,096"),)
    recipes = (BYOL_1, BYOL_2)
    tells_apart = False
    passes = 4  # two of the student and two of the teacher
    metrics = (found_pair, spread)

    def __init__(
        self,
        momentum: float | None = None,  # Of the teacher at the start; the paper's .996; None: by the number of steps
        dim: int = 256,  # Width of the projection
        hidden: int = 1024,  # Width of the hidden layers of projector and predictor; the paper's 4,096
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5}
    ):
        if momentum is not None:
            check_number("momentum", momentum, 0, below=1)
        check_number("dim", dim, 2, whole=True)
        check_number("hidden", hidden, 1, whole=True)
        self.check_views(views)
        self.momentum, self.dim, self.hidden, self.views = momentum, dim, hidden, views

    def model(self, encoder):
        projector = mlp(encoder.num_features, self.hidden, self.dim, batchnorm=True, last_bias=False)
        predictor = mlp(self.dim, self.hidden, self.dim, batchnorm=True, last_bias=False)
        return StudentTeacher(encoder, projector, predictor)

    def callbacks(self):
        return [EMATeacher(self.momentum)]

    def loss(self, pred, target, reduction="mean"):
        predictions, projections = pred
        return per_image(squared_distance(predictions, projections.detach().flip(1)).sum(1), reduction)


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Between embeddings (..., D) scaled to length 1, (...)."""
    return 2 - 2 * (units(a) * units(b)).sum(-1)
