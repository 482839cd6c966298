"""Bars instead of lines where a group has one or two lengths: a row per configuration, its figure written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from longreel.reports.svg import INK, printable

ROW = 19.0
# Room for a character of a note, in points, whatever font the reader has.
_CHARACTER = 7.0
_LABEL_CHARACTERS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """One row. Without a `value` it is a heading, or says in `note` why there is none.

    Args:
        label: left of the axis. value: length of the bar. bounds: its interval. note: behind it, in words.
        colour: of the bar. slug: makes its element's id.
    """

    label: str
    value: float | None = None
    bounds: tuple[float, float] | None = None
    note: str = ""
    colour: str = INK
    slug: str = ""


def draw_bars(axes: Axes, bars: Sequence[Bar], *, width: float, limit: float | None) -> None:
    """Fill axes with rows from the top down, on a linear scale from zero.

    Args:
        axes: as high as ROW for each bar. width: of the axes, in points. limit: where a vertical line is drawn.
    """
    ends = [max(bar.value or 0.0, *(bar.bounds or (0.0,))) for bar in bars]
    # As long as the bars may be with their notes still inside.
    share = [1 - (5 + _CHARACTER * len(bar.note)) / width for bar in bars]
    axes.set_xlim(0.0, max(limit or 0.0, *(end / max(room, 0.2) for end, room in zip(ends, share, strict=True))) * 1.02)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    for row, (bar, end) in enumerate(zip(bars, ends, strict=True)):
        _label(axes, row, bar)
        if bar.value is not None:
            (drawn,) = axes.barh(row, bar.value, height=0.62, color=bar.colour, alpha=0.85, zorder=2)
            drawn.set_gid(f"series-{bar.slug}")
        if bar.bounds is not None:
            axes.plot(bar.bounds, [row, row], color=INK, linewidth=1.4, zorder=3)
        if bar.note:
            axes.annotate(
                printable(bar.note), (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=12.0
            )
    if limit is not None:
        axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (1, 1.5)), gid="series-limit", zorder=1)
    # Every bar has its figure beside it.
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)


def _label(axes: Axes, row: int, bar: Bar) -> None:
    text = printable(bar.label)
    text = text if len(text) <= _LABEL_CHARACTERS else f"{text[: _LABEL_CHARACTERS - 1]}…"
    is_heading = bar.value is None and not bar.note
    axes.annotate(
        text,
        (0, row),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=12.0,
        fontweight="bold" if is_heading else "normal",
    )
