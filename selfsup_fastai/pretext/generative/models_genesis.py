"""Models Genesis, in two dimensions."""

import torch
from torch import Tensor

from selfsup_fastai.checks import check_choice, check_flag, check_number
from selfsup_fastai.data.draws import Draw
from selfsup_fastai.data.patches import boxes_mask
from selfsup_fastai.encoders.decoders import PerPixel
from selfsup_fastai.pretext.base import RestoringTask, per_image
from selfsup_fastai.seeding import host_of
from selfsup_fastai.transfer import constant, sent

CURVE_POINTS = 1000
ENTRIES = 4_000_000  # numbers of one part of `shuffled`: about 100 MB
FLIPS, BOXES = 3, 5
NEXT_FLIP, NEXT_BOX = 0.4, 0.95


class ModelsGenesis(RestoringTask):
    """What was the image before its pixels were shuffled, its intensities bent and parts of it painted over with noise?

    Zhou, Sodha, Rahman Siddiquee, Feng, Tajbakhsh, Gotway & Liang, Models Genesis: Generic Autodidactic Models for 3D
    Medical Image Analysis, 2019 (arXiv 1908.06912). To restore the image, the network must know appearance (from the
    bent intensities), texture and borders (from the shuffled windows), and context (from the painted parts).

    In: the image (B, C, H, W) in [0, 1], distorted by what was drawn for it, in this order: local pixel shuffling (in
    small windows the pixels change places; always read from the unshuffled image), a cubic Bezier curve from (0, 0) to
    (1, 1) through which all intensities go (rising, or in half of the images left as it runs, which inverts the
    contrast), and painting: noise in up to five boxes, or noise everywhere but in one to five large boxes, never both.
    First both image and target are flipped: while a chance of 0.4 comes true, up to three times, along a random axis.
    Target: the undistorted image (B, C, H, W). Prediction: images (B, C, H, W), raw until `activation` makes them 0..1.
    Loss: mean squared error of all pixels. Metric: the share of variance explained, 0 for painting the mean color.

    Ours, built from the description: two dimensions instead of volumes; lengths that scale with the image (windows of
    up to 1/10 of a side, boxes 1/21 from the border: 3 of 64 pixels), and as many windows as cover the image 1.9 times,
    which is what the paper's 10,000 do to its cubes; one curve and one order of pixels for all channels, noise for
    each; a U-Net whose only skip is at the first level, for with all of them the encoder's last layers need not know
    much. Networks without a finer first level (ViT) have no skip.

    Guards against copying: every kind of distortion hides what another leaves, so no single trick restores the image;
    and the decoder has no skip but that of the first level, the way around the encoder's deeper layers that remains:
    `skip` None closes it.

    Suits medical images, grey above all, and other images whose texture and layout matter and that all have a common
    look; images of 32 pixels or more. Does not suit where absolute intensity is the finding (CT numbers, dose maps: set
    `curve` to 0) or where left and right, up and down matter and must not be learned as equal (set `flip` to False).
    """

    name = "models_genesis"
    paper = "Zhou et al. 2019"
    by_map = True
    min_side = 20  # windows of two pixels

    def __init__(
        self,
        shuffle: float = 0.5,  # Probability that windows of the image are shuffled
        curve: float = 0.9,  # Probability that intensities are bent
        paint: float = 0.9,  # Probability that noise is painted
        outward: float = 0.8,  # Share of the painted images in which noise is all around instead of in boxes
        flip: bool = True,  # Flip image and target together
        skip: str | None = "first",  # Skip from the encoder's first level to the decoder; None: none
    ):
        for name, value in [("shuffle", shuffle), ("curve", curve), ("paint", paint), ("outward", outward)]:
            check_number(name, value, 0, 1)
        check_flag("flip", flip)
        check_choice("skip", skip, ("first", None))
        self.shuffle, self.curve, self.paint, self.outward = shuffle, curve, paint, outward
        self.flip, self.skip = flip, skip
        if not paint:
            self.check_idle("paint=0", "outward")

    def make_batch(self, x, *, generator, train, idx=None):
        draw = Draw(generator)
        if self.flip:
            x = flipped(x, draw)
        b = len(x)
        bent = shuffled(x, Draw(host_of(generator)).chance(b, self.shuffle), generator)
        bent = curved(bent, draw.chance(b, self.curve), draw)
        return (noised(bent, draw.chance(b, self.paint), draw.chance(b, self.outward), draw),), (x,)

    def model(self, encoder):
        return PerPixel(encoder, encoder.in_chans, skip=self.skip == "first")

    def loss(self, pred, target, reduction="mean"):
        return per_image((pred.sigmoid() - target).square(), reduction)


def flipped(x: Tensor, draw: Draw) -> Tensor:
    """Each image flipped up to three times along a random axis, as long as its chance comes true."""
    goes_on = draw.chance((FLIPS, len(x)), NEXT_FLIP).cumprod(0).bool()
    along = draw.chance((FLIPS, len(x)), 0.5)
    for axis, chosen in ((-2, along), (-1, ~along)):
        odd = ((goes_on & chosen).sum(0) % 2 == 1).view(-1, 1, 1, 1)
        x = torch.where(odd, x.flip(axis), x)
    return x


