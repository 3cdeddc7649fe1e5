"""`compare_pretexts`: which pretext task helps on these images, if any does?"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from fastai.data.core import DataLoaders

from selfsup_fastai.callbacks.consistency_loss import ConsistencyLoss
from selfsup_fastai.callbacks.precision import KINDS, Way
from selfsup_fastai.checks import check_choice, check_number
from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.compare.curves import label_curve
from selfsup_fastai.compare.facts import Labeled, data_facts, granted_in_words, known_of, name_of, versions
from selfsup_fastai.compare.halving import Race
from selfsup_fastai.compare.keeping import data_print
from selfsup_fastai.compare.leaks import check_unseen
from selfsup_fastai.compare.preparing import Asked, planned
from selfsup_fastai.compare.pretraining import entrants
from selfsup_fastai.compare.published import published_encoder
from selfsup_fastai.compare.sentence import whole_verdict
from selfsup_fastai.compare.signals import RELIABILITY, signals_of
from selfsup_fastai.compare.starts import SCRATCH, Start
from selfsup_fastai.compare.summary import summarize
from selfsup_fastai.data.files import result_folder
from selfsup_fastai.data.loader import check_dls, n_in_of
from selfsup_fastai.downstream.probes import METRICS, linear_probe
from selfsup_fastai.errors import SelfsupError, TaskError
from selfsup_fastai.messages import quiet, say
from selfsup_fastai.processes import check_single

TASKS = (
    "rotation",
    "relative_position",
    "colorization",
    "inpainting",
    "models_genesis",
    "simclr",
    "simsiam",
    "vicreg",
    "npid",
    "deep_cluster",
)
"""Who takes part where nothing is said: those that work with any convolutional net, of each kind some."""

ARCH, FINALISTS = "resnet10t", 3
BASELINES = (SCRATCH, "consistency", "published")
CONSISTENT, PUBLISHED = "scratch + consistency", "published weights"
RATIO = 1  # Unlabeled images for each labeled one: seven, as FixMatch has, take five times as long


def compare_pretexts(
    dls: DataLoaders,  # Unlabeled images, such as UnlabeledDataLoaders
    tasks: Sequence | None = None,  # Names, 'rotation+simclr', (name, settings), tasks; None: ten that suit most images
    labeled: DataLoaders | None = None,  # Labels are drawn from its training part; its validation part is the test set
    budget: int | None = None,  # Images through the encoder for each task that comes to the end; None: a lunch break's
    *,
    seconds: float | None = None,  # Instead of images: of training, for each
    arch: Any = None,  # The net; None: resnet10t
    seeds: int | None = None,  # Of everything: pretraining, draw of labels, order, head; None: 5, for a lunch break 3-5
    labels: Sequence[float | int] = (0.05, 0.2, 1.0),  # Shares of the labeled training images, or so many a class
    baselines: Sequence[str] = BASELINES,  # Beside the tasks: 'scratch' (always), 'consistency', 'published'
    finalists: int = FINALISTS,  # Tasks that come to the end; of more than these, half fall out at each rung
    steps: int | None = None,  # Of fine-tuning, as in `label_curve`
    epochs: int | None = None,  # Likewise
    metric: str | None = None,  # Likewise
    groups: str | None = None,  # Column that tells whose an image is; None: the patient, where that is known
    leaks: str = "raise",  # Images to pretrain on that are tested on: 'raise' an error, or 'exclude' them
    precision: str | None = None,  # Of all runs: 'bf16', 'fp16', 'fp32', 'auto'; None: fp32, for a lunch break 'auto'
    pretrained: bool | None = None,  # Published weights: True downloads them; None: if they are on this machine
    out: str | Path | None = None,  # Folder for encoders and runs: the same call goes on after a stop; None: a new one
    command: str | None = None,  # The shell command that does it again, for the report
) -> Comparison:
    """Pretrains by each task, fine-tunes on few labels and on more, and says what the figures bear: maybe nothing.

    Tasks get the same number of images through the encoder. Where there are more than `finalists`, they race: on each
    rung they are pretrained anew with one seed and twice the images, and the better half goes on, by a cross-validated
    linear model on the labeled *training* images. The last rung is pretrained once for each seed; label curves then
    stand beside those of the same net from scratch, from scratch with a consistency loss on the unlabeled images
    (FixMatch), and from published weights. Test labels choose nothing.

    Steps are timed first, and one line says how long it will take; what follows from the times is kept in `out`, and
    says in `settings` what it was. A task that fails is in `race` with the reason.
    Without `labeled` there are signals only (effective rank, alignment, ...), which choose nothing.
    Raises `DataError` where pretraining would see the test images, `SelfsupError` in one of several processes.
    """
    check_single("Comparing tasks")
    check_dls(dls)
    _check(seeds, finalists, budget, seconds, baselines, leaks, precision)
    arch, racing = arch or ARCH, entrants(list(TASKS if tasks is None else tasks))
    names, found = [entrant.name for entrant in racing], {}
    known = None if labeled is None else known_of(labeled, labels, metric, groups, steps, epochs)
    if labeled is not None:
        dls, found = check_unseen(dls, labeled, leaks == "exclude", groups)
    folder = result_folder(tempfile.mkdtemp(prefix="selfsup-compare-") if out is None else out)
    if out is None:
        say(f"Encoders and runs are kept in {folder}; with out= the same call could go on after a stop.")
    print_ = data_print(dls)
    starts = [] if known is None else _baselines(dls, known, arch, baselines, pretrained)
    asked = Asked(arch, seeds if known else 1, finalists, budget, seconds, precision)
    race = planned(dls, racing, asked, known, starts, folder, print_)
    seeds = race.rungs[-1].seeds
    race.run([entrant for entrant in racing if entrant.name in race.grants])
    parts = {"race": race.table(), "signals": _signals(race), "leaks": found, "command": command}
    parts |= {"encoders": race.files, "versions": versions(), "data": data_facts(dls, known)}
    settings = {
        "tasks": names,
        "arch": name_of(arch),
        "budget": granted_in_words(race.grants),
        "seeds": seeds,
        "finalists": finalists,
        "precision": str(Way(race.how.get("precision", "fp32"), race.how.get("channels_last", False))),
    }
    settings |= {"rungs": len(race.rungs), "baselines": [start.name for start in starts]}
    if known is None:
        comparison = Comparison(_without_labels(race), settings=settings, **parts)
    else:
        settings |= {"labels": known.amounts, "metric": known.metric, "choice": "labels of training images only"}
        settings |= {name: value for name, value in known.curve.items() if value is not None and name != "metric"}
        comparison = _compared(race, known, starts, seeds, settings, parts)
    comparison.save(folder)
    return comparison


def _check(seeds, finalists, budget, seconds, baselines, leaks, precision) -> None:
    check_choice("precision", precision, (None, "auto", *KINDS))
    if seeds is not None:
        check_number("seeds", seeds, 1, whole=True)
    check_number("finalists", finalists, 1, whole=True)
    check_choice("leaks", leaks, ("raise", "exclude"))
    for name in baselines:
        check_choice("baselines", name, BASELINES)
    if budget is not None and seconds is not None:
        raise TaskError("budget (images) and seconds both say how long a task is pretrained: give one of them.")
    if budget is not None:
        check_number("budget", budget, 1, whole=True)
    if seconds is not None:
        check_number("seconds", seconds, above=0)


def _baselines(dls, known: Labeled, arch, baselines, download: bool | None) -> list[Start]:
    """What the tasks are compared with, scratch first."""
    starts = [Start(SCRATCH, (arch,), fresh=True)]
    if "consistency" in baselines:
        if known.kind in ("category", "multicategory", "mask"):
            cbs, about = lambda: [ConsistencyLoss(dls, "fixmatch", ratio=RATIO)], f"fixmatch, ratio {RATIO}"
            starts.append(Start(CONSISTENT, (arch,), True, cbs, f"{about}, {data_print(dls)}"))
        else:
            say("FixMatch needs classes: the consistency loss is left out.")
    if "published" in baselines:
        net = published_encoder(arch, n_in_of(known.dls), None, download)
        starts += [] if net is None else [Start(PUBLISHED, (net,))]
    return starts


def _compared(race: Race, known: Labeled, starts: list[Start], seeds: int, settings: dict, parts: dict) -> Comparison:
    """Label curves of the tasks that are left, the baselines, and what they bear."""
    own = [Start(name, tuple(files)) for name, files in race.files.items()]
    encoders = {start.name: start for start in [*starts, *own]}
    kept = race.folder.parent / "runs"
    runs = label_curve(encoders, known.dls, known.amounts, seeds, folder=kept, **known.curve, **race.how)
    summary = summarize(runs)
    verdict = whole_verdict(summary, list(race.files))
    dropped = sum(1 for name in settings["tasks"] if name not in race.files)
    if dropped:
        verdict += (
            f" Of {len(settings['tasks'])} tasks {dropped} fell out before the end; the table of the race says why."
        )
    parts["probes"] = _probes(race, known, starts)
    return Comparison(verdict, runs, summary, settings=settings, **parts)


def _probes(race: Race, known: Labeled, starts: list[Start]) -> pd.DataFrame | None:
    """What each layer knows, of the first seed's encoders and of an untrained net; all labels of the training part."""
    if known.kind not in METRICS:
        return None
    sources = {SCRATCH: starts[0].sources[0], **{name: files[0] for name, files in race.files.items()}}
    tables = []
    for name, source in sources.items():
        with quiet():
            table = linear_probe(source, known.dls, C=0.01, max_dim=1024)
        tables.append(table.assign(start=name)[["start", *table.columns]])
    return pd.concat(tables, ignore_index=True)


def _signals(race: Race) -> pd.DataFrame | None:
    rows = []
    for name, files in race.files.items():
        try:
            rows.append({"task": name, **signals_of(files[0], race.dls), "validation loss": race.losses[name]})
        except SelfsupError as error:  # diverged: that is something to know, and no reason to stop
            say(f"{name}: {error}")
    return pd.DataFrame(rows) if rows else None


def _without_labels(race: Race) -> str:
    n = len(race.files)
    return (
        f"Without labels nobody can say which task helps. {n} encoder{'s were' if n != 1 else ' was'} pretrained; "
        f"`signals` says what their embeddings look like. {RELIABILITY} A few labels, say 10 a class, would tell."
    )
