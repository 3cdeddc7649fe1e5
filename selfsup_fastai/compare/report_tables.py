"""Tables of a comparison as the page shows them: cells are text, and every figure is the comparison's."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.compare.report_meaning import baseline_of, metric_of
from selfsup_fastai.compare.report_words import (
    MARKS,
    count_text,
    gain_text,
    interval_text,
    is_known,
    labels_text,
    name_text,
    p_text,
    score_text,
    start_text,
    value_text,
)

PLOT_WIDTH, PLOT_EDGE = 120, 6  # Of the little picture of a gain, in its own units


class Table(NamedTuple):
    """Cells row by row; the first of each row is its head."""

    columns: list[str]
    rows: list[list[str]]


class GainPlot(NamedTuple):
    """Where a gain, the ends of its interval and zero lie, from left to right."""

    low: float
    gain: float
    high: float
    zero: float


def summary_groups(comparison: Comparison) -> list[dict]:
    """Of each number of labels its title and rows, few labels first; the best start first, the baseline last."""
    table = comparison.summary
    if table is None or not len(table):
        return []
    place = _places(table)
    groups = []
    for _, rows in _by_labels(table):
        n_labels, last = int(rows["n_labels"].mean().round()), rows["start"] == baseline_of(comparison)
        rows = rows.assign(_last=last).sort_values(["_last", "score"], ascending=[True, False], kind="stable")
        said, asked = count_text(n_labels, "labeled image"), labels_text(rows["labels"].iloc[0])
        cells = [_summary_row(row, comparison, place) for _, row in rows.iterrows()]
        groups.append({"title": f"{_capital(asked)}: {said}", "rows": cells})
    return groups


def _by_labels(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """1.0, all labels, is not 1 label a class."""
    asked = [f"{isinstance(value, int | np.integer)} {value}" for value in table["labels"].astype(object)]
    groups = table.assign(_asked=asked).groupby("_asked", sort=False)
    return sorted(groups, key=lambda group: group[1]["n_labels"].mean())


def _summary_row(row: pd.Series, comparison, place: Callable[[float], float]) -> dict:
    metric, verdict = metric_of(comparison), row["verdict"] if isinstance(row["verdict"], str) else ""
    low, high = row["gain_low"], row["gain_high"]
    plot = (
        GainPlot(*map(place, (low, row["gain"], high, 0.0))) if verdict and is_known(low) and is_known(high) else None
    )
    p = p_text(row.get("p_corrected", row.get("p")))
    return {
        "start": start_text(row["start"], baseline_of(comparison)),
        "score": score_text(row["score"], metric),
        "interval": interval_text(row["low"], row["high"], metric),
        "gain": gain_text(row["gain"], metric) if verdict else "",
        "gain_interval": interval_text(low, high, metric, gain=True) if verdict else "",
        "verdict": verdict or "what the others are compared with",
        "mark": MARKS.get(verdict, ""),
        "p": f"p {p}" if p.startswith("<") else f"p = {p}" if p else "",
        "plot": plot,
    }


def _places(table: pd.DataFrame) -> Callable[[float], float]:
    """One scale for all gains of the table, with zero on it."""
    ends = [value for name in ("gain_low", "gain_high") for value in table[name] if is_known(value)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    scale = (PLOT_WIDTH - 2 * PLOT_EDGE) / ((high - low) or 1.0)
    return lambda value: round(PLOT_EDGE + (value - low) * scale, 2) if is_known(value) else PLOT_EDGE


def race_table(comparison: Comparison) -> Table | None:
    """A row a task: what became of it and its score after each round; those who stayed longest first."""
    race = comparison.race
    if race is None or not len(race):
        return None
    rungs = sorted(race["rung"].unique())
    heads = [f"Round {i + 1}: {_granted(race[race['rung'] == rung])}" for i, rung in enumerate(rungs)]
    parts = sorted((part.sort_values("rung") for _, part in race.groupby("task", sort=False)), key=_race_order)
    return Table(["Task", "What became of it", *heads, "Seconds"], [_race_row(part, rungs) for part in parts])


def _granted(rows: pd.DataFrame) -> str:
    """'5,000 images', the same for all tasks but for the last batch; where seconds were granted, the range."""
    images = rows["images"][rows["images"] > 0]
    if not len(images) or images.max() <= 1.1 * images.min():
        return f"{int(images.max() if len(images) else 0):,} images"
    return f"{int(images.min()):,} to {int(images.max()):,} images"


def _race_order(part: pd.DataFrame) -> tuple[float, float]:
    last = part.iloc[-1]
    return -last["rung"] - bool(last["kept"]), -last["score"] if is_known(last["score"]) else 1.0


def _race_row(part: pd.DataFrame, rungs: list) -> list[str]:
    known = {row["rung"]: row["score"] for _, row in part.iterrows() if is_known(row["score"])}
    scores = [score_text(known[rung], "") if rung in known else "–" for rung in rungs]
    last, round_ = part.iloc[-1], rungs.index(part.iloc[-1]["rung"]) + 1
    reason = f": {last['reason']}" if isinstance(last.get("reason"), str) and last["reason"] else ""
    dropped = f"✗ fell out in round {round_}" if part["images"].any() else "✗ took no part"
    ending = "✓ stayed to the end" if last["kept"] else dropped + reason
    return [str(last["task"]), ending, *scores, f"{part['seconds'].sum():,.0f}"]


def signals_table(comparison: Comparison) -> Table | None:
    """Signals that need no labels, a row a task."""
    return plain_table(comparison.signals)


def plain_table(table: pd.DataFrame | None, columns: Iterable[str] | None = None) -> Table | None:
    """Any table; floats with four digits."""
    if table is None or not len(table):
        return None
    kept = [name for name in (columns or table.columns) if name in table.columns]
    return Table(
        [_capital(name_text(c)) for c in kept],
        [[value_text(v) for v in row] for row in table[kept].itertuples(index=False)],
    )


def probe_table(comparison: Comparison) -> Table | None:
    """A row a layer, a column a start."""
    probes = comparison.probes
    if probes is None or not len(probes):
        return None
    starts = probes["start"] if "start" in probes else pd.Series("", probes.index)
    wide = probes.assign(start=starts).pivot_table(index="layer", columns="start", values="score", sort=False)
    metric = str(probes["metric"].iloc[0])
    rows = [[str(layer), *(score_text(v, metric) for v in row)] for layer, row in zip(wide.index, wide.to_numpy())]
    return Table(["Layer", *(start_text(s, "scratch") for s in wide.columns)], rows)


def runs_table(comparison: Comparison) -> Table | None:
    """Every run behind the figures."""
    runs, metric = comparison.runs, metric_of(comparison)
    if runs is None or not len(runs):
        return None
    rows = [
        [
            start_text(r.start, baseline_of(comparison)),
            labels_text(r.labels),
            f"{r.n_labels:,}",
            str(r.seed),
            score_text(r.score, metric),
        ]
        for r in runs.astype({"labels": object}).itertuples(index=False)
    ]
    return Table(["Start", "Labels", "Labeled images", "Seed", _capital(metric)], rows)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
