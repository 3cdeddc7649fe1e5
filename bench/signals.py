"""Do the signals that need no labels tell which epoch is the best? Their rank correlation with accuracies.

For each task one run with `Signals` and `OnlineKNN`: Spearman's correlation, over the epochs, of each signal and of the
validation loss with the accuracy of 20-NN; and what the epoch of the highest effective rank, of the lowest loss, the
last and the best one came to. Data as in bench/tasks.py.

    python bench/signals.py --tasks rotation simclr --epochs 12
"""

import argparse
from pathlib import Path

import pandas as pd
from measure import machine, markdown, tell
from tasks import RATES, Data, into, write

from selfsup_fastai.callbacks.collapse import SIGNALS, Signals
from selfsup_fastai.callbacks.probe import OnlineKNN
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.messages import quiet

MARKS = "<!-- signals: written by bench/signals.py -->", "<!-- end of signals -->"
MEASURED = [*SIGNALS, "valid_loss"]


def history(task: str, data: Data, args: argparse.Namespace) -> pd.DataFrame:
    """A row for each epoch: signals, validation loss, accuracy of 20-NN; read from its file if there is one."""
    file = args.out / "signals" / f"{task}-{args.images}-{args.epochs}-{args.size}-{args.seed}.json"
    if not file.exists():
        tell(f"{task}, {args.epochs} epochs")
        with quiet():
            learn = data.learner(task, args.seed)
            labeled = labeled_loaders(data.labeled, learn.encoder.image_channels, args.size, 128)
            signals, probe = Signals(), OnlineKNN(labeled)
            with learn.no_bar(), learn.no_logging():
                learn.fit_one_cycle(
                    args.epochs, RATES["vit" if "vit" in learn.encoder.arch else "conv"], cbs=[signals, probe]
                )
        found = signals.history.merge(pd.DataFrame(probe.rows), on="epoch")
        column = learn.recorder.metric_names.index("valid_loss") - 1
        found["valid_loss"] = [row[column] for row in learn.recorder.values]
        write(file, found.to_dict("list"))
    return pd.read_json(file)


def row(task: str, found: pd.DataFrame) -> dict:
    """A line of the table."""
    knn = found["knn"]
    agreed = {name: f"{found[name].corr(knn, method='spearman'):+.2f}" for name in MEASURED}
    chosen = {
        "last": knn.iloc[-1],
        "of highest rank": knn[found["rank"].idxmax()],
        "of lowest loss": knn[found["valid_loss"].idxmin()],
        "best": knn.max(),
    }
    return {"task": task, **agreed, **{f"20-NN, {name}": f"{value:.3f}" for name, value in chosen.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for what is found")
    parser.add_argument("--docs", type=Path, help="page to put the table in")
    parser.add_argument(
        "--tasks", nargs="+", default=["rotation", "inpainting", "colorization", "simclr", "simsiam", "vicreg"]
    )
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=2_000, help="to pretrain on")
    parser.add_argument("--probe-images", type=int, default=2_000, help="with labels, for 20-NN")
    parser.add_argument("--test-images", type=int, default=1_000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--bs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    data = Data(args)
    table = pd.DataFrame([row(task, history(task, data, args)) for task in args.tasks]).set_index("task")
    about = (
        f"{args.images:,} images at {args.size} px, batches of {args.bs}, {args.epochs} epochs of one cycle, one seed. "
        "Spearman's correlation over the epochs of a run with the accuracy of 20-NN (labels of "
        f"{args.probe_images:,} images, {args.test_images:,} to test), and that accuracy at four epochs."
    )
    command = f"python bench/signals.py --tasks {' '.join(args.tasks)}"
    text = f"```bash\n{command}\n```\n\n{about}\n\n{markdown(table, 'task')}\n\n{machine()}"
    print(text)
    if args.docs:
        into(args.docs, text, MARKS)


if __name__ == "__main__":
    main()
