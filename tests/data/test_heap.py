"""data/heap.py: what was freed is not asked for again."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from longreel.data.heap import keep_memory
{keep}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(bytearray(b"x") * (48 << 20))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
print(first, sum(faults() for _ in range(4)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_the_same_pages_are_used_again() -> None:
    def faults(keep: str) -> tuple[int, int]:
        printed = subprocess.check_output([sys.executable, "-c", PROGRAM.format(keep=keep)], text=True)
        first, later = printed.split()
        return int(first), int(later)

    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("settings of glibc")
    given_back, kept = faults(""), faults("keep_memory()")
    assert given_back[1] > 4 * 10_000
    assert kept[0] > 10_000
    assert kept[1] < 1_000
