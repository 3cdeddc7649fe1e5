"""From runs to what may be said of them: a row for each start and number of labels, and one sentence."""

import numpy as np
import pandas as pd

from selfsup_fastai.compare.scores import SCORES
from selfsup_fastai.compare.statistics import Estimate, estimate, holm, redrawn_images, verdict
from selfsup_fastai.compare.tables import Predictions
from selfsup_fastai.errors import DataError
from selfsup_fastai.messages import say

COLUMNS = ("start", "labels", "n_labels", "seed", "score", "metric")


def summarize(
    runs: pd.DataFrame,  # What `label_curve` returned
    baseline: str = "scratch",  # The start that the others are compared with
    confidence: float = 0.95,  # Of the intervals
) -> pd.DataFrame:
    """One row for each number of labels and start: score, gain over the baseline, intervals, p, and a verdict.

    Gains are paired: two starts with the same seed had the same labels, in the same order, and the same test images.
    `low` and `high` are the score's own interval. All intervals cover the seeds and, where the predictions of the runs
    are known, the choice of the test images (whole patients, where known); see `compare.statistics`.

    `p_corrected` and `gain_low` to `gain_high` are corrected by Holm's procedure for the comparisons made with one
    number of labels: that is the family, each number of labels is one of its own. `p_all` is corrected for all
    comparisons of the table; the sentence of `whole_verdict` goes by it. `verdict` is 'better' or 'worse' only where
    the corrected interval excludes 0. One seed says nothing: the intervals are infinite.

    Where several seeds share a pretraining run, and there are others, they count as one.
    """
    _check(runs, baseline)
    cases = _Cases(runs)
    rows = []
    for labels in _amounts(runs):
        family = _family(cases, runs[runs["labels"].map(repr) == repr(labels)], baseline, confidence)
        rows += [{"labels": labels, **row} for row in family]
    table = pd.DataFrame(rows)
    table["labels"] = pd.Series([row["labels"] for row in rows], dtype=object)
    compared = table["p"].notna()
    table["p_all"] = np.nan
    table.loc[compared, "p_all"] = holm(table.loc[compared, "p"].to_numpy()).p
    table.attrs |= {"metric": runs["metric"].iloc[0], "baseline": baseline, "confidence": confidence}
    table.attrs |= {"n_test": cases.n_test, "images": cases.known is not None}
    return table


def _check(runs: pd.DataFrame, baseline: str) -> None:
    missing = [name for name in COLUMNS if name not in runs]
    if missing or not len(runs):
        raise DataError(
            f"Expected rows of label_curve; {'columns missing: ' + ', '.join(missing) or 'there are none'}."
        )
    if baseline not in set(runs["start"]):
        raise DataError(f"No run starts from {baseline!r}; there are {', '.join(runs['start'].unique())}.")
    if runs.assign(labels=runs["labels"].map(repr)).duplicated(["start", "labels", "seed"]).any():
        raise DataError("There are two runs of one start, number of labels and seed: which is meant?")


def _amounts(runs: pd.DataFrame) -> list:
    """The numbers of labels as asked, fewest first. 1 a class and 1.0, all of them, are not the same."""
    found = {repr(labels): (n, labels) for labels, n in zip(runs["labels"], runs["n_labels"])}
    return [labels for _, labels in sorted(found.values(), key=lambda pair: pair[0])]


class _Cases:
    """Scores of runs, also on redrawn test images."""

    def __init__(self, runs: pd.DataFrame):
        self.known: Predictions | None = runs.attrs.get("predictions")
        self.score = SCORES.get(runs["metric"].iloc[0])
        self.is_share = self.score is not None and self.score.is_share
        if self.known is None or self.score is None or "run" not in runs:
            say("The predictions of these runs are not at hand: intervals cover the seeds, not the test images.")
            self.known, self.n_groups, self.n_test = None, 0, runs.attrs.get("n_test")
            return
        self.weights = redrawn_images(self.known.groups)
        self.n_groups, self.n_test = len(np.unique(self.known.groups)), len(self.known.truth)

    def possible(self, ends: tuple[float, float], least: float) -> tuple[float, float]:
        """An interval within what the score can be: of shares 0 to 1, of their differences -1 to 1."""
        return tuple(np.clip(ends, least, 1)) if self.is_share and np.isfinite(ends).all() else ends

    def of(self, runs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray | None]:
        """(S,) scores and (S, draws) those on redrawn images, in the order of the rows."""
        scores = runs["score"].to_numpy(float)
        if self.known is None:
            return scores, None
        return scores, np.stack([self.score(self.known[key], self.known.truth, self.weights) for key in runs["run"]])


def _family(cases: _Cases, runs: pd.DataFrame, baseline: str, confidence: float) -> list[dict]:
    """The rows for one number of labels, the baseline's first."""
    starts = [baseline, *(start for start in runs["start"].unique() if start != baseline)]
    parts = {start: runs[runs["start"] == start].sort_values("seed") for start in starts}
    found = {start: cases.of(part) for start, part in parts.items()}
    gains = {s: _gain(cases, parts[s], found[s], parts[baseline], found[baseline]) for s in starts[1:]}
    corrected = holm([gain.p for gain in gains.values()], confidence)
    rows = []
    for start in starts:
        of = _estimate(cases, parts[start], *found[start])
        low, high = cases.possible(of.interval(confidence), 0)
        n_labels = round(parts[start]["n_labels"].mean())
        row = {"n_labels": n_labels, "start": start, "score": of.mean, "low": low, "high": high}
        row |= dict.fromkeys(("gain", "gain_low", "gain_high", "p", "p_corrected"), np.nan) | {"verdict": ""}
        rows.append(row | {"seeds": len(parts[start])})
    for row, gain, p, level in zip(rows[1:], gains.values(), corrected.p, corrected.confidence):
        low, high = cases.possible(gain.interval(level), -1)
        row |= {"gain": gain.mean, "gain_low": low, "gain_high": high, "p": gain.p, "p_corrected": p}
        row["verdict"] = verdict(low, high)
    return rows


