"""How fast a run is: time and tokens between two lines of figures, and how long it took to begin."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

from longreel.parallel.metrics_log import Utilisation

_IMPORTED = time.perf_counter()


class Pace:
    """Time and tokens since the figures before."""

    def __init__(self) -> None:
        self._began, self._steps = time.perf_counter(), 0
        self._trained: Counter[int] = Counter()

    def add(self, clips_by_tokens: dict[int, int]) -> None:
        """Count a step of the clips {video tokens: number}."""
        self._steps += 1
        self._trained.update(clips_by_tokens)

    def figures(self, utilisation: Utilisation) -> dict[str, float]:
        """Seconds of a step, tokens a second over all ranks, and MFU where the devices' peak is known."""
        seconds = time.perf_counter() - self._began
        tokens = sum(tokens * number for tokens, number in self._trained.items())
        mfu = utilisation.mfu(self._trained, seconds)
        figures = {"seconds": seconds / self._steps, "tokens_per_s": tokens / seconds}
        return figures if mfu is None else figures | {"mfu": mfu}


def process_age() -> float:
    """Seconds since this process was started, imports included; where the system does not say, since those."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.perf_counter() - _IMPORTED
    # Field 22, counted behind the name, which may hold spaces and brackets: clock ticks from boot to the start.
    started = int(stat.read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
