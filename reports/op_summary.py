"""Our best kernel against the best peer, one row per point: what a sweep of ops comes down to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from longreel.reports import formatting
from longreel.reports.op_compare import Peers, Point, Rooflines, point_of
from longreel.reports.op_goals import CUDNN, FLASH, goal_lines
from longreel.reports.op_records import DIRECTIONS, OpRecord
from longreel.reports.store import latest


@dataclass(frozen=True, kw_only=True, slots=True)
class Duel:
    """One point: our fastest record, the best peer's (None where none ran), and our part of the roofline.

    against: our rate over that of each of NAMED_PEERS, None where it did not run.
    """

    ours: OpRecord
    peer: OpRecord | None
    roofline_fraction: float | None
    against: tuple[float | None, ...]

    @property
    def speedup(self) -> float | None:
        """Rate over the peer's."""
        if self.peer is None or not self.peer.rate or not self.ours.rate:
            return None
        return self.ours.rate / self.peer.rate

    def words(self) -> tuple[str, ...]:
        """Words under each of HEADINGS."""
        unit = "TFLOP/s" if self.ours.is_compute_bound else "TB/s"
        label = str(self.ours.config.get("label", ""))
        fraction = self.roofline_fraction
        return (
            f"{self.ours.op}, {self.ours.dtype}" + (f" ({label})" if label else ""),
            self.ours.direction,
            " ".join(f"{name} {size:,}" for name, size in self.ours.shape.items() if size != 1),
            f"{formatting.number((self.ours.rate or 0.0) / 1e12)} {unit}",
            self.ours.provider,
            formatting.MISSING if fraction is None else f"{100 * fraction:.0f} %",
            *(formatting.ratio(ratio) for ratio in self.against),
            formatting.ratio(self.speedup),
            formatting.MISSING if self.peer is None else self.peer.provider,
            f"{self.ours.kind}, {self.ours.device}",
        )


# Peers that the goals name, each with a column of its own.
NAMED_PEERS = (FLASH, CUDNN)
HEADINGS = (
    *("Op", "Direction", "Shape", "Rate", "Provider", "Roofline"),
    *(f"Over {name}" for name in NAMED_PEERS),
    *("Speed-up", "Best peer", "Figures"),
)


def duels(records: Sequence[OpRecord]) -> list[Duel]:
    """Every point at which a kernel of ours has a figure; tuning's candidates are left out.

    Args:
        records: of those with one key the last counts.
    """
    points = [r for r in latest(records) if not str(r.config.get("label", "")).startswith("tune")]
    peers, rooflines = Peers(points), Rooflines(points)
    ours: defaultdict[Point, list[OpRecord]] = defaultdict(list)
    for record in points:
        if record.is_ours and record.rate:
            ours[point_of(record)].append(record)
    best = [max(found, key=lambda r: r.rate or 0.0) for found in ours.values()]
    best.sort(key=lambda r: (r.op, DIRECTIONS.index(r.direction), r.shape.get("head_dim", 0), r.shape["seq_len"]))
    return [
        Duel(
            ours=r,
            peer=peers.best(r),
            roofline_fraction=rooflines.fraction(r),
            against=tuple(peers.speedup(r, name) for name in NAMED_PEERS),
        )
        for r in best
    ]


def summary_lines(records: Sequence[OpRecord]) -> list[str]:
    """The duels as aligned text, with a heading, then the goals; empty where no kernel of ours has a figure."""
    rows = [duel.words() for duel in duels(records)]
    if not rows:
        return []
    table = [HEADINGS, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    goals = goal_lines(records)
    return [*lines, "", *goals] if goals else lines
