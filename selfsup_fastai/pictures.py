"""The one place that draws: axes in a grid, and an image with a title on one of them."""

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase, SubFigure
from matplotlib.ticker import MaxNLocator

RIGHT, WRONG = "#0072B2", "#D55E00"  # blue and vermilion: told apart by color-blind people; a mark says the same
TITLE, TITLE_WIDTH = 0.4, 4.0  # Inches of the longest titles: two lines above a picture, one above several in a row


def grid_axes(
    n: int,  # How many pictures
    ctxs: list[Axes] | FigureBase | None = None,  # Axes to draw on, or where to make them; None: in a new figure
    figsize: tuple[float, float] | None = None,  # Inches, of the whole figure
    aspect: float = 1.0,  # Width over height of one picture
    columns: int | None = None,  # None: nearly square; in a figure that is given, as the pictures are largest
) -> list[Axes]:
    """`n` axes without ticks: those given, or new ones."""
    figure = ctxs if isinstance(ctxs, FigureBase) else None
    if ctxs is not None and figure is None:
        return list(ctxs)[:n]
    if not columns:
        columns = _columns_of(figure, n, aspect) if figure else math.ceil(math.sqrt(n / aspect))
    columns = max(1, min(columns, n))
    rows = math.ceil(n / columns)
    space = (
        {"left": 0.01, "right": 0.99, "bottom": 0.02, "top": 0.84, "hspace": 0.4, "wspace": 0.05} if figure else None
    )
    figure = figure or plt.figure(figsize=figsize or (2.1 * aspect * columns, 2.4 * rows))
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=space)
    for ax in axes.flat:
        ax.set_axis_off()
    return list(axes.flat)[:n]


def _columns_of(figure: FigureBase, n: int, aspect: float) -> int:
    """In how many columns `n` pictures are largest in a figure, with room for their titles."""
    box = figure.bbox.transformed(figure.dpi_scale_trans.inverted())  # inches

    def height(columns: int) -> float:
        return min(box.width / columns / aspect, box.height / math.ceil(n / columns) - TITLE)

    most = n if aspect < 1.5 else int(box.width / TITLE_WIDTH)
    return max(range(1, max(1, min(n, most)) + 1), key=height)


def figure_blocks(
    names: Sequence[str],  # Titles of the blocks
    figsize: tuple[float, float] | None = None,  # Inches, of the whole figure
) -> list[SubFigure]:
    """One figure of blocks, one below the other, each to be handed on as `ctxs`."""
    figure = plt.figure(figsize=figsize or (13, 5.2 * len(names)))
    blocks = list(figure.subfigures(len(names), 1, squeeze=False).flat)
    for block, name in zip(blocks, names):
        block.suptitle(name, fontweight="bold")
    return blocks


def draw(
    ax: Axes,
    image: torch.Tensor,  # (C, H, W), C of 1 or 3, values in [0, 1] (clamped)
    title: str = "",
    right: bool | None = None,  # Colors and marks the title; None: neither
) -> Axes:
    """One image on one axis, grey from black to white."""
    pixels = image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    mark = "" if right is None else "  ✓" if right else "  ✗"
    ax.set_title(title + mark, fontsize=9, color="black" if right is None else RIGHT if right else WRONG)
    ax.set_axis_off()
    return ax


def overlay(
    ax: Axes,
    image: torch.Tensor,  # (C, H, W), values in [0, 1]
    heat: torch.Tensor,  # (h, w), of any size and range
    title: str = "",
) -> Axes:
    """An image in grey under a map that is stretched over it: dark purple where it is least, pale yellow at most."""
    pixels = image.detach().cpu().float().clamp(0, 1).mean(0).numpy()
    values = heat.detach().cpu().float()
    values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    whole = torch.nn.functional.interpolate(values[None, None], image.shape[-2:], mode="bilinear")[0, 0]
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.imshow(whole.numpy(), cmap="magma", vmin=0, vmax=1, alpha=0.6, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
    return ax


def side_by_side(images: torch.Tensor, gap: int = 2) -> torch.Tensor:
    """(V, C, H, W) -> (C, H, V*W + gaps), white between the images."""
    v, c, h, w = images.shape
    canvas = torch.ones(c, h, v * w + (v - 1) * gap)
    for i, image in enumerate(images.detach().cpu()):
        canvas[:, :, i * (w + gap) : i * (w + gap) + w] = image
    return canvas


def mosaic(
    tiles: torch.Tensor,  # (9, C, t, t) in [0, 1], row by row
    side: int | None = None,  # In pixels, white around; None: as the tiles need, 3 * (t + 2)
) -> torch.Tensor:  # (C, side, side)
    """Nine tiles in a 3 x 3 grid with white borders."""
    _, c, t, _ = tiles.shape
    tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=1.0).view(3, 3, c, t + 2, t + 2)
    whole = tiles.permute(2, 0, 3, 1, 4).reshape(c, 3 * (t + 2), 3 * (t + 2))
    if side is None:
        return whole
    before = (side - whole.shape[-1]) // 2
    after = side - whole.shape[-1] - before
    return torch.nn.functional.pad(whole, (before, after, before, after), value=1.0)


