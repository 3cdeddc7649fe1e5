"""Does pretraining help on medical images? Scratch beside pretrained, at several shares of the labels.

pneumonia: PneumoniaMNIST (28 px), normal or pneumonia, official split. views: chest X-rays of the COVID-19 image data
collection, taken from the back (PA), from the front (AP, lying or not) or from the side (L), split by patient. Seeds
cover everything: pretraining, the draw of the labels, the order and the head. Pretraining sees training images only;
every figure is that of the last step, so test labels choose nothing. All starts get the same labels and as many steps.
A finished run is not done again: start the same command anew after a stop. The data: folders of archives as the tests
use them (SELFSUP_DATA names the folder they are looked for in).

    python bench/medical.py --out bench/results --docs docs/benchmarks.md
    python bench/medical.py --sets views --tasks simclr --seeds 5
"""

import argparse
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
from fastai.torch_core import set_seed
from measure import machine, markdown, mean_interval, tell, verdict
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from tasks import into, write

from selfsup_fastai.callbacks.log import SkipValidation
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.data.splitters import GroupSplitter
from selfsup_fastai.downstream.learner import downstream_learner
from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext.learner import pretext_learner

ARCH, STEPS, RATE = "resnet10t", 200, 5e-3
SIZE = {"pneumonia": 28, "views": 64}
BUDGET = {"pneumonia": 50_000, "views": 20_000}
SHARES = {"pneumonia": (0.01, 0.05, 0.1, 1.0), "views": (0.1, 0.3, 1.0)}
MEASURES = {"pneumonia": ("AUC", "accuracy"), "views": ("balanced accuracy",)}
OF = {"pneumonia": "training images", "views": "training patients"}


