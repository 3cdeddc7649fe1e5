"""Losses that more than one place uses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_fastai.errors import TaskError, unknown
from selfsup_fastai.processes import first_row, gathered


def units(
    z: Tensor,  # (..., D)
) -> Tensor:
    """Embeddings scaled to length 1, in float32 at least."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


def nt_xent(
    z1: Tensor,  # (B, D) embeddings of the first views, any scale
    z2: Tensor,  # (B, D) embeddings of the second views, row i from the same image as in z1
    temperature: float = 0.1,  # τ; the author's code takes 0.1 on ImageNet
    reduction: str = "mean",  # 'mean' over the 2B views, or 'none': the mean of each image's two terms
    alike: Tensor | None = None,  # (B,) int: images with the same number are not told apart; None: all are
) -> Tensor:  # scalar, or (B,) with reduction='none'
    """The loss of SimCLR (Chen et al. 2020): each of the 2B views must find its partner among the 2B - 1 others.

    Cross-entropy over cosine similarities divided by τ; a view is not compared with itself. 'mean' is the paper's mean
    over 2B terms; the author's code adds the means of the two directions, which is twice as much.
    Half precision and autocast are left for float32 inside, float64 stays float64. With several processes the views of
    all of them are told apart; the terms are those of this process's images.
    Raises `TaskError` for fewer than 2 images (no negatives) or shapes that do not match.
    """
    _check_pair(z1, z2, temperature)
    if reduction not in ("mean", "none"):
        raise unknown("reduction", reduction, ["mean", "none"])
    b = len(z1)
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = units(z1), units(z2)
        others = torch.cat([gathered(z1), gathered(z2)])  # (2N, D), N images in all processes
        similarity = torch.cat([z1, z2]) @ others.T / temperature  # (2B, 2N)
        first, n = first_row(z1), len(others) // 2
        own = torch.arange(b, device=z1.device) + first
        own = torch.cat([own, own + n])
        partner, left_out = own.roll(b), F.one_hot(own, 2 * n).bool()
        if alike is not None:
            same = alike.repeat(2).unsqueeze(1) == gathered(alike).repeat(2)
            left_out = same & ~F.one_hot(partner, 2 * n).bool()
        similarity = similarity.masked_fill(left_out, float("-inf"))
        terms = F.cross_entropy(similarity, partner, reduction="none").view(2, b).mean(dim=0)
    return terms.mean() if reduction == "mean" else terms


def view_distance(
    z: Tensor,  # (B, D) embeddings of the images
    changed: Tensor,  # (B, V, D) of what was made of them
    kind: str = "cosine",  # 'cosine': 1 - cosine, 0..2; 'mse': mean squared difference of the coordinates as they are
    reduction: str = "mean",  # 'mean', or 'none': the mean over the V of each image
) -> Tensor:  # scalar, or (B,) with reduction='none'
    """How far the embeddings of changed images are from the images' own. Both sides have a gradient.

    'mse' falls, too, if embeddings only become smaller. Half precision and autocast are left for float32 inside.
    Raises `UnknownNameError` for another kind.
    """
    with torch.autocast(z.device.type, enabled=False):
        z, changed = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z.unsqueeze(1), changed))
        if kind == "cosine":
            terms = 1 - F.cosine_similarity(z, changed, dim=-1)
        elif kind == "mse":
            terms = (z - changed).square().mean(-1)
        else:
            raise unknown("distance of views", kind, ["cosine", "mse"])
    return terms.mean() if reduction == "mean" else terms.mean(1)


def uda_loss(
    weak: Tensor,  # (B, K, ...) logits of the weakly changed images; no gradient flows to them
    strong: Tensor,  # (B, K, ...) logits of the same images, strongly changed
    threshold: float = 0.8,  # Images whose weak view is less sure than this do not count
    temperature: float = 0.4,  # Of the target's softmax: below 1 it is sharpened
    several: bool = False,  # K answers of yes or no each (multi-label) in place of one of K classes
) -> Tensor:  # scalar: the mean over all images, those that do not count as 0
    """Unsupervised data augmentation (Xie et al. 2020, arXiv 1904.12848): KL(sharpened weak || strong).

    How sure the weak view is, is its largest probability before it is sharpened, as in the authors' code. With
    `several` (ours) each answer is a distribution over yes and no of its own.
    """
    weak, strong = _answers(weak.detach(), several), _answers(strong, several)
    target = (weak / temperature).log_softmax(1)
    terms = (target.exp() * (target - strong.log_softmax(1))).sum(1)
    return (terms * (_sureness(weak) > threshold)).mean()


def fixmatch_loss(
    weak: Tensor,  # (B, K, ...) logits of the weakly changed images; no gradient flows to them
    strong: Tensor,  # (B, K, ...) logits of the same images, strongly changed
    threshold: float = 0.95,  # Images whose weak view is less sure than this do not count
    several: bool = False,  # As in `uda_loss`
) -> Tensor:  # scalar: the mean over all images, those that do not count as 0
    """FixMatch (Sohn et al. 2020, arXiv 2001.07685): cross-entropy of the strong view with the weak view's class."""
    weak, strong = _answers(weak.detach(), several), _answers(strong, several)
    terms = F.cross_entropy(strong, weak.argmax(1), reduction="none")
    return (terms * (_sureness(weak) >= threshold)).mean()


