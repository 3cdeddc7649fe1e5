"""Sentences beside tables and pictures: how to read them, and how the evidence was made."""

import shlex

from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.compare.report_meaning import baseline_of, confidence_of, metric_of, own_starts
from selfsup_fastai.compare.report_words import count_text, list_text, start_text, value_text

PLACES = {"--labeled": "LABELED", "--out": "REPORT"}  # What stands for a folder of the user's
RACE = (
    "In each round every task that was left was pretrained anew with the same budget, then the weaker half fell out, "
    "so that the others could be given more. The score (more is better) is that of a simple classifier on the "
    "pretrained network, tried within the labeled training images: test images had no part in it."
)
RACE_WITHOUT_LABELS = (
    "Every task was pretrained with the same budget; without labels nothing could choose between them."
)
SIGNALS = (
    "They say whether the network keeps images apart (effective rank: high is good), whether two views of one image "
    "stay together (alignment: low is good) and whether images spread evenly (uniformity: low is good). They help to "
    "compare runs of one task; across tasks they hardly agree with how useful a network is, so nothing was chosen by "
    "them."
)
SEEN, BOTH = "test images seen in pretraining", " on both sides"  # Keys of `Comparison.leaks`
PROBES = (
    "How to read it: a simple classifier was put on each layer of networks that were not trained any further, so a "
    "curve above the one from scratch says that this layer has learned something about your classes without having "
    "been told."
)


def table_words(comparison: Comparison) -> str:
    """What stands in the table."""
    metric, base = metric_of(comparison), start_text(baseline_of(comparison), baseline_of(comparison))
    unit = "in percent of the test images" if metric == "accuracy" else "on the test images"
    level = _level(comparison)
    runs = comparison.runs.groupby(["start", "n_labels"])["seed"].nunique()
    each = count_text(int(runs.min()), "run") if runs.min() == runs.max() else f"{runs.min()} to {runs.max()} runs"
    return (
        f"Each score is the mean {metric} ({unit}, more is better) over {each}, in small letters its {level} interval. "
        f"A gain is the difference to training {base} with the very same labels."
    )


def table_legend(comparison: Comparison) -> str:
    """What the marks and the little pictures mean."""
    points = " One point is one test image in a hundred." if metric_of(comparison) == "accuracy" else ""
    p = " p: how often luck alone would make a difference at least this large. Intervals of gains and p allow for the"
    p = p + " number of comparisons made with as many labels." if "p_corrected" in comparison.summary else ""
    return (
        "▲ better and ▼ worse: the difference is more than luck explains. ≈ not distinguishable: it may be luck. In "
        f"the little pictures the dashed line is no gain at all, and the bar is the interval.{points}{p}"
    )


def curve_words(comparison: Comparison, drawn: int) -> str:
    """How to read the curves, of which `drawn` are shown."""
    base = start_text(baseline_of(comparison), baseline_of(comparison))
    many = comparison.summary is not None and comparison.summary["start"].nunique() > drawn
    left_out = f" Of the others only the best {drawn - 1} are drawn; all are in the table." if many else ""
    return (
        f"How to read it: more labels are further to the right, better scores are higher; the dotted black curve is "
        f"training {base}. Bars are {_level(comparison)} intervals; where those of two curves overlap "
        f"widely, do not tell them apart.{left_out}"
    )


def neighbor_words(share_before: float | None, share_after: float | None) -> str:
    """What to look for, and the shares of neighbors of the same class."""
    words = (
        "The same images were shown to the network before it was trained and after it was pretrained; beside each are "
        "the ones that it takes for most similar (the figure is the similarity, 1 at most). Look for rows that show "
        "the same kind of thing; rows that merely share brightness or background say that little was learned."
    )
    if share_before is None or share_after is None:
        return words
    return (
        f"{words} ✓ is an image of the query's class, ✗ one of another: {100 * share_before:.0f} % of those shown were "
        f"of the same class before, {100 * share_after:.0f} % after. So few are an impression, no proof."
    )


def evidence(comparison: Comparison) -> list[str]:
    """How the figures came about, as far as the comparison says."""
    settings, runs = comparison.settings, comparison.runs
    budget, tasks = settings.get("budget"), own_starts(comparison) or list(settings.get("tasks") or [])
    lines = []
    if tasks:
        amount = f" ({value_text(budget)})" if budget else ""
        lines.append(
            f"Equal budgets: {list_text(tasks)} were given the same amount of pretraining{amount}, counted in images "
            "through the network or in seconds, whatever the task makes of an image."
        )
    if runs is not None and len(runs):
        lines += _labeled_evidence(comparison)
    return lines


def _labeled_evidence(comparison: Comparison) -> list[str]:
    base, attrs = start_text(baseline_of(comparison), baseline_of(comparison)), comparison.summary.attrs
    seeds, level = count_text(comparison.runs["seed"].nunique(), "seed"), _level(comparison)
    luck = "the luck of the draw of labels and of training" + ", and of the choice of test images" * bool(
        attrs.get("images")
    )
    return [
        f"Equal labels: every start was trained on the very same labeled images, drawn anew for each of {seeds}, for "
        "as many steps, by the schedule that suits it: pretrained nets are fine-tuned, new ones trained as a whole.",
        "Test labels chose nothing: neither a task, nor a setting, nor the moment to stop. Each network was tested "
        "once, after its last pass.",
        f"Intervals of scores are {level} intervals. They cover {luck}; they do not cover another hospital, camera or "
        "year.",
        "A verdict compares runs with the same seed and the same labels pair by pair. “Better” and “worse” are said "
        f"only where the interval of the difference to training {base} leaves out zero, after it was made wider "
        "because several comparisons were made with as many labels (Holm's correction). The sentence at the top of "
        "this page counts the comparisons of all numbers of labels together.",
        "“Not distinguishable” does not mean equal: it means that these runs cannot tell. More seeds and more test "
        "images narrow the intervals.",
    ]


def _level(comparison: Comparison) -> str:
    return f"{100 * confidence_of(comparison):.3g} %"


def leak_words(leaks: dict) -> str:
    """What the check of the test images means."""
    seen, n, left_out = (leaks.get(name) for name in (SEEN, "test images", "left out of pretraining"))
    if seen is None:
        return "That was not checked." if not leaks else ""
    both = [name.removesuffix(BOTH) for name, count in leaks.items() if name.endswith(BOTH) and count]
    of = f" of the {n:,}" if isinstance(n, int) else ""
    if left_out:
        shared = f", or shared {list_text(both)} with one," if both else ""
        return f"No: {count_text(left_out, 'image')} that showed a test image{shared} had been left out of pretraining."
    if seen or both:
        what = list_text([*([f"{seen:,}{of} test images"] if seen else []), *both])
        return f"Yes: {what} were among the images to pretrain on, so the results are better than they should be."
    return f"No: none{of} test images was among the images to pretrain on."


def masked(command: str) -> str:
    """A command line with words in place of the user's folders: their names may identify patients."""
    try:
        words = shlex.split(command)
    except ValueError:  # not a command line as a shell reads it
        return "selfsup compare FOLDER --labeled LABELED --out REPORT"
    made, before = [], ""
    for word in words:
        name, eq, _ = word.partition("=")
        if eq and name in PLACES:
            word = f"{name}={PLACES[name]}"
        elif before in PLACES:
            word = PLACES[before]
        elif before == "compare" and not word.startswith("-"):
            word = "FOLDER"
        elif "/" in word or "\\" in word:
            word = "FOLDER" if not eq else f"{name}=FOLDER"
        made.append(word)
        before = word
    return shlex.join(made)
