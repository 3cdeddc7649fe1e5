"""DINO."""

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from selfsup_fastai.callbacks.clock import SetClocks
from selfsup_fastai.callbacks.ema import EMATeacher
from selfsup_fastai.callbacks.memories import KeepMemories
from selfsup_fastai.callbacks.prototypes import TendPrototypes
from selfsup_fastai.checks import check_flag, check_number
from selfsup_fastai.data.recipes import DINO_GLOBAL_1, DINO_GLOBAL_2, DINO_LOCAL
from selfsup_fastai.encoders.clock import Clock
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.heads import draw_small_weights, mlp
from selfsup_fastai.encoders.memories import Memory
from selfsup_fastai.encoders.prototypes import Prototypes
from selfsup_fastai.encoders.teacher import Teacher
from selfsup_fastai.losses import crop_cross_entropy
from selfsup_fastai.pretext.joint import MultiCropTask, each_crop


class DINO(MultiCropTask):
    """What does a teacher, an average of the network itself, see in another crop of this image?

    Caron, Touvron, Misra, Jégou, Mairal, Bojanowski & Joulin, Emerging Properties in Self-Supervised Vision
    Transformers, 2021 (arXiv 2104.14294). The teacher is given the large crops and sorts them softly into classes of
    its own making; the student, given any other crop, large or small, must sort it likewise. The teacher's encoder is
    what is saved.

    In: two large crops of each image, (B, 2, C, S, S), of more than 40 % of its area, and small ones of less, (B,
    n_small, C, s, s); blur 1 and .1, solarize 0 and .2 on the large ones. Target: the image's row, (B,). Prediction: of
    all crops the student's embeddings of length 1, (B, 2 + n_small, dim), and logits, (B, 2 + n_small, prototypes); and
    the teacher's probabilities of the large ones, (B, 2, prototypes): softmax((logits - center) / its temperature).
    Loss: cross-entropy of these and the student's, the mean over the pairs of a large crop and another one. Metrics:
    `found_pair` on the large crops, and `clusters`, the number of groups that the teacher sorts images into: 1 when all
    has collapsed, to one class or to all of them equally.

    The center is a running average of the teacher's logits, of all processes, that changes after the step. The teacher
    follows the student's weights, with a momentum that rises along half a cosine to 1 from a start for the run's length
    (the paper's .996 is for 100 epochs of ImageNet and more). Its temperature stays at .04, the default of the authors'
    code, or rises in the first 30 % of a run (theirs: in 30 epochs of 100 to 800). The last layer, whose rows count by
    direction only, stays as it is in the first epoch (ours: in the first tenth of runs of less than ten). Where the
    student's network drops paths (`arch=create_encoder('vit_small_patch16_224', size=64, patch_size=8,
    drop_path_rate=0.1)`, as the authors'), the teacher's does not.

    Small data: 1,024 prototypes and a head 1,024 wide (the paper's: 65,536 and 2,048) that normalizes by batches (an
    option of the authors' code, off there): the features of a fresh network are so alike that without it runs of a few
    hundred steps ended with all classes equally likely, of a convnet and of a vision transformer. For their ViTs the
    authors use AdamW with weight decay that rises from .04 to .4, and clip each gradient at a norm of 3; with fastai
    that is `cbs=[ParamScheduler({'wd': SchedCos(0.04, 0.4)}), GradientClip(3.0)]`, clipped all together. For ResNets
    they use SGD, decay 1e-4 and `border=0.14`.

    Guards against one answer for everything: centering alone would make all classes equally likely, a low temperature
    alone would leave one; together they hold each other. Against answers without understanding: color jitter, grey,
    solarize and blur (from 64 pixels a side on, so rarely on small crops).

    Suits vision transformers above all, convnets too, batches of any size (accumulated gradients are exact but for
    batch norms). Does not suit data in which what tells classes apart is what the views destroy, nor runs of a few
    hundred steps. A small crop costs (s / S)^2 of an image-sized pass, one such pass with networks of one fixed size
    that cannot be given smaller images (Swin; vision transformers can); the teacher costs two more. `get_preds` gives
    embeddings, and decodes them to the cosine of the large crops.
    """

    name = "dino"
    collapse_hint = (
        "one answer for all images. Centering and the teacher's low temperature hold each other: lower "
        "teacher_temperature if all prototypes are equally likely, lower center_momentum if one takes all; or the rate "
        "is too high."
    )
    paper = "Caron et al. 2021"
    scaled = (("prototypes", "65,536"), ("hidden", "2,048"))
    recipes = (DINO_GLOBAL_1, DINO_GLOBAL_2)
    small = DINO_LOCAL
    further = 2
    tells_apart = False

    def __init__(
        self,
        n_small: int = 8,  # Small crops of each image; 0: none
        border: float = 0.4,  # Share of the area: large crops have more, small ones less; the paper's ResNets: 0.14
        prototypes: int = 1024,  # Classes; the paper's: 65,536
        frozen_epochs: int = 1,  # Epochs in which the last layer stays as it is; of short runs a tenth
        temperature: float = 0.1,  # The student's
        teacher_temperature: float = 0.04,  # The teacher's, in the end; in the paper's long runs: 0.07
        first_temperature: float = 0.04,  # The teacher's, at first; lower where the loss does not fall
        warm_up: float = 0.3,  # Share of the run in which the teacher's temperature rises
        momentum: float | None = None,  # The teacher's, at first; None: by the number of steps; the paper's: 0.996
        center_momentum: float = 0.9,  # Of the center
        batchnorm: bool = True,  # In the head; the paper's: False
        hidden: int = 1024,  # Width of the head's hidden layers; the paper's: 2048
        dim: int = 256,  # Width of the embeddings
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5}
    ):
        check_number("prototypes", prototypes, 2, whole=True)
        check_number("frozen_epochs", frozen_epochs, 0, whole=True)
        check_number("temperature", temperature, above=0)
        check_number("teacher_temperature", teacher_temperature, above=0)
        check_number("first_temperature", first_temperature, above=0)
        check_number("warm_up", warm_up, 0, 1)
        if momentum is not None:
            check_number("momentum", momentum, 0, 1)
        check_number("center_momentum", center_momentum, 0, below=1)
        check_flag("batchnorm", batchnorm)
        check_number("hidden", hidden, 1, whole=True)
        check_number("dim", dim, 1, whole=True)
        self.keep_crops(n_small, border, views)
        self.prototypes, self.frozen_epochs, self.temperature = prototypes, frozen_epochs, temperature
        self.teacher_temperature, self.first_temperature = teacher_temperature, first_temperature
        self.warm_up, self.momentum, self.center_momentum = warm_up, momentum, center_momentum
        self.batchnorm, self.hidden, self.dim = batchnorm, hidden, dim

    def model(self, encoder):
        return DINONet(encoder, self)

    def sharpness(self, share: float) -> float:
        """The teacher's temperature when this share of the run is over."""
        risen = min(1.0, share / self.warm_up) if self.warm_up else 1.0
        return self.first_temperature + risen * (self.teacher_temperature - self.first_temperature)

    def loss(self, pred, target, reduction="mean"):
        _, logits, codes = pred
        return crop_cross_entropy(codes, logits / self.temperature, reduction)

    def callbacks(self):
        return [SetClocks(), TendPrototypes(), EMATeacher(self.momentum), KeepMemories()]

    def product(self, model):
        """The teacher's encoder."""
        return model.teacher.net.encoder


