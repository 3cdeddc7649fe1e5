"""Memory of this process that was freed is used again, instead of being asked of the system anew at every batch."""

import ctypes
import os
from functools import cache

SWITCH = "SELFSUP_KEEP_MEMORY"
"""Environment variable: 0 leaves the C library as it is."""

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # the numbers of mallopt(3)
_OWN_SETTINGS = "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"


@cache
def keep_freed_memory() -> bool:
    """Tell glibc not to give large tensors' memory back to the system when they are freed; whether that was done.

    By default every allocation above 32 MB comes fresh from the system, page by page, which takes longer than many an
    operation on it. Holds for the whole process, which then shrinks less when it has freed much: only by what is beyond
    2 GB, and not below anything still in use. Nothing happens on other systems, where the user set glibc's own
    variables, or with SELFSUP_KEEP_MEMORY=0.
    """
    if os.environ.get(SWITCH) == "0" or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows
        return False
    if not hasattr(libc, "gnu_get_libc_version"):  # musl has a mallopt, too, but another malloc
        return False
    return bool(libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1) and libc.mallopt(_MMAP_MAX, 0))
