"""PIRL."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.data.patches import random_tiles
from selfsup_fastai.data.recipes import PIRL_PATCHES, PIRL_VIEW
from selfsup_fastai.data.views import random_view
from selfsup_fastai.encoders.crops import check_takes_parts
from selfsup_fastai.encoders.invariant import InvariantHeads, invariant_heads
from selfsup_fastai.losses import invariant_loss
from selfsup_fastai.pictures import draw_rows, mosaic
from selfsup_fastai.pretext.joint import BankTask

NOWHERE = {"flip": 0.0, "vertical_flip": 0.0, "jitter_p": 0.0, "grey_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0}
NOWHERE |= {"window": 0.0, "erase_p": 0.0}  # Fields of a recipe that then only crops, turns and shears
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "turn": 0.0, "shear": 0.0}  # With these it does all but that


class PIRL(BankTask):
    """Which of all training images were these nine shuffled patches cut from?

    Misra & van der Maaten, Self-Supervised Learning of Pretext-Invariant Representations, 2020 (arXiv 1912.01991).
    Jigsaw and rotation ask what was done to an image, so features must tell it. PIRL asks for features that do not
    depend on it: the patches' embedding is to be the image's own in a bank of all training images (as in NPID).

    In: a view of each image, (B, 1, C, H, W): crop of 8-100 % of the area, color jitter, grey, flip; its nine patches
    in random order, (B, 9, C, t, t): a tile of 3/4 of its cell at a random place in each cell of a 3 x 3 grid on
    another crop, of 60-100 %, each patch with colors and flip of its own; or with `transform='rotation'` another view
    in a random quarter turn, (B, 1, C, H, W); the image's place in the training set, (B,); and the places of images
    drawn at random, for the patches and for the image, (B, 2, K). Target: the row in the batch, (B,), for the metric
    alone. Prediction: embeddings of image and patches and the image's row of the bank, (B, 3, dim) of length 1, and the
    logits of the patches and of the image, (B, 2, 1 + K). Loss: `weight` times the noise-contrastive estimation of
    the patches against the bank, plus the rest times that of the image (see npid); Z is that of the first step's
    patches. Two heads: the image's is one linear layer; the patches' one for each patch, and one on the nine together.
    The bank keeps embeddings of images, not of patches. No permutation is classified. As in the authors' code but for
    posterizing, sharpening, solarizing and stretched contrast, which are left out; the temperature and the batch norms
    on the embeddings are ours (see npid).

    Images that are not for training have no row. Validation and `predict` show two views beside the patches, and the
    second takes the row's place. found_pair is the share of images whose patches are nearest among those of the batch.

    Guards: as in jigsaw gaps of random width between the tiles; patches differ in color from each other and from the
    image, or color histograms would be enough.

    Suits what jigsaw suits, images of things with parts, of at least 33 pixels (patches of 8), better 48 or more, and
    small batches. It takes many epochs: a row is renewed once in each. Does not suit textures nor near duplicates. An
    encoder of fixed input size (ViT) sees every patch enlarged: ten passes for each image, not one and a half.
    """

    name = "pirl"
    paper = "Misra & van der Maaten 2020"
    scaled = (("temperature", "0.07"),)
    recipes = (PIRL_VIEW, PIRL_PATCHES)
    n_inp = 4
    normalized = (True, True, False, False)

    def __init__(
        self,
        transform: str = "jigsaw",  # What is done to the image: 'jigsaw' or 'rotation'
        weight: float = 0.5,  # Of the transformed image's loss; the image's own has the rest
        negatives: int | None = None,  # Images drawn; None: as many as training images, 4096 at most (paper: 32,000)
        temperature: float = 0.2,  # Of the softmax; the paper's 0.07
        dim: int = 128,  # Width of an embedding
        bank_momentum: float = 0.5,  # Share of the old row in the new one
        centered: bool = True,  # Embeddings through batch norms without scale and shift; False: as in the paper
        views=None,  # 'photo', 'scan', 'microscopy'; or fields of a recipe: {'strength': 0.5} for weaker colors
    ):
        check_choice("transform", transform, ("jigsaw", "rotation"))
        check_number("weight", weight, 0, 1)
        self.transform, self.weight = transform, weight
        self.negatives, self.temperature, self.dim, self.bank_momentum = negatives, temperature, dim, bank_momentum
        self.centered, self.views = centered, views
        self.check_bank()
        self.check_views(views)
        self.min_side = 33 if transform == "jigsaw" else 8  # patches of 8 pixels
        self.passes = self._passes(fixed_size=False)

    def setup(self, dls, encoder):
        super().setup(dls, encoder)
        if self.transform == "jigsaw":
            check_takes_parts(encoder, tile_side(encoder.side), self.name)
        self.passes = self._passes(encoder.fixed_size)

    def _passes(self, fixed_size: object) -> float:
        """Of the image, and of what it was transformed to."""
        patches = 9 if fixed_size else 9 * (0.75 / 3) ** 2
        return 1 + (patches if self.transform == "jigsaw" else 1)

    def make_batch(self, x, *, generator, train, idx=None):
        views = [self.view(x, 0, generator) for _ in range(1 if train else 2)]
        changed = self.patches(x, generator) if self.transform == "jigsaw" else self.turned(x, generator)
        negatives = self.draw_negatives(len(x), 2, generator=generator)
        return (torch.stack(views, 1), changed, idx, negatives), (torch.arange(len(x), device=x.device),)

    def view(self, x: Tensor, number: int, generator: torch.Generator, **changes) -> Tensor:
        """By the recipe of this number, some of its fields changed."""
        return random_view(x, replace(self.recipe(number, x.shape[1], min(x.shape[-2:])), **changes), generator)

    def patches(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Nine patches of each image in random order, (B, 9, C, t, t)."""
        x = self.view(x, 1, generator, **NOWHERE)
        tiles = random_tiles(x, tile_side(x.shape[-1]), generator)
        tiles = self.view(tiles.flatten(0, 1), 1, generator, **WHOLE).unflatten(0, (len(x), 9))
        order = torch.rand(len(x), 9, generator=generator, device=x.device).argsort(1)
        return tiles[torch.arange(len(x), device=x.device).unsqueeze(1), order]

    def turned(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Another view in one of the four quarter turns, (B, 1, C, S, S)."""
        x = self.view(x, 0, generator)
        turns = torch.stack([torch.rot90(x, k, (-2, -1)) for k in range(4)], 1)
        k = torch.randint(4, (len(x), 1), generator=generator, device=x.device)
        return turns[torch.arange(len(x), device=x.device).unsqueeze(1), k]

    def model(self, encoder):
        parts = 9 if self.transform == "jigsaw" else 1
        return InvariantNet(encoder, invariant_heads(encoder.num_features, parts, self.dim, self.bank(), self.centered))

    def loss(self, pred, target, reduction="mean"):
        return invariant_loss(pred[1], self.weight, reduction)

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """Each image beside its patches as they were shuffled, or beside its turned view; then with their cosine."""
        views, changed = (t[:max_n] for t in inputs[:2])
        side, what = views.shape[-1], "shuffled" if self.transform == "jigsaw" else "turned"
        beside = [mosaic(tiles, side) if len(tiles) == 9 else tiles[0] for tiles in changed]
        said = [f"image {i} | {what}" if pred is None else f"cosine {pred[i]:.2f}" for i in range(len(views))]
        return draw_rows(list(zip(views[:, 0], beside)), said, ctxs, figsize)


def tile_side(side: int) -> int:
    """3/4 of a cell of a 3 x 3 grid on images of this side, in pixels."""
    return side // 3 * 3 // 4


class InvariantNet(nn.Module):
    """Views, patches or turned view, and places -> embeddings of image and patches with rows, and two logits."""

    def __init__(self, encoder: nn.Module, heads: InvariantHeads):
        super().__init__()
        self.encoder, self.heads = encoder, heads

    def forward(self, views: Tensor, changed: Tensor, idx: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        image = self.encoder(views[:, 0])
        parts = self.encoder(changed.flatten(0, 1)).unflatten(0, changed.shape[:2])
        own = self.encoder(views[:, 1]) if views.shape[1] == 2 else None
        found = self.heads(image, parts, idx, negatives, own)
        return torch.stack([found.image, found.changed, found.own], 1), found.logits
