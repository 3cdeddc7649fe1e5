"""Crops smaller than the images that a network is made for."""

import math

import torch
from torch import Tensor, nn

from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.maps import undisturbed
from selfsup_fastai.encoders.masked_vit import patch_size, takes_some_patches, through_blocks
from selfsup_fastai.encoders.split import pooled
from selfsup_fastai.errors import TaskError

STEP, LEAST = 8, 16  # Pixels: sides are multiples of 8, and at least 16


def nearest_side(
    pixels: float,
    step: int = STEP,
    least: int = LEAST,
) -> int:
    """The multiple of `step` nearest to so many pixels, `least` or the first multiple above it if that is more."""
    return step * max(math.ceil(least / step), math.floor(pixels / step + 0.5))


def crop_side(
    encoder: Encoder,
    share: float,  # Of the side of the images
) -> int:
    """Side in pixels of the crops nearest to `share` of the images on which the network runs, at least 16.

    A multiple of 8; for a vision transformer one of its patches, at least two. Never more than the images.
    """
    step, least = STEP, LEAST
    if takes_some_patches(encoder.body):
        step = patch_size(encoder.body)
        least = max(LEAST, 2 * step)
    first = nearest_side(share * encoder.side, step, least)
    return next((side for side in range(first, encoder.side, step) if _runs(encoder, side)), encoder.side)


def check_takes_parts(
    encoder: Encoder,
    side: int,  # Of the parts, in pixels
    task: str,  # Name, for the message
) -> None:
    """Raises `TaskError` where a task shows the network parts of images that are too small for it.

    Networks of one fixed size are given them enlarged.
    """
    if encoder.fixed_size or _runs(encoder, side):
        return
    least = next((s for s in range(side + 1, encoder.side) if _runs(encoder, s)), encoder.side)
    raise TaskError(
        f"{task} shows the network parts of {side} pixels a side, and {encoder.arch} takes no less than {least}. Take "
        f"images of {math.ceil(encoder.side * (least + 1) / side)} pixels, or another network, such as resnet18."
    )


def crop_cost(encoder: Encoder, side: int) -> float:
    """What a crop of this side costs, as a share of a whole image."""
    resized = encoder.fixed_size and not _any_grid(encoder)
    return 1.0 if resized else (side / encoder.side) ** 2


def crop_features(
    encoder: Encoder,
    x: Tensor,  # (B, C, s, s), of a side that `crop_side` gives
) -> Tensor:  # (B, num_features)
    """The encoder's features of small crops, at the size they have.

    A vision transformer made for images of one size, which would be given them enlarged, gets its positions
    interpolated instead (as DINO, Caron et al. 2021); other networks of one size are given them enlarged.
    """
    if not _any_grid(encoder):
        return encoder(x)
    body = encoder.body
    patches = body.patch_embed.norm(body.patch_embed.proj(x).permute(0, 2, 3, 1))  # (B, h, w, D)
    before, body.dynamic_img_size = body.dynamic_img_size, True  # has timm interpolate
    try:
        tokens = body._pos_embed(patches)
    finally:
        body.dynamic_img_size = before
    return pooled(body.forward_head(through_blocks(body, tokens)))


def _any_grid(encoder: Encoder) -> bool:
    """Whether it is a network of one size that `crop_features` runs at others."""
    return bool(encoder.fixed_size) and takes_some_patches(encoder.body)


def _runs(encoder: nn.Module, side: int) -> bool:
    """Whether crops of this side go through: pooling and valid convolutions can leave nothing of a small one."""
    like = next(encoder.parameters())
    x = torch.zeros(2, encoder.in_chans, side, side, dtype=like.dtype, device=like.device)
    try:
        with undisturbed(encoder):
            crop_features(encoder, x)
    except (RuntimeError, ValueError, AssertionError, TypeError, LookupError):
        return False
    return True
