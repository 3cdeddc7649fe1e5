"""Curves of tables, as `pictures` is for images: tables that draw themselves, and the looks that all curves share.

table = linear_probe(encoder, dls)     # a DataFrame
table.show()                           # and its picture

Curves are told apart by color, marker and line style at once, so that color-blind people and grey printers can.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from scipy import stats

from selfsup_fastai.errors import TaskError

# Okabe & Ito 2008, without their yellow; orange and sky blue darkened to a contrast of 3:1 with white paper
BLACK = "#000000"
COLORS = ("#0072B2", "#D55E00", "#CC79A7", "#009E73", "#C58700", "#499BCA")
MARKERS = "osD^vP*<"
LINES = ("-", "--", "-.", (0, (5, 1.5, 1, 1.5, 1, 1.5)), (0, (2.5, 1.2)))
BASELINE = "scratch"  # Its curve is dotted, black, with crosses

Plot = Callable[[pd.DataFrame, Axes | None], Axes]


class ShownFrame(pd.DataFrame):
    """A DataFrame that knows how it is drawn: `show()`. Parts and copies of it know, too."""

    _metadata = ("_plot",)

    def __init__(
        self,
        *args,
        plot: Plot | None = None,  # plot(table, ax) -> ax
        **kwargs,  # As for DataFrame
    ):
        super().__init__(*args, **kwargs)
        self._plot = plot

    @property
    def _constructor(self) -> type:
        return ShownFrame

    def __finalize__(self, other: object, method: str | None = None, **kwargs) -> "ShownFrame":
        """pandas hands on what a table knows beside its data; of several in `pd.concat` we take the first."""
        super().__finalize__(other, method, **kwargs)
        parts = getattr(other, "input_objs", None) or getattr(other, "objs", ())  # the latter before pandas 3
        self._plot = self._plot or next((p._plot for p in parts if isinstance(p, ShownFrame)), None)
        return self

    def show(
        self,
        ax: Axes | None = None,  # Where to draw; None: in a new figure
    ) -> Axes:
        """Draws the table; the axes come back, as from fastai's `show`."""
        if self._plot is None:
            raise TaskError("This table does not know how it is drawn; `plot_probe` or `plot_label_curve` may.")
        return self._plot(self, ax)


class Points(NamedTuple):
    """One curve, left to right; `low` and `high` are its interval, NaN where none is known."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def line_styles(
    names: Iterable[Hashable],  # Of the curves
    baseline: Hashable = BASELINE,  # Always black
) -> dict[Hashable, dict]:  # For `Axes.plot`: color, marker, linestyle
    """Looks for curves, by their names in order; the baseline's does not depend on where it stands."""
    others = [name for name in dict.fromkeys(names) if name != baseline]
    looks = {baseline: {"color": BLACK, "marker": "x", "linestyle": ":"}}
    for i, name in enumerate(others):
        line = LINES[i % len(LINES)]
        looks[name] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": line}
    return looks


def plot_label_curve(
    table: pd.DataFrame,  # A row a run (start, labels, n_labels, score), or a mean (start, n_labels, score, low, high)
    ax: Axes | None = None,  # Where to draw; None: in a new figure
    confidence: float = 0.95,  # Of the intervals, where a row is a run
) -> Axes:
    """The score over the number of labels, a curve for each start, with its interval as bars.

    The intervals are Student's over the runs; a single run has none. Where the table brings `low` and `high`, these
    are drawn.
    """
    _check(table, "start", "n_labels", "score")
    table = table if {"low", "high"} <= set(table.columns) else _over_runs(table, confidence)
    curves = {start: _points(rows, "n_labels") for start, rows in table.groupby("start", sort=False)}
    ax = _axes(ax)
    _draw_curves(ax, curves, log=True, baseline=table.attrs.get("baseline", BASELINE))
    _label_axes(ax, table, "labeled training images (log scale)")
    return ax


