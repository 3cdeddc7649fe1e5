"""Every pretext task on the same images, with the same encoder and the same number of images through it.

For each task and seed: the task's own metric beside guessing, a linear classifier on each frozen layer and 20-NN beside
the same encoder untrained, and how fast it trains. A finished run is not done again, a killed one is: start the same
command anew. Speeds come last, one task after the other, and are kept too (speed-*.json in --out): have the machine to
yourself then, or leave them out with --no-speeds. Rows that a page has already stay there if they were measured with
the same settings. The data: a folder with train/CLASS and test/CLASS, or the CIFAR-10 archive that tests use
(SELFSUP_DATA names the folder it is looked for in).

    python bench/tasks.py --out bench/results                           # all tasks
    python bench/tasks.py --tasks rotation simclr rotation+simclr --seeds 3 --docs docs/benchmarks.md
    python bench/tasks.py --tasks aet aet:transform=affine,border=reflect
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import mean, median

import pandas as pd
import torch
import yaml
from cifar10 import cifar10
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import set_seed
from measure import machine, markdown, tell
from steps import skip_first_stage

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.downstream.probes import linear_probe
from selfsup_fastai.encoders.encoder import Encoder
from selfsup_fastai.features import embed, knn_accuracy
from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext import TASKS, get_task
from selfsup_fastai.pretext.base import PretextTask
from selfsup_fastai.pretext.learner import PretextLearner, pretext_learner
from selfsup_fastai.pretext.multi import SeveralTasks

ARCH, NEIGHBORS, PROBED = "resnet10t", 20, 1024
BETWEEN = "; and "  # two machines that rows are from
TIMED = 3, 20  # batches to warm up with, and to measure
RATES = {"conv": 3e-3, "vit": 1e-3}  # a transformer does not bear the rate of a small convnet
SETTINGS = {
    "budget": 50_000,
    "images": 10_000,
    "probe-images": 3_000,
    "test-images": 5_000,
    "size": 48,
    "bs": 64,
    "seeds": 1,
}
ABOUT = {
    "budget": "images through the encoder",
    "images": "to pretrain on",
    "probe-images": "with labels, for the probes",
    "test-images": "to score the probes on",
    "size": "pixels a side",
    "bs": "of a batch",
    "seeds": "how many",
}


class Data:
    """Images to pretrain on, and labeled ones to probe with; tables of file and label."""

    def __init__(self, args: argparse.Namespace):
        train, test = cifar10(args.data, args.out)
        shuffled = train.sample(frac=1, random_state=0).reset_index(drop=True)
        self.train = shuffled.head(args.images)
        probed = shuffled.head(args.probe_images).assign(is_valid=False)
        test = test.sample(frac=1, random_state=0).head(args.test_images).assign(is_valid=True)
        self.labeled = pd.concat([probed, test], ignore_index=True)
        self.size, self.bs = args.size, args.bs

    def learner(self, task: str, seed: int) -> PretextLearner:
        """Of a task, with the common encoder; a task for another kind of net takes its own."""
        set_seed(seed, reproducible=True)
        made = named(task)
        dls = UnlabeledDataLoaders.from_files(self.train["file"], size=self.size, bs=self.bs)
        return pretext_learner(dls, made, ARCH if made.arch.startswith("resnet") else None)

    def probe(self, encoder: Encoder) -> dict:
        """Accuracies on the test images: a linear classifier a layer, and nearest neighbors."""
        dls = labeled_loaders(self.labeled, encoder.image_channels, self.size, 128)
        layers = linear_probe(encoder, dls, max_dim=PROBED).set_index("layer")["score"]
        neighbors = knn_accuracy(embed(encoder, dls.train), embed(encoder, dls.valid), NEIGHBORS)
        return {"layers": layers.round(4).to_dict(), "knn": round(neighbors, 4)}


def result(task: str, seed: int, data: Data, args: argparse.Namespace) -> dict:
    """What a task came to; read from its file if an earlier run got so far."""
    file = args.out / "tasks" / f"{task}-{args.images}-{args.budget}-{probed_as(args, seed)}.json"
    if file.exists():
        return json.loads(file.read_text())
    tell(f"{task}, seed {seed}")
    with quiet():
        learn = data.learner(task, seed)
        untrained = untrained_result(learn.encoder, seed, data, args)
        found = trained(learn, args.budget)
        learn.save_encoder(file.with_suffix(""))
        found |= {"task": task, "seed": seed, "random": untrained, **data.probe(learn.encoder)}
    write(file, found)
    return found


def trained(learn: PretextLearner, budget: int) -> dict:
    """Train for a number of images through the encoder, in whole epochs; the task's own numbers."""
    an_epoch = len(learn.dls.train) * learn.dls.train.bs * learn.task.passes
    epochs = max(1, round(budget / an_epoch))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(epochs, RATES["vit" if "vit" in learn.encoder.arch else "conv"])
    values = {k: v for k, v in learn.last_values.items() if v is not None}
    levels = learn.task.levels() if isinstance(learn.task, SeveralTasks) else {}
    own, chance = next(iter(levels.items()), (None, learn.task.chance()))
    own = own or next((name for name in values if name not in ("train_loss", "valid_loss")), "valid_loss")
    facts = {"epochs": epochs, "passes": learn.task.passes, "images": round(learn.images_seen)}
    facts |= {"arch": learn.encoder.arch, "input": learn.encoder.input}
    return {**facts, "metric": own, "value": values[own], "chance": chance}