def draw_rows(
    rows: Sequence[Sequence[torch.Tensor]],  # Of each question the pictures, all (C, H, W), values in [0, 1]
    titles: Sequence[str],  # One for each question
    ctxs: list[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    right: Sequence[bool | None] | None = None,  # As in `draw`, one for each question
    gap: int = 2,  # Pixels between two pictures
) -> list[Axes]:
    """Each question's pictures side by side on one axis."""
    height, width = rows[0][0].shape[-2:]
    axes = grid_axes(len(rows), ctxs, figsize, aspect=len(rows[0]) * width / height)
    for ax, row, title, known in zip(axes, rows, titles, right or [None] * len(rows)):
        draw(ax, side_by_side(torch.stack([picture.float() for picture in row]), gap), title, known)
    return axes


def draw_restored(
    asked: torch.Tensor,  # (B, C, H, W) in [0, 1], as the network was given them
    true: torch.Tensor,  # (B, C, H, W), what it should have made of them
    answers: torch.Tensor | None = None,  # (B, C, H, W), what it made of them
    ctxs: list[Axes] | None = None,
    max_n: int = 9,
    figsize: tuple[float, float] | None = None,
) -> list[Axes]:
    """Of each image what was asked, (what was answered, titled with its mean error,) and the truth, side by side."""
    n = min(max_n, len(true))
    if answers is None:
        return draw_rows(list(zip(asked[:n], true)), ["asked | true"] * n, ctxs, figsize)
    off = [(answer.float() - whole).abs().mean() for answer, whole in zip(answers[:n], true)]
    titles = [f"asked | answered | true, off by {error:.3f}" for error in off]
    return draw_rows(list(zip(asked[:n], answers, true)), titles, ctxs, figsize)


def see_through(
    images: torch.Tensor,  # (B, C, H, W)
    hidden: torch.Tensor,  # (B, 1, H, W) bool
) -> torch.Tensor:
    """What is hidden becomes a checkerboard of two greys, as image editors show what is not there.

    One grey would not be told from the background of many scans.
    """
    rows, columns = (torch.arange(n, device=images.device) // 2 for n in images.shape[-2:])
    board = 0.5 + 0.2 * ((rows[:, None] + columns) % 2)
    return torch.where(hidden, board.to(images.dtype), images)


def plot_history(
    history,  # DataFrame with columns epoch, train_loss, valid_loss and then metrics, as `MetricsFile` writes it
    chance: float | Mapping[str, float | None] | None = None,  # Level of guessing; or the metrics to draw, with theirs
) -> None:
    """Curves of a run, a point an epoch: losses on the left, then the first metric (or those named) with the level of
    guessing. A share is drawn from 0 to 1, or from as far below 0 as it was, down to -1."""
    if not isinstance(chance, Mapping):
        first = [c for c in history.columns if c not in ("epoch", "train_loss", "valid_loss")][:1]
        chance = dict.fromkeys(first, chance)
    metrics = [name for name in chance if name in history.columns]
    _, axes = plt.subplots(1, 1 + len(metrics), figsize=(4.5 * (1 + len(metrics)), 3.2), squeeze=False)
    epochs = history["epoch"] + 1
    for column, color in (("train_loss", RIGHT), ("valid_loss", WRONG)):
        axes[0, 0].plot(epochs, history[column], "o-", markersize=3, color=color, label=column.replace("_loss", ""))
    axes[0, 0].set(xlabel="epoch", ylabel="loss")
    axes[0, 0].legend(frameon=False)
    for ax, name in zip(axes[0, 1:], metrics):
        ax.plot(epochs, history[name], "o-", markersize=3, color=WRONG, label="valid")
        ax.set(xlabel="epoch", ylabel=name.replace("_", " "))
        if chance[name] is not None:
            ax.axhline(chance[name], color="grey", linestyle=":", label="guessing")
        if limits := _limits(history[name].min(), history[name].max()):
            ax.set_ylim(limits)
        ax.legend(frameon=False)
    for ax in axes.flat:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    plt.tight_layout()


def plot_rates(
    rates,  # DataFrame, a column a group of layers, epochs as the index; NaN where the group is frozen
    ax: Axes | None = None,  # Where to draw; None: in a new figure
) -> Axes:
    """The learning rate of each group over a run, on a scale of tens; a group that is frozen has none."""
    ax = ax or plt.subplots(figsize=(7, 4), layout="constrained")[1]
    shades = plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(rates.columns)).numpy())
    peaks = rates.max()
    limits = peaks.min() / 30, 3 * peaks.max()
    for name, color in zip(rates.columns[::-1], shades):
        seen = rates[name].where(rates[name] > 1.2 * limits[0])  # each cycle ends near 0, far below the picture
        ax.plot(rates.index, seen, color=color, label=name, linewidth=1.8)
    for number, begun in enumerate(rates.attrs.get("stages", ()), start=1):
        ax.axvline(begun, color="#6B6B6B", linewidth=0.8, linestyle=(0, (1, 3)))
        name = f" stage {number}" if number == 1 else f" {number}"
        ax.annotate(name, (begun, 0.985), xycoords=("data", "axes fraction"), va="top", fontsize=8, color="#4D4D4D")
    ax.set(xlabel="epoch", ylabel="learning rate", yscale="log", ylim=limits)
    ax.set_xlim(0, rates.index[-1] + (rates.index[1] - rates.index[0]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.legend(title="head to stem", frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def _limits(least: float, most: float) -> tuple[float, float] | None:
    """Of the axis of a metric; None: as matplotlib thinks."""
    if most > 1 or most < -1 or math.isnan(most):
        return None
    return max(-1.0, min(0.0, 1.1 * least)), 1.0


def save_picture(file) -> None:
    """Writes the current figure to a PNG file and closes it."""
    plt.savefig(file, dpi=110, bbox_inches="tight")
    plt.close()
