"""The report: one HTML page that tells whether pretraining helped, opens from disk and fetches nothing."""

import datetime
import hashlib
import re
import shlex
from base64 import b64encode
from pathlib import Path
from typing import Any

import pandas as pd
from fastai.data.core import DataLoaders
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from selfsup_fastai.compare import report_notes as notes
from selfsup_fastai.compare.comparison import Comparison
from selfsup_fastai.compare.report_meaning import BADGES, GLOSSARY, Reading, baseline_of, metric_of, read
from selfsup_fastai.compare.report_neighbors import Neighbors, find_neighbors
from selfsup_fastai.compare.report_pictures import MOST_CURVES, Picture, curve_picture, probe_picture, questions
from selfsup_fastai.compare.report_tables import (
    Table,
    probe_table,
    race_table,
    runs_table,
    signals_table,
    summary_groups,
)
from selfsup_fastai.compare.report_words import facts, labels_text, start_text
from selfsup_fastai.data.files import result_folder
from selfsup_fastai.data.loader import are_scans
from selfsup_fastai.data.reasons import REASONS
from selfsup_fastai.errors import EncoderFileError
from selfsup_fastai.seeding import preserved_rng
from selfsup_fastai.writing import write_whole

PAGE, PICTURES = "index.html", "pictures"
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z“])")  # not within a figure, such as 0.5, or 20 %
CONTENTS = {  # id -> name, and what of the page must be there for it
    "table": ("The results", "groups"),
    "curves": ("More labels", "curve"),
    "race": ("The race", "race"),
    "layers": ("Layers", "probe"),
    "neighbors": ("What looks alike", "neighbors"),
    "asked": ("What was asked", "questions"),
    "data": ("The images", "data"),
    "settings": ("Settings", "settings"),
    "evidence": ("Can this be trusted?", "evidence"),
    "words": ("A few words", "glossary"),
    "again": ("Once more", "versions"),
}


def write_report(
    comparison: Comparison,  # What `compare_pretexts` returned
    dls: DataLoaders | None,  # The unlabeled images; None: the page does not show what was asked
    labeled: DataLoaders | None,  # The labeled images, tested on the validation part; None: there are none
    out: str | Path,  # Folder to write to; made if missing
    paths: bool = False,  # Show file names, and the folders of scans: they may identify patients
) -> Path:
    """Writes `out`/index.html, a page that needs no other file, and its curves as PNG files; returns its path."""
    out = result_folder(out)
    with preserved_rng():
        page = page_of(comparison, dls, labeled, out, paths)
    for name, picture in _files(page).items():
        write_whole(result_folder(out / PICTURES) / f"{name}.png", picture)
    write_whole(out / PAGE, rendered(page).encode())
    return out / PAGE


