"""The longest length that fits, by a search that asks few times: memory grows all but linearly with length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

# 32 frames of 16 x 16 patches.
STEP = 8_192
MOST = 2**25


def longest_that_fits(
    need: Callable[[int], float],
    limit: float,
    *,
    known: Mapping[int, float] | None = None,
    step: int = STEP,
    most: int = MOST,
) -> int | None:
    """The longest multiple of step, at most `most`, whose need is within the limit; None where `step` is too long.

    Lengths to ask for come from a straight line through what is known, and from the middle where the line was wrong.
    What is returned fits, and one step more does not (or is beyond `most`).

    Args:
        need: of a length, never falling; `inf` where all that is known is that it does not fit.
        limit: what there is. known: needs of some lengths.
        step: between lengths. most: no longer than this.
    """
    top = most // step
    found = {n // step: need for n, need in (known or {}).items() if n % step == 0 and n // step <= top}

    def ask(n: int) -> bool:
        if n not in found:
            found[n] = need(n * step)
        return found[n] <= limit

    if not ask(1):
        return None
    by_line = True
    while True:
        low = max(n for n, needed in found.items() if needed <= limit)
        high = min((n for n, needed in found.items() if needed > limit), default=None)
        if low == top or (high is not None and high - low == 1):
            return low * step
        if high is None:
            below = max((n for n in found if n < low), default=None)
            rise = 0.0 if below is None else (found[low] - found[below]) / (low - below)
            # One beyond the crossing, which then lies between two neighbours; doubled where there is no line yet.
            ahead = int((limit - found[low]) / rise) + 1 if rise > 0 and by_line else low
            by_line = not by_line or not ask(min(low + max(1, ahead), top))
            continue
        on_line = by_line and math.isfinite(found[high])
        share = (limit - found[low]) / (found[high] - found[low]) if on_line else 0.5
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        ask(middle)
        # A line that leaves the crossing next to one end and far from the other is of no use.
        by_line = not by_line or min(middle - low, high - middle) <= 1
