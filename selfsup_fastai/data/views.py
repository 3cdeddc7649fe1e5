"""Random views of images on the device: the draw apart from its application.

`draw_views` draws every number that a batch of views needs, `apply_views` does nothing random: the same `Views` give
the same pixels, so views can be stored, shown, indexed and fixed by hand in a test.

    views = draw_views(SIMCLR, x.shape, generator, size=128)
    a = apply_views(x, views)                # (B, C, 128, 128) in [0, 1]

The order is crop with turn, shear and flips in one sampling, intensity window, color (brightness, contrast,
saturation, hue in an order drawn per image), grey, blur, solarize, erase. Every step that torchvision has does what its
function of the same name does.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup_fastai.data.colors import Jitter, grey, jitter_, jitter_of, solarize, stretch_
from selfsup_fastai.data.draws import Draw, Views, draw_views
from selfsup_fastai.data.patches import windows
from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.data.sampling import Straight, sample_shrunk, sample_straight, sample_turned, straight
from selfsup_fastai.errors import TaskError
from selfsup_fastai.transfer import sent

CHUNK = 400_000
"""Numbers worked on at a time on the CPU: what stays in the caches of two cores."""


@torch.no_grad()
def apply_views(
    x: Tensor,  # (B, C, H, W) float in [0, 1], C = 1 or 3
    views: Views,  # Drawn for B images of this H and W
) -> Tensor:  # (B, C, size, size) in [0, 1], of the type of x
    """Cut, flip, color and blur each image as it was drawn. On 1 channel saturation, hue and grey change nothing."""
    _check_images(x, views)
    dtype = torch.promote_types(x.dtype, torch.float32)
    jitter = jitter_of(views, x.shape[1], dtype)
    rows = jitter.place.argsort(stable=True)  # images whose hue comes at the same place are neighbors
    views, jitter = views[rows], jitter.pick(rows)
    drawn, known = _drawn(views, jitter, rows), views
    views, jitter, rows = views.to(x.device), jitter.to(x.device), sent(rows, x.device)
    places = straight(views, x.new_empty(0, *x.shape[1:], dtype=dtype))
    numbers = _Numbers(places, jitter, _kernels(views, dtype))
    out = x.new_empty(*x.shape[:2], views.size, views.size)
    for part in _chunks(out):
        of_part = {name: values[part] for name, values in drawn.items()}
        images = x.index_select(0, rows[part]).to(dtype)
        of_views = (partial(v.__getitem__, part) for v in (views, known))
        _put(out, of_part["rows"], _view(images, *of_views, numbers.pick(part), of_part))
    return out


class _Numbers(NamedTuple):
    """What the usual steps need, computed for a whole batch: for the few images of a chunk small tensors take long."""

    places: Straight
    jitter: Jitter
    kernels: Tensor  # (radius + 1, B, 1, 1, 1)

    def pick(self, part: slice) -> "_Numbers":
        places = Straight(self.places.columns[part], self.places.rows[part])
        return _Numbers(places, self.jitter.pick(part), self.kernels[:, part])


def _drawn(views: Views, jitter: Jitter, rows: Tensor) -> dict[str, list[int]]:
    """Which images these are and what happens to each: known if it was drawn on the CPU, else a device is asked."""
    turned = (views.turn != 0) | (views.shear != 0)
    flags = {
        "rows": rows,
        "place": jitter.place,
        "turned": turned,
        "shrunk": (views.boxes[:, 2:] > views.size).any(1) & ~turned,
        "window": (views.window[:, 0] > 0) | (views.window[:, 1] < 1),
        "grey": views.grey,
        "blur": views.sigma > 0,
        "solarize": views.solarize,
        "erase": views.erase[:, 2] > 0,
    }
    return dict(zip(flags, torch.stack([flag.long() for flag in flags.values()]).tolist()))


def _chunks(out: Tensor) -> Iterator[slice]:
    """Slices of a batch: all of it on an accelerator, on the CPU as many images as the caches hold."""
    n = len(out) if out.device.type != "cpu" else CHUNK // max(1, out[:1].numel())
    n = max(1, n)
    return (slice(i, i + n) for i in range(0, len(out), n))


def _view(
    x: Tensor,
    views: Callable[[], Views],
    known: Callable[[], Views],  # The same where they were drawn
    numbers: _Numbers,
    drawn: dict[str, list[int]],
) -> Tensor:
    """The view of each image; `drawn` says for each step on which images it is to be done."""
    images, shrunk = x, _true(drawn["shrunk"])
    x = sample_turned(x, views()) if any(drawn["turned"]) else sample_straight(x, numbers.places)
    _where_drawn(x, drawn["shrunk"], lambda _, rows: sample_shrunk(images[rows], known()[shrunk]))
    if any(drawn["window"]):
        stretch_(x, views().window)
    jitter_(x, numbers.jitter, drawn["place"])
    if x.shape[1] == 3:
        _where_drawn(x, drawn["grey"], lambda part, rows: grey(part).expand_as(part))
    _where_drawn(x, drawn["blur"], lambda part, rows: _blur(part, numbers.kernels[:, rows]))
    _where_drawn(x, drawn["solarize"], lambda part, rows: solarize(part, views().threshold))
    _where_drawn(x, drawn["erase"], lambda part, rows: _erase(part, views().erase[rows]))
    return x.clamp_(0, 1)


def _where_drawn(x: Tensor, drawn: list[int], change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the images where `drawn` is true by `change(images, rows)`."""
    order = _true(drawn)
    if order:
        rows = sent(torch.tensor(order), x.device)
        _put(x, order, change(x.index_select(0, rows), rows))


