"""Spotting artifacts."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.callbacks.rates import GameSteps
from selfsup_fastai.callbacks.train_first import TrainFirst
from selfsup_fastai.checks import check_number
from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.data.views import random_view
from selfsup_fastai.encoders.decoders import group_norm
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.frozen import TrainedFirst, as_it_stands
from selfsup_fastai.encoders.inputs import standardized
from selfsup_fastai.metrics import share
from selfsup_fastai.pictures import draw_rows, see_through
from selfsup_fastai.pretext.base import PretextTask, per_image
from selfsup_fastai.transfer import constant

CELL = 16  # Pixels a side of what one place of the autoencoder's code stands for: four convolutions of stride 2
LEAK = 0.1  # Slope of the leaky ReLUs below 0, as in the authors' code
ERROR, REAL, KEPT, RIVAL = -4, -3, -2, -1  # Planes of a prediction behind its pixels


def cells_told(pred: Tensor, genuine: Tensor) -> tuple[Tensor, Tensor]:
    """Of all pairs of a kept and a repaired cell of one repaired picture those in which the kept one is believed to be
    more genuine (as much: half a pair), and all pairs."""
    believed = F.avg_pool2d(pred[:, 1, KEPT].float(), CELL).flatten(1)
    kept = genuine[:, 1].flatten(1) > 0
    pairs = kept.unsqueeze(2) & ~kept.unsqueeze(1)  # (B, cells, cells): kept, repaired
    told = (believed.unsqueeze(2) - believed.unsqueeze(1)).sign() / 2 + 0.5
    return (told * pairs).sum(), pairs.sum()


def spotted(pred: Tensor, genuine: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (a decoded and a repaired one of each image) that are rightly called real or repaired, and all."""
    right = (pred[:, :, REAL, 0, 0] > 0) == constant((True, False), torch.bool, pred.device)
    return right.sum(), torch.tensor(right.numel())


