"""Figures of one group of records as SVG elements: throughput, memory and ratio to the baseline against length.

Drawn with matplotlib's object interface; nothing global is left changed, but matplotlib's settings are swapped while
a figure is being written, so draw from one thread at a time.
"""

from __future__ import annotations

import hashlib
import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import offset_copy

from longreel.reports import formatting
from longreel.reports.compare import Baselines, Group, throughput_interval
from longreel.reports.records import Record
from longreel.reports.series import Series, build_series
from longreel.reports.svg import INK, PALETTE, inline, printable

WIDTH = 440.0
PLOT_HEIGHT = 270.0
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_X_AXIS = 68.0, 22.0, 44.0
TITLE_LINE, LEGEND_LINE = 16.0, 15.0
LEGEND_COLUMNS = 3
# Intervals of lines that meet at one length stand beside each other, this many pixels apart.
DODGE = 2.6

COLOUR_OF = {"local": PALETTE[4], "ulysses": PALETTE[0], "fastseq": PALETTE[1], "ring": PALETTE[2], "usp": PALETTE[3]}
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A finished figure. `name`: throughput, memory or ratio. `svg`: an element with a `viewBox` and no fixed size."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plot:
    name: str
    title: str
    axis: str
    value: Callable[[Record], float | None]
    bounds: Callable[[Record], tuple[float, float] | None]
    tick: Callable[[float], str]
    binary: bool = False


def draw_group(group: Group, records: Sequence[Record]) -> list[Drawing]:
    """The figures of one group; those that would show nothing are left out.

    Args:
        group: what the records have in common. records: all records of the group.
    """
    baselines = Baselines(records)
    plots = (
        _Plot(
            name="throughput",
            title="Throughput",
            axis="tokens/s, all devices",
            value=lambda r: r.tokens_per_s,
            bounds=throughput_interval,
            tick=formatting.number,
        ),
        _Plot(
            name="memory",
            title="Peak memory",
            axis="bytes, rank that holds most",
            value=lambda r: r.peak_memory,
            bounds=lambda r: None,
            tick=lambda v: formatting.in_bytes(v).replace(".00", "").replace(".0", ""),
            binary=True,
        ),
        _Plot(
            name="ratio",
            title="Throughput relative to baseline",
            axis="ratio of tokens/s",
            value=baselines.ratio,
            bounds=baselines.ratio_interval,
            tick=lambda v: f"{v:g}×",
        ),
    )
    series = build_series(records)
    drawings = (_draw(plot, group, series) for plot in plots)
    return [drawing for drawing in drawings if drawing is not None]


def _draw(plot: _Plot, group: Group, series: Sequence[Series]) -> Drawing | None:
    shown = [(line, [p for p in line.points if plot.value(p)]) for line in series]
    shown = [(line, points) for line, points in shown if points]
    if not shown or (plot.name == "ratio" and all(line.is_baseline for line, _ in shown)):
        return None
    prefix = f"f{hashlib.sha256(repr(group).encode()).hexdigest()[:6]}-{plot.name}"
    subtitle = textwrap.wrap(printable(group.title), 66)[:3]
    with rc_context(SETTINGS | {"svg.hashsalt": prefix}), warnings.catch_warnings():
        # The browser draws the text with its own fonts; what matplotlib's cannot draw does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure, axes, handles = _axes(plot, shown, subtitle, group.label)
        lengths = {p.seq_len for _, points in shown for p in points}
        if plot.name == "ratio":
            axes.axhline(1.0, color=INK, linewidth=1.0, alpha=0.6)
        if plot.name == "memory":
            handles += _memory_marks(axes, shown)
            lengths |= {line.out_of_memory.seq_len for line, _ in shown if line.out_of_memory}
        _scales(axes, plot, sorted(lengths))
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.01, axes.get_position().y0 - MARGIN_X_AXIS / (figure.get_figheight() * 72)),
            ncols=_legend_columns(shown),
            frameon=False,
            fontsize=10.5,
            handlelength=2.5,
            columnspacing=1.2,
            labelspacing=0.4,
            borderaxespad=0.2,
        )
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    caption = f"{plot.title} against sequence length, {group.label}: {group.title}"
    names = ", ".join(line.label for line, _ in shown)
    label = printable(f"{caption}. Lines: {names}.")
    return Drawing(name=plot.name, caption=caption, svg=inline(text.getvalue(), prefix=prefix, label=label))


