"""SimCLR and BYOL by lightly and by this package, side by side: how fast they train, and what the encoder knows after.

Both sides begin with the same weights of the same net and get the same image files, batches of one size, as many steps,
torch's Adam at the same constant rate without weight decay, float32, and one recipe of views: SimCLR's with half the
color strength, BYOL's two, without blur below 64 pixels. Of each method they have the same temperature or momentum, and
heads of the same widths. lightly has no training loop of its own: it gets the one of its examples, in plain PyTorch.
What differs:

- Images: with lightly torch's loader opens each file in each epoch (Pillow) and draws views image by image, in its
  worker processes or, with 0 workers, between the steps. Ours reads pixels that were decoded once and kept, which is
  not timed (bench/data.py, part c, says what it costs), and draws views of a whole batch on the device.
- SimCLR: ours has both views of all images go through the net at once, so batch norms see them together; lightly's
  examples take one view after the other.
- BYOL: ours is the paper's sum of two squared distances, lightly's loss half the sum of two negative cosines: a quarter
  of the gradient, which Adam hardly notices and SGD would. lightly's last layers have a bias.
- Normalization: ours by the statistics of the images, lightly's by ImageNet's. Each encoder is scored, untrained too,
  with that of its side.
- The loop: fastai's, with ours, records losses and calls callbacks.

Nor are these our own defaults: those are fastai's Adam, one cycle of the rate, a temperature of .1, and for BYOL a
momentum that goes by the number of steps.

Speed is that of the steps in the middle of an epoch, the sides taking turns: the first steps do not count, nor do the
last ones, for which the workers have filled their queues. It is a mean over the steps and then a median over the
rounds: workers may hand over batches in bursts, and then a median step would be one that did not have to wait.

What is finished is not done again: start the same command anew after a stop. Have the machine to yourself for the
speeds, or leave them out with --no-speeds. The data: a folder with train/CLASS and test/CLASS, or the CIFAR-10 archive
that tests use (SELFSUP_DATA names the folder it is looked for in). Needs the extra `bench`.

    python bench/methods.py --out bench/results
    python bench/methods.py --methods simclr --images 600 --epochs 2 --no-speeds
"""

import argparse
import json
from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import mean

import pandas as pd
import torch
from cifar10 import cifar10
from fastai.callback.core import Callback
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, set_seed
from measure import Laps, against_best, machine, markdown, ratios, tell, timed
from measure import spread as over_rounds
from peers import LIGHTLY, LIGHTLY_STATS, WORKERS, lightly_batches, lightly_steps
from tasks import NEIGHBORS, Data, into, spread, write

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.labeled import labeled_loaders
from selfsup_fastai.data.recipes import BLUR_FROM
from selfsup_fastai.encoders.encoder import Encoder, create_encoder
from selfsup_fastai.features import embed, knn_accuracy
from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext.learner import pretext_learner

SHARED = {"simclr": {"temperature": 0.5}, "byol": {"momentum": 0.996}}  # the papers', SimCLR's on CIFAR; lightly's, too
OURS = {"simclr": {"views": {"strength": 0.5}}, "byol": {}}  # what makes our views those of `LIGHTLY`
ADAM = partial(torch.optim.Adam, weight_decay=0.0)
BEFORE, AFTER = 3, 2 * max(WORKERS)  # steps of an epoch that are not timed: at the end what torch's loader keeps ready
SETTINGS = {"images": 10_000, "epochs": 5, "bs": 64, "size": 32, "arch": "resnet10t", "lr": 1e-3, "seeds": 1}
SETTINGS |= {"probe-images": 3_000, "test-images": 5_000, "rounds": 5, "steps": 20}
ABOUT = {
    "images": "to train on; one of them is kept for validation",
    "epochs": "of training, before the encoder is scored",
    "bs": "of a batch",
    "size": "pixels a side, below 64: views are not blurred",
    "arch": "the net, by timm's name",
    "lr": "rate of Adam",
    "seeds": "how many; of the weights, the order and the views",
    "probe-images": "with labels, for the neighbors",
    "test-images": "to score the neighbors on",
    "rounds": "in which the speeds are measured",
    "steps": "of an epoch that are timed",
}


def starting_net(args: argparse.Namespace, seed: int) -> Encoder:
    """The net that both sides begin with."""
    set_seed(seed, reproducible=True)
    return create_encoder(args.arch, size=args.size)


