"""How to fine-tune with few labels: schedules, rates, norm layers, consistency; and what pretraining adds to it.

cifar10: 10,000 training images without labels at 64 px; pneumonia: PneumoniaMNIST at 28 px; 10 labels a class each.
resnet10t, pretrained anew for each seed on the training images; then a setting at a time is changed. Every run has the
same labels, order and head as its partner; gains are paired over label draws and pretraining seeds. All runs take the
same number of epochs over the labeled images, the last epoch counts; the default is `fine_tune` with a rate of 1e-2.
Settings are compared on one part of the test images, the whole (pretraining + gradual + consistency beside scratch) on
the others with other draws of labels, so what the first part chose the second one did not. A finished run is not done
again: start the same command anew after a stop. The data: archives as the tests use them (SELFSUP_DATA names the folder
they are looked for in).

    python bench/finetune.py --out bench/results --docs docs/benchmarks.md
    python bench/finetune.py --sets pneumonia --parts settings
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
from cifar10 import cifar10
from fastai.torch_core import set_seed
from measure import machine, markdown, mean_interval, tell, verdict
from medical import pneumonia
from sklearn.metrics import accuracy_score, roc_auc_score
from tasks import into, write

from selfsup_fastai.callbacks.consistency_loss import ConsistencyLoss
from selfsup_fastai.callbacks.log import SkipValidation
from selfsup_fastai.callbacks.precision import AutoPrecision
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext.learner import pretext_learner

DATA = Path(__file__).parents[2] / "shared" / "data"
ARCH, PER_CLASS, BS, RATE = "resnet10t", 10, 20, 1e-2
EPOCHS = {"cifar10": 40, "pneumonia": 200}  # 205 and 201 steps
SIZE = {"cifar10": 64, "pneumonia": 28}
CHANNELS = {"cifar10": 3, "pneumonia": 1}
BUDGET = {"cifar10": 400_000, "pneumonia": 50_000}
TASK = {"cifar10": "rotation", "pneumonia": "simclr"}
METRIC = {"cifar10": "accuracy", "pneumonia": "AUC"}
SETTINGS = {  # what is changed in `fine_tune`, or the kind of consistency
    "default": {},
    "stage_epochs 1, as ULMFiT": {"stage_epochs": 1},
    "schedule two_stage, as fastai": {"schedule": "two_stage"},
    "schedule all": {"schedule": "all"},
    "schedule lp_ft": {"schedule": "lp_ft"},
    "lr_mult 1": {"lr_mult": 1},
    "layer_decay 0.75": {"layer_decay": 0.75},
    "base_lr 2e-3": {"base_lr": 2e-3},
    "norms train": {"norms": "train"},
    "norms still": {"norms": "still"},
    "consistency uda": {"kind": "uda"},
    "consistency fixmatch": {"kind": "fixmatch"},
    "consistency mean_teacher": {"kind": "mean_teacher"},
    "consistency pi": {"kind": "pi"},
}
WHOLE = {
    "scratch": {},
    "scratch + consistency": {"kind": "fixmatch"},
    "pretraining, two_stage": {"schedule": "two_stage"},
    "pretraining + gradual": {},
    "pretraining + gradual + consistency": {"kind": "fixmatch"},
}
RATIO = 3  # unlabeled images for each labeled one: the same for all kinds, so that they cost the same


def tables(name: str, out: Path) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(file, label) of the training images, of the test images for the settings, and of those for the whole."""
    if name == "cifar10":
        train, test = cifar10(None, out)
    else:
        train, test = pneumonia(Path(os.environ.get("SELFSUP_DATA", DATA)), out)
    test = test.sample(frac=1, random_state=0).reset_index(drop=True)
    first = test.groupby("label").cumcount() < 100
    return train, test[first].reset_index(drop=True), test[~first].reset_index(drop=True)


def pretrained(name: str, seed: int, train: pd.DataFrame, out: Path) -> Path:
    """An encoder that saw the training images; one that an earlier run left is used again."""
    file = out / f"{name}-{TASK[name]}-{seed}.safetensors"
    if not file.exists():
        tell(f"{name}: pretraining, seed {seed}")
        set_seed(seed, reproducible=True)
        with quiet():
            dls = unlabeled(name, train, seed, 128 if name == "cifar10" else 64)
            learn = pretext_learner(dls, TASK[name], ARCH)
        epochs = max(1, round(BUDGET[name] / (len(learn.dls.train) * learn.dls.train.bs * learn.task.passes)))
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(epochs, 3e-3, cbs=AutoPrecision("bf16"))
        learn.save_encoder(file)
    return file


def unlabeled(name: str, train: pd.DataFrame, seed: int, bs: int):
    return UnlabeledDataLoaders.from_files(
        train["file"], size=SIZE[name], bs=bs, n_in=CHANNELS[name], seed=seed, valid_pct=0.02
    )


def drawn(train: pd.DataFrame, draw: int) -> pd.DataFrame:
    """`PER_CLASS` images of each class."""
    rng = np.random.default_rng(draw)
    return pd.concat([part.sample(PER_CLASS, random_state=rng) for _, part in train.groupby("label")])