class SpotArtifacts(PretextTask):
    """Is this picture intact or was it damaged and repaired, and where?

    Jenni & Favaro, Self-Supervised Feature Learning by Learning to Spot Artifacts, 2018 (arXiv 1806.05024). An
    autoencoder is trained on the images first and then frozen. Of its code for an image 70 % of the cells are dropped,
    and small repair layers between the decoder's layers fill them in as well as they can. A discriminator tells the
    decoded from the repaired picture and says which cells are genuine: what gives a repair away, once it is good, is
    that parts do not go together. The discriminator is the encoder that is kept.

    In: a crop of a third to all of each image, mirrored at random, brought to a multiple of 16 pixels (in training
    brightness and saturation are changed, too), (B, C, S, S) in [0, 1]; and the cells that are kept, at least one and
    never all, (B, 1, S/16, S/16). Neither is touched by Normalize: the encoder's mean and deviation are taken out of
    what it is shown, in the model. Target: the cells that are genuine in each of the two pictures, all of the decoded
    one, (B, 2, S/16, S/16). Prediction: the decoded and the repaired picture of each image, (B, 2, C + 4, S, S): pixels
    in [0, 1], then as planes their squared distance to the photo, whether the picture is real, where cells were kept,
    and whether it is real as the rival sees it: logits, from `get_preds` probabilities.

    Loss: the sum of what both players pay. Discriminator: cross-entropy of real or repaired + 0.1 * cross-entropy of
    the cells. Repair layers: cross-entropy with the labels swapped + 30 * squared error to the photo, with pixels in
    -1..1, at the kept cells. One backward pass trains both. The mean over kept pixels is taken image by image; the code
    takes it over the batch.

    What the numbers mean. `cells_told`: of pairs of a kept and a repaired cell of one picture the share in which the
    kept one is believed to be more genuine; guessing is 50 %. The repair layers do not play against this question, so
    it tells whether something is learned. `spotted`: the share of pictures rightly called real or repaired, a phase of
    the game between two players: near 50 % at balance however much both have learned, above it while the discriminator
    is ahead, below it where the repair layers are. The loss mixes what pulls in opposite directions; it need not fall.

    Guards against answers without understanding: what counts as real is the autoencoder's picture, not the photo, so
    that its blur says nothing. The border between kept and repaired cells may show; the repair layers are there to hide
    it, and do so only as well as they are trained.

    Differences to the authors' code: it has AlexNet with 4096 hidden units over the whole last map, here the verdict
    comes from the pooled map of any network that has one (what lies behind the map is not trained); where that map is
    coarser or finer than the cells, they are compared pixel by pixel. The code trains both players with Adam, first
    beta 0.5, from 3e-4 on; at ten times that, or with more momentum, the game swings. So steps are taken at `rate`
    times the learner's and with `momentum`, whatever its schedule says. The repair layers have group norms, not batch
    norms: what they make in validation is what the discriminator was trained on. The autoencoder is trained for 30
    epochs, not for 500 (of 105,000 images). Crops are resized one way, not bilinearly or bicubically at random, and
    brightness is a factor.

    Cost: the discriminator sees four pictures for each image, because the rival needs it a second time without training
    it. Decoders and repair layers come on top, at the paper's width about 2.3 G multiplications for 96 pixels, more
    than ResNet-18 takes for 224; `width=16` costs a quarter. All of it is thrown away in the end.

    Suits photographs of single things, of 64 pixels or more, by the thousand. Does not suit textures, where a repair
    is as good as what it replaces, nor images of less than 48 pixels: they have hardly any cells. An encoder with a
    map of its own for each 16 pixels (a ViT, or the paper's net) sees where the cells are; ResNets see it twice as
    coarsely.
    """

    name = "spot_artifacts"
    paper = "Jenni & Favaro 2018"
    by_map = True
    n_inp = 2
    normalized = (False, False)
    alone = "it trains an autoencoder first, and then two networks against each other."
    min_side = CELL + 1  # two cells
    passes = 4  # Decoded and repaired, for the discriminator and for its rival
    metrics = (share("cells_told", cells_told), share("spotted", spotted))

    def __init__(
        self,
        autoencoder_epochs: int = 30,  # Of the first stage; the paper's are 500
        keep: float = 0.3,  # Probability of a cell to be kept
        width: int = 32,  # Channels at full size, 16 times as many in the code; the paper's are 32
        mask_weight: float = 0.1,  # Of the question which cells are genuine
        kept_weight: float = 30.0,  # Of the error at kept cells, which the repair must leave as they are
        crop: float = 1 / 3,  # Smallest share of the image's area in a training picture; 1: no crops
        flip: float = 0.5,  # Probability of a mirror image; 0 where left and right matter
        color: float = 1.0,  # Strength of the changes of brightness and saturation; 0: none
        rate: float = 0.1,  # Both players' learning rate, times the learner's: its usual 3e-3 becomes the paper's 3e-4
        momentum: float = 0.5,  # Adam's first beta for both players, whatever the schedule says
    ):
        check_number("autoencoder_epochs", autoencoder_epochs, 1, whole=True)
        check_number("keep", keep, above=0, below=1)
        check_number("width", width, 1, whole=True)
        check_number("mask_weight", mask_weight, 0)
        check_number("kept_weight", kept_weight, 0)
        check_number("crop", crop, above=0, most=1)
        check_number("flip", flip, 0, 1)
        check_number("color", color, 0, 2)
        check_number("rate", rate, above=0)
        check_number("momentum", momentum, 0, below=1)
        self.autoencoder_epochs, self.keep, self.width = autoencoder_epochs, keep, width
        self.mask_weight, self.kept_weight = mask_weight, kept_weight
        self.crop, self.flip, self.color = crop, flip, color
        self.rate, self.momentum = rate, momentum

    def make_batch(self, x, *, generator, train, idx=None):
        cells = math.ceil(min(x.shape[-2:]) / CELL)
        x = random_view(x, self.recipe if train else replace(self.recipe, jitter_p=0.0), generator, cells * CELL)
        kept = self.draw(len(x), cells, generator).to(x.dtype)
        return (x, kept), (torch.cat([torch.ones_like(kept), kept], 1),)

    def draw(self, n: int, cells: int, generator: torch.Generator) -> Tensor:
        """Which cells of `n` images are kept, (n, 1, cells, cells) of bool: each by itself, but one at least and never
        all."""
        noise = torch.rand(n, 1, cells, cells, generator=generator, device=generator.device)
        least, most = noise.amin((2, 3), keepdim=True), noise.amax((2, 3), keepdim=True)
        return ((noise < self.keep) | (noise == least)) & (noise != most)

    @property
    def recipe(self) -> Recipe:
        """How training pictures are cut and colored."""
        ratio = (3 / 4, 4 / 3) if self.crop < 1 else (1.0, 1.0)
        colors = {"brightness": 32 / 255 * self.color, "saturation": 0.5 * self.color, "jitter_p": 1.0}
        return Recipe(scale=(self.crop, 1.0), ratio=ratio, flip=self.flip, grey_p=0.0, **colors)

    def callbacks(self):
        return [TrainFirst(self.autoencoder_epochs, step_size=3e-4, momentum=0.5), GameSteps(self.rate, self.momentum)]

    def model(self, encoder):
        return SpotNet(encoder, self.width)

    def loss(self, pred, kept, reduction="mean"):
        pred, is_real = pred.float(), constant((1.0, 0.0), torch.float32, pred.device).expand(len(pred), 2)
        verdict = _cross_entropy(pred[:, :, REAL, 0, 0], is_real).mean(1)
        everywhere = F.interpolate(kept, scale_factor=CELL)  # (B, 2, S, S)
        where = _cross_entropy(pred[:, :, KEPT], everywhere).mean((1, 2, 3))
        fooled = _cross_entropy(pred[:, :, RIVAL, 0, 0], 1 - is_real).mean(1)
        at = everywhere[:, 1]  # in the repaired picture
        error = (pred[:, 1, ERROR] * at).sum((1, 2)) / at.sum((1, 2)).clamp(min=1)
        return per_image(verdict + self.mask_weight * where + fooled + self.kept_weight * error, reduction)

    def activation(self, pred):
        return torch.cat([pred[:, :, :REAL], pred[:, :, REAL:].sigmoid()], 2)

    def decode(self, pred):
        return pred

    def chance(self):
        return 0.5

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """The photo, and what is kept of it; after training what is kept, the decoded and the repaired picture, and
        where the network finds that the latter was repaired. The title has both verdicts."""
        photos, kept = inputs[0][:max_n], F.interpolate(inputs[1][:max_n], scale_factor=CELL)
        left = see_through(photos, kept < 0.5)
        if pred is None:
            titles = [f"photo | kept, {share:.0%}" for share in kept.mean((1, 2, 3))]
            return draw_rows(list(zip(photos, left)), titles, ctxs, figsize)
        pred = pred[: len(photos)].float()
        decoded, repaired = pred[:, :, :ERROR].unbind(1)
        found = see_through(repaired, pred[:, 1:, KEPT] < 0.5)
        verdicts = pred[:, :, REAL, 0, 0] > 0.5
        said = [["real" if real else "repaired" for real in both] for both in verdicts.tolist()]
        titles = [f"kept | decoded, called {a} | repaired, called {b} | found" for a, b in said]
        right = [both == ["real", "repaired"] for both in said]
        return draw_rows(list(zip(left, decoded, repaired, found)), titles, ctxs, figsize, right)


