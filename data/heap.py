"""Memory of the C library's heap, kept by this process instead of given back and asked for again."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt, of malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MOST = 2**31 - 1
# What glibc before 2.35 takes for the size from which memory is given back at once.
_MOST_BEFORE = 32 << 20
_STEP = 256 << 20


def keep_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc; else do nothing.

    By itself glibc gives large pieces back at once, and the system clears the same pages again for every clip, which
    can cost more than the work. The process stays as large as it was at its peak.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Without the first of them, the others would have small pieces given back too.
    if mallopt is not None and any(mallopt(_M_MMAP_THRESHOLD, most) for most in (_MOST, _MOST_BEFORE)):
        mallopt(_M_TRIM_THRESHOLD, _MOST)
        mallopt(_M_TOP_PAD, _STEP)
