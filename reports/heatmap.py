"""The ratio heat map of one group: every configuration against every length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from longreel.reports import formatting
from longreel.reports.compare import Baselines, fastest
from longreel.reports.configurations import labels
from longreel.reports.records import Record

# Steps of colour on either side of 1; the last one is reached at twice or half the baseline's throughput.
LEVELS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatCell:
    """A configuration at a length. record: None where it was not run. is_best: has the length's best throughput."""

    record: Record | None
    text: str
    level: int
    is_best: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatRow:
    """A configuration. is_baseline: it is the baseline at some length."""

    label: str
    cells: tuple[HeatCell, ...]
    is_baseline: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMap:
    """Rows by strategy, degree and policy, the baseline first; a cell per length."""

    seq_lens: tuple[int, ...]
    rows: tuple[HeatRow, ...]


def level(ratio: float | None) -> int:
    """The step of colour of a ratio: 0 for none or 1, positive above 1."""
    if not ratio:
        return 0
    # The page's script has ratios of nine digits: what lies between two steps goes up in both.
    return max(-LEVELS, min(LEVELS, math.floor(LEVELS * math.log2(ratio) + 0.5 + 1e-6)))


def build_heatmap(records: Sequence[Record], baselines: Baselines) -> HeatMap | None:
    """The heat map of one group's records, None where no record has a ratio but the baseline."""
    names = labels(records)
    at: dict[tuple[str, int], list[Record]] = {}
    for name, record in zip(names, records, strict=True):
        at.setdefault((name, record.seq_len), []).append(record)
    seq_lens = sorted({r.seq_len for r in records})
    if all(baselines.ratio(r) is None or r is baselines.of(r) for r in records):
        return None
    best = {n: fastest(r for r in records if r.seq_len == n) for n in seq_lens}
    of_baseline = {name for name, record in zip(names, records, strict=True) if record is baselines.of(record)}

    def cell(name: str, seq_len: int) -> HeatCell:
        found = at.get((name, seq_len), [])
        if not found:
            return HeatCell(record=None, text="", level=0, is_best=False)
        record = fastest(found) or found[-1]
        ratio = baselines.ratio(record)
        text = f"{ratio:.2f}" if ratio is not None else record.status if record.status != "ok" else formatting.MISSING
        return HeatCell(record=record, text=text, level=level(ratio), is_best=record is best[seq_len])

    first = dict(zip(reversed(names), reversed(records), strict=True))
    order = sorted(first, key=lambda n: (n not in of_baseline, first[n].strategy, first[n].sp_degree, n))
    rows = [
        HeatRow(label=name, cells=tuple(cell(name, n) for n in seq_lens), is_baseline=name in of_baseline)
        for name in order
    ]
    return HeatMap(seq_lens=tuple(seq_lens), rows=tuple(rows))
