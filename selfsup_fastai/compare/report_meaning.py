"""What a comparison means, for a person who knows no self-supervised learning: three sentences and a glossary."""

from typing import NamedTuple

import pandas as pd

from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.compare.report_words import (
    SHARES,
    count_text,
    gain_text,
    interval_text,
    is_known,
    labels_text,
    list_text,
    score_text,
)

GLOSSARY = {
    "pretext task": "A question about an image whose answer comes with the image, so that nobody has to label it: "
    "which way is it up, what is hidden here, are these two the same picture? It is asked only so that the network "
    "learns to see.",
    "encoder": "The part of a network that turns an image into a few hundred numbers. It is what pretraining trains "
    "and what is kept afterwards.",
    "pretraining": "Training by a pretext task, on images without labels.",
    "label": "What a person says about an image: its class, a finding, a value. Labels are what is scarce.",
    "fine-tuning": "Training a pretrained encoder on labeled images, for what you really want to know.",
    "from scratch": "Training on the labeled images alone, beginning with random numbers: what is to be beaten.",
    "test images": "Labeled images that no network was trained on. All scores here are of them.",
    "interval": "Had everything been repeated many times, 95 of 100 such intervals would hold the true value. Where "
    "the interval of a gain holds zero, there may be no gain.",
    "seed": "A number that fixes everything random in a run. Repeating with other seeds shows how much is luck.",
    "probe": "A simple classifier on top of a network that is not trained any further: it shows what the network knows "
    "already.",
}
BADGES = {  # kind -> mark and word beside the verdict
    "helped": ("▲", "It helped"),
    "hint": ("≈", "A hint, no more"),
    "other": ("≈", "Not by pretraining"),
    "unclear": ("≈", "Not distinguishable"),
    "worse": ("▼", "It made things worse"),
    "unlabeled": ("?", "Not known yet"),
}


class Reading(NamedTuple):
    """A comparison as it is to be read."""

    kind: str  # A key of BADGES
    best: pd.Series | None  # The row of the summary to look at first
    sentences: list[str]  # What it means, how sure that is, what to do next
    use: str | None  # The start to go on with, if it has an encoder


def read(comparison: Comparison) -> Reading:
    """What to tell somebody who has a minute."""
    rows = compared(comparison)
    if rows.empty:
        return Reading("unlabeled", None, _unlabeled(comparison), None)
    own, better = rows[rows["start"].isin(own_starts(comparison))], rows["verdict"] == "better"
    sure = better & stands(rows)
    for kind, found, say in (("helped", sure & rows.index.isin(own.index), _helped), ("other", sure, _other)):
        if found.any():
            best = rows.loc[rows["gain"][found].idxmax()]
            return Reading(kind, best, say(comparison, best, rows), best["start"])
    if better.any():
        best = rows.loc[rows["gain"][better].idxmax()]
        return Reading("hint", best, _hint(comparison, best, rows), None)
    own = own if len(own) else rows
    kind, say = ("worse", _worse) if (own["verdict"] == "worse").all() else ("unclear", _unclear)
    best = own.loc[own["gain"].idxmax()]
    return Reading(kind, best, say(comparison, best, rows), None)


def compared(comparison: Comparison) -> pd.DataFrame:
    """The rows of the summary that have a verdict: all but the baseline's. Empty without labels."""
    table = comparison.summary
    if table is None or not len(table):
        return pd.DataFrame(columns=["labels", "start", "gain", "verdict"])
    return table[table["verdict"].fillna("") != ""]


def stands(rows: pd.DataFrame) -> pd.Series:
    """Whether a difference is more than chance even among all comparisons of the table."""
    return (rows[_end("low", rows)] > 0) | (rows[_end("high", rows)] < 0)


def _end(name: str, rows: pd.DataFrame | pd.Series) -> str:
    """The column of an end of the interval that the verdict goes by: corrected for all comparisons, where there is."""
    return f"all_{name}" if f"all_{name}" in rows else f"gain_{name}"


def confidence_of(comparison: Comparison) -> float:
    """Of the intervals."""
    return float(getattr(comparison.summary, "attrs", {}).get("confidence", 0.95))


def own_starts(comparison: Comparison) -> list[str]:
    """Starts that were pretrained on the user's images, not published weights or scratch with a help."""
    starts, tasks = compared(comparison)["start"].unique(), comparison.settings.get("tasks")
    return [start for start in starts if tasks is None or start in list(tasks)]


def metric_of(comparison: Comparison) -> str:
    runs = comparison.runs
    return str(runs["metric"].iloc[0]) if runs is not None and len(runs) else "accuracy"


def baseline_of(comparison: Comparison) -> str:
    """The start that the others are compared with."""
    table = comparison.summary
    if table is None or not len(table):
        return "scratch"
    return table.attrs.get("baseline") or table["start"][table["verdict"].fillna("") == ""].iloc[0]


def baseline_row(comparison: Comparison, row: pd.Series) -> pd.Series:
    """The baseline with as many labels."""
    table = comparison.summary
    return table[(table["start"] == baseline_of(comparison)) & (table["labels"] == row["labels"])].iloc[0]


