"""Is a record faster than the baseline at its length? SAME, FAST, SLOW or AMBIGUOUS, and when there is no verdict."""

from __future__ import annotations

from typing import get_args

from longreel.reports.compare import MIN_SAMPLES, Baselines
from longreel.reports.records import Record
from longreel.reports.turns import Comparison, Verdict


def verdict(record: Record, baselines: Baselines) -> Verdict | None:
    """The verdict that was recorded with samples taken in turns, else the one that both intervals give.

    None for the baseline itself, without a ratio or an interval, with fewer than MIN_SAMPLES samples on either side,
    and where ranks share cores.
    """
    baseline = baselines.of(record)
    if baseline is None or record is baseline or baselines.ratio(record) is None:
        return None
    if baselines.in_turns(record):
        for recorded in get_args(Verdict):
            if record.comparison.get("verdict") == recorded:
                return recorded
    if not all(may_be_judged(r) for r in (record, baseline)):
        return None
    bounds = baselines.ratio_interval(record)
    return None if bounds is None else of_interval(*bounds)


def may_be_judged(record: Record) -> bool:
    """Whether a record's time can say who is faster."""
    if record.kind == "predicted":
        return True
    return len(record.samples_s) >= MIN_SAMPLES and not record.provenance.get("sharing")


def of_interval(low: float, high: float) -> Verdict:
    """The verdict on a ratio of throughputs that lies between these."""
    return Comparison(ratio=2 / (low + high), low=1 / high, high=1 / low).verdict