class Clock(Callback):
    """Seconds of each step of an epoch of training, loading included."""

    def before_train(self):
        self.laps = Laps()

    def after_batch(self):
        if self.training:
            self.laps.lap()


class Ours:
    """This package's side: a learner."""

    def __init__(self, method: str, start: Encoder, dls: UnlabeledDataLoaders, args: argparse.Namespace, epochs: int):
        opt = partial(OptimWrapper, opt=ADAM)
        self.learn = pretext_learner(dls, method, start.body, opt_func=opt, **SHARED[method], **OURS[method])
        self.lr = args.lr

    def encoder(self) -> Encoder:
        """As it is now, with what its images are normalized by."""
        return self.learn.encoder

    def train(self, epochs: int) -> list[float]:
        """Some epochs; the seconds of each step of the last one."""
        clock = Clock()
        with self.learn.no_bar(), self.learn.no_logging():
            self.learn.fit(epochs, self.lr, cbs=clock)
        return clock.laps.seconds


class Lightly:
    """lightly's side: its parts in a plain loop, on the training images of our loaders."""

    def __init__(
        self,
        method: str,
        start: Encoder,
        dls: UnlabeledDataLoaders,
        args: argparse.Namespace,
        epochs: int,  # That it will be trained for, all in all
        workers: int = max(WORKERS),
    ):
        files = list(dls.items_df["file"][~dls.items_df["is_valid"]])
        make, views = LIGHTLY[method]
        self.batches, self.size = lightly_batches(views(args.size), files, args.bs, workers), args.size
        schedule = {"steps": epochs * len(self.batches)} if method == "byol" else {}
        self.net = make(deepcopy(start.body), start.num_features, **SHARED[method], **schedule).to(default_device())
        self.opt = ADAM([p for p in self.net.parameters() if p.requires_grad], args.lr)

    def encoder(self) -> Encoder:
        """A copy as it is now, with what its images are normalized by."""
        encoder = create_encoder(self.net.backbone, size=self.size)
        encoder.mean, encoder.std = LIGHTLY_STATS
        return encoder

    def train(self, epochs: int) -> list[float]:
        """Some epochs; the seconds of each step of the last one."""
        for _ in range(epochs):
            laps = Laps()
            for _ in lightly_steps(self.net, self.opt, self.batches):
                laps.lap()
        return laps.seconds


SIDES = {"ours": Ours, "lightly": Lightly}


def loaders(files: Iterable[Path], args: argparse.Namespace) -> UnlabeledDataLoaders:
    """Ours over some files, of which one is not for training."""
    return UnlabeledDataLoaders.from_files(files, size=args.size, bs=args.bs, valid_pct=0.0)


# --- what is measured -------------------------------------------------------------------------------------------------


def speeds(method: str, args: argparse.Namespace) -> pd.DataFrame:
    """Seconds an image by side: a row a round; read from its file if an earlier run got so far."""
    file = (
        args.out
        / "methods"
        / f"speed-{method}-{common(args)}-{args.rounds}-{args.steps}-{torch.get_num_threads()}.json"
    )
    if not file.exists():
        files = cifar10(args.data, args.out)[0]["file"].sample(frac=1, random_state=0)
        n = args.bs * (BEFORE + args.steps + AFTER) + 1
        with quiet():
            dls, start = loaders(files.head(n), args), starting_net(args, seed=0)
            epochs = args.rounds + 1
            sides = {f"{method}: ours": Ours(method, start, dls, args, epochs)}
            for workers in WORKERS:
                name = f"{method}: lightly, {workers} worker{'s' * (workers != 1)}"
                sides[name] = Lightly(method, start, dls, args, epochs, workers)
            cases = {name: partial(turn, side, args.bs) for name, side in sides.items()}
            write(file, timed(cases, args.rounds, lambda case: case()).to_dict("list"))
    return pd.DataFrame(json.loads(file.read_text()))


def turn(side: Ours | Lightly, bs: int) -> float:
    """One epoch: seconds an image of the steps in its middle."""
    return mean(side.train(1)[BEFORE:-AFTER]) / bs


