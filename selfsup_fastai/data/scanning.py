"""Headers of DICOM files as a table, and what is wrong with the others: before anything is decoded.

    table, problems = scan_dicoms('/pacs/export')

Headers are read in child processes with limits on time and memory: no file can stop a scan or hurt this process.
"""

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import pandas as pd

from selfsup_fastai.data.dicom_terms import (
    BODY_PARTS,
    IMAGE_WORDS,
    INTENTS,
    LATERALITIES,
    MODALITIES,
    PHOTOMETRIC,
    VIEWS,
    known,
    known_words,
)
from selfsup_fastai.data.files import REPORT_COLUMNS, as_paths, ask_files, find_files, usable_cpus
from selfsup_fastai.data.pseudonyms import pseudonym
from selfsup_fastai.data.reasons import REASONS, bad
from selfsup_fastai.errors import DataError

__all__ = ["COLUMNS", "IDENTIFYING", "headers", "scan_dicoms", "scan_files"]

COLUMNS = {  # of the table, and their types
    "file": object,
    "patient": object,
    "study": object,
    "series": object,
    "instance": object,
    "modality": object,
    "body_part": object,
    "view": object,
    "laterality": object,
    "plane": object,
    "frames": int,
    "height": int,
    "width": int,
    "samples": int,
    "photometric": object,
    "bits": int,
    "spacing_y": float,
    "spacing_x": float,
    "thickness": float,
    "window_center": float,
    "window_width": float,
    "slope": float,
    "intercept": float,
    "syntax": object,
    "number": float,
    "position": object,
    "orientation": object,
    "echo_time": float,
    "acquisition": float,
    "kind": object,
    "intent": object,
    "image_type": object,
    "burned_in": object,
    "lossy": bool,
    "color": bool,
    "n_bytes": int,
}
IDENTIFYING = ["patient_id", "patient_age", "patient_sex", "study_uid", "series_uid", "sop_uid"]
"""Columns that identify people, added only where they are asked for."""

_BATCH = 64  # files a request: one by one, asking takes as long as reading
_FILES_PER_WORKER = 1_000  # starting a child costs about as much as reading this many headers
_TIMED_OUT = {"timeout", "crashed"}


