"""Is a candidate faster than a baseline whose samples were taken in turns with its own? Intervals, not two medians.

The interval of the ratio is free of assumptions about the noise: of all quotients of a sample of either side, sorted,
it leaves out as many at both ends as the Mann-Whitney distribution allows at 95 % (Hodges and Lehmann 1963; exact for
independent samples that differ by a factor). So of pairs that are equal at most 5 % are called FAST or SLOW, of pairs
that differ by more than the margin at most 5 % SAME, whatever the distribution.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Verdict = Literal["SAME", "FAST", "SLOW", "AMBIGUOUS"]

# Within this fraction of each other two candidates are the same for every purpose.
MARGIN = 0.01
CONFIDENCE = 0.95
# As many samples of both sides have an interval at 95 % from here on; fewer of one want more of the other: 3 and 5.
MIN_DECISIVE = 4
# The exact distribution is counted up to this many samples of a side; beyond it a normal one differs by nothing.
_MOST_EXACT = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Candidate against baseline.

    Args:
        ratio: median quotient of times, below 1 the candidate is faster. low, high: its 95 % interval; from the
            extremes where there are too few samples for one.
        decisive: there were enough.
    """

    ratio: float
    low: float
    high: float
    decisive: bool = True

    @property
    def verdict(self) -> Verdict:
        """SAME within the margin, FAST or SLOW where the interval excludes 1, AMBIGUOUS otherwise."""
        if not self.decisive:
            return "AMBIGUOUS"
        if self.low >= 1 - MARGIN and self.high <= 1 + MARGIN:
            return "SAME"
        if self.high < 1:
            return "FAST"
        return "SLOW" if self.low > 1 else "AMBIGUOUS"


def compare(candidate_s: Sequence[float], baseline_s: Sequence[float], *, confidence: float = CONFIDENCE) -> Comparison:
    """Compare samples that were taken in turns.

    Args:
        candidate_s, baseline_s: seconds, at least one each. confidence: of the interval.

    Raises:
        ValueError: one side has no sample.
    """
    if not candidate_s or not baseline_s:
        raise ValueError(f"both sides need samples, got {len(candidate_s)} and {len(baseline_s)}")
    quotients = sorted(candidate / baseline for candidate in candidate_s for baseline in baseline_s)
    few, many = sorted((len(candidate_s), len(baseline_s)))
    outside = left_out(few, many, 1 - confidence)
    return Comparison(
        ratio=statistics.median(quotients),
        low=quotients[outside],
        high=quotients[-1 - outside],
        decisive=math.comb(few + many, few) * (1 - confidence) / 2 >= 1,
    )


@lru_cache
def left_out(few: int, many: int, error: float) -> int:
    """Quotients that an interval leaves out at each end: the most u with P(U <= u) at most error / 2, at least 0.

    Args:
        few, many: samples of either side, few <= many. error: one less the confidence.
    """
    tail = error / 2
    if many > _MOST_EXACT:
        mean, deviation = few * many / 2, math.sqrt(few * many * (few + many + 1) / 12)
        return max(0, math.floor(mean + deviation * statistics.NormalDist().inv_cdf(tail) - 0.5))
    # Ways in which `few` of all places sum up to each value of U.
    ways = [1] + [0] * (few * many)
    for i in range(1, few + 1):
        for u in range(few * many, many + i - 1, -1):
            ways[u] -= ways[u - many - i]
        for u in range(i, few * many + 1):
            ways[u] += ways[u - i]
    total, below, most = math.comb(few + many, few), 0, 0
    for u in range(few * many):
        below += ways[u]
        if below > tail * total:
            break
        most = u
    return most


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of the samples, between neighbours by straight line."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
