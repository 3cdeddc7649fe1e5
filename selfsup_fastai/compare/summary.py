"""From runs to what may be said of them: a row for each start and number of labels."""

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
    number of labels: that is the family, each number of labels is one of its own. `verdict` is 'better' or 'worse' only
    where this interval excludes 0. `p_all` and `all_low` to `all_high` are corrected for all comparisons of the table;
    the sentence of `whole_verdict` goes by them. One seed says nothing: the intervals are infinite.

    Where several seeds share a pretraining run, and there are others, they count as one.
    """
    _check(runs, baseline)
    cases = _Cases(runs)
    rows, gains = [], []
    for labels in _amounts(runs):
        family, found = _family(cases, runs[runs["labels"].map(repr) == repr(labels)], baseline, confidence)
        rows += [{"labels": labels, **row} for row in family]
        gains += [None, *found]
    _correct_all(cases, rows, gains, confidence)
    table = pd.DataFrame(rows)
    table["labels"] = pd.Series([row["labels"] for row in rows], dtype=object)
    table.attrs |= {"metric": runs["metric"].iloc[0], "baseline": baseline, "confidence": confidence}
    table.attrs |= {"n_test": cases.n_test, "images": cases.known is not None, "one_pretraining": _of_one(runs)}
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


def _of_one(runs: pd.DataFrame) -> list[str]:
    """Starts whose seeds all share one pretraining run: what another run would have come to, nobody knows."""
    if "pretrained" not in runs:
        return []
    counts = runs.groupby("start")[["pretrained", "seed"]].nunique()
    return counts.index[(counts["pretrained"] == 1) & (counts["seed"] > 1)].tolist()


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


def _correct_all(cases: _Cases, rows: list[dict], gains: list[Estimate | None], confidence: float) -> None:
    """Adds what is left of each gain after all comparisons of the table: p_all, all_low, all_high."""
    compared = [(row, gain) for row, gain in zip(rows, gains) if gain is not None]
    corrected = holm([gain.p for _, gain in compared], confidence)
    for row in rows:
        row |= dict.fromkeys(("p_all", "all_low", "all_high"), np.nan)
    for (row, gain), p, level in zip(compared, *corrected):
        low, high = cases.possible(gain.interval(level), -1)
        row |= {"p_all": p, "all_low": low, "all_high": high}


def _family(cases: _Cases, runs: pd.DataFrame, baseline: str, confidence: float) -> tuple[list[dict], list[Estimate]]:
    """The rows for one number of labels, the baseline's first; and the gains of the others."""
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
    return rows, list(gains.values())


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
