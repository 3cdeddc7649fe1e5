"""Pretraining on shards that can be killed at any moment, and goes on when it is started again.

    python docs/examples/shards.py photos work
    python docs/examples/shards.py photos work          # after a crash, a reboot, kill -9: the very same line

The first call packs the images of the folder `photos` into shards, work/shards, and pretrains on them. While it trains,
its state lies in work/state; the encoder comes to work/encoder.safetensors. Killed and started again, it ends on the
CPU with the very weights that it would have ended with.
"""

from argparse import ArgumentParser
from pathlib import Path

from fastai.torch_core import set_seed

from selfsup_fastai.callbacks.log import EpochLines
from selfsup_fastai.callbacks.resume import Resume
from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.data.shard_writing import write_shards
from selfsup_fastai.pretext.learner import pretext_learner


def main() -> None:
    args = arguments()
    shards = args.out / "shards"
    if not (shards / "index.csv").exists():  # it is written last: where it is, all shards are
        write_shards(args.photos, shards, args.per_shard, overwrite=True)
    set_seed(42, reproducible=True)
    dls = UnlabeledDataLoaders.from_shards(shards, size=args.size, bs=args.bs, num_workers=args.workers)
    learn = pretext_learner(dls, args.task, arch=args.arch)
    resume = Resume(args.out / "state", every=args.every)
    with learn.no_bar():
        learn.fit_one_cycle(args.epochs, 3e-3, cbs=[resume, EpochLines()])
    learn.save_encoder(args.out / "encoder.safetensors")
    resume.clear()


def arguments():
    """What the command line says."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path, help="folder of images")
    parser.add_argument("out", type=Path, help="folder for shards, state and encoder")
    for name, default in {"task": "rotation", "arch": "resnet18"}.items():
        parser.add_argument(f"--{name}", default=default)
    for name, default in {"epochs": 5, "size": 128, "bs": 64, "per-shard": 1000, "workers": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two states")
    return parser.parse_args()


if __name__ == "__main__":  # worker processes of Windows and macOS import this file
    main()