def rendered(page: dict) -> str:
    """The page as HTML. Every value is escaped; style and its checksum are the only things taken as they are."""
    where = PackageLoader("selfsup_fastai.compare", "page")
    web = Environment(loader=where, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = where.get_source(web, "style.css")[0]
    checksum = b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return web.get_template("report.html").render(page, style=Markup(style), style_hash=Markup(f"sha256-{checksum}"))


def page_of(comparison: Comparison, dls, labeled, out: Path, paths: bool) -> dict:
    """Everything that the page shows, by the names it has in page/report.html."""
    reading = read(comparison)
    first, _, more = SENTENCE_END.sub("\n", comparison.verdict, count=1).partition("\n")
    page = {"reading": reading, "badge": BADGES[reading.kind], "glossary": GLOSSARY}
    page |= {"verdict": first, "more_verdict": more}
    page |= {"meaning": list(zip(("What was found", "How sure that is", "What to do next"), reading.sentences))}
    page |= {"use_command": _use_command(comparison, reading, out), "day": datetime.date.today().isoformat()}
    page |= _figures(comparison) | _pictures(comparison, reading, dls, labeled)
    scans = any(given is not None and are_scans(given) for given in (dls, labeled))
    page |= {
        "data": facts(_data(comparison)),
        "settings": facts(_settings(comparison)),
        "leaks": facts(comparison.leaks),
    }
    page |= {"leak_words": notes.leak_words(comparison.leaks)}
    page |= {"versions": facts(comparison.versions), "evidence": notes.evidence(comparison)}
    page |= {"left_out": _left_out(dls, paths)} | _command(comparison.command, paths or not scans)
    page["contents"] = [(id, name) for id, (name, needed) in CONTENTS.items() if page[needed]]
    return page


def _settings(comparison: Comparison) -> dict:
    """With numbers of labels as everywhere on the page: 1.0 is all of them."""
    labels = comparison.settings.get("labels")
    return comparison.settings | ({"labels": [labels_text(amount) for amount in labels]} if labels else {})


def _data(comparison: Comparison) -> dict:
    """Its `labels` is their kind, not how many."""
    return {"label_kind" if name == "labels" else name: value for name, value in comparison.data.items()}


def _figures(comparison: Comparison) -> dict:
    groups, metric, base = summary_groups(comparison), metric_of(comparison), baseline_of(comparison)
    page = {"groups": groups, "runs": runs_table(comparison), "metric": metric[0].upper() + metric[1:]}
    page |= {"baseline": "scratch" if base == "scratch" else start_text(base, base)}
    page |= {"table_words": notes.table_words(comparison) if groups else ""}
    page |= {"table_legend": notes.table_legend(comparison) if groups else ""}
    page |= {"race": race_table(comparison), "race_words": notes.RACE if groups else notes.RACE_WITHOUT_LABELS}
    page |= {"signals": signals_table(comparison), "signal_words": notes.SIGNALS}
    return page | {"probes": probe_table(comparison), "probe_words": notes.PROBES}


def _pictures(comparison: Comparison, reading: Reading, dls: DataLoaders | None, labeled: DataLoaders | None) -> dict:
    page = {"curve": curve_picture(comparison), "probe": probe_picture(comparison)}
    page |= {"curve_words": notes.curve_words(comparison, MOST_CURVES)}
    tasks = list(comparison.settings.get("tasks") or [])
    page["questions"] = [] if dls is None else questions(tasks, dls, comparison.settings.get("arch"))
    start = _shown_start(comparison, reading)
    found = _neighbors(comparison.encoders[start][0], dls, labeled) if start else None
    page |= {"neighbors": found, "neighbors_of": start}
    return page | {"neighbor_words": notes.neighbor_words(found.before, found.after) if found else ""}


def _shown_start(comparison: Comparison, reading: Reading) -> str | None:
    """The pretrained encoder that neighbors are shown of: the one to use, else the best, else any."""
    best = None if reading.best is None else reading.best["start"]
    known = [start for start, files in (comparison.encoders or {}).items() if files]
    return next((start for start in (reading.use, best, *known) if start in known), None)


def _neighbors(encoder: Any, dls: DataLoaders | None, labeled: DataLoaders | None) -> Neighbors | None:
    """Among test images, whose classes are known; without labels, among those that pretraining was validated with."""
    if labeled is None and dls is None:
        return None
    vocab = None if labeled is None else list(getattr(labeled, "vocab", None) or [])
    try:
        return find_neighbors(encoder, (dls if labeled is None else labeled).valid, vocab)
    except EncoderFileError:  # a comparison outlives its encoders: then there is nothing to show
        return None


def _use_command(comparison: Comparison, reading: Reading, out: Path) -> str | None:
    """How to fine-tune the encoder that helped, from within the report's folder, if it lies there."""
    files = (comparison.encoders or {}).get(reading.use) if reading.use else None
    if not files:
        return None
    file, folder = Path(files[0]).resolve(), out.resolve()
    seen = file.relative_to(folder).as_posix() if folder in file.parents else file.name
    return shlex.join(["selfsup", "finetune", "LABELED", "--encoder", seen])


def _left_out(dls: DataLoaders | None, named: bool) -> Table | None:
    """Files that could not be used: their names if they may be shown, else how many for each reason."""
    report: pd.DataFrame | None = getattr(dls, "report", None)
    if report is None or not len(report):
        return None
    if named and "file" in report:
        return Table(["File", "Reason"], [[str(r.file), str(r.message)] for r in report.itertuples(index=False)])
    counts = report["code"].value_counts()
    return Table(["Files", "Reason"], [[f"{n:,}", REASONS.get(code, str(code))] for code, n in counts.items()])


def _command(command: str | None, named: bool) -> dict:
    note = "" if named or not command else "; FOLDER, LABELED and REPORT stand for your folders"
    return {"command": command if named or not command else notes.masked(command), "command_note": note}


def _files(page: dict) -> dict[str, bytes]:
    """Pictures that are written as files, too."""
    pictures: dict[str, Picture | None] = {"label_curve": page["curve"], "probes": page["probe"]}
    for question in page["questions"]:
        name = re.sub(r"[^A-Za-z0-9_+]+", "-", question.task).strip("-")
        pictures[f"asked_{name}"] = question.picture
    return {name: picture.png for name, picture in pictures.items() if picture and picture.png}
