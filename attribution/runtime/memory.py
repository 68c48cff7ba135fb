"""The C library's memory policy, which decides a tenth of a training step's time on a CPU."""

from __future__ import annotations

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@cache
def keep_freed_memory() -> bool:
    """Have glibc reuse freed memory instead of handing it to the system, to be faulted in anew.

    A step frees and allocates hundreds of MiB, and the system zeroes every page that it gives.
    Returns whether it could be asked: elsewhere than on glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
