"""Nothing but the model's own time? Training beside other libraries, and beside the bare step of the same model.

The bare step is forward, loss, backward and the optimizer's step on one batch that is in memory already, views and all:
no loader, no fastai. Medians over rounds in which every case has its turn, after one that does not count: have the
machine to yourself. All runs on the GPU where there is one, the pixels kept there. Needs the extra `bench` and the data
sets clothing10_photos and, for --parts memory, cifar10 (SELFSUP_DATA names the folder they are looked for in).

    python bench/train.py                                            # all parts
    python bench/train.py --parts peers tasks --docs docs/benchmarks.md
    python bench/train.py --parts tasks --tasks rotation simclr --rounds 5
    python bench/train.py --quick                                    # small and short: does it run?
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from measure import Absent, machine
from tasks import into
from train_growth import growth
from train_memory import memory
from train_peers import peers
from train_processes import gpu, processes
from train_tasks import tasks

from selfsup_fastai.pretext import TASKS

PARTS: dict[str, Callable[[Path, argparse.Namespace], str]] = {
    "peers": peers,
    "memory": memory,
    "tasks": tasks,
    "growth": growth,
    "processes": processes,
    "gpu": gpu,
}
SETTINGS = {"images": 320, "size": 96, "bs": 64, "arch": "resnet18", "rounds": 3}
SETTINGS |= {"task-size": 64, "task-bs": 32, "task-steps": 4, "few": 1_000, "many": 50_000}
QUICK = {"images": 32, "size": 32, "bs": 16, "arch": "resnet10t", "rounds": 1}
QUICK |= {"task-size": 48, "task-bs": 8, "task-steps": 2, "few": 500, "many": 2_000}
ABOUT = {
    "images": "photographs in an epoch",
    "size": "pixels a side",
    "bs": "of a batch",
    "arch": "the net, by timm's name",
    "rounds": "that count",
    "task-size": "pixels a side, in the part tasks",
    "task-bs": "of a batch, in the part tasks",
    "task-steps": "of an epoch, in the part tasks",
    "few": "images, in the part memory",
    "many": "images, in the part memory",
}


def part(name: str, work: Path, args: argparse.Namespace) -> str:
    """What a part found, with its command; or why there is nothing."""
    try:
        found = PARTS[name](work, args)
    except Absent as absent:
        found = str(absent)
    return f"```bash\n{command(name, args)}\n```\n\n{found}\n\n{machine()}"


def command(name: str, args: argparse.Namespace) -> str:
    """What finds it again."""
    usual = SETTINGS | (QUICK if args.quick else {})
    given = {name: getattr(args, name.replace("-", "_")) for name in SETTINGS}
    shown = ["--quick"] * args.quick + [f"--{name} {value}" for name, value in given.items() if value != usual[name]]
    if name == "tasks" and args.tasks != list(TASKS):
        shown.append(f"--tasks {' '.join(args.tasks)}")
    return " ".join([f"python bench/train.py --parts {name}", *shown])


def arguments(texts: list[str] | None = None) -> argparse.Namespace:
    """Of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of the part tasks")
    parser.add_argument("--methods", nargs="+", default=["simclr", "byol", "rotation"], help="of the part peers")
    parser.add_argument("--folder", type=Path, help="of photographs; else the data set clothing10_photos")
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), help=f"{ABOUT[name]} ({default})")
    parser.add_argument("--quick", action="store_true", help="small and short, for a try; other options still count")
    parser.add_argument("--work", type=Path, help="folder for unpacked data and pixels; else a temporary one")
    parser.add_argument("--trace", type=Path, help="file for a trace of the first method's training, for a browser")
    parser.add_argument("--docs", type=Path, help="page to put the tables in, each between its comments")
    args = parser.parse_args(texts)
    for name, default in (SETTINGS | (QUICK if args.quick else {})).items():
        if getattr(args, name.replace("-", "_")) is None:
            setattr(args, name.replace("-", "_"), default)
    return args


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).absolute()
        os.environ["SELFSUP_CACHE"] = str(work / "cache")
        for name in args.parts:
            text = part(name, work, args)
            print(f"### {name}\n\n{text}\n", flush=True)
            if args.docs:
                marks = f"<!-- train, {name}: written by bench/train.py -->", f"<!-- end of train, {name} -->"
                into(args.docs, text, marks)


if __name__ == "__main__":
    main()
