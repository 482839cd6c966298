"""What every figure of a report shares: size, colours, the heading above the axes, and how a finished one is kept."""

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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.markers import TICKDOWN, TICKLEFT

from longreel.reports import formatting
from longreel.reports.compare import Group
from longreel.reports.records import Record
from longreel.reports.series import Series
from longreel.reports.svg import INK, PALETTE, inline

WIDTH = 440.0
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_X_AXIS = 68.0, 22.0, 44.0
TITLE_LINE, LEGEND_LINE = 17.0, 18.0
PNG_DOTS_PER_INCH = 144

COLOUR_OF = {"local": PALETTE[4], "ulysses": PALETTE[0], "fastseq": PALETTE[1], "ring": PALETTE[2], "usp": PALETTE[3]}
MARKERS = ("o", "s", "^", "D", "v", "P")

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12.0,
    "hatch.linewidth": 0.9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A point of a figure: where it lies, in the units of the SVG's viewBox, and the record it shows."""

    x: float
    y: float
    record: Record
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A finished figure.

    Args:
        name: what it shows, fit for a file name. caption: the same in words, with its group.
        axis: what its values are. svg: an element with a `viewBox` and no fixed size.
        marks: its points, in reading order. png: the same picture, None where it was not asked for.
    """

    name: str
    caption: str
    axis: str
    svg: str
    marks: tuple[Mark, ...]
    png: bytes | None = None


def colour_of(line: Series) -> str:
    """The colour of a strategy's lines; the baseline's is the text's."""
    return INK if line.is_baseline else COLOUR_OF.get(line.strategy, PALETTE[5])


def finish(
    draw: Callable[[], tuple[Figure, Sequence[Mark]]],
    *,
    group: Group,
    name: str,
    caption: str,
    axis: str,
    more: str,
    png: bool,
) -> Drawing:
    """Draw a figure and keep it as an SVG element, and as a PNG where that is asked for.

    Args:
        draw: makes the figure and its marks. group, name: make its ids unique in a page. caption: what it shows.
        axis: what its values are. more: what its alternative text says beyond the caption.
    """
    prefix = f"f{hashlib.sha256(repr(group).encode()).hexdigest()[:6]}-{name}"
    picture = None
    with rc_context(SETTINGS | {"svg.hashsalt": prefix}), warnings.catch_warnings():
        # The browser draws the text with its own fonts; what matplotlib's cannot draw does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure, marks = draw()
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
        if png:
            figure.patch.set(visible=True, facecolor="white")
            figure.set_dpi(PNG_DOTS_PER_INCH)
            data = io.BytesIO()
            FigureCanvasAgg(figure).print_png(data, metadata={"Software": None})
            picture = data.getvalue()
    label = formatting.printable(f"{caption}. {more}")
    svg = inline(text.getvalue(), prefix=prefix, label=label)
    return Drawing(name=name, caption=caption, axis=axis, svg=svg, marks=tuple(marks), png=picture)


def frame(
    title: str,
    axis: str,
    group: Group,
    *,
    height: float,
    below: float,
    left: float,
    right: float = MARGIN_RIGHT,
    about: str | None = None,
) -> tuple[Figure, Axes]:
    """A figure with its heading, and axes of this height, with room `below` and to the `left` of them (points).

    about: what stands below the title, if not the group's.
    """
    subtitle = textwrap.wrap(formatting.printable(about or group.title), 60)[:3]
    total = TITLE_LINE * (2 + len(subtitle)) + 20.0 + height + below
    figure = Figure(figsize=(WIDTH / 72, total / 72), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.add_axes((left / WIDTH, below / total, 1 - (left + right) / WIDTH, height / total))
    axes.patch.set_visible(False)
    figure.text(0.012, 1 - 15 / total, f"{title} ({group.label})", fontsize=14.0, fontweight="bold", va="baseline")
    for i, line in enumerate(subtitle, start=1):
        figure.text(0.012, 1 - (16 + TITLE_LINE * i) / total, line, fontsize=12.0, va="baseline", alpha=0.8)
    # Above the axis, not along it: it reads without turning the head and cannot meet long tick labels.
    figure.text(0.012, (below + height + 9) / total, axis, fontsize=12.0, va="baseline")
    return figure, axes


def draw_axes(
    axes: Axes,
    *,
    x: Sequence[tuple[float, str]],
    y: Sequence[tuple[float, str]],
    more_x: Sequence[float] = (),
    name: str,
) -> None:
    """Axes, grid and labels, once scales and limits are final: an artist for all lines of a kind.

    matplotlib's own axes make several artists per tick and take most of a figure's time.

    Args:
        x, y: (place, label) of each tick, within the limits. more_x: places without a label. name: of the x axis.
    """
    axes.set_axis_off()
    axes.autoscale(False)
    gap, (left, right), (low, high) = math.nan, axes.get_xlim(), axes.get_ylim()
    grid = [point for at, _ in x for point in ((at, low), (at, high), (gap, gap))]
    grid += [point for at, _ in y for point in ((left, at), (right, at), (gap, gap))]
    axes.plot([at for at, _ in grid], [at for _, at in grid], color=INK, alpha=0.13, linewidth=0.8, zorder=0.5)
    axes.plot([0, 0, 1], [1, 0, 0], color=INK, linewidth=0.8, transform=axes.transAxes, clip_on=False)
    places = [*(at for at, _ in x), *more_x]
    look: dict[str, Any] = {"color": INK, "linestyle": "none", "clip_on": False, "markersize": 4}
    axes.plot(places, [0.0] * len(places), marker=TICKDOWN, transform=axes.get_xaxis_transform(), **look)
    axes.plot([0.0] * len(y), [at for at, _ in y], marker=TICKLEFT, transform=axes.get_yaxis_transform(), **look)
    for at, label in x:
        place: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
        axes.annotate(label, (at, 0), xytext=(0, -7), ha="center", va="top", fontsize=12.0, **place)
    for at, label in y:
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(label, (0, at), xytext=(-7, 0), ha="right", va="center", fontsize=12.0, **place)
    place = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(name, (0.5, 0), xytext=(0, -24), ha="center", va="top", fontsize=12.5, **place)


def mark(figure: Figure, axes: Axes, x: float, y: float, record: Record, value: float) -> Mark:
    """The mark at a point of the axes, once their scales are final."""
    across, up = axes.transData.transform((x, y))
    return Mark(x=float(across), y=float(figure.get_figheight() * 72 - up), record=record, value=value)
