"""I-JEPA."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsup_fastai.callbacks.ema import EMATeacher
from selfsup_fastai.checks import check_number
from selfsup_fastai.data.draws import Draw
from selfsup_fastai.data.patches import boxes_mask, enlarged
from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.data.views import square_view
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.encoders.heads import draw_small_weights
from selfsup_fastai.encoders.masked_vit import (
    check_takes_some_patches,
    fitting_patch,
    fix_positions,
    patch_size,
    patched_side,
    pool_patches,
    sincos_positions,
    visible_tokens,
)
from selfsup_fastai.encoders.teacher import Teacher
from selfsup_fastai.errors import TaskError
from selfsup_fastai.messages import say
from selfsup_fastai.pictures import draw_rows, see_through
from selfsup_fastai.pretext.base import PretextTask, per_image

ASKED, RATIO = (0.15, 0.2), (0.75, 1.5)  # Area of a target block as a share of the patches; its height by its width
CONTEXT = (0.85, 1.0)  # Area of the square block that the context is what is left of
TRIES = 20  # Places of the context's block that are tried
PASSES = 1.3  # The teacher's one, and the share of the patches that is the context (measured: .3 in batches of 64)


def found_block(pred: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """Share of the blocks whose predicted tokens are nearest to those of their own image among all in the batch.

    The others' tokens are those at the same places, so that to know the place does not help. An image alone in its
    batch counts as not found.
    """
    told, true = pred[0].float(), pred[1].float()
    if len(true) == 1:
        return told.new_zeros(())
    alike = told.flatten(2) @ true.flatten(1).T  # (B, blocks, B), as all true tokens are of one length
    return (alike.argmax(-1) == torch.arange(len(true), device=true.device).unsqueeze(1)).float().mean()


class IJEPA(PretextTask):
    """What would a teacher, an average of the network itself, make of the hidden blocks of the image?

    Assran, Duval, Misra, Bojanowski, Vincent, Rabbat, LeCun & Ballas, Self-Supervised Learning from Images with a
    Joint-Embedding Predictive Architecture, 2023 (arXiv 2301.08243). A vision transformer is given some patches, the
    context; a small second one predicts from them, for each of four blocks, the tokens that the teacher gives its
    patches, who is shown the whole image. Nothing is painted, and no views are compared: what is predicted is what
    things are, not their pixels. The teacher's encoder is what is saved.

    In: a view of each image, (B, C, S, S): crop of 30-100 % of the area in training, neither mirrored nor recolored
    (bilinear; the authors': bicubic), in validation the center square; which of its N patches are context, (B, N), and
    which are asked for, (B, 4, N), True where so. Target: the latter again. Prediction: the predicted tokens, (B, 4, N,
    D), 0 where not asked for, and the teacher's, (B, N, D), each with mean 0 and deviation 1. Loss: smooth L1 of the
    two where asked for (the authors' code; the paper says L2). `get_preds` gives the cosines of both, (B, N). The
    metric, `found_block` (ours), is the share of the blocks that can be told from the same places in the other images
    of the batch: guessing, and a network that has collapsed, find one in as many as the batch has images.

    A batch has one size of target blocks, 15-20 % of the patches, aspect .75-1.5 (as in the authors' code one random
    number sets both), and one of the context's block, 85-100 %, of which the targets are taken away and, at random,
    as many patches as it takes to give all images as few as the one that has fewest (the authors' code drops the last
    ones, at the bottom). Ours: blocks may reach the last row and column, and the context the whole grid, which the
    authors' code misses by one; more than a twentieth of the patches must be left, or 10 if that is less (theirs: 10,
    which grids of 6 x 6 never have); after 20 places one target is not taken away, then two, as theirs.

    The encoder's positions are fixed sines and cosines; a net from an earlier round or with published weights keeps its
    own, frozen. Its features are the mean of its patches: there is no class token, and one that a named net has is not
    used. The teacher's momentum rises along a line to 1 from a start for the run's length (the paper's .996 is for 300
    epochs of ImageNet). The predictor is scaled to small nets: 4 blocks of width 96; the authors' has 6 to 12 of 384.
    They use AdamW with weight decay that rises from .04 to .4: `cbs=ParamScheduler({'wd': SchedCos(0.04, 0.4)})`. The
    net that is taken when none is given is a tiny vision transformer with patches of 16 pixels from images of 128 on,
    of 8 from 48 on, of 4 below (ours).

    Guards against copying from next door: blocks are large, and nothing of them is in the context. Against one token
    for everything: the teacher has no gradient and is slow. That is no guarantee: watch the metric.

    Suits images with large structure, vision transformers and long runs; and data that bear no change of color or
    mirroring. Does not suit convnets: take dino, or simmim.
    """

    name = "ijepa"
    collapse_hint = (
        "the teacher gives all images the same tokens. What keeps that from happening is a teacher that follows "
        "slowly: raise the momentum or lower the rate."
    )
    paper = "Assran et al. 2023"
    scaled = (("predictor_depth", "6 to 12"), ("predictor_width", "384"))
    arch = "vit_tiny_patch16_224"
    n_inp = 3
    normalized = (True, False, False)
    passes = PASSES
    metrics = (found_block,)

    def __init__(
        self,
        blocks: int = 4,  # That are asked for
        predictor_depth: int = 4,  # Blocks of the predictor; the paper's has 6 to 12
        predictor_width: int = 96,  # A multiple of 4 and of the heads; the paper's: 384
        predictor_heads: int = 4,  # The paper's: as many as the encoder has
        momentum: float | None = None,  # The teacher's, at first; None: by the number of steps; the paper's: 0.996
        min_area: float = 0.3,  # Smallest share of the image's area in a training view; 1: no crop
    ):
        check_number("blocks", blocks, 1, whole=True)
        check_number("predictor_depth", predictor_depth, 1, whole=True)
        check_number("predictor_width", predictor_width, 4, whole=True)
        check_number("predictor_heads", predictor_heads, 1, whole=True)
        if momentum is not None:
            check_number("momentum", momentum, 0, 1)
        check_number("min_area", min_area, above=0, most=1)
        if predictor_width % math.lcm(4, predictor_heads):
            raise TaskError(
                f"predictor_width is a multiple of 4 and of the {predictor_heads} heads; got {predictor_width}."
            )
        self.blocks, self.momentum, self.min_area = blocks, momentum, min_area
        self.predictor_depth, self.predictor_width = predictor_depth, predictor_width
        self.predictor_heads = predictor_heads
        self.side = self.patch = None  # the encoder's, known after `setup`

    def arch_settings(self, side):
        return {"patch_size": fitting_patch(side), "class_token": False, "global_pool": "avg", "fc_norm": False}

    def setup(self, dls, encoder):
        check_takes_some_patches(encoder, self.name)
        self.say_scaled()
        self.side, self.patch = patched_side(encoder), patch_size(encoder.body)
        n = (self.side // self.patch) ** 2
        finer = next((p for p in range(self.side // 8, 0, -1) if self.side % p == 0), 1)
        fix = f"arch=create_encoder({encoder.arch!r}, size={self.side}, patch_size={finer}) makes smaller ones."
        if n < 4:
            raise TaskError(f"ijepa: of {n} patches of {self.patch} pixels none could be hidden. {fix}")
        if n < 16:
            say(f"ijepa: {n} patches of {self.patch} pixels are few to hide blocks of. {fix}")

    def make_batch(self, x, *, generator, train, idx=None):
        patch = self.patch or max(1, min(x.shape[-2:]) // 14)  # of 224 pixels 16
        side = self.side or min(x.shape[-2:]) // patch * patch
        recipe = Recipe(scale=(self.min_area, 1.0), flip=0, jitter_p=0, grey_p=0)
        x = square_view(x, side, recipe if train else None, generator)
        context, targets = draw_blocks(len(x), side // patch, self.blocks, generator)
        return (x, context, targets), (targets,)

    def model(self, encoder):
        fix_positions(encoder)
        pool_patches(encoder)
        return IJEPANet(encoder, self.predictor_depth, self.predictor_width, self.predictor_heads)

    def loss(self, pred, targets, reduction="mean"):
        told, true = (tokens.to(torch.promote_types(tokens.dtype, torch.float32)) for tokens in pred)
        error = F.smooth_l1_loss(told, true.unsqueeze(1).expand_as(told), reduction="none").mean(-1)  # (B, blocks, N)
        return per_image((error * targets).sum((1, 2)) / targets.sum((1, 2)), reduction)

    def callbacks(self):
        return [EMATeacher(self.momentum, shape="linear")]

    def embedded(self, pred):
        """The mean of the teacher's tokens."""
        return pred[1].mean(1)

    def product(self, model):
        """The teacher's encoder."""
        return model.teacher.net

    def activation(self, pred):
        """Cosine of each patch's predicted and true token, the mean over the blocks that ask for it, (B, N)."""
        told, true = pred
        asked = told.abs().sum(-1) > 0
        cosine = F.cosine_similarity(told, true.unsqueeze(1), dim=-1)
        return (cosine * asked).sum(1) / asked.sum(1).clamp(min=1)

    def decode(self, pred):
        return pred

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """What the network sees | the blocks it is asked for | (how near it came, white: cosine 1)."""
        x, context, blocks = (t[:max_n] for t in inputs)
        grid = math.isqrt(context.shape[1])
        pixels = partial(enlarged, grid=(grid, grid), size=x.shape[-1] // grid)
        panels = [see_through(x, pixels(~context)), _outlined(x, torch.cat([pixels(b) for b in blocks.unbind(1)], 1))]
        titles = ["seen | asked for"] * len(x)
        if pred is not None:
            asked = blocks.any(1)
            panels.append(see_through(pixels(pred[: len(x)]).clamp(0, 1).expand_as(x), pixels(~asked)))
            cosines = (pred[: len(x)] * asked).sum(1) / asked.sum(1)
            titles = [f"seen | asked for | found, cosine {cosine:.2f}" for cosine in cosines.tolist()]
        return draw_rows(list(zip(*panels)), titles, ctxs, figsize)


class IJEPANet(nn.Module):
    """(B, C, S, S), context (B, N) and blocks (B, T, N) -> predicted (B, T, N, D) and true tokens (B, N, D)."""

    def __init__(self, encoder: Encoder, depth: int, width: int, heads: int):
        super().__init__()
        self.encoder, self.teacher = encoder, Teacher(encoder)
        grid, d = patched_side(encoder) // patch_size(encoder.body), encoder.body.embed_dim
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.register_buffer("positions", sincos_positions((grid, grid), width))
        self.embed, self.token = nn.Linear(d, width), nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm, self.project = norm(width), nn.Linear(width, d)
        self.apply_weights()

    @torch.no_grad()
    def apply_weights(self) -> None:
        """The predictor's weights at the start; later blocks add less to the stream, as in the authors' code."""
        for part in (self.embed, self.blocks, self.project):
            part.apply(draw_small_weights)
        for i, block in enumerate(self.blocks, start=1):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.div_(math.sqrt(2 * i))

    def forward(self, x: Tensor, context: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        keep, asked = numbers(context), numbers(targets)  # (B, n), (B, T, m)
        seen = visible_tokens(self.encoder.body, x, keep)[:, self.encoder.body.num_prefix_tokens :]
        told = self.predict(seen, keep, asked)
        places = asked.unsqueeze(-1).expand_as(told)
        told = told.new_zeros(*targets.shape, told.shape[-1]).scatter(2, places, told)
        return told, self.true(x)

    def predict(self, seen: Tensor, keep: Tensor, asked: Tensor) -> Tensor:
        """The tokens (B, T, m, D) of the patches `asked` for, each block by itself."""
        seen = self.embed(seen) + self.positions[keep]
        questions = self.token + self.positions[asked]
        tokens = torch.cat([seen.unsqueeze(1).expand(-1, asked.shape[1], -1, -1), questions.to(seen.dtype)], 2)
        tokens = self.blocks(tokens.flatten(0, 1))[:, keep.shape[1] :]
        return self.project(self.norm(tokens)).unflatten(0, asked.shape[:2])

    @torch.no_grad()
    def true(self, x: Tensor) -> Tensor:
        """The teacher's tokens of all patches, (B, N, D), each with mean 0 and deviation 1."""
        body = self.teacher.net.body
        tokens = body.forward_features(x)[:, body.num_prefix_tokens :]
        return F.layer_norm(tokens, tokens.shape[-1:])


def numbers(
    chosen: Tensor,  # (..., N) bool, equally many in each row
) -> Tensor:  # (..., n) int64, rising
    """The numbers of what is chosen."""
    n = int(chosen.flatten(0, -2)[0].sum())
    return chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :n]


def draw_blocks(
    b: int,  # Images
    grid: int,  # Patches along a side
    blocks: int,  # Target blocks of each
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # (B, N) and (B, blocks, N) bool, row by row; equally many in each row
    """Context and targets of each image. Nothing is drawn until it fits: of what is drawn, what fits is taken."""
    draw, n = Draw(generator), grid**2
    targets = _boxes(draw, b, blocks, _sides(draw.uniform(()), ASKED, RATIO, grid), grid)
    places = _boxes(draw, b, TRIES, _sides(draw.uniform(()), CONTEXT, (1.0, 1.0), grid), grid)
    taken = torch.cat([targets.new_zeros(b, 1, n), targets.cumsum(1) > 0], 1).flip(1)  # by all, all but one, ... none
    left = (places.unsqueeze(1) & ~taken.unsqueeze(2)).flatten(1, 2)  # (B, (blocks + 1) * TRIES, N)
    enough = left.sum(-1) > min(10, n // 20)
    first = (enough * torch.arange(enough.shape[1], 0, -1, device=enough.device)).argmax(1)
    context = left[torch.arange(b, device=first.device), first]
    order = (draw.uniform((b, n)) + ~context).argsort(1).argsort(1)  # the context's patches come first
    return order < context.sum(1).min(), targets


def _sides(at: Tensor, area: tuple[float, float], ratio: tuple[float, float], grid: int) -> tuple[Tensor, Tensor]:
    """Height and width of a block in patches; `at` in 0..1 says where in both ranges."""
    cells = (grid**2 * (area[0] + at * (area[1] - area[0]))).floor().clamp(min=1)
    ratio = ratio[0] + at * (ratio[1] - ratio[0])
    return tuple(side.sqrt().round().long().clamp(1, grid) for side in (cells * ratio, cells / ratio))


def _boxes(draw: Draw, b: int, n: int, sides: tuple[Tensor, Tensor], grid: int) -> Tensor:
    """`n` blocks at random places of each image, (B, n, grid * grid)."""
    sides = tuple(side.expand(b * n, 1) for side in sides)
    starts = tuple(draw.below(grid - side + 1) for side in sides)
    return boxes_mask(starts, sides, (grid, grid)).view(b, n, grid**2)


def _outlined(x: Tensor, blocks: Tensor) -> Tensor:
    """Images (B, C, S, S), pale outside of the blocks (B, T, S, S), which have a white rim."""
    inner = ~F.max_pool2d((~blocks).float(), 3, 1, 1).bool()
    rims = (blocks & ~inner).any(1, keepdim=True)
    pale = torch.where(blocks.any(1, keepdim=True), x, 0.3 * x + 0.6)
    return torch.where(rims, torch.ones_like(x), pale)