def fine_tuned(name: str, start, setting: dict, parts: tuple, seed: int) -> dict:
    """What a start comes to; `start` is a file, or `ARCH`: from scratch all layers learn at one rate."""
    few, test, train = parts
    table = pd.concat([few.assign(is_valid=False), test.assign(is_valid=True)], ignore_index=True)
    setting, cbs = dict(setting), [AutoPrecision("bf16")]
    set_seed(seed)
    with quiet():
        if kind := setting.pop("kind", None):
            cbs.append(ConsistencyLoss(unlabeled(name, train, seed, BS), kind, ratio=RATIO))
        learn = downstream_learner(labeled_loaders(table, CHANNELS[name], SIZE[name], BS), start)
        epochs = setting.pop("epochs", EPOCHS[name])
        with learn.no_bar(), learn.no_logging():
            if start == ARCH:
                learn.fit_one_cycle(epochs + 1, RATE / 2, cbs=[*cbs, SkipValidation()])
            else:
                learn.fine_tune(epochs, **{"base_lr": RATE, **setting}, cbs=[*cbs, SkipValidation()])
            shares, truth = learn.get_preds()
    named = shares.argmax(1)
    score = accuracy_score(truth, named) if METRIC[name] == "accuracy" else roc_auc_score(truth, shares[:, 1])
    return {"score": float(score), "images": learn.images_seen}


SLOW = ("consistency", "layer_decay", "norms still")  # left out on CIFAR-10, where a run takes minutes


def settings_of(name: str, part: str) -> dict:
    """What is run on a set."""
    if part == "whole":
        return WHOLE
    return {k: v for k, v in SETTINGS.items() if name == "pneumonia" or not k.startswith(SLOW)}


def runs_of(name: str, part: str, data: tuple, args: argparse.Namespace) -> pd.DataFrame:
    """A row a run: setting, pretraining seed, draw of labels, score."""
    train, *tests = data
    out, rows = args.out / "finetune", []
    for seed in range(args.seeds):
        for draw in range(args.draws):
            labels = draw if part == "settings" else 100 + draw
            parts = drawn(train, labels), tests[part == "whole"], train
            for setting, changes in settings_of(name, part).items():
                fresh = setting.startswith("scratch")
                file = out / f"{name}-{part}-{setting.replace(' ', '_').replace(',', '')}-{seed}-{draw}.json"
                if not file.exists():
                    tell(f"{name}: {setting}, seed {seed}, draw {draw}")
                    start = ARCH if fresh else pretrained(name, seed, train, out)
                    write(file, fine_tuned(name, start, changes, parts, 1000 * seed + draw))
                rows.append({"setting": setting, "seed": seed, "draw": draw, **json.loads(file.read_text())})
    return pd.DataFrame(rows)


def table_of(name: str, runs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """A row a setting: its mean, and the paired gain over the baseline."""
    scores = runs.pivot(index=["seed", "draw"], columns="setting", values="score")
    rows = []
    for setting in runs["setting"].unique():
        mean, half = mean_interval(scores[setting])
        row = {"setting": setting, METRIC[name]: f"{mean:.3f} ± {half:.3f}"}
        if setting != baseline:
            gain, half = mean_interval(scores[setting] - scores[baseline])
            row |= {f"gain over {baseline}": f"{gain:+.3f} ± {half:.3f}", "verdict": verdict(gain, half)}
        row["images"] = f"{runs[runs['setting'] == setting]['images'].mean():,.0f}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for what is found")
    parser.add_argument("--docs", type=Path, help="page to put the tables in")
    parser.add_argument("--sets", nargs="+", default=list(SIZE), choices=list(SIZE))
    parser.add_argument("--parts", nargs="+", default=["settings", "whole"], choices=["settings", "whole"])
    parser.add_argument("--seeds", type=int, default=2, help="of pretraining")
    parser.add_argument("--draws", type=int, default=5, help="of labels")
    args = parser.parse_args()
    (args.out / "finetune").mkdir(parents=True, exist_ok=True)
    texts = [f"```bash\npython bench/finetune.py --seeds {args.seeds} --draws {args.draws}\n```"]
    for name in args.sets:
        data = tables(name, args.out)
        for part in args.parts:
            table = table_of(name, runs_of(name, part, data, args), "default" if part == "settings" else "scratch")
            n = len(data[1 + (part == "whole")])
            about = f"{BUDGET[name]:,} images through the encoder by {TASK[name]}, {PER_CLASS} labels a class"
            texts.append(f"**{name}, {part}**: {about}, {n:,} test images.")
            texts.append(markdown(table.set_index("setting"), "setting"))
    text = "\n\n".join([*texts, machine()])
    print(text)
    if args.docs:
        into(args.docs, text, ("<!-- fine-tuning: written by bench/finetune.py -->", "<!-- end of fine-tuning -->"))


if __name__ == "__main__":
    main()
