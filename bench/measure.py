"""What the benchmarks share: data sets, timing round by round, tables, and what they ran on."""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from fastai.torch_core import default_device
from scipy import stats

PACKAGES = "torch", "torchvision", "fastai", "timm", "lightly", "kornia", "pillow", "numpy"
_MODULES = {"pillow": "PIL"}  # where the name of the module is another


class Absent(Exception):
    """A data set is not at hand; the text says where it was looked for."""


def data_set(
    name: str,  # A folder in the one that SELFSUP_DATA names, with one archive in it
    into: Path,  # Folder to unpack to
) -> Path:
    """The unpacked data set. Raises `Absent`."""
    base = Path(os.environ.get("SELFSUP_DATA", Path(__file__).parents[2] / "shared" / "data"))
    archive = next((file for kind in ("*.zip", "*.tar.xz") for file in (base / name).glob(kind)), None)
    if archive is None:
        raise Absent(f"The data set {name} is not at hand: SELFSUP_DATA names the folder it is looked for in.")
    folder = into / name
    if not folder.exists():
        tell(f"unpacking {name}")
        with zipfile.ZipFile(archive) if archive.suffix == ".zip" else tarfile.open(archive) as opened:
            opened.extractall(folder, **({} if archive.suffix == ".zip" else {"filter": "data"}))
    return folder


def every_nth(folder: Path, n: int, into: Path) -> Path:
    """A copy of a folder with every n-th of its files."""
    for file in sorted(file for file in folder.rglob("*") if file.is_file())[::n]:
        copy = into / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy)
    return into


@contextmanager
def empty_cache(work: Path) -> Iterator[None]:
    """Inside, no pixels are kept yet."""
    usual = os.environ["SELFSUP_CACHE"]
    with tempfile.TemporaryDirectory(dir=work) as fresh:
        os.environ["SELFSUP_CACHE"] = fresh
        try:
            yield
        finally:
            os.environ["SELFSUP_CACHE"] = usual


def output(*arguments, **environment: str) -> str:
    """What a fresh Python printed. Raises `CalledProcessError` where it failed."""
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment).stdout


def tell(text: str) -> None:
    """A line of progress, apart from the results."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def timed(
    cases: dict[str | tuple, Callable],  # Each does its work and returns how many units that was
    rounds: int,
    measure: Callable[[Callable], float] | None = None,  # Gives a case's seconds a unit; None: of all that it does
) -> pd.DataFrame:  # Seconds a unit: a row a round, a column a case
    """Every case once unmeasured, then all of them in turn, round after round: what slows one round slows them all.

    Every second round goes backwards, so that no case always comes first, or always after the same other.
    """
    for name, case in cases.items():
        tell(f"warming up: {name}")
        case()
    table = []
    for i in range(rounds):
        tell(f"round {i + 1} of {rounds}")
        turns = list(cases)[:: -1 if i % 2 else 1]
        row = {name: (measure or _seconds_a_unit)(cases[name]) for name in turns}
        table.append([row[name] for name in cases])
    seconds = pd.DataFrame(table)
    seconds.columns = pd.Index(list(cases), tupleize_cols=False)
    return seconds


def _seconds_a_unit(case: Callable[[], int]) -> float:
    finish()
    start = time.perf_counter()
    units = case()
    finish()
    return (time.perf_counter() - start) / units


def mean_interval(values: pd.Series, confidence: float = 0.95) -> tuple[float, float]:
    """Mean of independent runs and half the width of Student's interval for it (infinite for a single run)."""
    if len(values) < 2:
        return float(values.mean()), float("inf")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def verdict(
    gain: float,  # A mean difference
    half: float,  # Half the width of its interval
) -> str:
    """Whether the interval excludes 0, and on which side."""
    return "better" if gain > half else "worse" if gain < -half else "not distinguishable"


class Laps:
    """Seconds from the start to the first lap, from there to the second, and so on; the device's work included."""

    def __init__(self):
        finish()
        self.seconds, self.since = [], time.perf_counter()

    def lap(self) -> None:
        """A step is done."""
        finish()
        now = time.perf_counter()
        self.seconds.append(now - self.since)
        self.since = now


def finish() -> None:
    """Wait for the device: it works on while Python goes ahead."""
    kind = default_device().type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def spread(values: pd.DataFrame, form: str = "{:.2f}") -> pd.DataFrame:
    """Median, min and max over the rounds: a row a case."""
    return values.agg(["median", "min", "max"]).T.map(form.format)


def ratios(seconds: pd.DataFrame, ours: str, form: str = "{:.1f}") -> list[str]:
    """How many times as long as `ours` each case took, by medians."""
    medians = seconds.median()
    return [form.format(median / medians[ours]) for median in medians]


def against_best(seconds: pd.DataFrame, ours: str, others: list[str]) -> str:
    """The ratio that counts, as a sentence."""
    medians = seconds.median()
    best = medians[others].idxmin()
    return f"{ours} : the best of the others ({best}) = {medians[best] / medians[ours]:.1f} : 1"


def markdown(table: pd.DataFrame, first: str) -> str:
    """A table of texts; `first` is the head of the column that the index becomes."""
    rows = [[first, *table.columns], ["---"] * (table.shape[1] + 1), *table.reset_index().values.tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def machine() -> str:
    """Processor, threads, versions, device."""
    try:
        with open("/proc/cpuinfo") as info:
            model = next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if default_device().type == "cuda" else default_device().type
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES if find_spec(_MODULES.get(name, name)))
    cpus = f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    return f"{cpus}; device: {device}; Python {platform.python_version()}, {versions}"
