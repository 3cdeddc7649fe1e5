"""The demo: the whole road on real data that comes with scikit-learn, in a few minutes on two CPU cores."""

from pathlib import Path

import numpy as np
import pandas as pd
from fastai.torch_core import set_seed
from PIL import Image

from selfsup_fastai.compare.curves import label_curve
from selfsup_fastai.compare.draws import draw_labels
from selfsup_fastai.compare.summary import summarize
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.downstream.probes import linear_probe
from selfsup_fastai.features import effective_rank, embed
from selfsup_fastai.messages import quiet, say
from selfsup_fastai.runs.pretraining import pretrain

SIZE, ARCH = 32, "resnet10t"
EPOCHS = {"rotation": 8, "simclr": 30}


def lesson(table: pd.DataFrame) -> str:
    """What the table of `run_demo` says, in words; and why."""
    verdicts = {
        "better": "clearly better than",
        "worse": "clearly worse than",
        "not distinguishable": "not distinguishable from",
    }
    found = [
        f"{task}: {verdicts[row['verdict']]} scratch "
        f"({row['gain']:+.1%}, {row['gain_low']:+.1%} to {row['gain_high']:+.1%})"
        for task, row in table.drop(index="scratch").iterrows()
    ]
    return f"""
{"; ".join(found)}.

Fifty labels are very little: a net that starts from random weights has to learn from them what strokes look like. The
others have seen 1,297 digits without labels before. Which question they were asked matters: many digits look alike
upside down (0, 1, 8; a turned 6 is a 9), so 'which way up?' (rotation) is a poor question for digits, though a good one
for photographs. No task is best everywhere: that is why swapping it is one word.
The intervals (95 %) are over the draws of labels and test images; there is one pretraining run behind each encoder."""


def write_digits(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """scikit-learn's 1,797 handwritten digits (UCI, Alpaydin & Kaynak 1998) as 8 x 8 grey PNGs, one folder a digit.

    Returns the tables (file, label) of train/ and test/: the first 1,297 and the last 500 images, which were written by
    other people.
    """
    from sklearn.datasets import load_digits

    digits, rows = load_digits(), []
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target)):
        file = folder / ("train" if i < 1297 else "test") / str(label) / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(file)
        rows.append({"file": file, "label": str(label)})
    table = pd.DataFrame(rows)
    return table[:1297], table[1297:].reset_index(drop=True)


def probe_layers(starts: dict, train: pd.DataFrame, test: pd.DataFrame, seed: int = 42) -> pd.DataFrame:
    """What each layer of the frozen encoders knows: accuracy of a linear classifier on it, trained on `train`.

    One row a start; the last column is the effective rank of the embeddings (of `num_features`): low means collapsed.
    """
    table, rows = pd.concat([train.assign(is_valid=False), test.assign(is_valid=True)], ignore_index=True), {}
    for name, start in starts.items():
        set_seed(seed)
        with quiet():
            learn = downstream_learner(labeled_loaders(table, 1, SIZE, 128), start)
        probe = linear_probe(learn.model.encoder, learn.dls, max_dim=1024, seed=seed)
        rank = effective_rank(embed(learn.model.encoder, learn.dls.valid).x)
        rows[name] = {**dict(zip(probe["layer"], probe["score"])), "effective rank": rank}
    return pd.DataFrame(rows).T.rename_axis("start")


def run_demo(
    out: str | Path = "demo",  # Folder for everything that the demo makes
    tasks: tuple[str, ...] = ("rotation", "simclr"),
    per_class: int = 5,  # Labels a class
    draws: int = 5,  # Times they are drawn
    pretrain_epochs: int | None = None,  # None: as suits each task
    epochs: int = 20,  # Of fine-tuning
    seed: int = 42,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pretrains once per task, probes the layers, fine-tunes on few labels; writes and returns both tables."""
    out = Path(out)
    train, test = write_digits(out / "digits")
    say(f"Wrote {len(train) + len(test):,} digits as PNG files, {len(test)} of them to test on.")
    starts = {"scratch": ARCH}
    for task in tasks:
        say(f"\nPretraining by {task} on {len(train):,} images, labels not used:")
        args = dict(arch=ARCH, seed=seed, overwrite=True, size=SIZE, bs=128, num_workers=0)
        pretrain(out / "digits/train", out / task, task, pretrain_epochs or EPOCHS[task], **args)
        starts[task] = out / task / "encoder.safetensors"
    say("\nA linear classifier on each layer of the frozen encoders ...")
    few = train.iloc[draw_labels(len(train), per_class, seed, train["label"].astype(int).to_numpy())]
    layers = probe_layers(starts, few, test, seed)
    layers.to_csv(out / "layers.csv")
    say(f"Fine-tuning on {per_class} labels a class, {draws} draws of labels, the same budget for each start ...")
    everything = pd.concat([train.assign(is_valid=False), test.assign(is_valid=True)], ignore_index=True)
    with quiet():
        dls = labeled_loaders(everything, 1, SIZE, 16)
    runs = label_curve(starts, dls, [per_class], draws, epochs=epochs)
    runs.to_csv(out / "runs.csv", index=False)
    table = summarize(runs).set_index("start")
    table.to_csv(out / "table.csv")
    return table, layers
