"""Colorization."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.data.loader import training_images
from selfsup_fastai.data.views import shift_flip_by_share
from selfsup_fastai.encoders import ab_bins
from selfsup_fastai.encoders.decoders import map_decoder
from selfsup_fastai.encoders.inputs import AB_REACH, lab_to_rgb, rgb_to_lab, to_input
from selfsup_fastai.errors import TaskError
from selfsup_fastai.metrics import explained, share
from selfsup_fastai.pictures import draw_rows
from selfsup_fastai.pretext.base import PretextTask, per_image
from selfsup_fastai.pretext.loader import PretextTransform

SMALLER = 4  # The output's side is the image's divided by this
SMOOTHING = 5.0  # Width of the Gaussian that smooths the shares of the colors, in units of Lab
GREY_DATA = "Grey images have no color to predict: take rotation, jigsaw, or split_brain with halves='diagonal'."


class Colorization(PretextTask):
    """Which color has each pixel of this grey picture?

    Zhang, Isola & Efros, Colorful Image Colorization, 2016 (arXiv 1603.08511). To answer, the network must know what
    things are: grass is green, skies are blue, a ball may have any color.

    In: lightness L of each image, one input (B, 1, H, W); the encoder takes one channel, and knows color images by
    their lightness ever after. Target: color, a and b of CIE Lab, at a quarter of the size, (B, 2, H/4, W/4): means
    over 4 x 4 pixels, of which the authors take one. Prediction: logits of 313 colors for each pixel, (B, 313, H/4,
    W/4). Loss: cross-entropy with the color spread over its nearest centers, times a weight that is larger for rare
    colors; mean over the pixels, where the authors' code takes a sum. The code spreads over 10 centers, the paper over
    5; the code puts the weight on the gradient, not on the value. How rare a color is, is measured on at least 1,024
    training images and saved with the model. Images without color (no |a| or |b| above 5) have a loss of 0. `get_preds`
    gives a and b, (B, 2, H/4, W/4): the annealed mean. Metrics, both of images that have color: the share of the
    variance of a and b that is explained by the mean over the predicted colors, 0 for naming one color always (the loss
    makes rare colors more probable than they are; for this metric their weights are divided out again); and the share
    of pixels whose nearest center is named, weighted as in the loss. Ours: the shift and the mirror images, and the
    decoder. The paper's net keeps a map of an eighth of the side by dilation; here the encoder's last map, of an
    ordinary net a thirty-second of the side, is laid out to a quarter.

    `answer='regression'` predicts a and b themselves, (B, 2, H/4, W/4), by half the squared distance (in units of 110).
    The best answer to an ambiguous question is then the mean of the plausible colors, which is grey: the classes are
    there to avoid it.

    Guards against grey answers: rare colors count more, and the mean is taken over probabilities sharpened by a
    temperature of 0.38. Nothing is done against traces that color leaves in the lightness (fringes of the lens, JPEG).

    Suits color photographs. Does not suit grey images (an error says what to take), stains and other false colors, nor
    what comes later when color is what tells its classes apart: the encoder does not see it.
    """

    name = "colorization"
    paper = "Zhang et al. 2016"
    by_map = True
    input = "L"
    channels = (3,)
    instead = GREY_DATA
    min_side = 16

    def __init__(
        self,
        answer: str = "classes",  # 'classes': 313 colors, as in the paper; 'regression': a and b, which goes grey
        neighbors: int = 5,  # Centers that share a color; the paper's 5, in the authors' code 10
        sigma: float = 5.0,  # Width of the Gaussian by which they share it, in units of Lab
        uniform: float = 0.5,  # Mixed into the colors' shares before 1 / share is taken; 1: all colors count the same
        temperature: float = 0.38,  # Of the annealed mean: 1: the mean; towards 0: the likeliest color
        shift: float = 0.125,  # In training, a shift by up to this share of the side; 0: none
        flip: float = 0.5,  # Probability of a mirror image in training
    ):
        check_choice("answer", answer, ("classes", "regression"))
        check_number("neighbors", neighbors, 1, ab_bins.N_BINS, whole=True)
        check_number("sigma", sigma, above=0)
        check_number("uniform", uniform, 0, 1)
        check_number("temperature", temperature, above=0)
        check_number("shift", shift, 0, 0.5)
        check_number("flip", flip, 0, 1)
        self.answer, self.neighbors, self.sigma, self.uniform = answer, neighbors, sigma, uniform
        self.temperature, self.shift, self.flip = temperature, shift, flip
        if answer == "regression":
            self.check_idle("answer='regression'", "neighbors", "sigma", "uniform", "temperature")
        self.rarity = Rarity()

    def setup(self, dls, encoder):
        """Counts the colors of training images."""
        counts = torch.zeros(ab_bins.N_BINS, dtype=torch.float64)
        for x in training_images(dls, drop=(PretextTransform,)):
            ab = self.color_of(x)
            counts += nearest_of_colored(ab).cpu().bincount(minlength=ab_bins.N_BINS)
        if not counts.sum():
            raise TaskError(f"colorization found no color in the training images. {GREY_DATA}")
        self.rarity = Rarity(counts, 1.0 if self.answer == "regression" else self.uniform)

    def make_batch(self, x, *, generator, train, idx=None):
        if train:
            x = shift_flip_by_share(x, generator, self.shift, self.flip)
        return (to_input(x, "L"),), (self.color_of(x),)

    def color_of(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> a and b at a quarter of the size, (B, 2, H/4, W/4): means over 4 x 4 pixels."""
        return F.adaptive_avg_pool2d(rgb_to_lab(x)[:, 1:], _smaller(x.shape[-2:]))

    def model(self, encoder):
        return ColorNet(encoder, self.rarity, ab_bins.N_BINS if self.answer == "classes" else 2)

    def loss(self, pred, target, reduction="mean"):
        if self.answer == "regression":
            losses = (pred - target / AB_REACH).square().sum(1) / 2
        else:
            weights, bins = ab_bins.soft_bins(target, self.neighbors, self.sigma)
            losses = self.rarity(bins[:, 0]) * ab_bins.soft_cross_entropy(pred, weights, bins)
        return per_image(losses.flatten(1).mean(1) * ab_bins.has_color(target), reduction)

    @property
    def metrics(self):
        return (explained("ab_explained", self.mean_colors), share("bin_accuracy", self.right_pixels))

    def mean_colors(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of the colors that are held possible, the truth, and that pixels of images with color count.

        The loss makes rare colors more probable by their weights; divided by these they are as probable as they are.
        """
        if self.answer == "regression":
            mean = pred * AB_REACH
        else:
            rarity = self.rarity.weights.view(1, -1, 1, 1)
            mean = ab_bins.mean_color((pred.float() - rarity.log()).softmax(1))
        return mean, target, ab_bins.has_color(target).view(-1, 1, 1, 1)

    def right_pixels(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """How many pixels, in images that have color, whose nearest center is named; of how many. Weighted as in the
        loss."""
        truth = ab_bins.nearest_bins(target)
        named = pred.argmax(1) if self.answer == "classes" else ab_bins.nearest_bins(pred * AB_REACH)
        weights = self.rarity(truth) * ab_bins.has_color(target).view(-1, 1, 1)
        return (weights * (named == truth)).sum(), weights.expand_as(truth).sum()

    def chance(self):
        return 0.0

    def activation(self, pred):
        """a and b, (B, 2, h, w)."""
        return pred * AB_REACH if self.answer == "regression" else annealed_mean(pred, self.temperature)

    def decode(self, pred):
        return pred

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """Grey picture and true colors; after training, the network's colors between the two."""
        colors = [targets[0]] if pred is None else [pred, targets[0]]
        title = "grey | true colors" if pred is None else "grey | network | true"
        lightness = inputs[0][:max_n]
        n = len(lightness)
        pictures = [lightness.expand(-1, 3, -1, -1), *(colored(lightness, ab[:n]) for ab in colors)]
        return draw_rows(list(zip(*pictures)), [title] * n, ctxs, figsize)


class Rarity(nn.Module):
    """How much each color counts, the more the rarer it is; until something was counted, all count the same."""

    def __init__(
        self,
        counts: Tensor | None = None,  # Pixels of each color, (313,)
        uniform: float = 1.0,  # How much of a uniform distribution is mixed in
    ):
        super().__init__()
        counts = torch.zeros(ab_bins.N_BINS) if counts is None else counts
        shares = counts.double() / counts.sum().clamp(min=1)
        self.register_buffer("weights", _weights(shares, uniform).float() if counts.sum() else torch.ones(len(counts)))

    def forward(self, bins: Tensor) -> Tensor:
        """Bins of any shape -> their weights; 1 on average over the (smoothed) colors of training images."""
        return self.weights[bins]


def _weights(shares: Tensor, uniform: float) -> Tensor:
    """w ~ 1 / ((1 - uniform) p + uniform / Q), p the smoothed shares, Q the colors that occur, so that w is 1 on
    average over p.

    Colors that do not occur count as much as the one that counts most: their p is 0, or nothing but the smoothing.
    """
    centers = ab_bins.ab_centers().double()
    spread = (-torch.cdist(centers, centers).square() / (2 * SMOOTHING**2)).exp()
    smooth = spread / spread.sum(0) @ shares
    occurs = shares > 0
    weights = 1 / ((1 - uniform) * smooth + uniform / occurs.sum())
    weights = torch.where(occurs, weights, weights[occurs].max())
    return weights * smooth[occurs].sum() / (smooth * weights)[occurs].sum()


class ColorNet(nn.Module):
    """Encoder and decoder: lightness (B, 1, H, W) -> (B, n_out, H/4, W/4). Keeps how rare each color is."""

    def __init__(self, encoder: nn.Module, rarity: Rarity, n_out: int):
        super().__init__()
        image = (encoder.side, encoder.side)
        self.encoder, self.rarity = encoder, rarity
        self.decoder = map_decoder(encoder, n_out, image, _smaller(image), last=64)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder.feature_map(x), _smaller(x.shape[-2:]))


def annealed_mean(logits: Tensor, temperature: float) -> Tensor:
    """(B, 313, h, w) -> a and b, (B, 2, h, w): the mean of probabilities that were sharpened (temperature below 1)."""
    return ab_bins.mean_color((logits.float() / temperature).softmax(1))


def nearest_of_colored(ab: Tensor) -> Tensor:
    """(B, 2, h, w) -> the nearest centers of all pixels of the images that have color, (n,)."""
    return ab_bins.nearest_bins(ab[ab_bins.has_color(ab) > 0]).flatten()


def colored(lightness: Tensor, ab: Tensor) -> Tensor:
    """Lightness (B, 1, H, W) in [0, 1] and colors (B, 2, h, w) -> images (B, 3, H, W)."""
    ab = F.interpolate(ab.float(), lightness.shape[-2:], mode="bilinear", align_corners=False)
    return lab_to_rgb(torch.cat([100 * lightness, ab], 1))


def _smaller(size: tuple[int, int]) -> tuple[int, int]:
    return max(1, size[0] // SMALLER), max(1, size[1] // SMALLER)