def probed_as(args: argparse.Namespace, seed: int) -> str:
    """What a result of the probes depends on besides the net, for a file's name."""
    return f"{args.size}-{args.probe_images}-{args.test_images}-{seed}"


def named(task: str) -> PretextTask:
    """A task by its name, with settings behind a colon: 'aet:transform=affine,border=reflect'."""
    name, _, texts = task.partition(":")
    pairs = [text.partition("=") for text in texts.split(",") if text]
    return get_task(name, **{key: yaml.safe_load(value) for key, _, value in pairs})


class Pace(Callback):
    """How long each of the first batches takes, loading included; then the fit is over."""

    def __init__(self):
        self.seconds = []

    def before_train(self):
        self.since = time.perf_counter()

    def after_batch(self):
        now = time.perf_counter()
        self.seconds.append(now - self.since)
        self.since = now
        if len(self.seconds) == sum(TIMED):
            raise CancelFitException


def speed(task: str, data: Data, args: argparse.Namespace) -> float:
    """Images through the encoder in a second of training: of the median batch, after a warm-up."""
    file = args.out / "tasks" / f"speed-{task}-{args.size}-{args.bs}.json"
    if not file.exists():
        tell(f"{task}, speed")
        with quiet():
            learn, pace = data.learner(task, seed=0), Pace()
            skip_first_stage(learn)
            with learn.no_bar(), learn.no_logging():
                learn.fit(1, cbs=pace)
        warm_up, _ = TIMED
        middle = mean if isinstance(learn.task, SeveralTasks) else median  # whose batches differ in what they take
        write(file, {"images_a_second": args.bs * learn.task.passes / middle(pace.seconds[warm_up:])})
    return json.loads(file.read_text())["images_a_second"]


def untrained_result(encoder: Encoder, seed: int, data: Data, args: argparse.Namespace) -> dict:
    """The probes of an encoder of this kind with random weights, once for each kind."""
    kind = f"random-{encoder.arch}-{encoder.input}-{probed_as(args, seed)}"
    file = args.out / "tasks" / f"{kind}.json"
    if not file.exists():
        write(file, data.probe(encoder))
    return json.loads(file.read_text())


