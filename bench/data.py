"""How fast images come: batches, SimCLR's views, the pixel cache, imports; ours beside others in one run.

Medians over rounds in which every case has its turn, after one round that does not count. A part whose data set is not
at hand (SELFSUP_DATA names the folder it is looked for in) is left out. Needs the extra `bench`.

    python bench/data.py             # all parts
    python bench/data.py a d --out results.md
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd
import torch
from fastai.torch_core import default_device
from fastai.vision.core import imagenet_stats
from measure import (
    Absent,
    against_best,
    data_set,
    empty_cache,
    every_nth,
    machine,
    markdown,
    output,
    ratios,
    spread,
    tell,
    timed,
)
from peers import (
    WORKERS,
    fastai_batches,
    kornia_view,
    lightly_views,
    torchvision_batches,
    torchvision_views,
)
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.loader import Standardize
from selfsup_fastai.data.recipes import SIMCLR
from selfsup_fastai.data.views import random_view
from selfsup_fastai.messages import quiet

SIZE, BS = 128, 64
N_VIEWED = 512  # images, decoded beforehand
SIZES, BATCHES = (64, 128, 224), (32, 64, 128, 256)
FEW, MANY = 1_000, 50_000  # images of CIFAR-10


def loaders(folder: Path, size: int = SIZE, **kwargs) -> UnlabeledDataLoaders:
    """Ours over a folder: all images but one to train with, normalized."""
    with quiet():
        tfms = Standardize.from_stats(*imagenet_stats)  # as `pretext_learner` does
        return UnlabeledDataLoaders.from_folder(folder, size=size, bs=BS, valid_pct=0.0, batch_tfms=tfms, **kwargs)


def epoch(batches: Iterable) -> int:
    """Run through all batches, onto the device; the number of images."""
    n = 0
    for batch in batches:
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        n += len(x.to(default_device(), non_blocking=True))
    return n


def epochs(batches: Iterable, n: int) -> Callable[[], int]:
    """A case of `n` epochs: one alone may be too short to be timed."""
    return lambda: sum(epoch(batches) for _ in range(n))


# --- a: batches ---------------------------------------------------------------------------------------------------


def batches(work: Path, rounds: int, full: bool) -> str:
    """Epochs of normalized batches of photographs, resized and cut at random, in random order."""
    folder = data_set("clothing10_photos", work)
    kept = loaders(folder)
    files = list(kept.items_df["file"][~kept.items_df["is_valid"]])
    ours = {"ours": kept.train, "ours, cache=False": loaders(folder, cache=False).train}
    peers = {
        f"{name}, {workers} workers": make(files, SIZE, BS, workers)
        for name, make in (("fastai", fastai_batches), ("torchvision", torchvision_batches))
        for workers in WORKERS
    }
    cases = {name: epochs(dl, 10 if name == "ours" else 1) for name, dl in {**ours, **peers}.items()}
    seconds = timed(cases, rounds)
    table = spread(1 / seconds, "{:,.0f}").assign(ratio=ratios(seconds, "ours"))
    about = f"{len(files)} photographs, {SIZE} px, batches of {BS}; images/s, and how many times as fast ours is."
    about += " Ours reads pixels that an earlier epoch kept (part c: what that cost); the others decode in each epoch."
    return f"{about}\n\n{markdown(table, 'loader')}\n\n{against_best(seconds, 'ours', list(peers))}"


# --- b: views -----------------------------------------------------------------------------------------------------


def views(work: Path, rounds: int, full: bool) -> str:
    """Two SimCLR views of each of some images that are decoded already."""
    with quiet():
        dls = UnlabeledDataLoaders.from_folder(data_set("clothing10_photos", work), size=SIZE, bs=BS)
    images = torch.cat([x.as_subclass(Tensor) for (x,) in dls.train])[:N_VIEWED]
    pixels = images.mul(255).round().byte().cpu()
    draws, kornia = torch.Generator(default_device()).manual_seed(0), kornia_view(SIZE)
    cases = {
        "ours": lambda: view_twice(images, lambda x: random_view(x, SIMCLR, draws, SIZE)),
        "kornia": lambda: view_twice(images, kornia),
    }
    pil = [to_pil_image(image) for image in pixels]
    for name, make, data in (("lightly", lightly_views, pil), ("torchvision v2", torchvision_views, list(pixels))):
        for workers in WORKERS:
            loader = make(data, SIZE, BS, workers)
            cases[f"{name}, {workers} workers"] = lambda loader=loader: sum(map(epoch, loader))
    seconds = timed(cases, rounds)
    table = spread(1 / seconds, "{:,.0f}").assign(ratio=ratios(seconds, "ours"))
    about = f"{len(images)} images of {SIZE} px, batches of {BS}; views/s, and how many times as fast ours is."
    return f"{about}\n\n{markdown(table, 'views')}\n\n{against_best(seconds, 'ours', list(cases)[1:])}"


def view_twice(images: Tensor, view: Callable[[Tensor], Tensor]) -> int:
    """Two views of each image, batch by batch, on the device of the images; the number of views."""
    return sum(len(view(x)) + len(view(x)) for x in images.split(BS))


# --- c: the cache -------------------------------------------------------------------------------------------------


def cache(work: Path, rounds: int, full: bool) -> str:
    """What keeping pixels costs at first, what an image costs afterwards, and how much memory is in use."""
    parts = [first_epoch(data_set("clothing10_photos", work), work, rounds)]
    many = data_set("cifar10", work) / "cifar10" / "train"
    folders = {FEW: every_nth(many, MANY // FEW, work / "few"), MANY: many}
    parts += [cost_an_image(folders, rounds, full), peak_memory(folders, rounds)]
    return "\n\n".join(parts)


def first_epoch(folder: Path, work: Path, rounds: int) -> str:
    """Making the loaders and one epoch, with an empty cache, a full one, none."""
    kept, unkept = loaders(folder), loaders(folder, cache=False)

    def first() -> int:
        with empty_cache(work):
            return min(1, epoch(loaders(folder).train))

    plain = "made and run, cache=False"
    cases = {
        "made and run, cache empty": first,
        "made and run, cache full": lambda: min(1, epoch(loaders(folder).train)),
        plain: lambda: min(1, epoch(loaders(folder, cache=False).train)),
        "run, cache full": lambda: min(1, epoch(kept.train)),
        "run, cache=False": lambda: min(1, epoch(unkept.train)),
    }
    seconds = timed(cases, rounds)
    table = spread(seconds).assign(ratio=ratios(seconds, plain, "{:.2f}"))
    about = f"{len(kept.items_df)} photographs, {SIZE} px, batches of {BS}; seconds of one epoch, and the share of"
    return f"{about} '{plain}'.\n\n{markdown(table, 'epoch')}"


def cost_an_image(folders: dict[int, Path], rounds: int, full: bool) -> str:
    """Microseconds an image, by size, batch and number of images."""
    cases = {}
    for n, folder in folders.items():
        for size in SIZES if full or n == FEW else SIZES[:1]:
            tell(f"keeping {n:,} images at {size} px")
            train = loaders(folder, size).train
            for bs in BATCHES:
                cases[n, size, bs] = epochs(train.new(bs=bs), max(1, 10 * FEW // n))
    seconds = timed(cases, rounds)
    medians = seconds.median()
    table = spread(1e6 * seconds, "{:.0f}")
    table["ratio"] = [f"{medians[case] / medians[(FEW, *case[1:])]:.2f}" for case in cases]
    table.index = [f"{n:,} images, {size} px, batches of {bs}" for n, size, bs in cases]
    left_out = "" if full else f" {MANY:,} images at {SIZES[0]} px only: --full for all."
    about = f"CIFAR-10; microseconds an image, and how many times the cost with {FEW:,} images.{left_out}"
    return f"{about}\n\n{markdown(table, 'epoch')}"


def peak_memory(folders: dict[int, Path], rounds: int) -> str:
    """Peak memory of processes that make loaders over kept pixels and run two epochs."""
    script, table = Path(__file__).with_name("peak.py"), []
    for i in range(rounds):
        tell(f"memory, round {i + 1} of {rounds}")
        peaks = {n: int(output(script, folder, SIZES[0], BS)) for n, folder in folders.items()}
        table.append({f"{n:,} images": peak / 1e6 for n, peak in peaks.items()})
    peaks = pd.DataFrame(table)
    rows = spread(peaks, "{:,.0f}").assign(ratio=ratios(peaks, f"{FEW:,} images", "{:.2f}"))
    about = f"Peak memory of a fresh process after two epochs at {SIZES[0]} px, batches of {BS}; MB."
    return f"{about}\n\n{markdown(rows, 'process')}"


# --- d: imports ---------------------------------------------------------------------------------------------------


def imports(work: Path, rounds: int, full: bool) -> str:
    """Seconds until a fresh process has imported everything, or shown its help."""
    fastai = "import fastai.vision.all"
    codes = {
        "import selfsup_fastai.all": "import selfsup_fastai.all",
        fastai: fastai,
        "selfsup --help": "import sys; from selfsup_fastai.cli import main; sys.argv = ['selfsup', '--help']; main()",
    }
    cases = {name: (lambda code=code: min(1, len(output("-c", f"{code}\nprint()")))) for name, code in codes.items()}
    seconds = timed(cases, rounds)
    table = spread(seconds).assign(ratio=ratios(seconds, fastai, "{:.2f}"))
    return f"Seconds of a fresh process, and the share of '{fastai}'.\n\n{markdown(table, 'process')}"


PARTS = {"a": batches, "b": views, "c": cache, "d": imports}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="a: batches, b: views, c: cache, d: imports")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help=f"{MANY:,} images at every size (9 GB more on the disk)")
    parser.add_argument("--work", type=Path, help="folder for unpacked data and pixels; else a temporary one")
    parser.add_argument("--out", type=Path, help="Markdown file for the results, too")
    args = parser.parse_args()
    if not set(args.parts) <= set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}; got {' '.join(args.parts)}")
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        os.environ["SELFSUP_CACHE"] = str(work / "cache")
        results = [machine()]
        print(results[0], flush=True)
        for name in args.parts:
            results.append(f"### {PARTS[name].__doc__}\n\n{result(PARTS[name], work, args)}")
            print(f"\n{results[-1]}", flush=True)
    if args.out:
        args.out.write_text("\n\n".join(results) + "\n")


def result(part: Callable, work: Path, args: argparse.Namespace) -> str:
    """The tables of a part, or why there are none."""
    try:
        return part(work, args.rounds, args.full)
    except Absent as absent:
        return str(absent)


if __name__ == "__main__":
    main()
