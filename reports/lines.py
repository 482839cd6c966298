"""Lines over sequence length: one per strategy and degree, the baseline in the text's colour, and where each ends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import offset_copy

from longreel.reports import formatting
from longreel.reports.compare import Group
from longreel.reports.frame import (
    LEGEND_LINE,
    MARGIN_LEFT,
    MARGIN_RIGHT,
    MARGIN_X_AXIS,
    MARKERS,
    WIDTH,
    Mark,
    colour_of,
    draw_axes,
    frame,
    mark,
)
from longreel.reports.records import Record
from longreel.reports.series import Series
from longreel.reports.svg import INK
from longreel.reports.ticks import linear_ticks, log_ticks, thin

PLOT_HEIGHT = 270.0
DASHES = ("-", "-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
# Lines whose values agree to this are drawn as one in two colours.
SAME = 1e-3
# Of a line that lies on another one: that one shows in the gaps.
OVER = (0, (5, 5))
# Intervals of lines that meet at one length stand beside each other, this many pixels apart.
DODGE = 2.6


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """What a figure shows of each record.

    Args:
        name: fit for ids. title, axis: its heading, and what its values are. value: of a record, None for none.
        bounds: its interval. tick: a value in words. binary: values are bytes.
        is_log: the axis is logarithmic, else it begins at zero. marks_ends: lines that ran out of memory end in a
            cross; in memory figures, which `shows_need`, the cross lies at the memory that was needed.
    """

    name: str
    title: str
    axis: str
    value: Callable[[Record], float | None]
    bounds: Callable[[Record], tuple[float, float] | None] = lambda r: None
    tick: Callable[[float], str]
    binary: bool = False
    is_log: bool = True
    marks_ends: bool = False
    shows_need: bool = False


Shown = Sequence[tuple[Series, list[Record]]]


def line_figure(plot: Plot, group: Group, shown: Shown, lengths: Sequence[int]) -> tuple[Figure, list[Mark]]:
    """The figure, and where its points lie.

    Args:
        shown: lines with those of their points that have a value. lengths: of the axis.
    """
    columns = 2 if max(len(line.label) for line, _ in shown) <= 26 else 1
    num_entries = len(shown) + plot.marks_ends + plot.shows_need
    legend = LEGEND_LINE * math.ceil(num_entries / columns) + 8.0
    below = legend + MARGIN_X_AXIS
    figure, axes = frame(plot.title, plot.axis, group, height=PLOT_HEIGHT, below=below, left=MARGIN_LEFT)
    middle = (len(shown) - 1) / 2
    handles = [
        _line(figure, axes, plot, line, points, i - middle, over=_twin(plot, points, shown[:i]))
        for i, (line, points) in enumerate(shown)
    ]
    if plot.shows_need:
        handles += _memory_marks(figure, axes, shown)
    elif plot.marks_ends:
        handles += _end_marks(figure, axes, plot, shown)
    _scales(axes, plot, lengths)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.01, axes.get_position().y0 - MARGIN_X_AXIS / (figure.get_figheight() * 72)),
        ncols=columns,
        frameon=False,
        fontsize=12.5,
        handlelength=2.5,
        columnspacing=1.2,
        labelspacing=0.4,
        borderaxespad=0.2,
    )
    values = [(p, plot.value(p)) for _, points in shown for p in points]
    return figure, [mark(figure, axes, p.seq_len, v, p, v) for p, v in values if v is not None]


def memory_limit(points: Sequence[Record]) -> tuple[int | None, str]:
    """The memory that decides what fits, and its name; (None, "") where there is none."""
    limit = max((p.memory_limit for p in points if p.memory_limit), default=None)
    usable = max((p.memory_usable for p in points if p.memory_usable), default=None)
    if limit is None or usable is None:
        return limit, "" if limit is None else f"limit, {formatting.in_bytes(limit)}"
    return usable, f"usable, {formatting.in_bytes(usable)} of {formatting.in_bytes(limit)}"


def _twin(plot: Plot, points: Sequence[Record], before: Shown) -> Series | None:
    """The line drawn before that has the same values at the same lengths, None where there is none."""
    for line, others in before:
        pairs = list(zip(points, others, strict=False))
        if len(points) == len(others) and all(
            p.seq_len == o.seq_len and math.isclose(plot.value(p) or 0, plot.value(o) or 0, rel_tol=SAME)
            for p, o in pairs
        ):
            return line
    return None


def _line(
    figure: Figure,
    axes: Axes,
    plot: Plot,
    line: Series,
    points: Sequence[Record],
    place: float,
    *,
    over: Series | None,
) -> Line2D:
    rank = max(0, line.sp_degree.bit_length() - 1)
    colour = colour_of(line)
    x, y = [p.seq_len for p in points], [plot.value(p) or 0.0 for p in points]
    bounds = [(at, bound) for at, bound in zip(x, map(plot.bounds, points), strict=True) if bound]
    if bounds:
        beside = offset_copy(axes.transData, figure, x=DODGE * place, units="dots")
        # One path with gaps, not a path for each.
        across = [value for at, _ in bounds for value in (at, at, math.nan)]
        up = [value for _, (low, high) in bounds for value in (low, high, math.nan)]
        axes.plot(across, up, color=colour, alpha=0.4, linewidth=1.1, transform=beside, zorder=2)
        # What is drawn beside its place does not count for the axis by itself.
        axes.update_datalim([(at, value) for at, bound in bounds for value in bound])
    (drawn,) = axes.plot(
        x,
        y,
        color=colour,
        label=formatting.printable(_legend_label(line, over)),
        linewidth=2.6 if line.is_baseline else 1.5,
        linestyle=(0, (4, 1.6)) if line.is_baseline else OVER if over else DASHES[rank % len(DASHES)],
        marker="o" if line.is_baseline else MARKERS[rank % len(MARKERS)],
        # Smaller than the marker that it lies on.
        markersize=2.5 if over else 5.0,
        markeredgewidth=0,
        zorder=4 if line.is_baseline else 3,
        gid=f"series-{line.slug}",
    )
    return drawn


def _legend_label(line: Series, over: Series | None) -> str:
    if over is None:
        return line.label
    if over.is_baseline:
        return f"{line.label} = baseline"
    return f"{line.strategy} = {over.label}"


def _cross(label: str) -> Line2D:
    shape: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 8, "markeredgewidth": 2}
    return Line2D([], [], color=INK, label=label, **shape)


def _end_marks(figure: Figure, axes: Axes, plot: Plot, shown: Shown) -> list[Line2D]:
    """A cross just behind the last point of each line that ran out of memory at the next length."""
    ended = [(line, points[-1]) for line, points in shown if line.out_of_memory]
    taken: Counter[tuple[int, int]] = Counter()
    for line, last in ended:
        value = plot.value(last) or 0.0
        # Crosses that meet stand beside each other.
        place = last.seq_len, round(12 * math.log(value))
        beside = offset_copy(axes.transData, figure, x=11 + 9 * taken[place], units="dots")
        taken[place] += 1
        axes.plot(
            [last.seq_len],
            [value],
            transform=beside,
            color=colour_of(line),
            linestyle="none",
            marker="x",
            markersize=7,
            markeredgewidth=2,
            zorder=5,
            gid=f"series-oom-{line.slug}",
        )
    return [_cross("out of memory beyond")] if ended else []


def _memory_marks(figure: Figure, axes: Axes, shown: Shown) -> list[Line2D]:
    """What a step may take as a line, and a cross at the first length at which a line's configuration did not fit."""
    handles = []
    limit, name = memory_limit([p for _, points in shown for p in points])
    if limit is not None:
        handles.append(
            axes.axhline(limit, color=INK, linewidth=1.2, linestyle=(0, (1, 1.5)), label=name, gid="series-limit")
        )
    crosses: list[Line2D] = []
    taken: Counter[tuple[int, int]] = Counter()
    for line, points in shown:
        failed = line.out_of_memory
        if failed is None:
            continue
        start = points[-1]
        used = start.peak_memory or math.nan
        at = failed.peak_memory or failed.memory_limit or used
        axes.plot([start.seq_len, failed.seq_len], [used, at], color=colour_of(line), linewidth=0.9, alpha=0.6)
        # Crosses that meet stand beside each other.
        place = failed.seq_len, round(50 * math.log(at))
        beside = offset_copy(axes.transData, figure, x=9 * taken[place], units="dots")
        taken[place] += 1
        crosses += axes.plot(
            [failed.seq_len],
            [at],
            transform=beside,
            color=colour_of(line),
            linestyle="none",
            marker="x",
            markersize=8,
            markeredgewidth=2,
            zorder=5,
            gid=f"series-oom-{line.slug}",
        )
    return [*handles, _cross("did not fit")] if crosses else handles


def _scales(axes: Axes, plot: Plot, lengths: Sequence[int]) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    characters = (WIDTH - MARGIN_LEFT - MARGIN_RIGHT) / 8.0
    labelled = thin(lengths, [len(formatting.length(n)) + 1.5 for n in lengths], characters, low, high)
    if plot.is_log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high / low < 1.5:
            low, high = low / 1.15, high * 1.15
            axes.set_ylim(low, high)
        ticks = log_ticks(low, high, binary=plot.binary)
    else:
        axes.set_ylim(bottom=0.0)
        ticks = linear_ticks(axes.get_ylim()[1])
    draw_axes(
        axes,
        x=[(n, formatting.length(n)) for n in labelled],
        y=[(value, plot.tick(value)) for value in ticks],
        more_x=[n for n in lengths if n not in labelled],
        name="tokens per sample",
    )