def window_count(height: int, width: int) -> int:
    """As many windows as have 1.9 times the area of the image together, on average."""
    mean_area = (1 + height // 10) / 2 * (1 + width // 10) / 2
    return round(1.9 * height * width / mean_area)


def shuffled(x: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Local pixel shuffling of the chosen images (B,), drawn on the CPU: in many small windows all pixels change
    places."""
    rows = sent(chosen.nonzero()[:, 0], x.device)
    h, w = x.shape[-2:]
    part = max(1, ENTRIES // (window_count(h, w) * (h // 10) * (w // 10)))
    out = x.clone()
    for some in rows.split(part):
        source = shuffled_places(len(some), h, w, generator)
        out[some] = x[some].flatten(2).gather(2, source.unsqueeze(1).expand(-1, x.shape[1], -1)).view_as(x[some])
    return out


def shuffled_places(b: int, h: int, w: int, generator: torch.Generator, count: int | None = None) -> Tensor:
    """For each pixel of each of `b` images the one it is read from, (b, h * w).

    `count` windows, sides 1 to a tenth of the image's, each with its own order of pixels. All are read from the
    unshuffled image, and the later window wins.
    """
    draw, device = Draw(generator), generator.device
    n = window_count(h, w) if count is None else count
    height, width = (draw.below(torch.full((b, n, 1), side // 10, device=device)) + 1 for side in (h, w))
    top, left = draw.below(h - height + 1), draw.below(w - width + 1)
    slots = torch.arange((h // 10) * (w // 10), device=device)  # of a window, row by row; small windows have fewer
    is_slot = slots < height * width
    order = torch.where(is_slot, draw.uniform(is_slot.shape), 2.0).argsort(-1)  # what is no slot stays behind
    nowhere = h * w

    def places(slot: Tensor) -> Tensor:
        at = (top + slot // width) * w + left + slot % width
        return torch.where(is_slot, at, nowhere).flatten(1)

    to, number = places(slots.expand_as(is_slot)), torch.arange(n, device=device).repeat_interleave(len(slots))
    number = number.expand_as(to)
    last = torch.full((b, h * w + 1), -1, device=device).scatter_reduce(1, to, number, "amax")
    to = torch.where(last.gather(1, to) == number, to, nowhere)
    source = torch.arange(h * w + 1, device=device).repeat(b, 1)
    return source.scatter(1, to, places(order))[:, :nowhere]


def bezier(points: Tensor) -> Tensor:
    """Cubic Bezier curves from (1, 1) back to (0, 0), (B, 2, 1000), with two control points each, (B, 2, 2)."""
    t = torch.linspace(1, 0, CURVE_POINTS, device=points.device)
    first, second = points.unsqueeze(-1).unbind(1)  # (B, 2, 1) each
    return 3 * (1 - t) ** 2 * t * first + 3 * (1 - t) * t**2 * second + t**3


def curved(x: Tensor, chosen: Tensor, draw: Draw) -> Tensor:
    """Intensities of the chosen images (B,) through a random curve each; half of the curves run from 1 to 0."""
    b = len(x)
    at, value = bezier(draw.uniform((b, 2, 2))).to(x.dtype).unbind(1)
    rising = draw.chance((b, 1), 0.5)
    value = torch.where(rising, value.sort(1).values, value)
    return torch.where(chosen.view(-1, 1, 1, 1), interpolated(x, at.sort(1).values, value), x)


def interpolated(x: Tensor, at: Tensor, value: Tensor) -> Tensor:
    """Numbers x (B, ...) through the polygons with corners `at` (B, n), ascending from 0 to 1, and `value` (B, n)."""
    flat = x.flatten(1).contiguous()
    right = torch.searchsorted(at.contiguous(), flat).clamp(1, at.shape[1] - 1)
    (x0, x1), (y0, y1) = ([row.gather(1, right - 1), row.gather(1, right)] for row in (at, value))
    share = ((flat - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1)
    return torch.lerp(y0, y1, share).view_as(x)


def noised(x: Tensor, chosen: Tensor, outward: Tensor, draw: Draw) -> Tensor:
    """Noise in boxes of the chosen images (B,), or, where `outward` (B,), everywhere but in boxes."""
    b, _, h, w = x.shape
    inside = boxes(b, h, w, draw, least=1 / 6, most=1 / 3, first=NEXT_BOX)
    kept = boxes(b, h, w, draw, least=3 / 7, most=4 / 7, first=1.0)
    noisy = torch.where(outward.view(-1, 1, 1, 1), ~kept, inside) & chosen.view(-1, 1, 1, 1)
    return torch.where(noisy, draw.uniform(x.shape).to(x.dtype), x)


def boxes(
    b: int,
    h: int,
    w: int,
    draw: Draw,
    least: float,  # Shortest height and width, as shares of the image's
    most: float,  # Longest
    first: float,  # Probability of the first box; each of up to four more has 0.95, if all before it came
) -> Tensor:
    """Whether a pixel lies in one of an image's boxes, (b, 1, h, w); boxes keep 3 of 64 pixels from the border."""
    chances = constant((first,) + (NEXT_BOX,) * (BOXES - 1), torch.float32, draw.generator.device)
    there = (draw.uniform((b, BOXES)) < chances).cumprod(1).bool()
    margin = max(1, round(min(h, w) * 3 / 64))
    starts, lengths = [], []
    for side in (h, w):
        length = (draw.uniform((b, BOXES), least, most) * side).long()
        starts.append(margin + draw.below((side - length - 2 * margin + 1).clamp(min=1)))
        lengths.append(length * there)
    return boxes_mask(starts, lengths, (h, w))