def scan_dicoms(
    folder: str | os.PathLike,  # Of DICOM files, under any names
    recurse: bool = True,  # Look into folders within the folder, at any depth
    identifying: bool = False,  # Add ids, UIDs, age and sex as they stand in the files
    n_workers: int | None = None,  # Child processes; None: by the number of files
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the headers of all DICOM files in a folder: (a table of the images, what cannot be used and why).

    See `scan_files`.
    """
    return scan_files(find_files(folder, recurse), identifying, n_workers)


def scan_files(
    paths: Iterable[str | os.PathLike],  # Files
    identifying: bool = False,  # Add ids, UIDs, age and sex as they stand in the files
    n_workers: int | None = None,  # Child processes; None: by the number of files
    timeout: float = 20.0,  # Seconds that one file may take
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the headers of DICOM files: (a table of the images, what cannot be used and why).

    The table has one row a file and the columns of `COLUMNS`; its index is the place in `paths`. `patient`, `study`,
    `series` and `instance` are pseudonyms (see `pseudonyms`), '' where a file has no such id. Texts are words of the
    standard; others, which may be anything, are replaced: body parts and views by 'OTHER-' and a pseudonym, the rest by
    ''. Missing numbers are NaN. Whether the pixels can be decoded stays open.
    The second frame has file, code (a key of `REASONS`) and message; its `attrs` say how many files were `checked`, and
    how many are `images` of other formats, which are no problem and no part of the table.

    `identifying=True` adds the columns patient_id, patient_age, patient_sex, study_uid, series_uid and sop_uid with
    what stands in the files. Such a table identifies people wherever it is printed or kept.
    """
    files = as_paths(paths)
    return tables(files, headers(files, identifying, n_workers, timeout), identifying)


def tables(
    files: Sequence[Path],
    found: Sequence[dict],  # What `headers` returns of them
    identifying: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Table and problems, as `scan_files` returns them."""
    columns = COLUMNS | dict.fromkeys(IDENTIFYING, object) if identifying else COLUMNS
    good = [i for i, facts in enumerate(found) if "modality" in facts]
    data = {name: [found[i][name] for i in good] for name in columns if name != "file"}
    data = {"file": [files[i] for i in good], **data}
    series = {name: pd.Series(data[name], index=good, dtype=kind) for name, kind in columns.items()}
    rows = [{"file": file, **facts} for file, facts in zip(files, found) if "code" in facts]
    problems = pd.DataFrame(rows, columns=REPORT_COLUMNS)
    problems.attrs["checked"] = len(files)
    problems.attrs["images"] = sum("image" in facts for facts in found)
    return pd.DataFrame(series, columns=list(columns), index=good), problems


def headers(
    files: Sequence[Path],
    identifying: bool = False,
    n_workers: int | None = None,
    timeout: float = 20.0,
) -> list[dict]:
    """Of each file a row of the table (without `file`), or code and message, or {'image': True}."""
    if n_workers is not None and n_workers < 1:
        raise DataError(f"n_workers is the number of processes, at least 1 (None: chosen by itself); got {n_workers}.")
    n_workers = n_workers or max(1, min(8, usable_cpus(), len(files) // _FILES_PER_WORKER))
    found = _asked(files, _BATCH, identifying, n_workers, timeout)
    again = [i for i, facts in enumerate(found) if facts.get("code") in _TIMED_OUT]
    for i, facts in zip(again, _asked([files[i] for i in again], 1, identifying, n_workers, timeout)):
        found[i] = facts
    return [_decodable(facts) for facts in found]


class _Batch(os.PathLike):
    """Files that are asked about at once."""

    def __init__(self, files: Sequence[Path], identifying: bool):
        self.n_files = len(files)
        self.settings = {"paths": [os.path.abspath(file) for file in files], "identifying": identifying}

    def __fspath__(self) -> str:
        return self.settings["paths"][0]


def _asked(files: Sequence[Path], n: int, identifying: bool, n_workers: int, timeout: float) -> list[dict]:
    """Of each file what a child process says, `n` of them asked about at once; the same for all of a batch that fails.

    Ids are replaced here.
    """
    batches = [_Batch(files[i : i + n], identifying) for i in range(0, len(files), n)]
    answers = ask_files("headers", batches, "Reading headers", n_workers, timeout)
    found = []
    for batch, answer in zip(batches, answers, strict=True):
        found += answer["rows"] if "rows" in answer else [answer] * batch.n_files
    return [_without_ids(facts, identifying) if "modality" in facts else facts for facts in found]


def _without_ids(row: dict, identifying: bool) -> dict:
    """A row as the table shows it."""
    ids = {name: row.pop(name) for name in ("patient_id", "issuer", "study_uid", "series_uid", "sop_uid")}
    row["patient"] = pseudonym("patient", ids["patient_id"], ids["issuer"])
    for name, uid in (("study", "study_uid"), ("series", "series_uid"), ("instance", "sop_uid")):
        row[name] = pseudonym(name, ids[uid])
    if identifying:
        row |= {name: ids.get(name, row.get(name)) for name in IDENTIFYING}
    for name, terms in _TERMS.items():
        row[name] = known(row[name], terms)
    for name, words in (("body_part", BODY_PARTS), ("view", VIEWS)):
        row[name] = _term(row[name]) if row[name] and not known_words(row[name], words) else row[name]
    row["image_type"] = "\\".join(word if known_words(word, IMAGE_WORDS) else "" for word in row["image_type"])
    for name in ("position", "orientation"):
        row[name] = None if row[name] is None else tuple(row[name])
    row["uid"], row["syntax"], row["kind"] = row["syntax"], _uid_name(row["syntax"]), _uid_name(row["kind"])
    return row


_TERMS = {"modality": MODALITIES, "laterality": LATERALITIES, "photometric": PHOTOMETRIC, "intent": INTENTS}
_TERMS |= {"burned_in": {"YES", "NO"}}


@lru_cache(4096)
def _term(text: str) -> str:
    """A word of nobody's: the same for the same text."""
    return f"OTHER-{pseudonym('term', text)[:6].upper()}"


@lru_cache(4096)
def _uid_name(uid: str) -> str:
    from selfsup_fastai.data.dicom import uid_name  # brings pydicom

    return uid_name(uid)


def _decodable(facts: dict) -> dict:
    """Code and message in place of a row whose pixels are compressed in a way that nothing here decodes."""
    if "uid" not in facts:
        return facts
    code = _missing_decoder(facts["uid"])
    if not code:
        return facts
    fix = ' pip install "selfsup_fastai[dicom]"' if code == "no_decoder" else ""
    return {"code": code, "message": str(bad(code, f"({facts['syntax']}){fix}"))}


@lru_cache(256)
def _missing_decoder(uid: str) -> str:
    """'no_decoder' or 'unsupported_syntax' where a syntax cannot be decoded here, else ''."""
    from selfsup_fastai.data.dicom import missing_decoder

    code = missing_decoder(uid)
    assert not code or code in REASONS, "a reason that is in no table"
    return code