def gain_sentence(comparison: Comparison, row: pd.Series) -> str:
    """'accuracy 68.2 % against 57.3 % with 5 labels a class'"""
    metric, base = metric_of(comparison), baseline_row(comparison, row)
    scores = f"{score_text(row['score'], metric)} against {score_text(base['score'], metric)}"
    return f"{metric} {scores} with {labels_text(row['labels'])}"


def _gain(comparison: Comparison, row: pd.Series) -> str:
    metric = metric_of(comparison)
    ends = (row[_end(name, row)] for name in ("low", "high"))
    interval = interval_text(*ends, metric, gain=True)
    return gain_text(row["gain"], metric) + (f" (interval {interval})" if interval else "")


def _helped(comparison: Comparison, best: pd.Series, rows: pd.DataFrame) -> list[str]:
    tried = f", even after allowing for the {len(rows)} comparisons that were made" if len(rows) > 1 else ""
    worse = rows[(rows["verdict"] == "worse") & (rows["start"] == best["start"])]
    but = f" With {list_text([labels_text(v) for v in worse['labels']])} it did harm, though." if len(worse) else ""
    return [
        f"A network that first practiced on your unlabeled images, by the pretext task “{best['start']}”, and then "
        "learned from your labels did better on the test images than one that learned from the labels alone: "
        f"{gain_sentence(comparison, best)}.",
        f"The gain is {_gain(comparison, best)}: the interval does not hold zero{tried}, so luck is an unlikely "
        f"explanation.{but}",
        f"Fine-tune the encoder of “{best['start']}” on all your labels, and before anybody relies on it, test "
        "it on images from other people, devices and days.",
    ]


def _hint(comparison: Comparison, best: pd.Series, rows: pd.DataFrame) -> list[str]:
    return [
        f"One start looks better than training from the labels alone, “{best['start']}”: "
        f"{gain_sentence(comparison, best)}.",
        f"The gain is {gain_text(best['gain'], metric_of(comparison))}, more than luck explains if only this number of "
        f"labels is looked at; but {len(rows)} comparisons were made, and among so many one may look like it by luck.",
        "Repeat this with more seeds or more test images before you build on it.",
    ]


def _other(comparison: Comparison, best: pd.Series, rows: pd.DataFrame) -> list[str]:
    own = list_text(own_starts(comparison), "or") or "any pretext task"
    return [
        f"Something else than pretraining on your images helped, “{best['start']}”: {gain_sentence(comparison, best)}.",
        f"That gain is {_gain(comparison, best)}; pretraining by {own} did not do better than training from scratch by "
        "more than luck explains.",
        f"Go on with “{best['start']}”, and come back to pretraining when you have more unlabeled images or more time.",
    ]


def _unclear(comparison: Comparison, best: pd.Series, rows: pd.DataFrame) -> list[str]:
    metric, own = metric_of(comparison), rows[rows["start"].isin(own_starts(comparison))]
    own = own if len(own) else rows
    most, worse = own[_end("high", own)].max(), own[own["verdict"] == "worse"]
    told = is_known(most) and most < (0.5 if metric in SHARES else 1.0)  # else an interval that says nothing
    seeds = count_text(comparison.runs["seed"].nunique(), "repeat")
    n_test = comparison.data.get("n_test") or comparison.summary.attrs.get("n_test")
    tested = f"{seeds} and {count_text(int(n_test), 'test image')}" if n_test else seeds
    possible = f": with {tested}, gains of up to {gain_text(most, metric)} may hide in the noise"
    harm = f" By {list_text([f'“{s}”' for s in worse['start'].unique()])} it even did harm." if len(worse) else ""
    return [
        "Whether a network had first practiced on your unlabeled images made no difference that can be told from luck: "
        f"the greatest gain, by “{best['start']}” with {labels_text(best['labels'])}, is {_gain(comparison, best)}."
        + harm,
        f"This does not prove that there is no gain{possible if told else '; so few runs tell little'}.",
        "Train from scratch, which is the least work; to know it more surely, repeat this with more seeds, "
        "more unlabeled images or a greater budget.",
    ]


def _worse(comparison: Comparison, best: pd.Series, rows: pd.DataFrame) -> list[str]:
    return [
        "Networks that had first practiced on your unlabeled images did worse on the test images than one that learned "
        f"from the labels alone; even the best, “{best['start']}”: {gain_sentence(comparison, best)}.",
        f"The difference is {_gain(comparison, best)}, more than luck explains; the usual reasons are a question that "
        "does not suit the images, or pretraining that was too short.",
        "Do not use these encoders; train from scratch, or compare other tasks with a greater budget.",
    ]


def _unlabeled(comparison: Comparison) -> list[str]:
    return [
        "There were no labels, so whether pretraining helps with what you want to know cannot be said yet.",
        "The signals below tell only whether a network has learned to keep your images apart; across tasks they hardly "
        "agree with how useful a network is, so do not choose a task by them.",
        "Label about twenty images of each class, half of them to test with, and repeat this with --labeled.",
    ]
