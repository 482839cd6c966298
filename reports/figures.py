"""Figures of one group of records as SVG elements: throughput, memory and ratio to the baseline against length.

Lines where there are three lengths or more, bars where there are fewer.

Drawn with matplotlib's object interface; nothing global is left changed, but matplotlib's settings are swapped while
a figure is being written, so draw from one thread at a time.
"""

from __future__ import annotations

import hashlib
import io
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import offset_copy

from longreel.reports import formatting
from longreel.reports.bars import ROW, Bar, draw_bars
from longreel.reports.compare import Baselines, Group, throughput_interval
from longreel.reports.records import Record
from longreel.reports.series import Series, build_series
from longreel.reports.svg import INK, PALETTE, inline, printable
from longreel.reports.ticks import log_ticks, thin

WIDTH = 440.0
PLOT_HEIGHT = 270.0
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_X_AXIS = 68.0, 22.0, 44.0
TITLE_LINE, LEGEND_LINE = 17.0, 18.0
# Left of bars stand the names of the configurations.
MARGIN_LEFT_BARS = 172.0
# With fewer lengths than this a line has nothing to show.
MIN_LENGTHS_OF_LINES = 3
# Lines whose values agree to this are drawn as one in two colours.
SAME = 1e-3
# Intervals of lines that meet at one length stand beside each other, this many pixels apart.
DODGE = 2.6

COLOUR_OF = {"local": PALETTE[4], "ulysses": PALETTE[0], "fastseq": PALETTE[1], "ring": PALETTE[2], "usp": PALETTE[3]}
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
# Of a line that lies on another one: that one shows in the gaps.
OVER = (0, (5, 5))

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
    of_step = any(r.memory_meaning == "step" for r in records)
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
            title="Memory of a step" if of_step else "Peak memory",
            axis="what a step adds to its process, fullest rank" if of_step else "bytes, rank that holds most",
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
    if not shown:
        return None
    lengths = {p.seq_len for _, points in shown for p in points}
    # At one length the ratios are the throughputs again.
    if plot.name == "ratio" and (len(lengths) == 1 or all(line.is_baseline for line, _ in shown)):
        return None
    if plot.name == "memory":
        lengths |= {line.out_of_memory.seq_len for line, _ in shown if line.out_of_memory}
    prefix = f"f{hashlib.sha256(repr(group).encode()).hexdigest()[:6]}-{plot.name}"
    subtitle = textwrap.wrap(printable(group.title), 60)[:3]
    with rc_context(SETTINGS | {"svg.hashsalt": prefix}), warnings.catch_warnings():
        # The browser draws the text with its own fonts; what matplotlib's cannot draw does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        if _num_lengths(series) < MIN_LENGTHS_OF_LINES:
            figure = _bar_figure(plot, series, sorted(lengths), subtitle, group.label)
        else:
            figure = _line_figure(plot, shown, sorted(lengths), subtitle, group.label)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    caption = f"{plot.title} against sequence length, {group.label}: {group.title}"
    names = ", ".join(line.label for line, _ in shown)
    label = printable(f"{caption}. Lines: {names}.")
    return Drawing(name=plot.name, caption=caption, svg=inline(text.getvalue(), prefix=prefix, label=label))


def _num_lengths(series: Sequence[Series]) -> int:
    failed = {line.out_of_memory.seq_len for line in series if line.out_of_memory}
    return len(failed | {p.seq_len for line in series for p in line.points})


def _line_figure(
    plot: _Plot,
    shown: Sequence[tuple[Series, list[Record]]],
    lengths: Sequence[int],
    subtitle: Sequence[str],
    label: str,
) -> Figure:
    columns = 2 if max(len(line.label) for line, _ in shown) <= 26 else 1
    num_entries = len(shown) + (2 if plot.name == "memory" else 0)
    legend = LEGEND_LINE * math.ceil(num_entries / columns) + 8.0
    figure, axes = _frame(plot, subtitle, label, height=PLOT_HEIGHT, below=legend + MARGIN_X_AXIS, left=MARGIN_LEFT)
    middle = (len(shown) - 1) / 2
    handles = [
        _line(figure, axes, plot, line, points, i - middle, over=_twin(plot, points, shown[:i]))
        for i, (line, points) in enumerate(shown)
    ]
    axes.set_xlabel("tokens per sample", fontsize=12.5)
    if plot.name == "ratio":
        axes.axhline(1.0, color=INK, linewidth=1.0, alpha=0.6)
    if plot.name == "memory":
        handles += _memory_marks(figure, axes, shown)
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
    return figure


