"""A part of bench/train.py: how much memory training takes."""

import argparse
from pathlib import Path

import pandas as pd
from measure import data_set, every_nth, markdown, output, ratios, spread, tell
from steps import photographs

SMALL = 32, 64, "rotation", "resnet10t"  # pixels a side, batch, task and net of folders of many images


def memory(work: Path, args: argparse.Namespace) -> str:
    """Beside the bare step's, and by the number of images."""
    return f"{beside_bare(work, args)}\n\n{by_images(work, args)}"


def beside_bare(work: Path, args: argparse.Namespace) -> str:
    """Processes that train on photographs, and that take bare steps of the same model."""
    folder = photographs(work, args.images + 1, args.folder)
    cases = {
        (method, kind): (folder, args.size, args.bs, kind, method, args.arch)
        for method in args.methods
        for kind in ("bare", "ours")
    }
    peaks = measured(cases, args.rounds)
    medians, table = peaks.median(), spread(peaks, "{:,.0f}")
    table["ratio"] = [f"{medians[case] / medians[(case[0], 'bare')]:.2f}" for case in cases]
    table.index = [f"{method}: {'bare step' if kind == 'bare' else kind}" for method, kind in cases]
    about = f"Peak memory of a fresh process, MB; {args.images:,} photographs, {args.size} px, batches of {args.bs},"
    about += f" {args.arch}. The same is imported for bare steps; {described()}."
    return f"{about}\n\n{markdown(table, 'process')}"


def by_images(work: Path, args: argparse.Namespace) -> str:
    """Processes that train on few and on many images."""
    many = data_set("cifar10", work) / "cifar10" / "train"
    n_found = sum(1 for file in many.rglob("*") if file.is_file())
    folders = {n: every_nth(many, n_found // n, work / f"cifar-{n}") for n in (args.few, args.many) if n < n_found}
    folders = {**folders, **({n_found: many} if args.many >= n_found else {})}
    texts = []
    for state in ("empty", "full"):
        tell(f"pixel cache {state}")
        cases = {f"{n:,} images": (folder, *SMALL[:2], "ours", *SMALL[2:]) for n, folder in folders.items()}
        peaks = measured(cases, 1 if state == "empty" else args.rounds)  # it is full after the first
        table = spread(peaks, "{:,.0f}").assign(ratio=ratios(peaks, next(iter(cases)), "{:.2f}"))
        few, most = peaks.median()
        n_few, n_most = folders
        added = f"{(most - few) * 1e3 / (n_most - n_few):.2f} KB an image more"
        texts.append(f"{markdown(table, f'pixel cache {state} at first')}\n\n{added}.")
    size, bs, task, arch = SMALL
    pixels = f"An image's pixels, {3 * size**2 / 1e3:.1f} KB, count where they are mapped into memory"
    about = f"CIFAR-10 at {size} px, batches of {bs}, {task}, {arch}; MB. {pixels}; {described()}."
    return "\n\n".join([about, *texts])


def described() -> str:
    """What a process does."""
    return "every batch of an epoch is made, and eight are trained on"


def measured(cases: dict, rounds: int) -> pd.DataFrame:
    """Megabytes: a row a round, a column a case."""
    script, table = Path(__file__).with_name("peak.py"), []
    for i in range(rounds):
        tell(f"memory, round {i + 1} of {rounds}")
        table.append([int(output(script, *settings)) / 1e6 for settings in cases.values()])
    peaks = pd.DataFrame(table)
    peaks.columns = pd.Index(list(cases), tupleize_cols=False)
    return peaks
