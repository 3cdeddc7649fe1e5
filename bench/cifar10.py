"""CIFAR-10 with few labels: scratch beside pretrained. Prints the tables of docs/benchmarks.md.

10,000 training images without labels, resnet10t at 64 px, the same number of images through the encoder for each task;
then 10 labels a class, the same fine-tuning budget for each start, several draws. The data: a folder with train/CLASS
and test/CLASS, or the archive that tests use (SELFSUP_DATA names the folder it is looked for in).

    python bench/cifar10.py --data FOLDER --out bench/results
"""

import argparse
import os
import platform
import tarfile
from pathlib import Path

import fastai
import pandas as pd
import timm
import torch
from fastai.torch_core import set_seed

from selfsup_fastai.compare.curves import label_curve
from selfsup_fastai.compare.summary import summarize
from selfsup_fastai.data.files import find_files
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.labeled import class_table, labeled_loaders
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.encoders.checkpoint import read_card
from selfsup_fastai.features import embed, knn_accuracy
from selfsup_fastai.messages import quiet, say
from selfsup_fastai.pretext.learner import pretext_learner

ARCH, SIZE, BS = "resnet10t", 64, 128


def cifar10(folder: Path | None, cache: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables (file, label) of 10,000 training images, the first 1,000 of each class, and of all test images."""
    if folder is None:
        base = Path(os.environ.get("SELFSUP_DATA", Path(__file__).parents[2] / "shared" / "data"))
        folder = cache / "cifar10"
        if not folder.exists():
            archive = next((base / "cifar10").glob("*.tar.xz"), None)
            if archive is None:
                raise SystemExit("CIFAR-10 is not at hand: pass --data FOLDER with train/CLASS and test/CLASS in it.")
            with tarfile.open(archive) as tar:
                tar.extractall(cache, filter="data")
    train, test = (class_table(find_files(folder / part), folder / part) for part in ("train", "test"))
    return train.groupby("label").head(1000).reset_index(drop=True), test


def pretrain(task: str, files: pd.Series, budget: int, out: Path, seed: int) -> Path:
    """An encoder trained for `budget` images through it; one that an earlier run left is used again."""
    file = out / f"{task}.safetensors"
    if file.exists():
        say(f"{file} is there already")
        return file
    set_seed(seed, reproducible=True)
    with quiet():
        learn = pretext_learner(UnlabeledDataLoaders.from_files(files, size=SIZE, bs=BS), task, ARCH)
    per_epoch = len(learn.dls.train) * learn.dls.train.bs * learn.task.passes
    with learn.no_bar():
        learn.fit_one_cycle(max(1, round(budget / per_epoch)), 3e-3)
    return learn.save_encoder(file)


def facts(file: Path) -> dict:
    """What an encoder's card says of its training."""
    card = read_card(file)
    return {"encoder images": card["images"], "epochs": card["epochs"], **card["metrics"]}


def knn(start, train: pd.DataFrame, test: pd.DataFrame, seed: int) -> float:
    """20-NN accuracy of the frozen encoder, with the labels of all training images."""
    set_seed(seed)
    table = pd.concat([train.assign(is_valid=False), test.assign(is_valid=True)], ignore_index=True)
    with quiet():
        learn = downstream_learner(labeled_loaders(table, 3, SIZE, BS), start)
    return knn_accuracy(embed(learn.model.encoder, learn.dls.train), embed(learn.model.encoder, learn.dls.valid), k=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--tasks", nargs="+", default=["rotation", "simclr"])
    parser.add_argument("--budget", type=int, default=160_000, help="images through the encoder")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, test = cifar10(args.data, args.out)
    starts = {"scratch": ARCH}
    for task in args.tasks:
        say(f"pretraining: {task}")
        starts[task] = pretrain(task, train["file"], args.budget, args.out, args.seed)
    say("20-NN")
    neighbors = {name: knn(start, train, test, args.seed) for name, start in starts.items()}
    say("fine-tuning")
    both = pd.concat([train.assign(is_valid=False), test.assign(is_valid=True)], ignore_index=True)
    dls = labeled_loaders(both, 3, SIZE, 20)
    runs = label_curve(starts, dls, [args.per_class], args.draws, epochs=args.epochs)
    runs.to_csv(args.out / "cifar10_runs.csv", index=False)
    table = summarize(runs).set_index("start")
    table["20-NN, all labels"] = pd.Series(neighbors)
    versions = f"torch {torch.__version__}, fastai {fastai.__version__}, timm {timm.__version__}"
    print(f"{os.cpu_count()} CPU cores, {platform.machine()}, {versions}\n")
    print(pd.DataFrame({task: facts(starts[task]) for task in args.tasks}).T.to_string(), "\n")
    print(table.to_string(float_format="{:.3f}".format, na_rep=""))


if __name__ == "__main__":
    main()
