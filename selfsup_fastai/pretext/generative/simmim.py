"""SimMIM."""

import math

import torch
from torch import Tensor, nn

from selfsup_fastai.checks import check_number
from selfsup_fastai.data.patches import enlarged, random_cells
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.inputs import from_standardized, standardized
from selfsup_fastai.encoders.masked_vit import covered_tokens, patch_size, patched_side, takes_some_patches
from selfsup_fastai.metrics import explained
from selfsup_fastai.pretext.base import HiddenTask, per_image


def _as_they_are(pred: Tensor, target: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return pred, target, hidden


class SimMIM(HiddenTask):
    """What do the hidden squares of the image look like?

    Xie, Zhang, Cao, Lin, Bao, Yao, Dai & Hu, SimMIM: A Simple Framework for Masked Image Modeling, 2021 (arXiv
    2111.09886). The simplest form of the question: large squares are covered, the whole image goes through the
    network, and one linear layer on its last map paints the pixels.

    In: a view of each image, (B, C, S, S): crop of 67-100 % of the area and flip in training, in validation the center
    square; and the pixels that are hidden, (B, 1, S, S), True where hidden. Targets: the normalized image, (B, C, S,
    S), and again what is hidden. Prediction: an image (B, C, S, S), likewise normalized; `get_preds` decodes it to
    [0, 1]. Loss: the mean absolute error on hidden pixels; the metric is the share of their variance that is explained.

    The squares are a sixth of the image's side, as the paper's 32 of 192 pixels, or the nearest number that divides the
    side; where none near does, the image is resized to fit. With a plain vision transformer they are whole
    patches, covered after the patch embedding, as in the authors' code. With every other net (theirs has but Swin and
    ViT) the task is ours, a variant with dense input: hidden pixels are overwritten with one learned color, so that
    edges of the squares can be seen; a Swin is treated so, too.

    Guards against copying from next door: the squares are large. Of a convnet's input their edges can be seen, which
    gives nothing of what is under them away.

    Suits convnets and transformers that are fine-tuned afterwards, on images with large structure; frozen, the features
    are weaker than those of joint embedding. Does not suit fine textures, which nobody could paint: the best answer
    is a blur.
    """

    name = "simmim"
    paper = "Xie et al. 2021"
    by_map = True
    min_side = 12
    metrics = (explained("explained", _as_they_are, around_mean=False),)

    def __init__(
        self,
        mask_ratio: float = 0.6,  # Share of the squares that is hidden, rounded up
        squares: int = 6,  # Along a side of the image, or nearly; 2 to 16
        min_area: float = 0.67,  # Smallest share of the image's area in a training view; 1: no crop
        flip: float = 0.5,  # Probability of a mirror image; 0 where left and right matter
    ):
        check_number("mask_ratio", mask_ratio, above=0, below=1)
        check_number("squares", squares, 2, 16, whole=True)
        check_number("min_area", min_area, above=0, most=1)
        check_number("flip", flip, 0, 1)
        self.mask_ratio, self.squares, self.min_area, self.flip = mask_ratio, squares, min_area, flip
        self.side = self.square = self.mean = self.std = None  # known after `setup`

    def setup(self, dls, encoder):
        self.side, self.square = self.grid(encoder)
        self.mean, self.std = encoder.mean, encoder.std

    def grid(self, encoder: Encoder) -> tuple[int, int]:
        """Sides in pixels of the images and of the squares for this network."""
        if takes_some_patches(encoder.body):
            return fitting_squares(patched_side(encoder), self.squares, patch_size(encoder.body))
        return fitting_squares(encoder.fixed_size or encoder.side, self.squares)

    def make_batch(self, x, *, generator, train, idx=None):
        side, square = (self.side, self.square) if self.side else fitting_squares(min(x.shape[-2:]), self.squares)
        x = self.view(x, side, generator, train)
        grid = side // square
        n_hidden = min(grid**2 - 1, math.ceil(self.mask_ratio * grid**2 - 1e-9))
        hidden = enlarged(random_cells(len(x), grid**2, n_hidden, generator), (grid, grid), square)
        return (x, hidden), (standardized(x, self.mean, self.std), hidden)

    def model(self, encoder):
        side, _ = self.grid(encoder)
        return (CoveredPatches if takes_some_patches(encoder.body) else CoveredPixels)(encoder, side)

    def loss(self, pred, target, hidden, reduction="mean"):
        error = (pred.float() - target).abs().mean(1, keepdim=True)  # (B, 1, S, S)
        error = (error * hidden).flatten(1).sum(1) / (hidden.flatten(1).sum(1) + 1e-5)
        return per_image(error, reduction)

    def decode(self, pred):
        """The painted images in [0, 1], (B, C, S, S)."""
        return from_standardized(pred, self.mean, self.std).clamp(0, 1)

    def hidden_pixels(self, x, hidden):
        return hidden

    def painted(self, x, hidden, pred):
        return torch.where(hidden, pred, x)


class Painter(nn.Module):
    """The linear head: each place of a map (B, D, h, w) paints its block of pixels, (B, C, S, S)."""

    def __init__(self, width: int, cells: int, channels: int, side: int):
        super().__init__()
        self.side, block = side, math.ceil(side / cells)
        self.layers = nn.Sequential(nn.Conv2d(width, channels * block**2, 1), nn.PixelShuffle(block))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[..., : self.side, : self.side]


class CoveredPatches(nn.Module):
    """A vision transformer whose hidden patches are replaced by one learned token: (B, C, S, S), (B, 1, S, S) -> image.

    All patches go through it.
    """

    def __init__(self, encoder: Encoder, side: int):
        super().__init__()
        self.encoder, self.patch = encoder, patch_size(encoder.body)
        width, self.cells = encoder.body.embed_dim, side // self.patch
        self.token = nn.Parameter(torch.randn(width) * 0.02)
        self.paint = Painter(width, self.cells, encoder.in_chans, side)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        patches = hidden[:, 0, :: self.patch, :: self.patch].flatten(1)
        tokens = covered_tokens(self.encoder.body, x, patches, self.token)[:, self.encoder.body.num_prefix_tokens :]
        return self.paint(tokens.transpose(1, 2).unflatten(2, (self.cells, self.cells)))


class CoveredPixels(nn.Module):
    """Any other network, hidden pixels overwritten with one learned color: (B, C, S, S), (B, 1, S, S) -> image."""

    def __init__(self, encoder: Encoder, side: int):
        super().__init__()
        self.encoder = encoder
        width, cells, _ = encoder.map_shape((side, side))
        self.color = nn.Parameter(torch.zeros(encoder.in_chans, 1, 1))  # the mean of the data, to begin with
        self.paint = Painter(width, cells, encoder.in_chans, side)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return self.paint(self.encoder.feature_map(torch.where(hidden, self.color.to(x.dtype), x)))


def fitting_squares(
    side: int,  # Of the images, in pixels
    squares: int,  # Wanted along a side
    step: int = 1,  # A square is a multiple of this, which divides the side: the patch of a vision transformer
) -> tuple[int, int]:  # Sides in pixels of the images, perhaps resized to fit, and of the squares
    """Squares that cover the image exactly: from 2/3 to 3/2 as many along a side as wanted, the nearest in size."""
    near = [s for s in range(step, side + 1, step) if side % s == 0 and squares / 1.5 <= side / s <= squares * 1.5]
    if near:
        return side, min(near, key=lambda s: abs(s - side / squares))
    square = step if step > 1 else max(1, side // squares)
    return side // square * square, square
