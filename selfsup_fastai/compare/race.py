"""`compare_pretexts`: which pretext task helps on these images, if any?"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fastai.data.core import DataLoaders
from tqdm.auto import tqdm

from selfsup_fastai.compare.keeping import key_of
from selfsup_fastai.compare.planning import (
    Rung,
)
from selfsup_fastai.compare.pretraining import Entrant, pretrained, reason_for
from selfsup_fastai.data.files import result_folder
from selfsup_fastai.messages import say

PLAN, ENCODERS, RUNS = "plan.json", "encoders", "runs"


@dataclass
class Race:
    """A race under way: what is granted, who is left, and who fell out why."""

    dls: DataLoaders
    arch: Any
    folder: Path
    rungs: list[Rung]
    images: int  # The whole budget
    print: str  # Of the images
    speeds: dict[str, float]
    judge: Any = None  # (file of an encoder) -> score from training labels
    rows: list[dict] = field(default_factory=list)
    files: dict[str, list[Path]] = field(default_factory=dict)
    losses: dict[str, float | None] = field(default_factory=dict)

    def run(self, racing: list[Entrant]) -> None:
        """All rungs; afterwards `files` has the encoders of the tasks that are left, one for each seed."""
        total = sum(self._granted(rung, e) * rung.seeds for rung in self.rungs for e in racing[: rung.tasks])
        with tqdm(total=total, unit="image", unit_scale=True, disable=None, leave=False) as bar:
            for number, rung in enumerate(self.rungs):
                last = number == len(self.rungs) - 1
                found = [(self._rung(e, number, rung, bar), e) for e in racing]
                found = [(row, e) for row, e in found if row is not None]
                keep = len(found) if last else self.rungs[number + 1].tasks
                order = sorted(found, key=lambda pair: -np.nan_to_num(pair[0]["score"], nan=-np.inf))
                for place, (row, e) in enumerate(order):
                    row["kept"] = place < keep
                    if not row["kept"]:
                        row["reason"] = f"number {place + 1} of {len(order)}; {keep} went on"
                racing = [e for _, e in order[:keep]]

    def _granted(self, rung: Rung, entrant: Entrant) -> int:
        share = self.images if isinstance(self.images, int) else self.images * self.speeds[entrant.name]
        return max(1, round(rung.share * share))

    def _rung(self, entrant: Entrant, number: int, rung: Rung, bar: tqdm) -> dict | None:
        """The row of one task; None, and a row that says why, where it failed."""
        row = {"task": entrant.name, "rung": number, "images": 0, "seconds": 0.0, "score": np.nan, "kept": False}
        self.rows.append(row | {"reason": ""})
        row, images = self.rows[-1], self._granted(rung, entrant)
        files = []
        try:
            for seed in range(rung.seeds):
                bar.set_description(f"{entrant.name}, rung {number + 1} of {len(self.rungs)}, seed {seed}")
                files.append(self._file(entrant, images, seed))
                facts = pretrained(self.dls, entrant, self.arch, images, seed, files[-1], bar)
                row["images"] += facts["images"]
                row["seconds"] = round(row["seconds"] + facts["seconds"], 1)
            row["score"] = self.judge(files[0]) if self.judge else np.nan
        except Exception as error:  # whatever a task or network raises, the others go on
            row["reason"] = reason_for(error)
            say(f"{entrant.name} falls out: {row['reason']}")
            return None
        if number == len(self.rungs) - 1:
            self.files[entrant.name], self.losses[entrant.name] = files, facts["valid_loss"]
        return row

    def _file(self, entrant: Entrant, images: int, seed: int) -> Path:
        from selfsup_fastai.pretext import get_task

        settings = get_task(entrant.task, **entrant.settings).settings()
        name = "".join(c if c.isalnum() or c in "+_-" else "_" for c in entrant.name)
        key = key_of(
            task=name, settings=settings, arch=_arch_name(self.arch), images=images, seed=seed, data=self.print
        )
        return result_folder(self.folder / ENCODERS) / f"{name}-{seed}-{key[:12]}.safetensors"
