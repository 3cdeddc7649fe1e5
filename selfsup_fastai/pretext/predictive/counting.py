"""Learning to count."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.data.colors import some_grey
from selfsup_fastai.data.halving import KERNELS, halved
from selfsup_fastai.encoders.crops import check_takes_parts
from selfsup_fastai.encoders.heads import mlp
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pictures import draw, grid_axes, side_by_side
from selfsup_fastai.pretext.base import PerView, PretextTask, per_image


def counts_match(pred, other):
    """Share of images whose tiles add up to a count nearer to their own image's than to the other image's.

    As near to both, as where nothing is counted, is half of a match; an image alone in its batch has nothing else.
    """
    own, foreign = _distances(pred, other)
    return ((foreign - own).sign() / 2 + 0.5).mean()


class Counting(PretextTask):
    """How many of each thing are in the image, if its four quarters together must hold as many?

    Noroozi, Pirsiavash & Favaro, Representation Learning by Learning to Count, 2017 (arXiv 1708.06734). Nobody says
    what is counted: the network finds things that a quarter holds or does not hold and that survive shrinking.

    In: the four quarters of each image and the whole at half its size, so that all five are of one size: one input
    (B, 5, C, H/2, W/2); of odd sizes the last row or column is cut off. Target: the row of another image of the batch,
    (B,): the next one. Prediction: counts phi of each of the five, (B, 5, counts), none below 0. Loss of an image x
    with the other image y, with D for the image at half its size and T for its quarters:
    |phi(Dx) - sum phi(Tx)|^2 + max(0, margin - |phi(Dy) - sum phi(Tx)|^2), summed over the counts. The code we
    read adds the same with x and y exchanged: as every image is an x and a y here, twice the value on average.
    Pictures tell |phi(Dx) - sum phi(Tx)|^2 and |phi(Dy) - sum phi(Tx)|^2. Guessing gives `counts_match` of 50 %, and so
    does counting nothing. The hidden layer is narrower than the paper's 4096, for thousands of images rather than a
    million.

    Guards: counts of 0 for everything would add up, too; the second term makes them cost `margin`. That an image
    was shrunk should not show, so the kernel is drawn for each image (nearest, area, bilinear, bicubic, Lanczos),
    and two thirds of the color images are made grey, all five parts alike, against chromatic aberration. It still
    shows to some extent, as only one of the five parts is shrunk: of 400 photographs of 64 pixels a net that sees 9
    pixels named that part for a third (guessing: a fifth), for over half if the kernel was always 'area', for 90 %
    if 'nearest'. No kernel hides it where the images were enlarged to their size, for only the shrunken part is
    sharp then. CIFAR-10's 32 pixels brought to 48: such a net named the part for 92 % of the images (at 32: 56 %),
    nothing was learned in the best layer (.442, untrained .444), and at 32 pixels it was (.434, untrained .397;
    bench/tasks.py --size 32). So let `size` be no more than the pixels that the images have.

    Suits photographs and scans with many things or parts in them (cells, nuclei). Does not suit images of one
    centered thing that no quarter shows, nor batches of one. The loss wants a batch of images that differ. An encoder
    of fixed input size (ViT) sees every part enlarged to that size: five passes for each image.
    """

    name = "counting"
    paper = "Noroozi et al. 2017"
    of_color = ("grey",)
    min_side = 16  # quarters of 8 pixels
    metrics = (counts_match,)

    def __init__(
        self,
        margin: float = 10.0,  # How far, squared, the counts of two images should at least be apart
        counts: int = 1000,  # How many things are counted
        hidden: int = 1024,  # Width of the layer before
        grey: float = 2 / 3,  # Share of color images made grey; 0 turns the guard off
        kernels: str = "all",  # 'all': drawn for each image; or one of nearest, area, bilinear, bicubic, lanczos
    ):
        check_number("margin", margin, above=0)
        check_number("counts", counts, 1, whole=True)
        check_number("hidden", hidden, 1, whole=True)
        check_number("grey", grey, 0, 1)
        check_choice("kernels", kernels, ("all", *KERNELS))
        self.margin, self.counts, self.hidden = margin, counts, hidden
        self.grey, self.kernels = grey, kernels
        self.passes = 5 / 4

    def setup(self, dls, encoder):
        if dls.train.bs is not None and dls.train.bs < 2:
            raise TaskError("counting compares images of a batch: it needs a batch size of 2 or more, not 1.")
        check_takes_parts(encoder, encoder.side // 2, self.name)
        self.passes = 5 if encoder.fixed_size else 5 / 4

    def make_batch(self, x, *, generator, train, idx=None):
        b, _, h, w = x.shape
        x = x[..., : h // 2 * 2, : w // 2 * 2]
        x = some_grey(x, self.grey, generator)
        kernel = torch.randint(len(KERNELS), (b,), generator=generator, device=x.device)
        if self.kernels != "all":
            kernel = torch.full_like(kernel, list(KERNELS).index(self.kernels))
        other = (torch.arange(b, device=x.device) + 1) % b
        return (torch.cat([_quarters(x), halved(x, kernel).unsqueeze(1)], 1),), (other,)

    def model(self, encoder):
        return PerView(encoder, nn.Sequential(mlp(encoder.num_features, self.hidden, self.counts), nn.ReLU()))

    def loss(self, pred, other, reduction="mean"):
        own, foreign = _distances(pred, other)
        too_near = (self.margin - foreign).clamp(min=0)
        return per_image(own + torch.where(_has_other(other), too_near, 0), reduction)

    def activation(self, pred):
        return pred

    def decode(self, pred):
        """The counts themselves: their distances say more than any sum of them."""
        return pred

    def chance(self):
        return 0.5

    def show(self, inputs, targets, pred=None, ctxs=None, max_n=9, figsize=None):
        """The quarters, the whole and the other image at half their size; after training with how far the quarters'
        counts are from those of either."""
        axes = grid_axes(min(max_n, len(inputs[0])), ctxs, figsize, aspect=1.9)  # leaves room for two lines
        (parts,), (other,) = inputs, targets
        has_other = _has_other(other).tolist()
        apart = None if pred is None else torch.stack(_distances(pred[: len(other)], other), 1).tolist()
        for i, ax in enumerate(axes):
            wholes = [parts[i, 4], parts[other[i], 4]] if has_other[i] else [parts[i, 4]]
            panels, said, right = (
                ["quarters", "whole", "another"][: 1 + len(wholes)],
                "quarters hold as much as whole?",
                None,
            )
            if apart:
                own, foreign = apart[i]
                said = f"off by {own:.2g}"
                if has_other[i]:
                    said, right = f"{said}, from another by {foreign:.2g}", own < foreign
            draw(ax, _picture(parts[i], wholes), f"{' | '.join(panels)}\n{said}", right)
        return axes


def _quarters(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4, C, H/2, W/2), row by row."""
    return torch.stack([quarter for half in x.chunk(2, -2) for quarter in half.chunk(2, -1)], 1)


def _distances(pred: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of the quarters' sum from the count of the image itself and of the other one, (B,) each."""
    pred = pred.to(torch.promote_types(pred.dtype, torch.float32))  # sums of squares are too much for half precision
    total, whole = pred[:, :4].sum(1), pred[:, 4]
    return (whole - total).square().sum(-1), (whole[other] - total).square().sum(-1)


def _has_other(other: Tensor) -> Tensor:
    """(B,) bool: all, or none of a batch of one."""
    return other != torch.arange(len(other), device=other.device)


def _picture(parts: Tensor, wholes: list[Tensor]) -> Tensor:
    """The quarters, first of parts (5, C, h, w), in their places with white gaps, and the wholes beside them."""
    top, bottom = side_by_side(parts[:2]), side_by_side(parts[2:4])
    quarters = torch.cat([top, torch.ones_like(top[:, :2]), bottom], 1)
    pictures, spare = [quarters], quarters.shape[1] - parts.shape[-2]
    pictures += [F.pad(whole.cpu(), (4, 0, spare // 2, spare - spare // 2), value=1.0) for whole in wholes]
    return torch.cat(pictures, 2)
