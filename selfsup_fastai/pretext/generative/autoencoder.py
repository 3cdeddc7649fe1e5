"""Autoencoder, plain and denoising."""

import torch
from torch import Tensor
from torch.nn import functional as F

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.encoders.decoders import PerPixel
from selfsup_fastai.pretext.base import RestoringTask, per_image

ERRORS = ("cross_entropy", "squared")


class Autoencoder(RestoringTask):
    """What was the image before a share of its pixels went black, told from the few numbers of the encoder's last map?

    Vincent, Larochelle, Bengio & Manzagol, Extracting and Composing Robust Features with Denoising Autoencoders, 2008
    (doi 10.1145/1390156.1390294; the authors' code was not looked at). The encoder must press the image into a small
    map, from which a decoder, thrown away afterwards, paints it again.

    In: the image, (B, C, H, W) in [0, 1], in which exactly a share `denoise` of the pixels, drawn anew at each visit,
    is set to 0 (masking noise). Target: the image without the noise, (B, C, H, W). Prediction: images (B, C, H, W),
    logits until `activation` makes them 0..1. Loss: the paper's cross-entropy of intensities taken for probabilities,
    averaged over the numbers of an image where the paper sums them (its least value is not 0 but the entropy of the
    intensities); or the squared error. Metric: the share of variance explained, 0 for painting the mean color.
    Ours: all channels of a pixel go together, or the others would tell the lost one; one deep network instead of
    layers trained one after the other; a decoder without tied weights.

    Guards against copying without understanding: the noise, which forces the network to complete what is missing from
    what is around it, and the narrow last map, the only way from encoder to decoder. A network whose last map has as
    many numbers as the image needs no understanding at all when `denoise` is 0.

    Suits small, aligned, simple images (digits, cells, spectrograms), in which most of what varies matters, and is
    the cheapest baseline. Does not suit photographs of things much: large areas and brightness count most in the loss,
    while what names a thing may be a few pixels. With `denoise` 0 it keeps everything, noise of the camera included:
    right for compression and for finding odd images, poor for features. A denoiser is trained to throw away what cannot
    be foretold from its surroundings: poor where that is the finding (dust-sized lesions, stars, fine texture).
    """

    name = "autoencoder"
    paper = "Vincent et al. 2008"
    by_map = True

    def __init__(
        self,
        denoise: float = 0.25,  # Share of the pixels set to 0 (paper: 0.1, 0.25 or 0.4 by data); 0: plain autoencoder
        error: str = "cross_entropy",  # The paper's; or 'squared'
    ):
        check_number("denoise", denoise, 0, below=1)
        check_choice("error", error, ERRORS)
        self.denoise, self.error = denoise, error

    def make_batch(self, x, *, generator, train, idx=None):
        return (masked(x, self.denoise, generator),), (x,)

    def model(self, encoder):
        return PerPixel(encoder, encoder.in_chans)

    def loss(self, pred, target, reduction="mean"):
        if self.error == "cross_entropy":
            return per_image(F.binary_cross_entropy_with_logits(pred, target, reduction="none"), reduction)
        return per_image((pred.sigmoid() - target).square(), reduction)


def masked(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Masking noise: in each image (C, H, W) exactly `share` of the pixels, rounded, are 0 in all channels."""
    b, _, h, w = x.shape
    order = torch.rand(b, h * w, generator=generator, device=x.device).argsort(1)
    kept = torch.ones(b, h * w, device=x.device, dtype=x.dtype)
    kept.scatter_(1, order[:, : round(share * h * w)], 0)
    return x * kept.view(b, 1, h, w)
