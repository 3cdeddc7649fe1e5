"""Images a second of one process and of several that train one model, on the CPU of this machine.

Pixels are in memory, so that training alone is measured, from the fourth step on. All cores are shared among the
processes, and so is the batch: one process and several take the same steps. Rounds in turns; medians.

    python bench/two_processes.py                    # SimCLR, ResNet-18, 96 px
    python bench/two_processes.py --processes 1,2,4 --task rotation --size 64
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time

import numpy as np
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import set_seed
from fastcore.parallel import num_cpus
from measure import machine, tell

from selfsup_fastai.data.images import UnlabeledDataLoaders
from selfsup_fastai.messages import quiet
from selfsup_fastai.pretext.learner import pretext_learner
from selfsup_fastai.processes import is_first, join, n_processes

WARM = 3  # Steps that do not count


class Clock(Callback):
    """Seconds of the steps after the first ones; ends the fit after so many."""

    order = 99

    def __init__(self, steps: int):
        self.steps, self.times = steps, []

    def after_batch(self):
        self.times.append(time.perf_counter())
        if len(self.times) == self.steps + WARM:
            raise CancelFitException

    @property
    def seconds(self) -> float:
        """Of a step, the median."""
        return statistics.median(np.diff(self.times[WARM - 1 :]))


def images_a_second(task: str, arch: str, size: int, bs: int, steps: int) -> float:
    """Of all processes together; `bs` is of all of them, too."""
    join()
    set_seed(0)
    n = bs * (steps + WARM) + 2 * n_processes()
    array = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    share = bs // n_processes()
    with quiet():
        dls = UnlabeledDataLoaders.from_array(
            array, size=size, bs=share, valid_pct=2 * n_processes() / n, num_workers=0, device="cpu"
        )
        learn = pretext_learner(dls, task, arch)
        clock = Clock(steps)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3, cbs=clock)
    return share * n_processes() / clock.seconds


def started(n: int, options: argparse.Namespace) -> float:
    """Images a second of `n` processes, started anew."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, num_cpus() // n)), "CUDA_VISIBLE_DEVICES": ""}
    env |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [f"--{name}={getattr(options, name)}" for name in ("task", "arch", "size", "bs", "steps")]
    command = [sys.executable, __file__, "--one", *words]
    runs = [
        subprocess.Popen(command, env={**env, "RANK": str(k), "LOCAL_RANK": str(k)}, stdout=subprocess.PIPE, text=True)
        for k in range(n)
    ]
    said = [run.communicate()[0] for run in runs]
    return float(said[0].split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--task", default="simclr")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--bs", type=int, default=64, help="Images in a batch of all processes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = images_a_second(options.task, options.arch, options.size, options.bs, options.steps)
        if is_first():
            print(found)
        return
    counts = [int(n) for n in options.processes.split(",")]
    found = {n: [] for n in counts}
    for i in range(options.rounds):
        for n in counts:
            found[n].append(started(n, options))
            tell(f"round {i + 1}: {n} process{'es' * (n > 1)}, {found[n][-1]:.1f} images/s")
    print(f"{options.task}, {options.arch}, {options.size} px, batches of {options.bs}, on {machine()}\n")
    print("| processes | images/s | beside the first row |\n|---|---|---|")
    for n, values in found.items():
        middle = statistics.median(values)
        print(f"| {n} | {middle:.1f} | {middle / statistics.median(found[counts[0]]):.2f} |")


if __name__ == "__main__":
    main()