def _true(drawn: list[int]) -> list[int]:
    return [i for i, yes in enumerate(drawn) if yes]


def _put(out: Tensor, rows: list[int], images: Tensor) -> None:
    """Images to their rows of `out`."""
    if out.device.type == "cpu":  # where index_copy_ takes longer
        for row, image in zip(rows, images):
            out[row].copy_(image)
    else:
        out.index_copy_(0, sent(torch.tensor(rows), out.device), images.to(out.dtype))


def random_view(
    x: Tensor,  # (B, C, H, W) float in [0, 1], C = 1 or 3
    recipe: Recipe,
    generator: torch.Generator,
    size: int | None = None,  # Side of the view; None: the shorter side of the images
) -> Tensor:  # (B, C, size, size) in [0, 1]
    """Draw a view of each image and apply it."""
    _check_images(x)
    return apply_views(x, draw_views(recipe, tuple(x.shape), generator, size))


def square_view(
    x: Tensor,  # (B, C, H, W) float in [0, 1], C = 1 or 3
    side: int,  # Of the view, in pixels
    recipe: Recipe | None,  # None: no random view but the center square, at this size
    generator: torch.Generator,
) -> Tensor:  # (B, C, side, side) in [0, 1]
    """What a task paints again: a random view in training, always the same in validation."""
    if recipe is not None:
        return random_view(x, recipe, generator, side)
    x = center_square(x)
    same = x.shape[-1] == side
    return x if same else F.interpolate(x, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


def multi_crop(
    x: Tensor,  # (B, C, H, W) float in [0, 1], C = 1 or 3
    recipes: Sequence[Recipe],  # One for each view: [DINO_GLOBAL_1, DINO_GLOBAL_2, *[DINO_LOCAL] * 6]
    generator: torch.Generator,
    sizes: Sequence[int],  # Side of each view
) -> list[Tensor]:  # (B, C, size, size) for each recipe
    """Views of different recipes and sizes of each image (SwAV, Caron et al. 2020; DINO, Caron et al. 2021)."""
    if len(recipes) != len(sizes):
        raise TaskError(f"{len(recipes)} recipes came with {len(sizes)} sizes; give one size for each recipe.")
    return [random_view(x, recipe, generator, size) for recipe, size in zip(recipes, sizes)]


def _check_images(x: Tensor, views: Views | None = None) -> None:
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.is_floating_point():
        raise TaskError(
            f"Views are for float images (B, C, H, W) in [0, 1] with 1 or 3 channels; "
            f"these are {tuple(x.shape)} of {x.dtype}. IntToFloatTensor makes floats of bytes."
        )
    if views is not None and len(views) != len(x):
        raise TaskError(f"{len(views)} views were drawn for a batch of {len(x)} images. Draw them for x.shape.")


def _kernels(views: Views, dtype: torch.dtype) -> Tensor:
    """Gaussian weights of a pixel and its neighbors on either side, (radius + 1, B, 1, 1, 1).

    The kernel's side is a tenth of the view's, made odd (SimCLR).
    """
    radius = views.size // 10 // 2
    steps = torch.arange(-radius, radius + 1, device=views.sigma.device, dtype=dtype)
    sigma = views.sigma.to(dtype)[:, None].clamp(min=1e-6)  # those with 0 are not blurred
    return torch.softmax(-0.5 * (steps / sigma) ** 2, dim=1)[:, radius:].T.contiguous()[..., None, None, None]


def _blur(x: Tensor, kernels: Tensor) -> Tensor:
    """Gaussian blur, reflected at the borders."""
    weights = list(kernels)
    return x if len(weights) == 1 else _smooth(_smooth(x, weights, 3), weights, 2)


def _smooth(x: Tensor, weights: list[Tensor], dim: int) -> Tensor:
    """One axis of the blur."""
    radius, side = len(weights) - 1, x.shape[dim]
    padded = F.pad(x, (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius), mode="reflect")
    out, pair = padded.narrow(dim, radius, side) * weights[0], torch.empty_like(x)
    for k in range(1, radius + 1):
        torch.add(padded.narrow(dim, radius - k, side), padded.narrow(dim, radius + k, side), out=pair)
        out.addcmul_(pair, weights[k])
    return out


def _erase(x: Tensor, boxes: Tensor) -> Tensor:
    """Each image's rectangle painted over with its mean color (Zhong et al. 2020; DeVries & Taylor 2017)."""
    top, left, height, width = boxes[:, :, None].unbind(dim=1)
    at = torch.arange(x.shape[-1], device=x.device)
    rows, columns = (at >= top) & (at < top + height), (at >= left) & (at < left + width)
    hole = (rows[:, None, :, None] & columns[:, None, None, :]).to(x.dtype)
    return torch.lerp(x, x.mean((2, 3), keepdim=True), hole)


def random_shift_flip(
    x: Tensor,  # (B, C, H, W)
    generator: torch.Generator,
    pad: int = 4,  # Largest shift in pixels, in each direction
    flip: float = 0.5,  # Probability of a left-right mirror image
) -> Tensor:  # (B, C, H, W)
    """Shift each image by whole pixels, reflected at the borders, and mirror some: no pixel value changes.

    The "pad, crop, flip" of CIFAR training and RotNet (Gidaris et al. 2018).
    """
    return apply_shifts(x, *draw_shifts(tuple(x.shape), generator, pad, flip))


def shift_flip_by_share(
    x: Tensor,  # (B, C, H, W)
    generator: torch.Generator,
    shift: float,  # Largest shift, a share of the shorter side
    flip: float,  # Probability of a left-right mirror image
) -> Tensor:  # (B, C, H, W)
    """`random_shift_flip` for images of any size."""
    return random_shift_flip(x, generator, round(shift * min(x.shape[-2:])), flip)


def draw_shifts(
    shape: tuple[int, ...],  # (B, C, H, W) of the images
    generator: torch.Generator,
    pad: int = 4,  # Largest shift in pixels
    flip: float = 0.5,  # Probability of a mirror image
) -> tuple[Tensor, Tensor]:  # shifts (B, 2) int64 in -pad..pad (down, right as the window moves), mirrored (B,) bool
    """The random part of `random_shift_flip`."""
    b, side = shape[0], min(shape[-2:])
    if not 0 <= pad < side:
        raise TaskError(f"A shift of up to {pad} pixels does not suit images of side {side}: choose 0..{side - 1}.")
    draw = Draw(generator)
    span = torch.full((b, 2), 2 * pad + 1, device=generator.device)
    return draw.below(span) - pad, draw.chance(b, flip)


def apply_shifts(
    x: Tensor,  # (B, C, H, W)
    shifts: Tensor,  # (B, 2) whole pixels by which the window moves down and right
    mirrored: Tensor,  # (B,) bool
) -> Tensor:  # (B, C, H, W)
    """out[r, c] = x[r + down, c + right], reflected at the borders; then mirrored where drawn."""
    shifts, mirrored = sent(shifts, x.device), sent(mirrored, x.device)
    rows, columns = (_reflected(shifts[:, i], side) for i, side in enumerate(x.shape[-2:]))
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return windows(x, rows[:, None, None], columns[:, None, None])[:, 0]


def _reflected(shift: Tensor, side: int) -> Tensor:
    """(B,) -> (B, side): positions of a window moved by `shift`, mirrored at the first and the last pixel."""
    at = (torch.arange(side, device=shift.device) + shift[:, None]).abs()
    return (side - 1) - ((side - 1) - at).abs()


def center_square(
    x: Tensor,  # (..., H, W)
    side: int | None = None,  # S in pixels; None: min(H, W)
) -> Tensor:  # (..., S, S)
    """The square in the middle, cut out without interpolation; a view into x."""
    h, w = x.shape[-2:]
    s = min(h, w) if side is None else side
    top, left = (h - s) // 2, (w - s) // 2
    return x[..., top : top + s, left : left + s]
