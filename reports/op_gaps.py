"""Points without a figure, one line per provider and reason: what is missing everywhere is said once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longreel.reports.op_records import DIRECTIONS, OpRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """Points of one provider that have no figure for one reason. where: lengths and directions, in words."""

    provider: str
    status: str
    where: str
    reason: str


def gaps(records: Iterable[OpRecord]) -> list[Gap]:
    """The records that are not `ok`, gathered; ours and what is worse first."""
    found: defaultdict[tuple[str, str, str], list[OpRecord]] = defaultdict(list)
    everything = list(records)
    for r in everything:
        if r.status != "ok":
            found[r.provider, r.status, r.reason or ""].append(r)
    worst = ("wrong", "error", "oom", "skipped")
    ordered = sorted(found.items(), key=lambda item: (worst.index(item[0][1]), not item[1][0].is_ours, item[0][0]))
    return [
        Gap(provider=provider, status=status, where=_where(points, everything), reason=reason)
        for (provider, status, reason), points in ordered
    ]


def _where(points: Sequence[OpRecord], everything: Sequence[OpRecord]) -> str:
    lengths, directions = _spread(points)
    all_lengths, all_directions = _spread(everything)
    words = "every length" if lengths == all_lengths else ", ".join(f"{n:,}" for n in lengths) + " tokens"
    return words if directions == all_directions else f"{words}; {', '.join(directions)}"


def _spread(records: Sequence[OpRecord]) -> tuple[list[int], list[str]]:
    directions = {r.direction for r in records}
    return sorted({r.shape["seq_len"] for r in records}), [d for d in DIRECTIONS if d in directions]