class SpotNet(nn.Module):
    """The autoencoder, the repair layers and the judge: (B, C, S, S) and cells -> (B, 2, C + 4, S, S)."""

    def __init__(self, encoder: Encoder, width: int):
        super().__init__()
        self.autoencoder = Autoencoder(encoder.in_chans, width)
        self.repairs = nn.ModuleList(Repair(n) for n in reversed(self.autoencoder.widths))
        self.judge = Judge(encoder)

    @property
    def encoder(self) -> Encoder:
        return self.judge.encoder

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        code = self.autoencoder.encode(x)
        pictures = torch.stack([self.autoencoder.decode(code), self.repaired(code, kept)], 1)  # (B, 2, C, S, S)
        real, where = self.judge(pictures.detach())
        rival = as_it_stands(self.judge, pictures)[0] if torch.is_grad_enabled() else real
        error = (2 * (pictures - x.unsqueeze(1))).square().mean(2)  # with pixels in -1..1
        planes = torch.stack([error, real.expand_as(where), where, rival.expand_as(where)], 2)
        return torch.cat([pictures, planes], 2)

    def repaired(self, code: Tensor, kept: Tensor) -> Tensor:
        """The picture that is decoded of the kept cells (B, 1, h, w) alone."""
        x = dropped(code, kept)
        for repair, layer in zip(self.repairs, self.autoencoder.decoder):
            x = layer(repair(x, F.interpolate(kept, x.shape[-2:])))
        return to_pixels(x)


