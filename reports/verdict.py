"""Is a candidate faster than a baseline? A verdict from intervals, not from two medians."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["SAME", "FAST", "SLOW", "AMBIGUOUS"]

# Within this fraction of each other two candidates are the same for every purpose.
MARGIN = 0.01
# With fewer samples than this a bootstrap is too sure of itself, and the interval spans all quotients.
MIN_BOOTSTRAP = 6
_RESAMPLES, _CONFIDENCE = 1000, 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Candidate against baseline. ratio: of median times, below 1 the candidate is faster; low, high: its interval."""

    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """SAME within the margin, FAST or SLOW where the interval excludes 1, AMBIGUOUS otherwise."""
        if self.low >= 1 - MARGIN and self.high <= 1 + MARGIN:
            return "SAME"
        if self.high < 1:
            return "FAST"
        return "SLOW" if self.low > 1 else "AMBIGUOUS"


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of the samples, between neighbours by straight line."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def compare(candidate_s: Sequence[float], baseline_s: Sequence[float]) -> Comparison:
    """Compare samples that were taken in alternation.

    Args:
        candidate_s, baseline_s: seconds, at least one each.

    Returns:
        The ratio of medians with a 95 % interval: by bootstrap (fixed seed), or from the extremes of few samples.

    Raises:
        ValueError: one side has no sample.
    """
    if not candidate_s or not baseline_s:
        raise ValueError(f"both sides need samples, got {len(candidate_s)} and {len(baseline_s)}")
    ratio = statistics.median(candidate_s) / statistics.median(baseline_s)
    if min(len(candidate_s), len(baseline_s)) < MIN_BOOTSTRAP:
        return Comparison(ratio=ratio, low=min(candidate_s) / max(baseline_s), high=max(candidate_s) / min(baseline_s))
    source = random.Random(0)

    def resampled(samples: Sequence[float]) -> float:
        return statistics.median(source.choices(samples, k=len(samples)))

    ratios = [resampled(candidate_s) / resampled(baseline_s) for _ in range(_RESAMPLES)]
    tail = (1 - _CONFIDENCE) / 2
    return Comparison(ratio=ratio, low=quantile(ratios, tail), high=quantile(ratios, 1 - tail))