def _bar_figure(
    plot: _Plot, series: Sequence[Series], lengths: Sequence[int], subtitle: Sequence[str], label: str
) -> Figure:
    limit, name = _limit([p for line in series for p in line.points]) if plot.name == "memory" else (None, "")
    bars = [bar for seq_len in lengths for bar in _bars(plot, series, seq_len)]
    bars[0] = replace(bars[0], note=f"dotted: {name}" if name else "")
    if any(bar.is_hollow and bar.value for bar in bars):
        plot = replace(plot, axis=f"{plot.axis}; hollow: did not fit")
    height = ROW * len(bars)
    figure, axes = _frame(plot, subtitle, label, height=height, below=10.0, left=MARGIN_LEFT_BARS)
    draw_bars(axes, bars, width=WIDTH - MARGIN_LEFT_BARS - MARGIN_RIGHT, limit=limit)
    return figure


def _bars(plot: _Plot, series: Sequence[Series], seq_len: int) -> list[Bar]:
    bars = [Bar(label=f"{seq_len:,} tokens")]
    for line in series:
        colour = INK if line.is_baseline else COLOUR_OF.get(line.strategy, PALETTE[5])
        slug = f"{line.slug}-at-{seq_len}"
        point = next((p for p in line.points if p.seq_len == seq_len), None)
        failed = line.out_of_memory
        if point is not None and (value := plot.value(point)):
            bars.append(
                Bar(
                    label=line.label,
                    value=value,
                    bounds=plot.bounds(point),
                    note=plot.tick(value),
                    colour=colour,
                    slug=slug,
                )
            )
        elif point is None and failed is not None and failed.seq_len == seq_len and plot.name != "ratio":
            needed = failed.peak_memory if plot.name == "memory" else None
            note = "did not fit" if needed is None else plot.tick(needed)
            bars.append(Bar(label=line.label, value=needed, note=note, colour=colour, is_hollow=True, slug=slug))
    return bars


def _frame(
    plot: _Plot, subtitle: Sequence[str], label: str, *, height: float, below: float, left: float
) -> tuple[Figure, Axes]:
    """A figure with its heading, and axes of this height, with room `below` and to the `left` of them."""
    total = TITLE_LINE * (2 + len(subtitle)) + 20.0 + height + below
    figure = Figure(figsize=(WIDTH / 72, total / 72))
    figure.patch.set_visible(False)
    axes = figure.add_axes((left / WIDTH, below / total, 1 - (left + MARGIN_RIGHT) / WIDTH, height / total))
    axes.patch.set_visible(False)
    figure.text(0.012, 1 - 15 / total, f"{plot.title} ({label})", fontsize=14.0, fontweight="bold", va="baseline")
    for i, line in enumerate(subtitle, start=1):
        figure.text(0.012, 1 - (16 + TITLE_LINE * i) / total, line, fontsize=12.0, va="baseline", alpha=0.8)
    # Above the axis, not along it: it reads without turning the head and cannot meet long tick labels.
    figure.text(0.012, (below + height + 9) / total, plot.axis, fontsize=12.0, va="baseline")
    return figure, axes


def _twin(plot: _Plot, points: Sequence[Record], before: Sequence[tuple[Series, list[Record]]]) -> Series | None:
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
    plot: _Plot,
    line: Series,
    points: Sequence[Record],
    place: float,
    *,
    over: Series | None,
) -> Line2D:
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
        label=printable(_legend_label(line, over)),
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


def _limit(points: Sequence[Record]) -> tuple[int | None, str]:
    """The memory that decides what fits, and its name; (None, "") where there is none."""
    limit = max((p.memory_limit for p in points if p.memory_limit), default=None)
    usable = max((p.memory_usable for p in points if p.memory_usable), default=None)
    if limit is None or usable is None:
        return limit, "" if limit is None else f"limit, {formatting.in_bytes(limit)}"
    return usable, f"usable, {formatting.in_bytes(usable)} of {formatting.in_bytes(limit)}"


def _memory_marks(figure: Figure, axes: Axes, shown: Sequence[tuple[Series, list[Record]]]) -> list[Line2D]:
    """What a step may take as a line, and a cross at the first length at which a line's configuration did not fit."""
    handles = []
    limit, name = _limit([p for _, points in shown for p in points])
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
        colour = INK if line.is_baseline else COLOUR_OF.get(line.strategy, PALETTE[5])
        axes.plot([start.seq_len, failed.seq_len], [used, at], color=colour, linewidth=0.9, alpha=0.6)
        # Crosses that meet stand beside each other.
        place = failed.seq_len, round(50 * math.log(at))
        beside = offset_copy(axes.transData, figure, x=9 * taken[place], units="dots")
        taken[place] += 1
        crosses += axes.plot(
            [failed.seq_len],
            [at],
            transform=beside,
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
    low, high = axes.get_xlim()
    characters = (WIDTH - MARGIN_LEFT - MARGIN_RIGHT) / 8.0
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
    axes.tick_params(which="both", labelsize=12.0, length=4)
