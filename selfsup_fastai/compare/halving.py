"""Successive halving: all tasks get a little, the better half more, and so on. Test labels are not looked at."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from fastai.data.core import DataLoaders
from tqdm.auto import tqdm

from selfsup_fastai.compare.keeping import key_of
from selfsup_fastai.compare.planning import Rung
from selfsup_fastai.compare.pretraining import Entrant, pretrained, reason_for
from selfsup_fastai.compare.starts import content_of
from selfsup_fastai.data.files import result_folder
from selfsup_fastai.messages import say
from selfsup_fastai.writing import write_whole

COLUMNS = ["task", "rung", "images", "seconds", "score", "kept", "reason"]


@dataclass
class Race:
    """A race under way: what is granted, who is left, and who fell out why."""

    dls: DataLoaders  # Images to pretrain on
    arch: Any
    folder: Path  # For the encoders
    rungs: list[Rung]
    grants: dict[str, int]  # Images through the encoder for each task, on the last rung
    print: str  # Of the images
    how: dict = field(default_factory=dict)  # `precision` and `channels_last` of all learners
    judge: Callable[[Path], float] | None = None  # A score of an encoder, from training labels only
    judged_by: str = ""  # Tells these labels, and this score, from others
    rows: list[dict] = field(default_factory=list)
    files: dict[str, list[Path]] = field(default_factory=dict)  # Of the tasks that are left: an encoder for each seed
    losses: dict[str, float | None] = field(default_factory=dict)  # And the validation loss of the last

    def run(self, racing: list[Entrant]) -> None:
        """All rungs, one after the other."""
        racing = [replace(entrant, how=self.how) for entrant in racing]
        most = [sorted((self._granted(rung, e) for e in racing), reverse=True)[: rung.tasks] for rung in self.rungs]
        total = sum(rung.seeds * sum(images) for rung, images in zip(self.rungs, most))
        with tqdm(total=total, unit="image", unit_scale=True, disable=None, leave=False) as bar:
            for number in range(len(self.rungs)):
                racing = self._rung(number, racing, bar)

    def table(self) -> pd.DataFrame:
        """A row for each task and rung."""
        return pd.DataFrame(self.rows, columns=COLUMNS)

    def drop(self, name: str, reason: str) -> None:
        """A task that cannot take part."""
        self.rows.append(dict(zip(COLUMNS, (name, 0, 0, 0.0, np.nan, False, reason))))

    def _granted(self, rung: Rung, entrant: Entrant) -> int:
        return max(1, round(rung.share * self.grants[entrant.name]))

    def _rung(self, number: int, racing: list[Entrant], bar: tqdm) -> list[Entrant]:
        """Those who go on."""
        found = [(entrant, self._tried(number, entrant, bar)) for entrant in racing]
        found = [(entrant, row) for entrant, row in found if not row["reason"]]
        last = number == len(self.rungs) - 1
        keep = len(found) if last else self.rungs[number + 1].tasks
        order = sorted(found, key=lambda pair: -np.nan_to_num(pair[1]["score"], nan=-np.inf))
        for place, (_, row) in enumerate(order):
            row["kept"] = place < keep
            row["reason"] = "" if row["kept"] else f"number {place + 1} of {len(order)}; {keep} went on"
        return [entrant for entrant, row in found if row["kept"]]

    def _tried(self, number: int, entrant: Entrant, bar: tqdm) -> dict:
        """The row of one task, with a reason where it failed."""
        rung, images = self.rungs[number], self._granted(self.rungs[number], entrant)
        row = dict(zip(COLUMNS, (entrant.name, number, 0, 0.0, np.nan, False, "")))
        self.rows.append(row)
        try:
            files = []
            for seed in range(rung.seeds):
                bar.set_description(f"{entrant.name}, rung {number + 1} of {len(self.rungs)}, seed {seed}")
                files.append(self._file(entrant, images, seed))
                facts = pretrained(self.dls, entrant, self.arch, images, seed, files[-1], bar)
                row |= {"images": row["images"] + facts["images"]}
                row |= {"seconds": round(row["seconds"] + facts["seconds"], 1)}
            row["score"] = self._score(files[0])
        except Exception as error:  # whatever a task or network raises, the others go on
            row["reason"] = reason_for(error)
            say(f"{entrant.name} falls out: {row['reason']}")
            return row
        if number == len(self.rungs) - 1:
            self.files[entrant.name], self.losses[entrant.name] = files, facts["valid_loss"]
        return row

    def _score(self, encoder: Path) -> float:
        """Computed, or found beside the encoder."""
        if self.judge is None:
            return np.nan
        file = encoder.with_name(f"{encoder.stem}-{self.judged_by[:12]}.score.json")
        if not file.exists():
            write_whole(file, json.dumps(self.judge(encoder)).encode())
        return float(json.loads(file.read_text("utf-8")))

    def _file(self, entrant: Entrant, images: int, seed: int) -> Path:
        name = "".join(c if c.isalnum() or c in "+_" else "-" for c in entrant.name).strip("-")
        settings = dict(task=entrant.about(), arch=content_of(self.arch), images=images, seed=seed, data=self.print)
        return result_folder(self.folder) / f"{name}-{seed}-{key_of(**settings)[:12]}.safetensors"
