"""Prints the peak memory, in bytes, of a process that makes loaders over a folder and runs two epochs, or that trains.

python bench/peak.py FOLDER SIZE BATCH
python bench/peak.py FOLDER SIZE BATCH ours TASK ARCH     # one look at every batch, then some steps of training
python bench/peak.py FOLDER SIZE BATCH bare TASK ARCH     # as many steps on one batch that nothing was opened for
"""

import resource
import sys

STEPS = 8


def peak() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux hands `ru_maxrss` on from the process that started this one, so the kernel's own note is read there.
    """
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def loaders(folder: str, size: int, bs: int) -> None:
    """Two epochs of plain batches."""
    from selfsup_fastai.data.images import UnlabeledDataLoaders

    dls = UnlabeledDataLoaders.from_folder(folder, size=size, bs=bs)
    for _ in range(2):
        for _batch in dls.train:
            pass


def ours(folder: str, size: int, bs: int, task: str, arch: str) -> None:
    """Every batch of an epoch made, and some of them trained on."""
    from fastai.callback.training import ShortEpochCallback
    from steps import epoch

    from selfsup_fastai.data.images import UnlabeledDataLoaders
    from selfsup_fastai.pretext.learner import pretext_learner

    dls = UnlabeledDataLoaders.from_folder(folder, size=size, bs=bs, valid_pct=0.0)
    learn = pretext_learner(dls, task, arch)
    for _batch in learn.dls.train:
        pass
    epoch(learn, [ShortEpochCallback(STEPS / len(learn.dls.train))])


def bare(folder: str, size: int, bs: int, task: str, arch: str) -> None:
    """The bare step of the same model, of noise; what is imported is the same, too."""
    import torch
    from steps import Bare

    from selfsup_fastai.encoders.encoder import create_encoder
    from selfsup_fastai.pretext import get_task
    from selfsup_fastai.pretext.base import PretextLoss

    task, x = get_task(task), torch.rand(bs, 3, size, size)
    made = task.batch(x, generator=torch.Generator().manual_seed(0), train=True)
    model = task.model(create_encoder(arch, size=size))
    Bare(model, PretextLoss(task), made[: task.n_inp], made[task.n_inp :]).steps(STEPS)


if __name__ == "__main__":
    folder, size, bs, *training = sys.argv[1:]
    what, *settings = training or ["loaders"]
    {"loaders": loaders, "ours": ours, "bare": bare}[what](folder, int(size), int(bs), *settings)
    print(peak())