def _axes(
    plot: _Plot, shown: Sequence[tuple[Series, list[Record]]], subtitle: Sequence[str], label: str
) -> tuple[Figure, Axes, list[Line2D]]:
    num_entries = len(shown) + (2 if plot.name == "memory" else 0)
    legend = LEGEND_LINE * math.ceil(num_entries / _legend_columns(shown)) + 8.0
    heading = TITLE_LINE * (2 + len(subtitle)) + 18.0
    height = heading + PLOT_HEIGHT + MARGIN_X_AXIS + legend
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    figure.patch.set_visible(False)
    left, bottom = MARGIN_LEFT / WIDTH, (legend + MARGIN_X_AXIS) / height
    axes = figure.add_axes((left, bottom, 1 - left - MARGIN_RIGHT / WIDTH, PLOT_HEIGHT / height))
    axes.patch.set_visible(False)
    figure.text(0.012, 1 - 15 / height, f"{plot.title} ({label})", fontsize=14.0, fontweight="bold", va="baseline")
    for i, line in enumerate(subtitle, start=1):
        figure.text(0.012, 1 - (16 + TITLE_LINE * i) / height, line, fontsize=11.0, va="baseline", alpha=0.8)
    middle = (len(shown) - 1) / 2
    handles = [_line(figure, axes, plot, line, points, i - middle) for i, (line, points) in enumerate(shown)]
    axes.set_xlabel("tokens per sample", fontsize=11.5)
    # Above the axis, not along it: it reads without turning the head and cannot meet long tick labels.
    figure.text(0.012, (legend + MARGIN_X_AXIS + PLOT_HEIGHT + 9) / height, plot.axis, fontsize=11.0, va="baseline")
    return figure, axes, handles


def _legend_columns(shown: Sequence[tuple[Series, list[Record]]]) -> int:
    longest = max((len(line.label) for line, _ in shown if not line.is_baseline), default=0)
    return LEGEND_COLUMNS if longest <= 16 else 2 if longest <= 26 else 1


def _line(figure: Figure, axes: Axes, plot: _Plot, line: Series, points: Sequence[Record], place: float) -> Line2D:
    rank = max(0, line.sp_degree.bit_length() - 1)
    colour = INK if line.is_baseline else COLOUR_OF.get(line.strategy, PALETTE[5])
    x, y = [p.seq_len for p in points], [plot.value(p) or math.nan for p in points]
    for at, bound in zip(x, map(plot.bounds, points), strict=True):
        if bound:
            beside = offset_copy(axes.transData, figure, x=DODGE * place, units="dots")
            axes.plot([at, at], bound, color=colour, alpha=0.4, linewidth=1.1, transform=beside, zorder=2)
            # What is drawn beside its place does not count for the axis by itself.
            axes.update_datalim([(at, bound[0]), (at, bound[1])])
    (drawn,) = axes.plot(
        x,
        y,
        color=colour,
        label=printable(line.label),
        linewidth=2.6 if line.is_baseline else 1.5,
        linestyle=(0, (4, 1.6)) if line.is_baseline else DASHES[rank % len(DASHES)],
        marker="o" if line.is_baseline else MARKERS[rank % len(MARKERS)],
        markersize=4.5,
        markeredgewidth=0,
        zorder=4 if line.is_baseline else 3,
        gid=f"series-{line.slug}",
    )
    return drawn


