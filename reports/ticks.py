"""Where an axis has its ticks, and which of them have room for a label."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from longreel.reports import formatting


def thin(values: Sequence[int], widths: Sequence[float], room: float, low: float, high: float) -> list[int]:
    """Those of the ascending values whose labels fit beside each other on a log axis, the largest first.

    Args:
        values: where labels are wanted. widths: of their labels, in characters. room: of the axis, in characters.
        low, high: ends of the axis.
    """
    scale = room / math.log(high / low)
    kept: list[int] = []
    limit = math.inf
    for value, width in zip(reversed(values), reversed(widths), strict=True):
        centre = math.log(value / low) * scale
        if centre + width / 2 <= limit:
            kept.insert(0, value)
            limit = centre - width / 2
    return kept


def log_ticks(low: float, high: float, *, binary: bool = False) -> list[float]:
    """Three to eight round values on a log axis from low to high.

    Powers of two where bytes are counted (`binary`) and there are enough of them, else 1-2-5 steps of each decade, or
    even steps on an axis too short for those; bytes in the unit that suits them.
    """
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    if binary and last - first >= 2:
        return [2.0**n for n in range(first, last + 1, math.ceil((last - first + 1) / 8))]
    unit = formatting.byte_unit(high)[0] if binary else 1
    if high / low > 4:
        decades = range(math.floor(math.log10(low / unit)), math.ceil(math.log10(high / unit)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            ticks = [s * 10.0**d * unit for d in decades for s in steps if low <= s * 10.0**d * unit <= high]
            if len(ticks) >= 3:
                return ticks[:: math.ceil(len(ticks) / 8)]
    even = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low / unit, high / unit)
    return [float(tick) * unit for tick in even if low <= tick * unit <= high]


def linear_ticks(high: float) -> list[float]:
    """Four to seven round values from zero to the end of an axis."""
    return [
        float(tick) for tick in MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(0.0, high) if tick <= high
    ]
