"""The summary in a sentence, for a person who has never heard of pretraining. It claims what the intervals bear."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

FEW_SEEDS = 3  # Below, only very large differences can show


def whole_verdict(
    summary: pd.DataFrame,  # What `summarize` returned
    tasks: Sequence[str] | None = None,  # Starts that were pretrained on the user's images; None: all but the baseline
) -> str:
    """What helped, if anything did, and by how much.

    A start is said to help only where its gain stands after Holm's correction for every comparison of the table; the
    interval given is that of this correction. Where a gain stands only among the comparisons with one number of labels,
    it is called a hint.
    """
    base = "training from scratch" if summary.attrs["baseline"] == "scratch" else summary.attrs["baseline"]
    compared = summary[summary["p"].notna()]
    if not len(compared):
        return f"There is nothing to compare {base} with: no other start came to the end."
    own = compared if tasks is None else compared[compared["start"].isin(list(tasks))]
    others = compared.drop(own.index)
    if summary["seeds"].min() < 2:
        return f"On your data nothing can be said: from a single seed nobody knows what is chance.{_best(own, summary)}"
    sentences = [_of_tasks(own, compared, summary, base)] if len(own) else []
    alone = [name for name, _ in _sure(own, "better", summary) if name in summary.attrs.get("one_pretraining", [])]
    if alone:
        sentences.append(
            f"Behind {' and '.join(alone)} there is one pretraining run: another could come out otherwise."
        )
    sentences += [f"{name} helped: {_gain(row, summary)}." for name, row in _sure(others, "better", summary)]
    worse = _sure(compared, "worse", summary)
    sentences += [f"{name} is worse than {base}: {_gain(row, summary)}." for name, row in worse]
    if not sentences:
        sentences = [_nothing(others, summary, base)]
    if summary["seeds"].min() < FEW_SEEDS:
        sentences.append("With two seeds only very large differences can show; take more of them.")
    return " ".join(sentences)


def _of_tasks(own: pd.DataFrame, compared: pd.DataFrame, summary: pd.DataFrame, base: str) -> str:
    """Whether one of them helped."""
    better = _sure(own, "better", summary)
    if better:
        said = "; ".join(f"{name}, {_gain(row, summary)}" for name, row in better)
        return f"On your data pretraining helped: {said}.{_elsewhere(own, better, summary)}"
    hints = own[own["verdict"] == "better"]
    if not len(hints):
        return _nothing(own, summary, base)
    row = hints.loc[hints["gain"].idxmax()]
    return (
        f"On your data there is a hint, no more: {row['start']}, {_gain(row, summary)}. Alone that would be more than "
        f"chance explains, but {len(compared)} comparisons were made, and among so many one may look like this. More "
        "seeds or more test images would tell."
    )


def _nothing(rows: pd.DataFrame, summary: pd.DataFrame, base: str) -> str:
    what = "no task" if len(rows["start"].unique()) > 1 else rows["start"].iloc[0]
    verb = "is" if what == "no task" else "is not"
    return f"On your data, {what} {verb} distinguishable from {base}.{_best(rows, summary)}"


def _best(rows: pd.DataFrame, summary: pd.DataFrame) -> str:
    if not len(rows):
        return ""
    row = rows.loc[rows["gain"].idxmax()]
    if abs(row["gain"]) < 5e-4:
        return " There is no difference: all came to the same."
    return f" The largest difference: {row['start']}, {_gain(row, summary)}."


def _sure(rows: pd.DataFrame, verdict: str, summary: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """Of each start with such a gain after all corrections the largest one, largest first."""
    ends = rows["all_low"] if verdict == "better" else -rows["all_high"]
    rows = rows[(ends > 0) & (rows["verdict"] == verdict)]
    rows = rows.reindex(rows["gain"].abs().sort_values(ascending=False).index).drop_duplicates("start")
    return [(row["start"], row) for _, row in rows.iterrows()]


def _elsewhere(own: pd.DataFrame, better: list[tuple[str, pd.Series]], summary: pd.DataFrame) -> str:
    """With which numbers of labels none of those that helped did."""
    rows = own[own["start"].isin([name for name, _ in better])]
    helped = {repr(row["labels"]) for _, row in rows[rows["all_low"] > 0].iterrows()}
    rest = {repr(row["labels"]): _labels(row) for _, row in rows.iterrows() if repr(row["labels"]) not in helped}
    if not rest:
        return ""
    return f" With {' and with '.join(rest.values())} no difference can be told from chance."


def _gain(row: pd.Series, summary: pd.DataFrame) -> str:
    """'with 100 labeled images 5.3 more of 100 test images named rightly (95 % interval +1.0 to +9.6)'"""
    metric = summary.attrs["metric"]
    times, digits = (1, ".3g") if metric in ("R2", "negative MAE") else (100, ".1f")
    change = f"{abs(times * row['gain']):{digits}} {'more' if row['gain'] >= 0 else 'less'}"
    unit = "of 100 test images named rightly" if metric == "accuracy" else f"{'points ' * (times == 100)}in {metric}"
    text = f"with {_labels(row)} {change} {unit}"
    if not np.isfinite(row["all_low"]):
        return text
    if times == 100 and row["all_high"] - row["all_low"] >= 1:  # as wide as all that scores can be
        return f"{text} (how much of that is chance, so few seeds cannot tell)"
    low, high = (f"{times * row[end]:+{digits}}" for end in ("all_low", "all_high"))
    return f"{text} ({100 * summary.attrs['confidence']:.3g} % interval {low} to {high})"


def _labels(row: pd.Series) -> str:
    n = f"{row['n_labels']:,} labeled images"
    if isinstance(row["labels"], float):
        return f"all {n}" if row["labels"] == 1 else n
    return f"{n} ({row['labels']} a class)"
