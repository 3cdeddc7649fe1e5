"""memory.py: large tensors that were freed are used again, and only where nobody said otherwise."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")

FAULTS = """
import resource, sys, torch
from selfsup_fastai.memory import keep_freed_memory
kept = keep_freed_memory()
def faults():
    for _ in range(10):  # glibc wants a few of them before it finds its way
        torch.ones(12 << 20)  # 48 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print(kept, faults() - before)
"""


def pages_asked_for(**variables) -> tuple[bool, int]:
    """Whether memory was kept, and pages asked of the system by ten tensors after ten others that were freed."""
    settings = "SELFSUP_KEEP_MEMORY", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"
    env = {k: v for k, v in os.environ.items() if k not in settings} | variables
    shown = subprocess.run([sys.executable, "-c", FAULTS], env=env, check=True, capture_output=True, text=True).stdout
    kept, pages = shown.split()
    return kept == "True", int(pages)


def test_freed_memory_is_used_again():
    kept, pages = pages_asked_for()
    assert kept and pages < 100


@pytest.mark.parametrize("variable", [{"SELFSUP_KEEP_MEMORY": "0"}, {"MALLOC_MMAP_MAX_": "65536"}])
def test_who_sets_it_otherwise_is_heard(variable):
    kept, pages = pages_asked_for(**variable)
    assert not kept and pages > 200  # the system may hand out pages of 2 MB: 240 of them
