"""Figures of one group of records: against length, over the sequence-parallel degree, and a step's parts.

Lines where there are three lengths or more, bars where there are fewer.

Drawn with matplotlib's object interface; nothing global is left changed, but matplotlib's settings are swapped while
a figure is being written, so draw from one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from longreel.reports import formatting
from longreel.reports.bars import ROW, Bar, draw_bars
from longreel.reports.breakdown import draw_breakdowns
from longreel.reports.compare import Group, throughput_interval
from longreel.reports.exposure import exposed_share
from longreel.reports.frame import MARGIN_RIGHT, WIDTH, Drawing, Mark, colour_of, finish, frame, mark
from longreel.reports.lines import Plot, line_figure, memory_limit
from longreel.reports.records import Record
from longreel.reports.scaling import draw_degrees
from longreel.reports.series import Series, build_series

# Left of bars stand the names of the configurations.
MARGIN_LEFT_BARS = 172.0
# With fewer lengths than this a line has nothing to show.
MIN_LENGTHS_OF_LINES = 3


def draw_group(group: Group, records: Sequence[Record], *, png: bool = False) -> list[Drawing]:
    """The figures of one group; those that would show nothing are left out.

    Args:
        group: what the records have in common. records: all records of the group. png: draw each as a PNG, too.
    """
    series = build_series(records)
    of_step = any(r.memory_meaning == "step" for r in records)
    drawings = [_draw(plot, group, series, png=png) for plot in _plots(of_step)]
    found = [drawing for drawing in drawings if drawing is not None]
    return [*found, *draw_degrees(group, series, png=png), *draw_breakdowns(group, series, png=png)]


def _plots(of_step: bool) -> tuple[Plot, ...]:
    def in_bytes(value: float) -> str:
        return formatting.in_bytes(value).replace(".00", "").replace(".0", "")

    return (
        Plot(
            name="throughput",
            title="Throughput",
            axis="tokens/s, all devices",
            value=lambda r: r.tokens_per_s,
            bounds=throughput_interval,
            tick=formatting.number,
            marks_ends=True,
        ),
        Plot(
            name="memory",
            title="Memory of a step" if of_step else "Peak memory",
            axis="what a step adds to its process, fullest rank" if of_step else "bytes, rank that holds most",
            value=lambda r: r.peak_memory or None,
            tick=in_bytes,
            binary=True,
            marks_ends=True,
            shows_need=True,
        ),
        Plot(
            name="traffic",
            title="Traffic",
            axis="bytes one rank sends in a step",
            value=lambda r: sum(r.traffic.values()) or None,
            tick=in_bytes,
            binary=True,
        ),
        Plot(
            name="exposed",
            title="Exposed communication",
            axis="% of the step that waits for it",
            value=lambda r: None if (share := exposed_share(r)) is None else 100 * share,
            tick=lambda v: f"{v:g} %",
            is_log=False,
        ),
    )


def _draw(plot: Plot, group: Group, series: Sequence[Series], *, png: bool) -> Drawing | None:
    shown = [(line, [p for p in line.points if plot.value(p) is not None]) for line in series]
    shown = [(line, points) for line, points in shown if points]
    if not shown:
        return None
    lengths = {p.seq_len for _, points in shown for p in points}
    if plot.shows_need:
        lengths |= {line.out_of_memory.seq_len for line, _ in shown if line.out_of_memory}

    def draw() -> tuple[Figure, list[Mark]]:
        if _num_lengths(series) < MIN_LENGTHS_OF_LINES:
            return _bar_figure(plot, group, series, sorted(lengths))
        return line_figure(plot, group, shown, sorted(lengths))

    names = ", ".join(line.label for line, _ in shown)
    return finish(
        draw,
        group=group,
        name=plot.name,
        caption=f"{plot.title} against sequence length, {group.label}: {group.title}",
        axis=plot.axis,
        more=f"Lines: {names}.",
        png=png,
    )


def _num_lengths(series: Sequence[Series]) -> int:
    failed = {line.out_of_memory.seq_len for line in series if line.out_of_memory}
    return len(failed | {p.seq_len for line in series for p in line.points})


def _bar_figure(
    plot: Plot, group: Group, series: Sequence[Series], lengths: Sequence[int]
) -> tuple[Figure, list[Mark]]:
    limit, name = memory_limit([p for line in series for p in line.points]) if plot.shows_need else (None, "")
    rows = [row for seq_len in lengths for row in _bars(plot, series, seq_len)]
    bars = [bar for bar, _ in rows]
    bars[0] = replace(bars[0], note=f"dotted: {name}" if name else "")
    axis = plot.axis
    if any(bar.is_hollow and bar.value for bar in bars):
        axis += "; hollow: did not fit"
    figure, axes = frame(plot.title, axis, group, height=ROW * len(bars), below=10.0, left=MARGIN_LEFT_BARS)
    draw_bars(axes, bars, width=WIDTH - MARGIN_LEFT_BARS - MARGIN_RIGHT, limit=limit)
    return figure, [
        mark(figure, axes, bar.value, i, record, bar.value)
        for i, (bar, record) in enumerate(rows)
        if record is not None and bar.value is not None
    ]


def _bars(plot: Plot, series: Sequence[Series], seq_len: int) -> list[tuple[Bar, Record | None]]:
    bars: list[tuple[Bar, Record | None]] = [(Bar(label=f"{seq_len:,} tokens"), None)]
    for line in series:
        colour, slug = colour_of(line), f"{line.slug}-at-{seq_len}"
        point = next((p for p in line.points if p.seq_len == seq_len), None)
        failed = line.out_of_memory
        if point is not None and (value := plot.value(point)) is not None:
            note = plot.tick(float(f"{value:.3g}")) if not plot.is_log else plot.tick(value)
            bounds = plot.bounds(point)
            bar = Bar(label=line.label, value=value, bounds=bounds, note=note, colour=colour, slug=slug)
            bars.append((bar, point))
        elif point is None and failed is not None and failed.seq_len == seq_len and plot.marks_ends:
            needed = failed.peak_memory if plot.shows_need else None
            note = "did not fit" if needed is None else plot.tick(needed)
            bar = Bar(label=line.label, value=needed, note=note, colour=colour, is_hollow=True, slug=slug)
            bars.append((bar, failed))
    return bars
