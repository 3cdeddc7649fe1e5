"""Pictures of random views beside the images they were cut from."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Polygon
from torch import Tensor

from selfsup_fastai.data.draws import Views, draw_views
from selfsup_fastai.data.recipes import Recipe
from selfsup_fastai.data.sampling import outlines
from selfsup_fastai.data.views import apply_views
from selfsup_fastai.errors import TaskError
from selfsup_fastai.pictures import draw, grid_axes
from selfsup_fastai.seeding import VALID_SEED, Generator

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by color-blind people


def show_views(
    x: Tensor,  # (B, C, H, W) float in [0, 1], C = 1 or 3
    recipe: Recipe | Sequence[Recipe | Views],  # One: `n_views` views of it; several: a view each; Views: as drawn
    generator: torch.Generator | None = None,  # None: the same views every time
    n_views: int = 4,  # Of one recipe
    sizes: int | Sequence[int] | None = None,  # Side of the views, or of each; None: the shorter side of the images
    max_n: int = 4,  # Images
    ctxs: list[Axes] | None = None,  # max_n * (1 + number of views) axes to draw on; None: new ones
    figsize: tuple[float, float] | None = None,  # Inches
) -> list[Axes]:
    """A row an image: the image with the outlines of its crops, then its views, each under a title of its own color.

    The title says what was done to the view beyond the crop and the factors of brightness, contrast and saturation.
    """
    recipes = [recipe] * n_views if isinstance(recipe, Recipe) else list(recipe)
    sizes = [sizes] * len(recipes) if sizes is None or isinstance(sizes, int) else list(sizes)
    if len(sizes) != len(recipes):
        raise TaskError(f"{len(recipes)} views came with {len(sizes)} sizes; give one size, or one for each view.")
    x = x[:max_n]
    generator = generator or Generator(x.device, VALID_SEED)
    views = [
        r[: len(x)] if isinstance(r, Views) else draw_views(r, tuple(x.shape), generator, size)
        for r, size in zip(recipes, sizes)
    ]
    columns = 1 + len(views)
    figsize = figsize or (2.1 * columns, 2.9 * len(x))  # room for titles of three lines
    axes = grid_axes(len(x) * columns, ctxs, figsize, columns=columns)
    for i in range(len(x)):
        row = axes[i * columns : (i + 1) * columns]
        draw(row[0], x[i], f"image {i}")
        for k, (ax, of_view) in enumerate(zip(row[1:], views)):
            _show(row[0], ax, x[i : i + 1], of_view[i], _COLORS[k % len(_COLORS)])
    return axes


def _show(whole: Axes, ax: Axes, x: Tensor, view: Views, color: str) -> None:
    """One view on `ax` and its outline on the axis of the whole image."""
    draw(ax, apply_views(x, view)[0], _title(view, x.shape[1])).title.set_color(color)
    corners = outlines(view)[0].numpy() - 0.5  # matplotlib's 0 is the center of the first pixel
    whole.add_patch(Polygon(corners, fill=False, edgecolor=color, linewidth=2))


def _title(view: Views, channels: int) -> str:
    """What was drawn for one view, in a few words."""
    row = view.describe().iloc[0]
    words = [
        ("mirrored", row.flip),
        ("upside down", row.vertical_flip),
        (f"{row.turn:+.0f}°", row.turn),
        (f"sheared {row.shear:+.0f}°", row.shear),
        (f"hue {360 * row.hue:+.0f}°", channels == 3 and row.hue),
        ("grey", channels == 3 and row.grey),
        (f"blur {row.sigma:.1f}", row.sigma),
        ("solarized", row.solarize),
        ("erased", row.erase_height),
    ]
    said = [word for word, drawn in words if drawn]
    return "\n".join(", ".join(said[i : i + 2]) for i in range(0, len(said), 2))
