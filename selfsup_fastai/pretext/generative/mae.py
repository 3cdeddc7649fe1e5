"""Masked autoencoders."""

import math
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsup_fastai.checks import check_flag, check_number
from selfsup_fastai.data.patches import enlarged, from_patches, random_cells, to_patches
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.inputs import from_standardized, standardized
from selfsup_fastai.encoders.masked_vit import (
    check_takes_some_patches,
    fitting_patch,
    fix_positions,
    patch_size,
    patched_side,
    sincos_positions,
    visible_tokens,
)
from selfsup_fastai.errors import TaskError
from selfsup_fastai.messages import say
from selfsup_fastai.metrics import explained
from selfsup_fastai.pretext.base import HiddenTask, per_image

EPS = 1e-6  # Added to the variance of a patch, and in the decoder's layer norms


def hidden_pixels(pred: Tensor, target: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Answer and truth of all patches, (B, N, p * p * C), and which of them count."""
    return pred, target, hidden.unsqueeze(-1)


class MAE(HiddenTask):
    """What do the hidden three quarters of the image look like?

    He, Chen, Xie, Li, Dollár & Girshick, Masked Autoencoders Are Scalable Vision Learners, 2021 (arXiv 2111.06377). A
    vision transformer is given only the patches that are left, which makes training cheap; a small second one, thrown
    away afterwards, paints the others from what the first makes of them. To do that it must know how things go on.

    In: a view of each image, (B, C, S, S): crop of 20-100 % of the area and flip in training (bilinear; the authors':
    bicubic), in validation the center square; and which of its N patches are hidden, (B, N), True where hidden.
    Targets: the pixels of the patches, (B, N, p * p * C), each patch with mean 0 and deviation 1, and again what is
    hidden. Prediction: likewise (B, N, p * p * C); loss: the mean squared error on hidden patches, 1 for naming the
    mean of each (0 where a patch is flat); the metric is the share of the variance that is explained. It stays near 0
    for the first hundreds of steps. Hidden patches never enter the encoder.

    The positions are fixed sines and cosines in both nets: the encoder's own are overwritten and frozen while it is
    pretrained here, and are kept under timm's name; a net from an earlier round or with published weights keeps its
    positions, frozen. The encoder starts from timm's random weights rather than the authors' (Xavier), and the decoder
    is scaled to small nets: 4 blocks of width 128; the authors' has 8 of width 512 with 16 heads, for encoders of width
    768 and more.

    The net that is taken when none is given is a tiny vision transformer with patches of 16 pixels from images of 128
    on, of 8 from 48 on, of 4 below (ours): patches of 16 pixels would cut an image of 48 into 3 x 3, of which the
    network would see two. Of a net that is named the patches stay as they are;
    `arch=create_encoder('vit_small_patch16_224', size=64, patch_size=8)` makes others.

    Guards against copying from next door: three of four patches are hidden, so of a hidden one's four neighbors one is
    seen on average; and brightness and contrast of a patch, which its neighbors tell, are not asked for.

    Suits images with large structure and a vision transformer that is fine-tuned afterwards; frozen, its features are
    weaker than those of joint embedding. It takes long runs (the paper's: 800 epochs and more). Does not suit convnets:
    take simmim.
    """

    name = "mae"
    paper = "He et al. 2021"
    arch = "vit_tiny_patch16_224"
    metrics = (explained("explained", hidden_pixels, around_mean=False),)

    def __init__(
        self,
        mask_ratio: float = 0.75,  # Share of the patches that is hidden
        normalize_patches: bool = True,  # Each target patch to mean 0, deviation 1; False: pixels as the net sees them
        fixed_positions: bool = True,  # Of the encoder; False: they are trained like all else
        decoder_depth: int = 4,  # Blocks of the decoder; the paper's has 8
        decoder_width: int = 128,  # A multiple of 4 and of the heads; the paper's: 512
        decoder_heads: int = 4,  # The paper's: 16
        min_area: float = 0.2,  # Smallest share of the image's area in a training view; 1: no crop
        flip: float = 0.5,  # Probability of a mirror image; 0 where left and right matter
    ):
        check_number("mask_ratio", mask_ratio, above=0, below=1)
        check_flag("normalize_patches", normalize_patches)
        check_flag("fixed_positions", fixed_positions)
        check_number("decoder_depth", decoder_depth, 1, whole=True)
        check_number("decoder_width", decoder_width, 4, whole=True)
        check_number("decoder_heads", decoder_heads, 1, whole=True)
        check_number("min_area", min_area, above=0, most=1)
        check_number("flip", flip, 0, 1)
        if decoder_width % math.lcm(4, decoder_heads):
            raise TaskError(f"decoder_width is a multiple of 4 and of the {decoder_heads} heads; got {decoder_width}.")
        self.mask_ratio, self.normalize_patches, self.fixed_positions = mask_ratio, normalize_patches, fixed_positions
        self.decoder_depth, self.decoder_width, self.decoder_heads = decoder_depth, decoder_width, decoder_heads
        self.min_area, self.flip = min_area, flip
        self.passes = 1 - mask_ratio
        self.side = self.patch = self.mean = self.std = None  # the encoder's, known after `setup`

    def arch_settings(self, side):
        return {"patch_size": fitting_patch(side)}

    def setup(self, dls, encoder):
        check_takes_some_patches(encoder, self.name)
        self.side, self.patch = patched_side(encoder), patch_size(encoder.body)
        self.mean, self.std = encoder.mean, encoder.std
        n = (self.side // self.patch) ** 2
        finer = next((p for p in range(self.side // 8, 0, -1) if self.side % p == 0), 1)
        fix = f"arch=create_encoder({encoder.arch!r}, size={self.side}, patch_size={finer}) makes smaller ones."
        if self.n_visible(n) in (0, n):
            raise TaskError(f"mae: of {n} patches of {self.patch} pixels none would be left or hidden. {fix}")
        if n < 16:
            say(f"mae: {n} patches of {self.patch} pixels are few to guess from. {fix}")

    def n_visible(self, n: int) -> int:
        """How many of `n` patches the encoder sees."""
        return int(n * (1 - self.mask_ratio) + 1e-9)

    def make_batch(self, x, *, generator, train, idx=None):
        patch = self.patch or max(1, min(x.shape[-2:]) // 14)  # of 224 pixels 16
        side = self.side or min(x.shape[-2:]) // patch * patch
        x = self.view(x, side, generator, train)
        n = (side // patch) ** 2
        hidden = random_cells(len(x), n, n - self.n_visible(n), generator)
        return (x, hidden), (self.target(x, patch), hidden)

    def target(self, x: Tensor, patch: int) -> Tensor:
        """What is to be painted, (B, N, patch * patch * C)."""
        patches = to_patches(standardized(x, self.mean, self.std), patch)
        if not self.normalize_patches:
            return patches
        mean, std = _mean_and_std(patches)
        return (patches - mean) / std

    def model(self, encoder):
        if self.fixed_positions:
            fix_positions(encoder)
        n = (patched_side(encoder) // patch_size(encoder.body)) ** 2
        return MAENet(encoder, self.n_visible(n), self.decoder_depth, self.decoder_width, self.decoder_heads)

    def loss(self, pred, target, hidden, reduction="mean"):
        error = (pred.float() - target).pow(2).mean(-1)  # (B, N)
        return per_image((error * hidden).sum(1) / hidden.sum(1), reduction)

    def hidden_pixels(self, x, hidden):
        grid = math.isqrt(hidden.shape[1])
        return enlarged(hidden, (grid, grid), x.shape[-1] // grid)

    def painted(self, x, hidden, pred):
        """Images (B, C, S, S) in [0, 1] with the hidden patches as the network paints them.

        It was never asked for a patch's mean and deviation: they are the true ones, as in the authors' pictures.
        """
        patch, side = x.shape[-1] // math.isqrt(hidden.shape[1]), x.shape[-2:]
        if self.normalize_patches:
            mean, std = _mean_and_std(to_patches(standardized(x, self.mean, self.std), patch))
            pred = pred * std + mean
        answer = from_standardized(from_patches(pred, patch, side), self.mean, self.std)
        return torch.where(self.hidden_pixels(x, hidden), answer, x)


class MAENet(nn.Module):
    """Encoder on the visible patches, decoder on all: (B, C, S, S) and (B, N) -> (B, N, p * p * C)."""

    def __init__(self, encoder: Encoder, n_visible: int, depth: int, width: int, heads: int):
        super().__init__()
        self.encoder, self.n_visible = encoder, n_visible
        patch, body = patch_size(encoder.body), encoder.body
        grid = patched_side(encoder) // patch
        norm = partial(nn.LayerNorm, eps=EPS)
        self.embed = nn.Linear(body.embed_dim, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("positions", sincos_positions((grid, grid), width))
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm, self.paint = norm(width), nn.Linear(width, patch * patch * encoder.in_chans)
        for part in (self.embed, self.blocks, self.paint):
            part.apply(_xavier)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        keep = hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.n_visible]
        seen = self.embed(visible_tokens(self.encoder.body, x, keep))
        prefix, seen = seen.split([seen.shape[1] - self.n_visible, self.n_visible], 1)
        patches = self.mask_token.to(seen.dtype).expand(*hidden.shape, -1)
        patches = patches.scatter(1, keep.unsqueeze(-1).expand_as(seen), seen) + self.positions
        tokens = self.blocks(torch.cat([prefix, patches], 1))
        return self.paint(self.norm(tokens[:, prefix.shape[1] :]))


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _mean_and_std(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Of each patch over its pixels and channels; unbiased, as in the authors' code."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + EPS).sqrt()