def _memory_marks(axes: Axes, shown: Sequence[tuple[Series, list[Record]]]) -> list[Line2D]:
    """The device's memory as a line, and a cross at the first length at which a line's configuration did not fit."""
    handles = []
    limits = {p.memory_limit for _, points in shown for p in points if p.memory_limit}
    if limits:
        limit = max(limits)
        name = f"limit, {formatting.in_bytes(limit)}"
        handles.append(
            axes.axhline(limit, color=INK, linewidth=1.2, linestyle=(0, (1, 1.5)), label=name, gid="series-limit")
        )
    crosses = []
    for line, points in shown:
        failed = line.out_of_memory
        if failed is None:
            continue
        start = points[-1]
        used = start.peak_memory or math.nan
        at = failed.peak_memory or failed.memory_limit or used
        colour = INK if line.is_baseline else COLOUR_OF.get(line.strategy, PALETTE[5])
        axes.plot([start.seq_len, failed.seq_len], [used, at], color=colour, linewidth=0.9, alpha=0.6)
        crosses += axes.plot(
            [failed.seq_len],
            [at],
            color=colour,
            linestyle="none",
            marker="x",
            markersize=8,
            markeredgewidth=2,
            zorder=5,
            gid=f"series-oom-{line.slug}",
        )
    if crosses:
        handles.append(
            Line2D(
                [], [], color=INK, linestyle="none", marker="x", markersize=8, markeredgewidth=2, label="did not fit"
            )
        )
    return handles


def _scales(axes: Axes, plot: _Plot, lengths: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    if len(lengths) == 1:
        axes.set_xlim(lengths[0] / 2, lengths[0] * 2)
    low, high = axes.get_xlim()
    characters = (WIDTH - MARGIN_LEFT - MARGIN_RIGHT) / 7.2
    labelled = thin(lengths, [len(formatting.length(n)) + 1.5 for n in lengths], characters, low, high)
    axes.xaxis.set_major_locator(FixedLocator(labelled))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: formatting.length(round(v))))
    axes.xaxis.set_minor_locator(FixedLocator([n for n in lengths if n not in labelled]))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    low, high = axes.get_ylim()
    if high / low < 1.5:
        low, high = low / 1.15, high * 1.15
        axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(low, high, binary=plot.binary)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: plot.tick(v)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", color=INK, alpha=0.13, linewidth=0.8)
    axes.tick_params(which="both", labelsize=11.0, length=4)


def thin(values: Sequence[int], widths: Sequence[float], room: float, low: float, high: float) -> list[int]:
    """Those of the ascending values whose labels fit beside each other on a log axis, the largest first.

    Args:
        values: where labels are wanted. widths: of their labels, in characters. room: of the axis, in characters.
        low, high: ends of the axis.
    """
    scale = room / math.log(high / low)
    kept: list[int] = []
    limit = math.inf
    for value, width in zip(reversed(values), reversed(widths), strict=True):
        centre = math.log(value / low) * scale
        if centre + width / 2 <= limit:
            kept.insert(0, value)
            limit = centre - width / 2
    return kept


def log_ticks(low: float, high: float, *, binary: bool = False) -> list[float]:
    """Three to eight round values on a log axis from low to high.

    Powers of two where bytes are counted (`binary`) and there are enough of them, else 1-2-5 steps of each decade, or
    even steps on an axis too short for those; bytes in the unit that suits them.
    """
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    if binary and last - first >= 2:
        return [2.0**n for n in range(first, last + 1, math.ceil((last - first + 1) / 8))]
    unit = formatting.byte_unit(high)[0] if binary else 1
    if high / low > 4:
        decades = range(math.floor(math.log10(low / unit)), math.ceil(math.log10(high / unit)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            ticks = [s * 10.0**d * unit for d in decades for s in steps if low <= s * 10.0**d * unit <= high]
            if len(ticks) >= 3:
                return ticks[:: math.ceil(len(ticks) / 8)]
    even = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low / unit, high / unit)
    return [float(tick) * unit for tick in even if low <= tick * unit <= high]