def _gain(cases: _Cases, ours: pd.DataFrame, found, theirs: pd.DataFrame, base) -> Estimate:
    """The paired difference over the seeds that both have."""
    shared = sorted(set(ours["seed"]) & set(theirs["seed"]))
    if not shared:
        raise DataError("Two starts have no seed in common: they cannot be compared in pairs.")
    a, b = (np.flatnonzero(part["seed"].isin(shared)) for part in (ours, theirs))
    redrawn = None if found[1] is None else found[1][a] - base[1][b]
    return _estimate(cases, ours.iloc[a], found[0][a] - base[0][b], redrawn)


def _estimate(cases: _Cases, runs: pd.DataFrame, scores: np.ndarray, redrawn: np.ndarray | None) -> Estimate:
    """Over the seeds; over the pretraining runs, where there are several that some seeds share."""
    origins = runs["pretrained"].to_numpy() if "pretrained" in runs else runs["seed"].to_numpy()
    different = np.unique(origins)
    if 1 < len(different) < len(runs):
        scores = np.array([scores[origins == one].mean() for one in different])
        redrawn = None if redrawn is None else np.stack([redrawn[origins == one].mean(0) for one in different])
    return estimate(scores, redrawn, cases.n_groups)


def whole_verdict(
    summary: pd.DataFrame,  # What `summarize` returned
    about: dict[str, str] | None = None,  # Words for starts that are no tasks: {'timm': 'published weights'}
) -> str:
    """One sentence, or a few, for a person who has never heard of pretraining.

    A start is said to help only where its gain stands after correction for every comparison of the table; where it
    stands only for the comparisons with one number of labels, it is called a hint.
    """
    about, base = about or {}, summary.attrs["baseline"]
    compared = summary[summary["p"].notna()].copy()
    compared["name"] = [about.get(start, start) for start in compared["start"]]
    if not len(compared):
        return f"There is nothing to compare: all runs start from {base}."
    if summary["seeds"].min() < 2:
        unknown = "On your data nothing can be said yet: from a single seed nobody knows what is chance"
        return f"{unknown}; {_best(compared, summary)}"
    alpha = 1 - summary.attrs["confidence"]
    sure = compared[(compared["p_all"] < alpha) & (compared["verdict"] != "not distinguishable")]
    better, worse = (sure[sure["verdict"] == word] for word in ("better", "worse"))
    sentences = []
    if len(better):
        sentences.append(f"On your data pretraining helped: {_gains(better, summary)}.")
    elif (hints := compared[compared["verdict"] == "better"]) is not None and len(hints):
        sentences.append(
            f"On your data there is a hint, no more: {_gains(hints, summary)}; but {len(compared)} comparisons were "
            "made, and among so many one may look like this by chance. More seeds or test images would tell."
        )
    else:
        sentences.append(f"On your data nothing is distinguishable from {_scratch(base)}: {_best(compared, summary)}")
    if len(worse):
        sentences.append(f"Worse than {_scratch(base)}: {_gains(worse, summary)}.")
    return " ".join(sentences)


def _scratch(base: str) -> str:
    return "training from scratch" if base == "scratch" else base


def _gains(rows: pd.DataFrame, summary: pd.DataFrame) -> str:
    """Start by start, at each number of labels."""
    return "; ".join(_gain_words(row, summary) for _, row in rows.iterrows())


def _best(compared: pd.DataFrame, summary: pd.DataFrame) -> str:
    row = compared.loc[compared["gain"].idxmax()]
    return f"the largest gain is that of {_gain_words(row, summary)}."


def _gain_words(row: pd.Series, summary: pd.DataFrame) -> str:
    change, unit = _amount_words(row["gain"], summary.attrs["metric"])
    text = f"{row['name']} with {_labels_words(row)}, {change} {unit}"
    if not np.isfinite(row["gain_low"]):
        return text
    ends = " to ".join(_amount_words(row[end], summary.attrs["metric"])[0] for end in ("gain_low", "gain_high"))
    return f"{text} (interval {ends})"


def _amount_words(value: float, metric: str) -> tuple[str, str]:
    """A gain in the metric's own terms."""
    if metric == "accuracy":
        return f"{100 * value:+.1f}", "points (of 100 test images named rightly)"
    if metric in ("negative MAE", "R2"):
        return f"{value:+.3g}", f"in {metric}"
    return f"{100 * value:+.1f}", f"points of {metric}"


def _labels_words(row: pd.Series) -> str:
    n = f"{row['n_labels']:,} labeled images"
    if isinstance(row["labels"], float):
        return f"{n} (all)" if row["labels"] == 1 else n
    return f"{n} ({row['labels']} a class)"
