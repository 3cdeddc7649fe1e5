"""Prints the peak memory, in bytes, of a process that makes loaders over a folder and runs two epochs.

python bench/peak.py FOLDER SIZE BATCH
"""

import resource
import sys

from selfsup_fastai.data.images import UnlabeledDataLoaders


def peak() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux hands `ru_maxrss` on from the process that started this one, so the kernel's own note is read there.
    """
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    folder, size, bs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dls = UnlabeledDataLoaders.from_folder(folder, size=size, bs=bs)
    for _ in range(2):
        for _batch in dls.train:
            pass
    print(peak())
