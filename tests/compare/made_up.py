"""Comparisons whose figures are made up, so that a page about them can be checked in seconds."""

import numpy as np
import pandas as pd
from scipy import stats

from selfsup_fastai.compare.comparison import Comparison

GAINS = {"simclr": 0.11, "rotation": 0.03, "jigsaw": -0.01}
LABELS = {2: 12, 5: 30, 20: 120}


def runs_of(gains: dict[str, float], metric: str = "accuracy", seeds: int = 5, spread: float = 0.015) -> pd.DataFrame:
    """A row a run: scratch rises with the labels, each start is better by its gain, everything with noise."""
    rng, rows = np.random.default_rng(1), []
    for labels, n_labels in LABELS.items():
        for seed in range(seeds):
            luck = rng.normal(0, 0.03)
            for start, gain in {"scratch": 0.0, **gains}.items():
                score = 0.45 + 0.09 * np.log2(labels) + luck + gain / labels**0.3 + rng.normal(0, spread)
                rows.append(
                    {
                        "start": start,
                        "labels": labels,
                        "n_labels": n_labels,
                        "seed": seed,
                        "score": score,
                        "metric": metric,
                    }
                )
    return pd.DataFrame(rows)


def summary_of(runs: pd.DataFrame) -> pd.DataFrame:
    """Student's intervals and paired differences; p times the number of comparisons (Bonferroni)."""
    rows = []
    for labels, part in runs.groupby("labels"):
        wide = part.pivot(index="seed", columns="start", values="score")
        others = [start for start in part["start"].unique() if start != "scratch"]
        for start in ["scratch", *others]:
            low, high = stats.t.interval(0.95, len(wide) - 1, wide[start].mean(), stats.sem(wide[start]))
            row = {"labels": labels, "n_labels": part["n_labels"].iloc[0], "start": start, "score": wide[start].mean()}
            row |= {"low": low, "high": high, "gain": np.nan, "gain_low": np.nan, "gain_high": np.nan, "p": np.nan}
            row |= {"p_corrected": np.nan, "verdict": ""}
            if start != "scratch":
                difference = wide[start] - wide["scratch"]
                n = len(others) * len(LABELS)
                ends = stats.t.interval(1 - 0.05 / n, len(wide) - 1, difference.mean(), stats.sem(difference))
                p = stats.ttest_1samp(difference, 0).pvalue
                verdict = "better" if ends[0] > 0 else "worse" if ends[1] < 0 else "not distinguishable"
                row |= {"gain": difference.mean(), "gain_low": ends[0], "gain_high": ends[1], "p": p}
                row |= {"p_corrected": min(1.0, p * n), "verdict": verdict}
            rows.append(row | {"seeds": len(wide)})
    table = pd.DataFrame(rows)
    table["p_all"], table["all_low"], table["all_high"] = table["p_corrected"], table["gain_low"], table["gain_high"]
    table.attrs |= {"metric": runs["metric"].iloc[0], "baseline": "scratch", "confidence": 0.95, "images": True}
    return table


def race() -> pd.DataFrame:
    """Two rounds; columns as `compare_pretexts` gives them."""
    rows = [("rotation", 0, 5000, 31.0, 0.52, True, ""), ("simclr", 0, 5000, 55.0, 0.55, True, "")]
    rows += [("jigsaw", 0, 5000, 48.0, 0.50, True, "")]
    rows += [("mae", 0, 5000, 61.0, 0.41, False, "number 4 of 5; 3 went on")]
    rows += [("byol", 0, 5000, 77.0, 0.38, False, "number 5 of 5; 3 went on")]
    rows += [("rotation", 1, 15000, 62.0, 0.56, True, ""), ("simclr", 1, 15000, 111.0, 0.63, True, "")]
    rows += [("jigsaw", 1, 15000, 97.0, 0.53, True, "")]
    return pd.DataFrame(rows, columns=["task", "rung", "images", "seconds", "score", "kept", "reason"])


def probes(starts: list[str]) -> pd.DataFrame:
    layers = {"conv1": 64, "layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}
    rows = []
    for i, start in enumerate(starts):
        for j, (layer, dim) in enumerate(layers.items()):
            score = 0.5 + 0.06 * j * (1 if i else 0.4) - 0.02 * i * (j == 4)
            rows.append(
                {
                    "start": start,
                    "layer": layer,
                    "dim": dim,
                    "C": 0.1,
                    "score": score,
                    "metric": "accuracy",
                    "n_test": 144,
                }
            )
    return pd.DataFrame(rows)


LEAKS = {"checked": "the pixels of all images", "pretraining images": 720, "test images": 144}
LEAKS |= {"test images seen in pretraining": 0, "patients on both sides": 0, "left out of pretraining": 0}
SIGNALS = pd.DataFrame(
    {"task": ["simclr", "rotation", "jigsaw"], "effective rank": [61.2, 18.4, 22.9], "alignment": [0.31, 0.55, 0.61]}
).assign(uniformity=[-3.1, -1.4, -1.2])


def made_up(
    gains: dict[str, float] | None = GAINS, verdict: str = "Pretraining helped: simclr is better.", **changes
) -> Comparison:
    """A comparison; `gains` None: without labels."""
    runs = summary = None
    starts = ["scratch", *(gains or {})]
    if gains is not None:
        runs = runs_of(gains, **{k: changes.pop(k) for k in ("metric", "seeds", "spread") if k in changes})
        summary = summary_of(runs)
    settings = {
        "tasks": list(gains or GAINS),
        "budget": "20,000 images",
        "seeds": 5,
        "labels": [2, 5, 20],
        "epochs": 20,
    }
    settings |= {"size": 64, "arch": "resnet10t", "confidence": 0.95}
    data = {
        "n_unlabeled": 720,
        "n_labeled": 120,
        "n_test": 144,
        "channels": 3,
        "size": 64,
        "groups": None,
        "labels": "category",
    }
    data |= {"classes": {"dress": 30, "hat": 30, "pants": 30, "shoes": 30}}
    parts = dict(runs=runs, summary=summary, verdict=verdict, race=race(), probes=probes(starts), signals=SIGNALS)
    parts |= dict(settings=settings, data=data, leaks=dict(LEAKS))
    parts |= dict(versions={"selfsup_fastai": "0.1", "torch": "2.15"}, encoders={}, command=None)
    return Comparison(**(parts | changes))
