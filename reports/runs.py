"""Two runs of the same points: what got slower, larger or broke, what improved, and what only one of them has.

A change of the step time is reported when it is large (at least a stated part) and significant (the interval of the
ratio, by ranks as for samples in turns, excludes 1). Memory and traffic are counted, not sampled: there size alone
decides, as it does for predictions, whose interval is the model's uncertainty and says nothing about a change of its
output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from longreel.reports import formatting
from longreel.reports.compare import Group
from longreel.reports.configurations import labels
from longreel.reports.records import Record
from longreel.reports.store import latest
from longreel.reports.turns import compare

Outcome = Literal["regression", "improvement", "undecided", "other"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """When a change is reported.

    Args:
        size: smallest relative change, 0.05 is 5 %. confidence: of the intervals of sampled times, below 1.
    """

    size: float = 0.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.size < 1:
            raise ValueError(f"size must lie between 0 and 1 (0.05 is 5 %), got {self.size}")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be at least 0.5 and below 1, got {self.confidence}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One quantity of one point.

    Args:
        ratio: new over old, None for a status and where one of them is zero. interval: of the ratio, None where exact.
    """

    group: Group
    label: str
    seq_len: int
    quantity: str
    before: str
    after: str
    ratio: float | None
    interval: tuple[float, float] | None
    outcome: Outcome
    why: str = ""

    @property
    def sort_key(self) -> tuple[float, str, int]:
        """The worst first: what broke, then by size."""
        return -math.inf if self.ratio is None else -abs(math.log(self.ratio)), self.label, self.seq_len


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A point that only one run has."""

    group: Group
    label: str
    seq_len: int
    status: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunComparison:
    """Two runs compared. num_common: points of both. reconfigured: those whose configurations differ in detail."""

    thresholds: Thresholds
    num_common: int
    changes: tuple[Change, ...]
    only_old: tuple[Point, ...]
    only_new: tuple[Point, ...]
    reconfigured: tuple[str, ...]

    def of(self, outcome: Outcome) -> list[Change]:
        """The changes of one outcome, the largest first."""
        return sorted((c for c in self.changes if c.outcome == outcome), key=lambda c: c.sort_key)


def compare_runs(old: Sequence[Record], new: Sequence[Record], thresholds: Thresholds) -> RunComparison:
    """Compare two runs point by point: same kind, regime, model, device, configuration and length.

    Args:
        old, new: records of each run; of those of one point the last counts, whatever commit they are of.
        thresholds: what is reported.

    Raises:
        ValueError: a run has no records, or the two have no point in common.
    """
    for name, records in (("old", old), ("new", new)):
        if not records:
            raise ValueError(f"the {name} run has no records")
    before, after = _by_point(old), _by_point(new)
    pairs = [(before[p], after[p]) for p in before if p in after]
    lonely_old = [record for p, record in before.items() if p not in after]
    lonely_new = [record for p, record in after.items() if p not in before]
    reconfigured = _pair_by_identity(lonely_old, lonely_new)
    pairs += reconfigured
    if not pairs:
        raise ValueError("the two runs have no point in common")
    names = _names([*old, *new])
    changes = [change for a, b in pairs for change in _changes(a, b, names(b), thresholds)]

    def points(records: Sequence[Record]) -> tuple[Point, ...]:
        found = [Point(group=Group.of(r), label=names(r), seq_len=r.seq_len, status=r.status) for r in records]
        return tuple(sorted(found, key=lambda p: (p.group.sort_key, p.label, p.seq_len)))

    return RunComparison(
        thresholds=thresholds,
        num_common=len(pairs),
        changes=tuple(changes),
        only_old=points(lonely_old),
        only_new=points(lonely_new),
        reconfigured=tuple(f"{names(b)} at {b.seq_len:,} tokens" for _, b in reconfigured),
    )


def _by_point(records: Sequence[Record]) -> dict[str, Record]:
    return {record.point: record for record in latest(records)}


def _pair_by_identity(old: list[Record], new: list[Record]) -> list[tuple[Record, Record]]:
    """Takes out of both lists what agrees in all but details of the configuration, where that is unambiguous."""
    pairs = []
    for record in list(old):
        same_old = [r for r in old if r.identity == record.identity]
        same_new = [r for r in new if r.identity == record.identity]
        if len(same_old) == len(same_new) == 1:
            pairs.append((record, same_new[0]))
            old.remove(record)
            new.remove(same_new[0])
    return pairs


def _names(records: Sequence[Record]) -> Callable[[Record], str]:
    known = dict(zip(map(id, records), labels(records), strict=True))
    return lambda record: known[id(record)]


def _changes(a: Record, b: Record, label: str, thresholds: Thresholds) -> list[Change]:
    def change(quantity: str, before: str, after: str, outcome: Outcome, **more: object) -> Change:
        values = {"ratio": None, "interval": None} | more
        where = {"group": Group.of(b), "label": label, "seq_len": b.seq_len}
        return Change(**where, quantity=quantity, before=before, after=after, outcome=outcome, **values)  # type: ignore[arg-type]

    if a.status != b.status:
        outcome: Outcome = "regression" if a.status == "ok" else "improvement" if b.status == "ok" else "other"
        return [change("status", a.status, b.status, outcome, why=b.reason or a.reason or "")]
    found = []
    if a.status == "ok" and a.step_s and b.step_s:
        ratio = b.step_s / a.step_s
        if abs(ratio - 1) >= thresholds.size:
            bounds, why = _time_interval(a, b, thresholds.confidence)
            decided = b.kind == "predicted" or (bounds is not None and (bounds[0] > 1 or bounds[1] < 1))
            outcome = ("regression" if ratio > 1 else "improvement") if decided else "undecided"
            times = f"{formatting.number(a.step_s)} s", f"{formatting.number(b.step_s)} s"
            found.append(change("step time", *times, outcome, ratio=ratio, interval=bounds, why=why))
    counted = [("traffic", sum(a.traffic.values()), sum(b.traffic.values()))]
    # What a process takes is not counted but observed, and differs from run to run.
    if a.memory_meaning == b.memory_meaning == "allocated":
        counted.append(("memory", a.peak_memory or 0, b.peak_memory or 0))
    for quantity, before, after in counted:
        # One that only one run has a figure of was not counted in the other, but for exchanges that came or went.
        appeared = quantity == "traffic" and a.status == "ok" and (before == 0) != (after == 0)
        if appeared or (before and after and abs(after / before - 1) >= thresholds.size):
            sizes = formatting.in_bytes(before), formatting.in_bytes(after)
            outcome = "regression" if after > before else "improvement"
            found.append(change(quantity, *sizes, outcome, ratio=None if appeared else after / before))
    return found


def _time_interval(a: Record, b: Record, confidence: float) -> tuple[tuple[float, float] | None, str]:
    """(interval of the ratio of step times, why there is none)."""
    if b.kind == "predicted":
        return None, ""
    if not a.samples_s or not b.samples_s:
        return None, "no samples"
    found = compare(b.samples_s, a.samples_s, confidence=confidence)
    if not found.decisive:
        return None, f"too few samples: {len(a.samples_s)} and {len(b.samples_s)}"
    return (found.low, found.high), ""
