"""Pictures of the page: curves as SVG, images as JPEG, each with what it shows in words. All lie in the page itself."""

import math
import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.compare.report_meaning import baseline_of, metric_of, own_starts
from selfsup_fastai.compare.report_words import SHARES, labels_text, score_text
from selfsup_fastai.errors import SelfsupError
from selfsup_fastai.messages import quiet
from selfsup_fastai.plots import plot_label_curve, plot_probe
from selfsup_fastai.pretext import get_task
from selfsup_fastai.pretext.learner import pretext_learner
from selfsup_fastai.seeding import preserved_rng

ASKED = 4  # Images that each question is shown of
WIDTH = 5.4  # Inches of curves: their letters can be read on a phone, too
HEIGHT, LINE = 3.3, 0.2  # Likewise, without the legend; of a line of the legend
MOST_CURVES = 7  # In one picture: more cannot be told from one another


class Picture(NamedTuple):
    """A picture that needs no file, and the words for people who do not see it."""

    source: str  # data:...
    alt: str
    png: bytes | None = None  # The same as a file


def drawn_starts(comparison: Comparison) -> list[str]:
    """The baseline and the best others, as many as can be told from one another; tasks before others, so that curves of
    one start look alike in all pictures."""
    table, base = comparison.summary, baseline_of(comparison)
    if table is None or not len(table):
        return list(comparison.probes["start"].unique())[:MOST_CURVES]
    means = table[table["start"] != base].groupby("start")["score"].mean().sort_values(ascending=False)
    chosen, own = means.index[: MOST_CURVES - 1], own_starts(comparison)
    return [base, *(s for s in own if s in chosen), *(s for s in table["start"].unique() if s in {*chosen} - {*own})]


def _in_order(table: pd.DataFrame, starts: Iterable[str]) -> pd.DataFrame:
    """The rows of these starts, one start after the other; the table's `attrs` stay."""
    places = {start: place for place, start in enumerate(starts)}
    kept = table[table["start"].isin(list(places))]
    return kept.iloc[np.argsort(kept["start"].map(places).to_numpy(), kind="stable")]


def curve_picture(comparison: Comparison) -> Picture | None:
    """The score over the number of labels, a curve a start."""
    runs = comparison.runs
    if runs is None or not len(runs):
        return None
    means = _in_order(comparison.summary, drawn_starts(comparison))
    means = means[["start", "labels", "n_labels", "score", "low", "high"]].replace([np.inf, -np.inf], np.nan)
    means.attrs = {"metric": metric_of(comparison), "baseline": baseline_of(comparison)}
    return _plotted(lambda ax: plot_label_curve(means, ax), metric_of(comparison), _curve_alt(comparison))


def _curve_alt(comparison: Comparison) -> str:
    table, metric = comparison.summary, metric_of(comparison)
    said = []
    for start, rows in table.groupby("start", sort=False):
        ends = [rows.loc[i] for i in dict.fromkeys((rows["n_labels"].idxmin(), rows["n_labels"].idxmax()))]
        scores = [f"{score_text(row['score'], metric)} with {labels_text(row['labels'])}" for row in ends]
        said.append(f"{start}: {' and '.join(scores)}")
    return f"Curves of {metric} over the number of labeled images. {'; '.join(said)}."


def probe_picture(comparison: Comparison) -> Picture | None:
    """What each layer knows, a curve a start."""
    probes = comparison.probes
    if probes is None or not len(probes):
        return None
    if "start" in probes:
        probes = _in_order(probes, dict.fromkeys([*drawn_starts(comparison), "scratch"]))
    metric, best = str(probes["metric"].iloc[0]), probes.loc[probes["score"].idxmax()]
    of = f" of {best['start']}" if "start" in probes else ""
    most = f"Most is known in {best['layer']}{of}: {score_text(best['score'], metric)}."
    return _plotted(lambda ax: plot_probe(probes, ax), metric, f"Curves of {metric} over the layers. {most}")


def _plotted(draw: Callable[[Axes], Any], metric: str, alt: str) -> Picture:
    with mpl.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path", "font.size": 10}):
        figure, ax = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw(ax)
        if metric in SHARES:  # as in the tables
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        _legend_below(ax)
        return _kept(figure, alt, vector=True)


def _legend_below(ax: Axes) -> None:
    """Beside the curves it would leave them little room on a phone; the figure grows by its rows."""
    legend = ax.get_legend()
    if legend is None:
        return
    names = [text.get_text() for text in legend.get_texts()]  # the best first
    handles = dict(zip(*reversed(ax.get_legend_handles_labels())))
    legend.remove()
    longest = max(map(len, names))
    columns = 3 if longest < 14 else 2 if longest < 26 else 1
    ax.figure.set_figheight(HEIGHT + LINE * math.ceil(len(names) / columns))
    looks = {"ncols": columns, "frameon": False, "handlelength": 3}
    ax.figure.legend([handles[name] for name in names], names, loc="outside lower center", **looks)


def _kept(figure: Figure, alt: str, vector: bool = False) -> Picture:
    """The figure as a picture; it is closed."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi=130, bbox_inches=None if vector else "tight")
    if vector:
        drawn = BytesIO()
        nobody = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", metadata=nobody)
        source = as_data("image/svg+xml", drawn.getvalue())
    else:
        source = as_data("image/jpeg", as_jpeg(Image.open(BytesIO(png.getvalue())).convert("RGB")))
    plt.close(figure)
    return Picture(source, alt, png.getvalue())


def as_data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"


def as_jpeg(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=88, optimize=True)
    return buffer.getvalue()


class Question(NamedTuple):
    """What a task asks, in words and in a picture."""

    task: str
    asks: str
    paper: str
    picture: Picture | None
    wide: bool = False  # Whether its letters would be too small on a phone
    reason: str = ""  # Why there is no picture


def questions(
    tasks: Iterable[str],  # As tables call them: of two of one name the second is 'rotation (2)'
    dls: DataLoaders,  # Unlabeled images
    arch: Any = None,
    seed: int = 42,
) -> list[Question]:
    """Of each task what it asks about some of the images."""
    return [_question(name, dls, arch, seed) for name in tasks]


def _question(name: str, dls: DataLoaders, arch: Any, seed: int) -> Question:
    task = get_task(re.sub(r" \(\d+\)$", "", name))
    asks, paper = _sentence(type(task).asks()), getattr(task, "paper", "")
    try:
        with quiet(), preserved_rng():
            set_seed(seed)
            figure = pretext_learner(dls, task, arch).show_batch(max_n=ASKED)[0].figure
    except SelfsupError as error:
        return Question(name, asks, paper, None, reason=str(error))
    wide = figure.get_figwidth() > WIDTH
    return Question(name, asks, paper, _kept(figure, f"Some of your images as {name} shows them to the network."), wide)


def _sentence(text: str) -> str:
    return text if text.endswith(("?", "!", ".")) else f"{text}."