class Autoencoder(TrainedFirst):
    """Pictures (B, C, S, S) in [0, 1] to a code (B, 16 * width, S/16, S/16) and back."""

    what = "autoencoder"

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.widths = [width * 2**i for i in range(5)]  # Of the maps, full size first
        pairs = list(zip(self.widths, self.widths[1:]))
        self.encoder = nn.Sequential(_conv(channels, width, 3), *(_conv(n, m, 2, stride=2) for n, m in pairs))
        ups = [nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), _conv(m, n, 3)) for n, m in reversed(pairs)]
        self.decoder = nn.Sequential(*ups, nn.Conv2d(width, channels, 3, padding=1))
        self.freeze()

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(2 * x - 1)

    def decode(self, code: Tensor) -> Tensor:
        return to_pixels(self.decoder(code))

    def own_loss(self, x, kept):
        return 30 * F.mse_loss(2 * self.decode(self.encode(x)) - 1, 2 * x - 1)


class Repair(nn.Module):
    """Two convolutions that see which cells are kept, (B, 1, h, w), and change the others only.

    Without batch norm: the judge is asked in validation about what it was trained on, and repairs made with running
    averages look different from those made with a batch's own.
    """

    def __init__(self, channels: int):
        super().__init__()
        first = nn.Conv2d(channels + 1, channels, 3, padding=1, bias=False)
        self.layers = nn.Sequential(
            first, group_norm(channels), nn.LeakyReLU(LEAK), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        return x + (1 - kept) * self.layers(torch.cat([x, kept], 1))


class Judge(nn.Module):
    """The encoder that is kept, asked about pictures (B, 2, C, S, S): real? (B, 2, 1, 1), kept where? (B, 2, S, S)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        channels = encoder.map_shape((64, 64))[0]
        self.encoder = encoder
        self.real = nn.Linear(channels, 1)
        self.kept = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        b, size = pictures.shape[:2], pictures.shape[-2:]
        x = standardized(pictures.flatten(0, 1), self.encoder.mean, self.encoder.std)
        x = self.encoder.feature_map(x)
        where = F.interpolate(self.kept(x), size, mode="nearest-exact")
        return self.real(x.mean((2, 3))).view(*b, 1, 1), where.view(*b, *size)


def dropped(
    code: Tensor,  # (B, C, h, w)
    kept: Tensor,  # (B, 1, h, w), 1 for cells that stay
) -> Tensor:
    """Cells that are not kept become the mean of the 3 x 3 cells around them."""
    return kept * code + (1 - kept) * F.avg_pool2d(code, 3, 1, 1, count_include_pad=False)


def to_pixels(x: Tensor) -> Tensor:
    """What the last layer gives, any number, to [0, 1]."""
    return (x.tanh() + 1) / 2


def _conv(n_in: int, n_out: int, side: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, side, stride, padding=side // 2 if stride == 1 else 0, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.LeakyReLU(LEAK))


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
