"""Vision transformers that are shown only some of their patches."""

import torch
from timm.layers import PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.errors import TaskError


def takes_some_patches(body: nn.Module) -> bool:
    """Whether a network can be run on some of its patches: timm's plain ViT, patches that do not overlap.

    With a stem of convolutions, or positions given inside the blocks, a patch would know of its hidden neighbors.
    """
    if not isinstance(body, VisionTransformer) or type(body).forward_features is not VisionTransformer.forward_features:
        return False
    embed = body.patch_embed
    square = isinstance(embed, PatchEmbed) and embed.patch_size[0] == embed.patch_size[1]
    return square and embed.proj.kernel_size == embed.proj.stride == tuple(embed.patch_size)


def check_takes_some_patches(encoder: Encoder, task: str) -> None:
    """Raises `TaskError` with networks that suit."""
    if not takes_some_patches(encoder.body):
        raise TaskError(
            f"{task} leaves patches out, which takes a plain vision transformer of timm's ('vit_tiny_patch16_224', "
            f"'vit_small_patch16_224', 'deit3_small_patch16_224'); {encoder.arch} is none. "
            "Leave arch out for a small one, or take simmim, which suits every net."
        )


def patch_size(body: VisionTransformer) -> int:
    """Pixels a side."""
    return body.patch_embed.patch_size[0]


def patched_side(encoder: Encoder) -> int:
    """Side in pixels of the square images that the patches of this encoder cover exactly.

    The one size it takes; where it takes any, the largest multiple of a patch in the size it is trained at.
    """
    patch = patch_size(encoder.body)
    return encoder.fixed_size or max(1, encoder.side // patch) * patch


def fitting_patch(
    side: int,  # Of the images, in pixels
) -> int:
    """Pixels a side of patches that are neither few nor many: 16 from 128 pixels on, 8 from 48 on, else 4."""
    return 16 if side >= 128 else 8 if side >= 48 else 4


def fix_positions(encoder: Encoder) -> None:
    """Sines and cosines, frozen. A net from an earlier round or with published weights keeps its own, frozen."""
    if not encoder.lineage:
        set_sincos_positions(encoder.body)
    if encoder.body.pos_embed is not None:
        encoder.body.pos_embed.requires_grad_(False)


def pool_patches(encoder: Encoder) -> None:
    """Have the features be the mean of the patches, where they were a class token or a learned pooling of timm's."""
    if encoder.source == "timm" and encoder.body.global_pool != "avg":
        encoder.body.global_pool, encoder.body.attn_pool = "avg", None
        encoder.kwargs = {**encoder.kwargs, "global_pool": "avg", "fc_norm": False}  # the norm stays with the tokens


def visible_tokens(
    body: VisionTransformer,
    x: Tensor,  # (B, C, S, S) images
    keep: Tensor,  # (B, n) numbers of the patches that are seen, row by row
) -> Tensor:  # (B, prefix + n, D): class and register tokens, then the patches in the order of `keep`
    """What the network makes of the patches in `keep`; no pixel of the others enters.

    With all patches in order it is `body.forward_features(x)`.
    """
    tokens = _placed(body, body.patch_embed(x))
    prefix, patches = tokens.split([body.num_prefix_tokens, tokens.shape[1] - body.num_prefix_tokens], 1)
    patches = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    return through_blocks(body, torch.cat([prefix, patches], 1))


def covered_tokens(
    body: VisionTransformer,
    x: Tensor,  # (B, C, S, S) images
    hidden: Tensor,  # (B, N) bool, one for each patch
    token: Tensor,  # (D,) what stands for a hidden patch
) -> Tensor:  # (B, prefix + N, D)
    """What the network makes of all patches when the hidden ones are replaced by `token`, in their places."""
    patches = body.patch_embed(x)
    covered = hidden.view(len(x), *patches.shape[1:-1], 1)
    patches = torch.where(covered, token.to(patches.dtype), patches)
    return through_blocks(body, _placed(body, patches))


def sincos_positions(
    grid: tuple[int, int],  # Rows and columns
    width: int,  # Numbers for each place, a multiple of 4
) -> Tensor:  # (rows * columns, width)
    """Places in a grid as sines and cosines: half of the numbers for the column, half for the row (MoCo v3, MAE).

    Wave lengths rise from 2 pi to nearly 10,000 times that.
    """
    if width % 4:
        raise TaskError(f"Sines and cosines of rows and columns need a width that is a multiple of 4, not {width}.")
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequency = 10_000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [place.reshape(-1, 1) * frequency for place in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1).float()


@torch.no_grad()
def set_sincos_positions(body: VisionTransformer) -> None:
    """Sines and cosines in place of the positions that the network would learn; 0 for class and register tokens."""
    if body.pos_embed is None:
        return
    waves = sincos_positions(body.patch_embed.grid_size, body.embed_dim)
    body.pos_embed.zero_()
    body.pos_embed[0, -len(waves) :] = waves.to(body.pos_embed)


def _placed(body: VisionTransformer, patches: Tensor) -> Tensor:
    """Patch embeddings with their positions, behind class and register tokens."""
    return body._pos_embed(patches)


def through_blocks(body: VisionTransformer, tokens: Tensor) -> Tensor:
    """What the network makes of tokens that have their positions, (B, N, D)."""
    tokens = body.norm_pre(tokens)
    return body.norm(checkpoint_seq(body.blocks, tokens) if body.grad_checkpointing else body.blocks(tokens))