class Sorter(nn.Module):
    """Encoder, head and prototypes: crops of two sizes -> embeddings (B, V, dim) of length 1 and logits (B, V, K)."""

    def __init__(self, encoder: Encoder, task: DINO):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, task.hidden, task.dim, 3, task.batchnorm, gelu=True)
        self.projector.apply(draw_small_weights)
        self.prototypes = Prototypes(task.dim, task.prototypes, task.frozen_epochs, unit=False)

    def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
        features = each_crop(self.encoder, large, small)
        z = F.normalize(self.projector(features.flatten(0, 1)), dim=-1).unflatten(0, features.shape[:2])
        return z, self.prototypes(z)


class DINONet(nn.Module):
    """Large and small crops -> (the student's embeddings, its logits, the teacher's probabilities of the large)."""

    def __init__(self, encoder: Encoder, task: DINO):
        super().__init__()
        self.student = Sorter(encoder, task)
        self.teacher = Teacher(self.student)
        for module in self.teacher.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        self.center, self.clock = Center(task.prototypes, task.center_momentum), Clock()
        self.temperature = task.sharpness

    @property
    def encoder(self) -> Encoder:
        """The student's, which is trained."""
        return self.student.encoder

    def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, logits = self.student(large, small)
        _, seen = self.teacher(large, small[:, :0])
        self.center.note(seen.mean(1))
        return z, logits, self.center.codes(seen, self.temperature(self.clock.share))


class Center(Memory):
    """A running average of the teacher's logits, (K,)."""

    def __init__(self, n: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(n))

    def codes(self, logits: Tensor, temperature: float) -> Tensor:
        """The teacher's probabilities, in float32 at least."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return ((logits - self.mean) / temperature).softmax(-1)

    def remember(self, logits: Tensor) -> None:
        self.mean.lerp_(logits.mean(0).to(self.mean.dtype), 1 - self.momentum)
