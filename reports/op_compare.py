"""What an op record's figure is held against: the rooflines of its run, and the best peer at the same point."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from longreel.reports.op_records import OpRecord

ROOFLINE_OPS = ("clone", "matmul")

Point = tuple[object, ...]


def point_of(record: OpRecord) -> Point:
    """What records of different providers must share to be compared: run, op, direction, dtype, device, shape, pass."""
    shape = tuple(sorted(record.shape.items()))
    return record.run, record.op, record.direction, record.dtype, record.device, shape, record.config.get("label", "")


class Rooflines:
    """Best rate of `clone` and `matmul` per dtype and device: of a record's own run, else of all runs there."""

    def __init__(self, records: Iterable[OpRecord]) -> None:
        self._best: dict[tuple[object, ...], float] = {}
        for record in records:
            if record.op in ROOFLINE_OPS and record.rate:
                for where in self._places(record):
                    self._best[where] = max(record.rate, self._best.get(where, 0.0))

    @staticmethod
    def _places(record: OpRecord) -> tuple[tuple[object, ...], ...]:
        anywhere = record.is_compute_bound, record.dtype, record.device
        return (*anywhere, record.run), anywhere

    def fraction(self, record: OpRecord) -> float | None:
        """The record's rate over its roofline's; None without either."""
        rooflines = [self._best[where] for where in self._places(record) if where in self._best]
        return record.rate / rooflines[0] if record.rate and rooflines else None


class Peers:
    """The records that are not ours, at each point."""

    def __init__(self, records: Iterable[OpRecord]) -> None:
        self._at: defaultdict[Point, dict[str, OpRecord]] = defaultdict(dict)
        for record in records:
            if not record.is_ours and record.rate:
                self._at[point_of(record)][record.provider] = record

    def best(self, record: OpRecord) -> OpRecord | None:
        """The fastest peer at the record's point."""
        return max(self._at.get(point_of(record), {}).values(), key=lambda r: r.rate or 0.0, default=None)

    def speedup(self, record: OpRecord, provider: str | None = None) -> float | None:
        """Rate over that of the peer of this name, or of the best one; above 1 is faster; None without either."""
        peer = self.best(record) if provider is None else self._at.get(point_of(record), {}).get(provider)
        return None if peer is None or not peer.rate or not record.rate else record.rate / peer.rate


def groups(records: Iterable[OpRecord]) -> dict[tuple[str, ...], list[OpRecord]]:
    """Records by (kind, device, op, dtype, pass): one table each."""
    found: defaultdict[tuple[str, ...], list[OpRecord]] = defaultdict(list)
    for r in records:
        found[r.kind, r.device, r.op, r.dtype, str(r.config.get("label", ""))].append(r)
    return dict(found)
