"""Which lines a figure draws: per strategy and SP degree the best record at each length, and the baseline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from longreel.reports import formatting
from longreel.reports.compare import fastest
from longreel.reports.records import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line of a figure.

    Args:
        label: as in the legend. strategy, sp_degree: of every point. is_baseline: the line all ratios refer to.
        points: records with status `ok`, one per length, ascending.
        out_of_memory: the first length after the last point where nothing fitted, None where nothing ran out.
    """

    label: str
    strategy: str
    sp_degree: int
    is_baseline: bool
    points: tuple[Record, ...]
    out_of_memory: Record | None

    @property
    def slug(self) -> str:
        return "baseline" if self.is_baseline else formatting.slug(f"{self.strategy} sp {self.sp_degree}")


def build_series(records: Sequence[Record]) -> list[Series]:
    """The lines of one group: the baseline first, then by strategy and SP degree.

    At each length a line shows the fastest of the policies, engines and attention providers that ran there. A line
    that would repeat the baseline point by point is left out.
    """
    marked = [r for r in records if r.is_baseline]
    series = []
    if marked:
        names = sorted({f"{formatting.engine(r.engine)}, SP {r.sp_degree}" for r in marked})
        series.append(_line(marked, f"baseline: {' / '.join(names)}", is_baseline=True))
    by_line: defaultdict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        by_line[record.strategy, record.sp_degree].append(record)
    for (strategy, sp_degree), found in sorted(by_line.items()):
        line = _line(found, f"{strategy}, SP {sp_degree}", is_baseline=False)
        if not (series and all(point in series[0].points for point in line.points)):
            series.append(line)
    return [line for line in series if line.points or line.out_of_memory]


def _line(records: Sequence[Record], label: str, *, is_baseline: bool) -> Series:
    at_length: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        at_length[record.seq_len].append(record)
    points, out_of_memory = [], None
    for seq_len in sorted(at_length):
        point = fastest(at_length[seq_len])
        if point is not None:
            points.append(point)
            out_of_memory = None
        elif out_of_memory is None:
            failed = [r for r in at_length[seq_len] if r.status == "oom"]
            out_of_memory = min(failed, key=lambda r: r.peak_memory or float("inf"), default=None)
    return Series(
        label=label,
        strategy=records[0].strategy,
        sp_degree=records[0].sp_degree,
        is_baseline=is_baseline,
        points=tuple(points),
        out_of_memory=out_of_memory,
    )
