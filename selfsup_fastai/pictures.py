"""The one place that draws: axes in a grid, and an image with a title on one of them."""

import math
from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

RIGHT, WRONG = "#0072B2", "#D55E00"  # blue and vermilion: told apart by color-blind people; a mark says the same


def grid_axes(
    n: int,  # How many pictures
    ctxs: list[Axes] | None = None,  # Axes to draw on; None: new ones
    figsize: tuple[float, float] | None = None,  # Inches, of the whole figure
    aspect: float = 1.0,  # Width over height of one picture
    columns: int | None = None,  # None: nearly square
) -> list[Axes]:
    """`n` axes without ticks: those given, or a new figure's."""
    if ctxs is not None:
        return list(ctxs)[:n]
    columns = columns or math.ceil(math.sqrt(n / aspect))
    columns = max(1, min(columns, n))
    rows = math.ceil(n / columns)
    _, axes = plt.subplots(rows, columns, figsize=figsize or (2.1 * aspect * columns, 2.4 * rows), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return list(axes.flat)[:n]


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


def side_by_side(images: torch.Tensor, gap: int = 2) -> torch.Tensor:
    """(V, C, H, W) -> (C, H, V*W + gaps), white between the images."""
    v, c, h, w = images.shape
    canvas = torch.ones(c, h, v * w + (v - 1) * gap)
    for i, image in enumerate(images.detach().cpu()):
        canvas[:, :, i * (w + gap) : i * (w + gap) + w] = image
    return canvas


def draw_rows(
    rows: Sequence[Sequence[torch.Tensor]],  # Of each question the pictures, all (C, H, W), values in [0, 1]
    titles: Sequence[str],  # One for each question
    ctxs: list[Axes] | None = None,
    figsize: tuple[float, float] | None = None,
    right: Sequence[bool | None] | None = None,  # As in `draw`, one for each question
) -> list[Axes]:
    """Each question's pictures side by side on one axis."""
    height, width = rows[0][0].shape[-2:]
    axes = grid_axes(len(rows), ctxs, figsize, aspect=len(rows[0]) * width / height)
    for ax, row, title, known in zip(axes, rows, titles, right or [None] * len(rows)):
        draw(ax, side_by_side(torch.stack([picture.float() for picture in row])), title, known)
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


def plot_history(history, chance: float | None = None) -> None:
    """Curves of a run, a point an epoch: losses on the left, the first metric on the right with the level of guessing.

    `history`: a DataFrame with columns epoch, train_loss, valid_loss and then metrics, as `MetricsFile` writes it.
    """
    metrics = [c for c in history.columns if c not in ("epoch", "train_loss", "valid_loss")][:1]
    _, axes = plt.subplots(1, 1 + len(metrics), figsize=(4.5 * (1 + len(metrics)), 3.2), squeeze=False)
    epochs = history["epoch"] + 1
    for column, color in (("train_loss", RIGHT), ("valid_loss", WRONG)):
        axes[0, 0].plot(epochs, history[column], "o-", markersize=3, color=color, label=column.replace("_loss", ""))
    axes[0, 0].set(xlabel="epoch", ylabel="loss")
    axes[0, 0].legend(frameon=False)
    for name in metrics:
        axes[0, 1].plot(epochs, history[name], "o-", markersize=3, color=WRONG, label="valid")
        axes[0, 1].set(xlabel="epoch", ylabel=name.replace("_", " "), ylim=(0, 1) if history[name].max() <= 1 else None)
        if chance is not None:
            axes[0, 1].axhline(chance, color="grey", linestyle=":", label="guessing")
        axes[0, 1].legend(frameon=False)
    for ax in axes.flat:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    plt.tight_layout()


def save_picture(file) -> None:
    """Writes the current figure to a PNG file and closes it."""
    plt.savefig(file, dpi=110, bbox_inches="tight")
    plt.close()
