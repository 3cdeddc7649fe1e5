"""SwAV."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup_fastai.callbacks.clock import SetClocks
from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.callbacks.prototypes import TendPrototypes
from selfsup_fastai.checks import check_number
from selfsup_fastai.data.recipes import SWAV_GLOBAL, SWAV_LOCAL
from selfsup_fastai.encoders.clock import Clock
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.encoders.memories import FeatureQueue
from selfsup_fastai.encoders.prototypes import Prototypes
from selfsup_fastai.losses import crop_cross_entropy
from selfsup_fastai.messages import say
from selfsup_fastai.pretext.joint import MultiCropTask, each_crop
from selfsup_fastai.processes import n_processes, own_share, summed

MOST, LEAST = 3000, 16  # Prototypes: the paper's, and the least that are chosen for small data
QUEUED_FROM = 0.15  # Share of a run that is short for `queue_epochs`; the paper's shortest: epoch 15 of 100


class SwAV(MultiCropTask):
    """Into which cluster would another crop of this image be sorted?

    Caron, Misra, Mairal, Goyal, Bojanowski & Joulin, Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments, 2020 (arXiv 2006.09882). Embeddings are compared with learned prototypes; each large crop gets a code,
    soft shares of the prototypes, such that over the batch all prototypes are used equally; every other crop of the
    image must predict that code.

    In: two large crops of each image, (B, 2, C, S, S), more than 14 % of its area, and small ones of less, (B, n_small,
    C, s, s); SimCLR's colors. Target: the image's row, (B,). Prediction: of all crops embeddings of length 1, (B, 2 +
    n_small, dim), and cosines with the prototypes, (B, 2 + n_small, K); and codes of the large ones, (B, 2, K). Loss:
    cross-entropy of code and softmax of cosines divided by the temperature, the mean over the pairs of a large crop and
    another one. Codes have no gradient. They depend on the batch, so accumulated gradients would not be exact.
    Metrics: `found_pair` on the large crops, and `clusters`, the number of groups that codes sort images into: 1 when
    all has collapsed.

    Prototypes are brought back to length 1 after each step, and stay as they are in the first epoch (ours: in the first
    tenth of runs of less than ten). How many there are follows the data: one for ten images, 16 to 3,000 (ours; the
    paper has 3,000 for 1.3 million). Where a batch has fewer images than there are prototypes, queues of earlier
    embeddings, one for each large crop, are balanced together with it, from epoch 15 on as in the authors' code for
    small batches (ours: after 15 % of shorter runs), once they are full; as long as batch and queue together have at
    least as many rows as there are prototypes, at most half of the data. With several processes all of them balance
    codes together, and share the queues. The authors train with LARC; Adam does for small nets.

    Guards against all images in one cluster: codes are balanced. Against answers without understanding: color jitter,
    grey, and crops that share little; blur from 64 pixels a side on, so rarely on small crops.

    Suits most data from a thousand images on, and small batches better than SimCLR. Does not suit data in which
    what tells classes apart is what the views destroy, or with very unequal classes, as all clusters are made equally
    large. A small crop costs (s / S)^2 of an image-sized pass, one such pass with networks of one fixed size that
    cannot be given smaller images (Swin; vision transformers can). `get_preds` gives embeddings, and decodes them to
    the cosine of the large crops.
    """

    name = "swav"
    collapse_hint = (
        "one embedding for all images. Balanced codes should keep that from happening: lower epsilon, take fewer "
        "prototypes, or a lower rate."
    )
    paper = "Caron et al. 2020"
    recipes = (SWAV_GLOBAL, SWAV_GLOBAL)
    small = SWAV_LOCAL
    accumulates = False

    def __init__(
        self,
        n_small: int = 6,  # Small crops of each image; 0: none
        border: float = 0.14,  # Share of the area: large crops have more, small ones less
        prototypes: int | None = None,  # None: by the number of images; the paper's: 3000
        queue: int | None = None,  # Embeddings kept of each large crop; None: as needed; 0: none; the paper's: 3840
        queue_epochs: int = 15,  # Epochs before the queue is used; of short runs 15 %
        frozen_epochs: int = 1,  # Epochs in which prototypes stay as they are; of short runs a tenth
        temperature: float = 0.1,  # Of the predictions
        epsilon: float = 0.05,  # Of the codes; higher: softer
        rounds: int = 3,  # Of balancing
        dim: int = 128,  # Width of the embeddings
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5}
    ):
        if prototypes is not None:
            check_number("prototypes", prototypes, 2, whole=True)
        if queue is not None:
            check_number("queue", queue, 0, whole=True)
        check_number("queue_epochs", queue_epochs, 0, whole=True)
        check_number("frozen_epochs", frozen_epochs, 0, whole=True)
        check_number("temperature", temperature, above=0)
        check_number("epsilon", epsilon, 0.03)  # below, e^(-2 / epsilon) is 0 in float32
        check_number("rounds", rounds, 1, whole=True)
        check_number("dim", dim, 1, whole=True)
        self.keep_crops(n_small, border, views)
        self.prototypes, self.queue = prototypes, queue
        self.queue_epochs, self.frozen_epochs = queue_epochs, frozen_epochs
        self.temperature, self.epsilon, self.rounds, self.dim = temperature, epsilon, rounds, dim
        self.n_prototypes, self.n_queued = prototypes or MOST, queue or 0  # the data's, known after `setup`

    def setup(self, dls, encoder):
        super().setup(dls, encoder)
        images, batch = len(dls.train_ds), dls.train.bs * n_processes()
        if self.prototypes is None:
            self.n_prototypes = min(MOST, max(LEAST, images // 10))
        if self.queue is None:
            missing = -(-max(0, self.n_prototypes - batch) // batch)  # batches, rounded up
            self.n_queued = min(missing, images // (2 * batch)) * batch
        queued = f"a queue of {self.n_queued:,} embeddings" if self.n_queued else "no queue"
        say(f"swav: {self.n_prototypes:,} prototypes for {images:,} images, {queued} beside batches of {batch}.")

    def model(self, encoder):
        return SwAVNet(encoder, self)

    def loss(self, pred, target, reduction="mean"):
        _, cosines, codes = pred
        return crop_cross_entropy(codes, cosines / self.temperature, reduction)

    def callbacks(self):
        return [SetClocks(), TendPrototypes(), KeepMemories()]


class SwAVNet(nn.Module):
    """Large and small crops -> (embeddings, cosines with the prototypes, codes of the large crops)."""

    def __init__(self, encoder: Encoder, task: SwAV):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, encoder.num_features, task.dim, batchnorm=True)
        self.prototypes = Prototypes(task.dim, task.n_prototypes, task.frozen_epochs, unit=True)
        self.queues = nn.ModuleList([FeatureQueue(task.n_queued, task.dim) for _ in range(2 if task.n_queued else 0)])
        self.clock, self.queue_epochs = Clock(), task.queue_epochs
        self.epsilon, self.rounds = task.epsilon, task.rounds

    def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = each_crop(self.encoder, large, small)  # (B, V, C)
        z = F.normalize(self.projector(features.flatten(0, 1)), dim=-1).unflatten(0, features.shape[:2])
        cosines = self.prototypes(z)
        codes = torch.stack([self.codes(cosines[:, crop], crop) for crop in range(2)], 1)
        for queue, entering in zip(self.queues, z.unbind(1)):
            queue.note(entering)
        return z, cosines, codes

    @torch.no_grad()
    def codes(self, cosines: Tensor, crop: int) -> Tensor:
        """(B, K) of one of the large crops, balanced together with its queue where that is in use."""
        rows = len(cosines)
        if self.queues and self.clock.past(self.queue_epochs, QUEUED_FROM) and self.queues[crop].settled():
            earlier = self.prototypes(own_share(self.queues[crop].rows))
            cosines = torch.cat([cosines, earlier.to(cosines.dtype)])
        return sinkhorn(cosines, self.epsilon, self.rounds)[:rows]


@torch.no_grad()
def sinkhorn(
    cosines: Tensor,  # (N, K) of embeddings with prototypes; with several processes each has rows of its own
    epsilon: float,
    rounds: int,
) -> Tensor:  # (N, K), rows sum to 1
    """Codes near to the softmax of cosines / epsilon that use all prototypes equally, after a few rounds of balancing.

    In float32 at least. As in the authors' code each round makes the sums of the prototypes equal, then those of the
    rows.
    """
    with torch.autocast(cosines.device.type, enabled=False):
        cosines = cosines.to(torch.promote_types(cosines.dtype, torch.float32))
        codes = ((cosines - 1) / epsilon).exp()
        for _ in range(rounds):
            codes = codes / summed(codes.sum(0))
            codes = codes / codes.sum(1, keepdim=True)
    return codes