def write(file: Path, found: dict) -> None:
    """A file that is either there with everything in it or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")  # runs beside this one may write the same
    part.write_text(json.dumps(found))
    os.replace(part, file)


# --- tables -----------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """The mean; of several seeds with their standard deviation."""
    values = torch.tensor([v for v in values if v is not None], dtype=torch.double)
    if not len(values):
        return ""
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def row(runs: list[dict], images_a_second: float | None) -> dict:
    """A line of the first table: the runs of one task, and its speed."""
    best = [max(run["layers"], key=run["layers"].get) for run in runs]
    random = [max(run["random"]["layers"].values()) for run in runs]
    gains = [run["layers"][layer] - most for run, layer, most in zip(runs, best, random)]
    first = runs[0]
    return {
        "task": first["task"],
        "its own metric": f"{first['metric'].replace('_', ' ')} {spread([run['value'] for run in runs])}",
        "guessing": spread([run["chance"] for run in runs]),
        "best layer": f"{best[0]} {spread([max(run['layers'].values()) for run in runs])}",
        "best layer, untrained": spread(random),
        "gain": f"{sum(gains) / len(gains):+.3f}",
        "20-NN": spread([run["knn"] for run in runs]),
        "20-NN, untrained": spread([run["random"]["knn"] for run in runs]),
        "epochs": str(first["epochs"]),
        "images through the encoder": f"{first['images']:,}",
        "a second": "" if images_a_second is None else f"{images_a_second:,.0f}",
    }


def report(by_task: dict[str, list[dict]], speeds: dict[str, float | None]) -> list[dict]:
    """All tables, each a line by its first column: the tasks, then the layers, a table for each kind of network."""
    first = {task: row(runs, speeds[task]) for task, runs in by_task.items()}
    layers: dict[tuple, dict] = {}
    for task, runs in by_task.items():
        names = tuple(runs[0]["layers"])
        fed = "" if runs[0]["input"] in ("rgb", "grey") else f", fed with {runs[0]['input']}"
        fed += f", {task}'s net" if "vit" in runs[0]["arch"] else ""  # tasks build transformers of their own
        shown = {f"untrained{fed}": [run["random"] for run in runs], task: runs}
        for name, found in shown.items():
            accuracies = {layer: spread([run["layers"][layer] for run in found]) for layer in names}
            layers.setdefault(names, {})[name] = {"task": name, **accuracies}
    return [first, *layers.values()]


def described(args: argparse.Namespace) -> str:
    """What all rows of a page have in common."""
    settings = {f"--{name}": getattr(args, name.replace("-", "_")) for name in SETTINGS}
    shown = [f"{name} {value}" for name, value in settings.items() if value != SETTINGS[name[2:]]]
    command = " ".join(["python bench/tasks.py --tasks TASK ...", *shown])
    about = [
        f"{args.images:,} images without labels at {args.size} px in batches of {args.bs}; for each task about",
        f"{args.budget:,} images through the encoder (to whole epochs), one cycle up to a rate of {RATES['conv']}",
        f"({RATES['vit']} for a ViT); {ARCH}, or the task's net. Speed is that of the median of {TIMED[1]} batches",
        "(of several tasks the mean), alone on the machine, loading included.",
        f"Linear classifiers (features averaged to at most {PROBED} numbers a layer) and {NEIGHBORS}-NN get the labels",
        f"of {args.probe_images:,} of these images and are scored on {args.test_images:,} others; the best layer is",
        f"chosen there, too, as that of the untrained net is. Seeds of everything: {args.seeds}; ± is their deviation.",
    ]
    return f"```bash\n{command}\n```\n\n" + "\n".join(about)


def page_text(tables: list[dict], about: str, machines: list[str]) -> str:
    """The report as it stands on a page."""
    shown = [markdown(pd.DataFrame(list(lines.values())).set_index("task"), "task") for lines in tables]
    return "\n\n".join([about, *shown, BETWEEN.join(machines)])


def kept(page: Path, about: str, marks: tuple[str, str]) -> tuple[list[dict], list[str]]:
    """The tables that a page has and the machines they are from; none if they are of other settings."""
    _, text, _ = parts(page, marks)
    if about not in text:
        return [], []
    *blocks, machines = text.strip().split("\n\n")
    tables = []
    for block in blocks:
        if block.startswith("| task |"):
            head, _, *lines = [[cell.strip() for cell in line[2:-2].split(" | ")] for line in block.split("\n")]
            tables.append({line[0]: dict(zip(head, line)) for line in lines})
    return tables, machines.split(BETWEEN)


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """Each table of both, with the lines of both. What a new line has counts; where it is empty, the old one's."""
    tables = {tuple(next(iter(lines.values()))): dict(lines) for lines in old}
    for lines in new:
        table = tables.setdefault(tuple(next(iter(lines.values()))), {})
        for name, line in lines.items():
            before = table.get(name, {})
            table[name] = {head: value or before.get(head, "") for head, value in line.items()}
    return list(tables.values())


def into(page: Path, text: str, marks: tuple[str, str]) -> None:
    """Put the report between the two marks of a page."""
    before, _, after = parts(page, marks)
    begin, end = marks
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")


def parts(page: Path, marks: tuple[str, str]) -> tuple[str, str, str]:
    """What a page has before, between and after two marks."""
    begin, end = marks
    before, mark, rest = page.read_text("utf-8").partition(begin)
    between, last, after = rest.partition(end)
    if not (mark and last):
        raise SystemExit(f"{page.name} has no place for the tables: put {begin} and {end} where they belong.")
    return before, between, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for what is found")
    parser.add_argument("--docs", type=Path, help="page to put the tables in")
    parser.add_argument("--mark", default="tasks", help="which tables of the page: between the comments of this name")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="rotation, rotation+jigsaw, aet:border=gray")
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{ABOUT[name]} ({default:,})")
    parser.add_argument("--speeds", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = Data(args)
    by_task = {task: [result(task, seed, data, args) for seed in range(args.seeds)] for task in args.tasks}
    speeds = {task: speed(task, data, args) if args.speeds else None for task in args.tasks}
    tables, about = report(by_task, speeds), described(args)
    print(page_text(tables, about, [machine()]))
    if args.docs:
        marks = f"<!-- {args.mark}: written by bench/tasks.py -->", f"<!-- end of {args.mark} -->"
        old, machines = kept(args.docs, about, marks)
        machines += [] if machine() in machines else [machine()]
        into(args.docs, page_text(merged(old, tables), about, machines), marks)


if __name__ == "__main__":
    main()