def pneumonia(base: Path, out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables (file, label, group) to train and to test with; each image is a group of its own."""
    arrays = np.load(next((base / "pneumoniamnist").glob("*.npz")))
    tables = []
    for part in ("train", "test"):
        folder = out / "pneumonia" / part
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{i:05d}.png" for i in range(len(arrays[f"{part}_images"]))]
        for file, image in zip(files, arrays[f"{part}_images"]):
            if not file.exists():
                Image.fromarray(image).save(file)
        labels = np.where(arrays[f"{part}_labels"].ravel() == 1, "pneumonia", "normal")
        tables.append(pd.DataFrame({"file": files, "label": labels, "group": range(len(files))}))
    return tables[0], tables[1]


def views(base: Path, out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Likewise; groups are patients, 30 % of the images to test with."""
    if not (out / "covid_chestxray").exists():
        zipfile.ZipFile(next((base / "covid_chestxray_448").glob("*.zip"))).extractall(out)
    folder = out / "covid_chestxray"
    table = pd.read_csv(folder / "metadata.csv", dtype=str)
    table = table[table["modality"] == "X-ray"].reset_index(drop=True)
    files = [folder / name for name in table["file"]]
    labels = table["view"].replace({"AP Supine": "AP"})
    table = pd.DataFrame({"file": files, "label": labels, "group": table["patientid"]})
    train, test = GroupSplitter("group", valid_pct=0.3, seed=0)(table)
    return table.iloc[train].reset_index(drop=True), table.iloc[test].reset_index(drop=True)


def drawn(train: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """A share of the groups, at least two images of each class: of single images the same share of each class."""
    if share == 1:
        return train
    rng = np.random.default_rng(seed)
    if train["group"].is_unique:
        parts = [part.sample(max(2, round(share * len(part))), random_state=rng) for _, part in train.groupby("label")]
        return pd.concat(parts)
    groups = train["group"].unique()
    while True:
        chosen = train[train["group"].isin(rng.choice(groups, max(2, round(share * len(groups))), replace=False))]
        if (chosen["label"].value_counts().reindex(train["label"].unique(), fill_value=0) >= 2).all():
            return chosen


def pretrained(name: str, task: str, train: pd.DataFrame, seed: int, out: Path) -> Path:
    """An encoder that saw the training images only; one that an earlier run left is used again."""
    file = out / f"{name}-{task}-{seed}.safetensors"
    if not file.exists():
        set_seed(seed, reproducible=True)
        with quiet():
            dls = UnlabeledDataLoaders.from_files(train["file"], size=SIZE[name], bs=64, n_in=1, seed=seed)
            learn = pretext_learner(dls, task, ARCH, **({"flip": 0} if task == "rotation" else {}))
        epochs = max(1, round(BUDGET[name] / (len(learn.dls.train) * learn.dls.train.bs * learn.task.passes)))
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(epochs, 3e-3)
        learn.save_encoder(file)
    return file


def run(name: str, start, few: pd.DataFrame, test: pd.DataFrame, seed: int) -> dict:
    """What a start comes to with these labels."""
    table = pd.concat([few.assign(is_valid=False), test.assign(is_valid=True)], ignore_index=True)
    bs = min(32, len(few) // 2)
    epochs = max(2, round(STEPS / (len(few) // bs)))
    set_seed(seed)
    with quiet():
        learn = downstream_learner(labeled_loaders(table, 1, SIZE[name], bs), start)
        with learn.no_bar(), learn.no_logging():
            if start == ARCH:
                learn.fit_one_cycle(epochs, RATE, cbs=SkipValidation())
            else:
                learn.fine_tune(epochs - 1, 2 * RATE, freeze_epochs=1, cbs=SkipValidation())
            shares, truth = learn.get_preds()
    named = shares.argmax(1)
    found = {"accuracy": accuracy_score(truth, named), "balanced accuracy": balanced_accuracy_score(truth, named)}
    if shares.shape[1] == 2:
        found["AUC"] = roc_auc_score(truth, shares[:, 1])
    return {measure: float(value) for measure, value in found.items()} | {"labels": len(few), "epochs": epochs}


def runs_of(name: str, data: tuple, args: argparse.Namespace) -> pd.DataFrame:
    """A row a run."""
    train, test = data
    rows = []
    for seed in range(args.seeds):
        for share in SHARES[name]:
            few = drawn(train, share, seed)
            for start in ("scratch", *args.tasks):
                file = args.out / "medical" / f"{name}-{start}-{share}-{seed}.json"
                if not file.exists():
                    tell(f"{name}, {start}, {share:.0%} of the labels, seed {seed}")
                    encoder = ARCH if start == "scratch" else pretrained(name, start, train, seed, args.out / "medical")
                    write(file, run(name, encoder, few, test, seed))
                rows.append({"start": start, "share": share, "seed": seed, **json.loads(file.read_text())})
    return pd.DataFrame(rows)


def table_of(name: str, runs: pd.DataFrame) -> pd.DataFrame:
    """A row a share and start: means with their intervals, paired gains over scratch with theirs."""
    rows = []
    runs = runs.sort_values("share", kind="stable")
    for (share, start), part in runs.groupby(["share", "start"], sort=False):
        row = {f"{OF[name]} with labels": f"{share:.0%}", "labels": f"{part['labels'].mean():,.0f}", "start": start}
        for measure in MEASURES[name]:
            by_seed = part.set_index("seed")[measure]
            row[measure] = "{:.3f} ± {:.3f}".format(*mean_interval(by_seed))
            if start != "scratch":
                scratch = runs[(runs["share"] == share) & (runs["start"] == "scratch")].set_index("seed")[measure]
                gain, half = mean_interval(by_seed - scratch)
                row[f"gain in {measure}"] = f"{gain:+.3f} ± {half:.3f}, {verdict(gain, half)}"
        rows.append(row)
    first = f"{OF[name]} with labels"
    return (
        pd.DataFrame(rows).fillna("").sort_values(first, key=lambda c: c.str.rstrip("%").astype(float), kind="stable")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for what is found")
    parser.add_argument("--docs", type=Path, help="page to put the tables in")
    parser.add_argument("--sets", nargs="+", default=list(SIZE), choices=list(SIZE))
    parser.add_argument("--tasks", nargs="+", default=["rotation", "simclr"])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    base = Path(os.environ.get("SELFSUP_DATA", Path(__file__).parents[2] / "shared" / "data"))
    (args.out / "medical").mkdir(parents=True, exist_ok=True)
    texts = [f"```bash\npython bench/medical.py --seeds {args.seeds} --tasks {' '.join(args.tasks)}\n```"]
    for name in args.sets:
        data = {"pneumonia": pneumonia, "views": views}[name](base, args.out)
        table = table_of(name, runs_of(name, data, args))
        images = f"{len(data[0]):,} images to train, {len(data[1]):,} to test, {SIZE[name]} px, {BUDGET[name]:,} images"
        texts.append(f"**{name}**: {images} through {ARCH} in pretraining, {STEPS} steps of fine-tuning.")
        texts.append(markdown(table.set_index(table.columns[0]), table.columns[0]))
    text = "\n\n".join([*texts, machine()])
    print(text)
    if args.docs:
        into(args.docs, text, ("<!-- medical: written by bench/medical.py -->", "<!-- end of medical -->"))


if __name__ == "__main__":
    main()