def softmax_mse(
    a: Tensor,  # (B, K, ...) logits
    b: Tensor,  # (B, K, ...) logits of other views of the same images
    several: bool = False,  # As in `uda_loss`: sigmoids in place of a softmax
) -> Tensor:  # scalar
    """Mean squared difference of the probabilities, over classes and images (mean teacher, Tarvainen & Valpola 2017,
    arXiv 1703.01780; the Pi model, Laine & Aila 2017, arXiv 1610.02242). A side with a gradient gets it."""
    a, b = (z.sigmoid() if several else z.softmax(1) for z in (a.float(), b.float()))
    return (a - b).square().mean()


def confidence(
    weak: Tensor,  # (B, K, ...) logits
    strong: Tensor,  # (B, K, ...) logits of other views of the same images
    threshold: float = 0.0,
    several: bool = False,  # As in `uda_loss`
) -> tuple[Tensor, Tensor]:
    """Share of the answers that are at least so sure; and of these, the share that the other view gives, too (NaN of
    none)."""
    weak, strong = _answers(weak.detach(), several), _answers(strong.detach(), several)
    sure = _sureness(weak) >= threshold
    alike = sure & (weak.argmax(1) == strong.argmax(1))  # counted, not picked out: a GPU is not waited for
    return sure.float().mean(), alike.sum() / sure.sum()


def _answers(logits: Tensor, several: bool) -> Tensor:
    """(B, K, ...) as float; of K answers of yes or no each, (B, 2, K, ...): softmax over 2 is the sigmoid of each."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.stack([torch.zeros_like(logits), logits], 1) if several else logits


def _sureness(logits: Tensor) -> Tensor:
    return logits.softmax(1).amax(1)


def nce(
    logits: Tensor,  # (B, 1 + K): log(p / (K / N)) of the truth and of K draws, as `ContrastBank.logits` gives it
    reduction: str = "mean",
) -> Tensor:  # scalar, or (B,) with reduction='none'
    """Noise-contrastive estimation (NPID, Wu et al. 2018): tell the truth from K uniform draws out of N possibilities.

    -log(p / (p + K/N)) of the truth, and the sum of -log((K/N) / (p + K/N)) over the draws.
    """
    terms = F.softplus(-logits[:, 0]) + F.softplus(logits[:, 1:]).sum(1)
    return terms.mean() if reduction == "mean" else terms


def invariant_loss(
    logits: Tensor,  # (B, 2, 1 + K) of the changed image and of the image
    weight: float = 0.5,  # Of the changed image's term; the image's has the rest
    reduction: str = "mean",  # 'mean', or 'none': (B,)
) -> Tensor:
    """The noise-contrastive estimation of both against the bank (PIRL)."""
    changed, image = (nce(each, reduction) for each in logits.unbind(1))
    return weight * changed + (1 - weight) * image


def off_diagonal_squares(
    matrix: Tensor,  # (D, D)
) -> Tensor:  # scalar
    """Sum of squares beside the diagonal: how much the features of embeddings tell about each other."""
    return (matrix - matrix.diagonal().diag()).square().sum()


def crop_cross_entropy(
    codes: Tensor,  # (B, 2, K) probabilities of K classes, given to the two large crops of each image; no gradient
    logits: Tensor,  # (B, V, K) of all its crops, the large ones first
    reduction: str = "mean",  # 'mean', or 'none': the mean over the pairs of each image
) -> Tensor:  # scalar, or (B,) with reduction='none'
    """Every crop is to answer with the code of another one: the loss of SwAV and DINO (Caron et al. 2020 and 2021).

    Cross-entropy, the mean over all pairs of a code and a crop, but for a large crop with its own code. Half precision
    and autocast are left for float32 inside, float64 stays float64.
    """
    with torch.autocast(logits.device.type, enabled=False):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        terms = -torch.einsum("bck,bvk->bcv", codes.to(dtype), logits.to(dtype).log_softmax(-1))
        n_codes, n_crops = terms.shape[1:]
        own = torch.eye(n_codes, n_crops, dtype=torch.bool, device=terms.device)
        each = terms.masked_fill(own, 0).sum((1, 2)) / (n_codes * (n_crops - 1))
    return each.mean() if reduction == "mean" else each


def _check_pair(z1: Tensor, z2: Tensor, temperature: float) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise TaskError(
            f"The contrastive loss compares two sets of embeddings (B, D) of the same images; "
            f"it got {tuple(z1.shape)} and {tuple(z2.shape)}."
        )
    if len(z1) < 2:
        raise TaskError(
            f"The contrastive loss needs at least 2 images in a batch, to have something to tell an image from; "
            f"it got {len(z1)}. Use a larger batch size, or drop the last batch."
        )
    if not temperature > 0:
        raise TaskError(f"The temperature of the contrastive loss is {temperature}; it must be above 0 (SimCLR: 0.1).")