def _over_runs(table: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """A row for each start and number of labels: the mean over the runs and its interval."""
    asked = table["labels"] if "labels" in table else table["n_labels"]
    either = table["n_labels"].where(asked == 1, 0)  # 1 a class and 1.0, all of them, are the same number
    rows = []
    for _, runs in table.groupby([table["start"], asked, either], sort=False):
        half = half_width(runs["score"], confidence)
        mean = {"start": runs["start"].iloc[0], "n_labels": runs["n_labels"].mean(), "score": runs["score"].mean()}
        rows.append({**mean, "low": mean["score"] - half, "high": mean["score"] + half})
    means = pd.DataFrame(rows)
    means.attrs = {"metric": metric_of(table), "baseline": table.attrs.get("baseline", BASELINE)}
    return means


def half_width(values: pd.Series, confidence: float = 0.95) -> float:
    """Half the width of Student's interval for the mean of independent runs; NaN for a single one."""
    n = len(values)
    if n < 2:
        return np.nan
    return float(stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / n**0.5)


def plot_probe(
    table: pd.DataFrame,  # What a probe returned; or several of them, one below the other, with a column `start`
    ax: Axes | None = None,  # Where to draw; None: in a new figure
) -> Axes:
    """The score over the layers, the number of neighbors or the number of shots; a curve for each start.

    Bars: where the scores are shares of `n_test` images, Wilson's 95 % interval, which is about these images alone;
    for shots, the deviation over the draws. A dotted line is the score of guessing, where the table knows it.
    """
    over = next((name for name in ("layer", "k", "shots") if name in table.columns), None)
    if over is None:
        raise TaskError(f"A probe's table has a column layer, k or shots; this one has {_listed(table.columns)}.")
    _check(table, over, "score")
    groups = table.groupby("start", sort=False) if "start" in table else [("", table)]
    parts = {start: _with_interval(rows) for start, rows in groups}
    ax = _axes(ax)
    if over == "layer":
        _draw_layers(ax, parts, table.attrs.get("baseline", BASELINE))
    else:
        curves = {start: _points(rows, over) for start, rows in parts.items()}
        _draw_curves(ax, curves, log=True, baseline=table.attrs.get("baseline", BASELINE))
    names = {"layer": "layer", "k": "neighbors (log scale)", "shots": "labeled images a class (log scale)"}
    _label_axes(ax, table, ax.get_xlabel() or names[over])
    _draw_guessing(ax, table)
    return ax


def _with_interval(rows: pd.DataFrame) -> pd.DataFrame:
    """With columns low and high, if they can be known."""
    if {"low", "high"} <= set(rows.columns):
        return rows
    if "std" in rows:
        return rows.assign(low=rows["score"] - rows["std"], high=rows["score"] + rows["std"])
    if metric_of(rows) == "accuracy" and "n_test" in rows:
        low, high = wilson(rows["score"].to_numpy(float), rows["n_test"].to_numpy(float))
        return rows.assign(low=low, high=high)
    return rows


def wilson(share: np.ndarray, n: np.ndarray, z: float = 1.959964) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a share of `n` (1927): never outside of [0, 1]."""
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return center - half, center + half


def _draw_layers(ax: Axes, parts: dict[Hashable, pd.DataFrame], baseline: Hashable) -> None:
    """Layers side by side, by name; where the nets have different ones, by depth."""
    names = [list(rows["layer"]) for rows in parts.values()]
    same = all(layers == names[0] for layers in names)
    places = [np.arange(len(n)) if same else np.linspace(0, 1, len(n)) if len(n) > 1 else np.ones(1) for n in names]
    curves = {s: _points(rows.assign(_at=at), "_at") for (s, rows), at in zip(parts.items(), places)}
    _draw_curves(ax, curves, log=False, baseline=baseline)
    if same:
        turned = max(map(len, map(str, names[0]))) * len(names[0]) > 60
        ax.set_xticks(places[0], names[0], rotation=45 if turned else 0, ha="right" if turned else "center")
        ax.set_xlim(-0.5, len(names[0]) - 0.5)
    else:
        ax.set_xlabel("depth of the layer: 0 the first, 1 the last")


def _draw_guessing(ax: Axes, table: pd.DataFrame) -> None:
    chance = table.attrs.get("chance")
    if chance is None:
        return
    ax.axhline(chance, color="#6B6B6B", linewidth=1, linestyle=(0, (1, 3)), zorder=1)
    below, above = ax.get_ylim()
    ax.set_ylim(min(below, chance - 0.05 * (above - below)), above)
    ax.annotate(
        "guessing", (0.01, chance), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color="#4D4D4D"
    )


def _draw_curves(ax: Axes, curves: dict[Hashable, Points], log: bool, baseline: Hashable) -> None:
    """Every curve with its bars, side by side where they share their places; a legend in the order of their ends."""
    looks, shifts = line_styles(curves, baseline), np.linspace(-1, 1, len(curves)) if len(curves) > 1 else [0]
    values = np.unique(np.concatenate([points.x for points in curves.values()]))
    apart = max((values[-1] / values[0]) ** 0.01, 1.02) if log else 0.06
    for (name, points), shift in zip(curves.items(), shifts):
        shifted = points.x * apart**shift if log else points.x + apart * shift * _step(points.x)
        bars = np.nan_to_num([points.y - points.low, points.high - points.y]).clip(min=0)
        look = {"linewidth": 1.8, "markersize": 6, "capsize": 3, "elinewidth": 1, "zorder": 3, **looks[name]}
        ax.errorbar(shifted, points.y, bars, label=str(name), **look)
    if log:
        _log_axis(ax, values)
    _limit_scores(ax, list(curves.values()))
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.8, zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        _legend(ax, curves)


def _step(x: np.ndarray) -> float:
    return float(np.diff(x).min()) if len(x) > 1 else 1.0


def _legend(ax: Axes, curves: dict[Hashable, Points]) -> None:
    """Best curve first; beside a figure of ours, within axes that were given."""
    handles = dict(zip(curves, ax.get_legend_handles_labels()[0]))
    order = sorted(curves, key=lambda name: -curves[name].y[-1])
    ours = ax.figure.get_layout_engine() is not None and len(ax.figure.axes) == 1
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if ours else {"loc": "best"}
    ax.legend([handles[name] for name in order], order, frameon=False, handlelength=3.2, fontsize=9, **place)


def _log_axis(ax: Axes, values: np.ndarray) -> None:
    """Ticks at the values themselves, in plain figures; of those too near to each other the first."""
    ax.set_xscale("log")
    shown: list[float] = []
    room = max(np.log(values[-1] / values[0]) / 12, 1e-9)
    for value in values:
        if not shown or np.log(value / shown[-1]) >= room:
            shown.append(value)
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_major_formatter(FixedFormatter([f"{value:,.0f}" for value in shown]))
    ax.xaxis.set_minor_locator(NullLocator())
    margin = max((values[-1] / values[0]) ** 0.06, 1.15)
    ax.set_xlim(values[0] / margin, values[-1] * margin)


def _limit_scores(ax: Axes, curves: Sequence[Points]) -> None:
    """As the scores and their intervals need; an interval of two runs may be wider than that can be."""
    scores = np.concatenate([points.y for points in curves])
    ends = np.concatenate([[*points.low, *points.high] for points in curves])
    least, most = np.nanmin(scores), np.nanmax(scores)
    room = max(most - least, 0.05 * max(abs(most), abs(least)), 1e-3)
    ends = np.clip(ends, least - 1.5 * room, most + 1.5 * room)
    low, high = np.nanmin([least, *ends]), np.nanmax([most, *ends])
    margin = 0.06 * max(high - low, room)
    ax.set_ylim(low - margin, high + margin)


def _points(rows: pd.DataFrame, x: str) -> Points:
    rows = rows.sort_values(x, kind="stable")
    none = np.full(len(rows), np.nan)
    low, high = (rows[name].to_numpy(float) if name in rows else none for name in ("low", "high"))
    return Points(rows[x].to_numpy(float), rows["score"].to_numpy(float), low, high)


def _label_axes(ax: Axes, table: pd.DataFrame, x: str) -> None:
    ax.set(xlabel=x, ylabel=metric_of(table))


def metric_of(table: pd.DataFrame) -> str:
    """What the scores of a table are."""
    if "metric" in table and len(table):
        return str(table["metric"].iloc[0])
    return str(table.attrs.get("metric", "score"))


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(figsize=(7, 4), layout="constrained")[1] if ax is None else ax


def _check(table: pd.DataFrame, *columns: str) -> None:
    missing = [name for name in columns if name not in table.columns]
    if missing or not len(table):
        what = f"has no column {', '.join(missing)} (it has {_listed(table.columns)})" if missing else "has no rows"
        raise TaskError(f"The table {what}, so there is nothing to draw.")


def _listed(names: Iterable) -> str:
    return ", ".join(map(str, names)) or "none"
