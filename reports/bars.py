"""Bars instead of lines where a group has one or two lengths: a row per configuration, its figure written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from longreel.reports import formatting
from longreel.reports.svg import INK

ROW = 19.0
# Room for a character of a note, in points, whatever font the reader has.
_CHARACTER = 7.0
_LABEL_CHARACTERS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One row; a heading where it has no `slug`.

    Args:
        label: left of the axis. value: length of the bar, None for none. bounds: its interval.
        note: at the right edge. colour: of the bar. is_hollow: it shows what was not reached.
        slug: makes its element's id.
    """

    label: str
    value: float | None = None
    bounds: tuple[float, float] | None = None
    note: str = ""
    colour: str = INK
    is_hollow: bool = False
    slug: str = ""


def draw_bars(axes: Axes, bars: Sequence[Bar], *, width: float, limit: float | None) -> None:
    """Fill axes with rows from the top down, on a linear scale from zero.

    Args:
        axes: as high as ROW for each bar. width: of the axes, in points.
        limit: where a vertical line is drawn below the first row, whose note should name it.
    """
    ends = [max(bar.value or 0.0, *(bar.bounds or (0.0,))) for bar in bars]
    notes = _CHARACTER * max((len(bar.note) for bar in bars if bar.slug), default=0) + 8
    axes.set_xlim(0.0, max([*ends, limit or 0.0]) / (1 - min(notes / width, 0.8)))
    axes.set_ylim(len(bars) - 0.5, -0.5)
    for row, bar in enumerate(bars):
        _words(axes, row, bar, width)
        if bar.value is not None:
            (drawn,) = axes.barh(
                row,
                bar.value,
                height=0.62,
                facecolor="none" if bar.is_hollow else bar.colour,
                edgecolor=bar.colour if bar.is_hollow else "none",
                linewidth=1.4,
                alpha=0.85,
                zorder=2,
            )
            drawn.set_gid(f"series-{bar.slug}")
        if bar.bounds is not None:
            axes.plot(bar.bounds, [row, row], color=INK, linewidth=1.4, zorder=3)
    if limit is not None:
        span = [0.5, len(bars) - 0.5]
        axes.plot([limit] * 2, span, color=INK, linewidth=1.2, linestyle=(0, (1, 1.5)), gid="series-limit", zorder=1)
    # Every bar has its figure beside it.
    axes.set_axis_off()
    axes.axvline(0.0, color=INK, linewidth=0.8, clip_on=False)


def _words(axes: Axes, row: int, bar: Bar, width: float) -> None:
    label = formatting.printable(bar.label)
    label = label if len(label) <= _LABEL_CHARACTERS else f"{label[: _LABEL_CHARACTERS - 1]}…"
    texts = ((label, -6.0, "normal" if bar.slug else "bold"), (formatting.printable(bar.note), width, "normal"))
    for text, place, weight in texts:
        axes.annotate(
            text,
            (0, row),
            xytext=(place, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=12.0,
            fontweight=weight,
        )