def result(method: str, name: str, seed: int, data: Data, args: argparse.Namespace) -> dict:
    """What a side's encoder knows before and after training; read from its file if an earlier run got so far."""
    budget = f"{args.images}-{args.epochs}-{args.lr}-{args.probe_images}-{args.test_images}-{seed}"
    file = args.out / "methods" / f"{method}-{name}-{common(args)}-{budget}.json"
    if not file.exists():
        tell(f"{method}, {name}, seed {seed}")
        with quiet():
            start = starting_net(args, seed)
            side = SIDES[name](method, start, loaders(data.train["file"], args), args, args.epochs)
            untrained = neighbors(side.encoder(), data)
            set_seed(seed, reproducible=True)
            steps = args.epochs * len(side.train(args.epochs))
            write(file, {"steps": steps, "untrained": untrained, "knn": neighbors(side.encoder(), data)})
    return json.loads(file.read_text())


def neighbors(encoder: Encoder, data: Data) -> float:
    """Accuracy of the nearest labeled images on the test images."""
    dls = labeled_loaders(data.labeled, encoder.image_channels, data.size, 128)
    return knn_accuracy(embed(encoder, dls.train), embed(encoder, dls.valid), NEIGHBORS)


def common(args: argparse.Namespace) -> str:
    """What every figure depends on, for a file's name."""
    return f"{args.arch}-{args.size}-{args.bs}"


# --- tables -----------------------------------------------------------------------------------------------------------


def speed_text(method: str, seconds: pd.DataFrame) -> str:
    """Images a second of each side, and the ratio that counts."""
    ours, *others = seconds.columns
    table = over_rounds(1 / seconds, "{:,.0f}").assign(ratio=ratios(seconds, ours, "{:.2f}"))
    return f"{markdown(table, 'images a second')}\n\n{against_best(seconds, ours, others)}"


def row(runs: list[dict]) -> dict:
    """A line of the table of accuracies: the runs of one side, a seed each."""
    gains = [run["knn"] - run["untrained"] for run in runs]
    return {
        f"{NEIGHBORS}-NN": spread([run["knn"] for run in runs]),
        "untrained": spread([run["untrained"] for run in runs]),
        "gain": f"{mean(gains):+.3f}",
        "steps": f"{runs[0]['steps']:,}",
    }


def described(args: argparse.Namespace) -> str:
    """The command, and what all figures have in common."""
    given = {f"--{name}": getattr(args, name.replace("-", "_")) for name in SETTINGS}
    shown = [f"{name} {value}" for name, value in given.items() if value != SETTINGS[name[2:]]]
    if args.methods != list(SHARED):
        shown.insert(0, f"--methods {' '.join(args.methods)}")
    command = " ".join(["python bench/methods.py", *shown])
    shared = "; ".join(f"{method}: {name} {value}" for method in args.methods for name, value in SHARED[method].items())
    about = [
        f"{args.images:,} images without labels, one of them for validation, at {args.size} px in batches of",
        f"{args.bs}; {args.arch}, torch's Adam at a constant rate of {args.lr}, {args.epochs} epochs; {shared}.",
        f"Speed: images, each in two views, in a second of training, loading included; {args.steps} steps a round,",
        f"median, least and most of {args.rounds} rounds; ratio: how many times as long an image takes as with ours.",
        f"Frozen encoders: {NEIGHBORS}-NN with the labels of {args.probe_images:,} training images, on",
        f"{args.test_images:,} test images. Seeds of everything: {args.seeds}; ± is their deviation.",
    ]
    return f"```bash\n{command}\n```\n\n" + "\n".join(about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for what is found")
    parser.add_argument("--docs", type=Path, help="page to put the tables in")
    parser.add_argument("--methods", nargs="+", default=list(SHARED), choices=list(SHARED))
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{ABOUT[name]} ({default})")
    parser.add_argument("--speeds", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if args.size >= BLUR_FROM:
        parser.error(f"below {BLUR_FROM} pixels views are not blurred: --size {args.size} would not be one recipe")
    args.out.mkdir(parents=True, exist_ok=True)
    data, texts = Data(args), [described(args)]
    if args.speeds:
        texts += [speed_text(method, speeds(method, args)) for method in args.methods]
    rows = {
        f"{method}: {name}": row([result(method, name, seed, data, args) for seed in range(args.seeds)])
        for method in args.methods
        for name in SIDES
    }
    text = "\n\n".join([*texts, markdown(pd.DataFrame(rows).T, "frozen encoder"), machine()])
    print(text)
    if args.docs:
        into(args.docs, text, ("<!-- methods: written by bench/methods.py -->", "<!-- end of methods -->"))


if __name__ == "__main__":
    main()
