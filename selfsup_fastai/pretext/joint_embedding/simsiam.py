"""SimSiam."""

from torch import Tensor, nn

from selfsup_fastai.callbacks.rates import RateThatStays
from selfsup_fastai.checks import check_number
from selfsup_fastai.data.recipes import MOCO
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.losses import units
from selfsup_fastai.pretext.base import per_image
from selfsup_fastai.pretext.joint import JointTask, each_view, found_pair, spread


class SimSiam(JointTask):
    """What will this network itself make of the image's other view?

    Chen & He, Exploring Simple Siamese Representation Learning, 2020 (arXiv 2011.10566). The network predicts from one
    view what it makes of the other, and is corrected on the side of the prediction alone. No image is pushed away from
    another; there is no teacher, no queue, and a batch need not be large.

    In: two views of each image, one input (B, 2, C, H, W): crop of 20-100 % of the area, flip, color jitter (half of
    SimCLR's), grey, blur (none under 64 pixels). Target: the image's row, (B,). Prediction: projections z and
    predictions p of both views, (B, 2, dim) each; loss: 1 - cos(p1, z2) / 2 - cos(p2, z1) / 2, in which no gradient
    flows through z: 0 is perfect, 1 where nothing is known. It is 1 more than the paper's, since fastai's `lr_find`
    stops at once where a loss is below 0. The last batch norm of the projector has no scale and shift, and its last
    layer no bias. The predictor's learning rate does not fall: it stays at the highest that the schedule has come to
    (the code's is constant; the paper found that better). Each view goes through the network by itself.

    The projector has 2 layers, as the paper's for CIFAR-10; for ImageNet it has 3. The authors train with SGD; here the
    learner's optimizer takes the steps.

    Guards against the collapse to one answer for all images, at which the loss would be 0: that no gradient flows
    through z, and the predictor. Without either of them this network does collapse. So look at the metric `spread`: it
    falls to 0 in a collapse, whatever the loss says. Color jitter and grey hide color histograms.

    Suits small machines: it costs the least of its kind, and batches of 32 or 64 do. Does not suit nets without batch
    norms as well as others, nor data in which what tells classes apart is what the views destroy: change `views` then.
    `get_preds` decodes to the cosine of an image's two projections.
    """

    name = "simsiam"
    collapse_hint = (
        "one embedding for all images. What keeps that from happening is the predictor and that one view is held "
        "constant; a rate that is too high, or batches of a few images, undo it. Try a tenth of the rate, or batches "
        "of 64 and more; barlow_twins and vicreg are safer on small data."
    )
    paper = "Chen & He 2020"
    recipes = (MOCO, MOCO)
    tells_apart = False
    passes = 2
    metrics = (found_pair, spread)

    def __init__(
        self,
        dim: int = 2048,  # Width of the projection and of the projector's hidden layers
        bottleneck: int = 512,  # Width of the predictor's hidden layer, a quarter of dim
        layers: int = 2,  # Of the projector; the paper's for ImageNet has 3
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5}
    ):
        check_number("dim", dim, 2, whole=True)
        check_number("bottleneck", bottleneck, 1, whole=True)
        check_number("layers", layers, 1, whole=True)
        self.check_views(views)
        self.dim, self.bottleneck, self.layers, self.views = dim, bottleneck, layers, views

    def model(self, encoder):
        n_in = encoder.num_features
        projector = mlp(n_in, self.dim, self.dim, self.layers, batchnorm=True, last_batchnorm="plain")
        return Siamese(encoder, projector, mlp(self.dim, self.bottleneck, self.dim, batchnorm=True))

    def callbacks(self):
        return [RateThatStays("predictor")]

    def loss(self, pred, target, reduction="mean"):
        projections, predictions = pred
        cosines = (units(predictions) * units(projections.detach().flip(1))).sum(-1)  # p1 with z2, p2 with z1
        return per_image(1 - cosines, reduction)


class Siamese(nn.Module):
    """Views (B, V, C, H, W) to projections and predictions of them, (B, V, D) each."""

    def __init__(self, encoder: Encoder, projector: nn.Module, predictor: nn.Module):
        super().__init__()
        self.encoder, self.projector, self.predictor = encoder, projector, predictor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = each_view(lambda view: self.projector(self.encoder(view)), x)
        return z, each_view(self.predictor, z)
