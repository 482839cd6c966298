"""Peak memory of this process over a stretch of work, from the kernel's own high-water mark."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak resident bytes since construction.

    Linux keeps a high-water mark (VmHWM), which is set back to the present size at the start. Where that is not
    possible, the peak is that of the process's whole life, and `source` says so.

    Attributes:
        before: resident bytes at the start, after freed memory was handed back to the system; None where the peak is
            not one since then, so that their difference would say nothing.
        source: what the figure is, in words.
    """

    def __init__(self) -> None:
        _hand_back()
        self.before: int | None = None
        try:
            _CLEAR.write_text("5")
            self.source = "VmHWM of the process, set back before the timed steps"
            self.before = _status_bytes("VmRSS")
        except OSError:
            self.source = "largest resident size of the process's whole life (ru_maxrss), earlier points included"

    def read(self) -> int:
        """Bytes."""
        peak = _status_bytes("VmHWM")
        return peak if peak is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _hand_back() -> None:
    """Return what malloc keeps of freed buffers, so that earlier work does not count."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
