"""Rate against sequence length, a line per provider: one figure per op, direction, dtype and remaining shape."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import defaultdict
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from longreel.reports import formatting
from longreel.reports.frame import SETTINGS, WIDTH
from longreel.reports.op_records import OpRecord
from longreel.reports.svg import INK, PALETTE, inline
from longreel.reports.ticks import thin

_HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 330.0, 58.0, 18.0, 82.0, 58.0
_MARKERS = ("o", "s", "^", "D", "v", "P")


def rate_unit(record: OpRecord) -> tuple[float, str]:
    """(size, name) of the unit in which a record's rate is told."""
    return (1e12, "TFLOP/s") if record.is_compute_bound else (1e12, "TB/s")


def draw_rates(title: str, records: Sequence[OpRecord]) -> list[str]:
    """SVG elements for the records of one group; shapes with fewer than two lengths have no figure.

    Args:
        title: of the group. records: of one op, direction and dtype.
    """
    by_shape: defaultdict[tuple[tuple[str, int], ...], list[OpRecord]] = defaultdict(list)
    for record in records:
        if record.rate:
            rest = tuple((name, size) for name, size in record.shape.items() if name != "seq_len")
            by_shape[rest].append(record)
    drawn = []
    for shape, found in by_shape.items():
        if len({r.shape["seq_len"] for r in found}) > 1:
            words = ", ".join(f"{name.replace('_', ' ')} {size:,}" for name, size in shape if size != 1)
            drawn.append(_draw(title, words, found))
    return drawn


def _draw(title: str, subtitle: str, records: Sequence[OpRecord]) -> str:
    lines: defaultdict[str, list[OpRecord]] = defaultdict(list)
    for record in records:
        lines[record.provider].append(record)
    # Ours first, in full strength.
    names = sorted(lines, key=lambda name: (not lines[name][0].is_ours, name))
    unit, unit_name = rate_unit(records[0])
    lengths = sorted({r.shape["seq_len"] for r in records})
    prefix = f"r{hashlib.sha256(f'{title}{subtitle}'.encode()).hexdigest()[:8]}"
    with rc_context(SETTINGS | {"svg.hashsalt": prefix}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(WIDTH / 72, _HEIGHT / 72))
        figure.patch.set_visible(False)
        size = (WIDTH - _LEFT - _RIGHT) / WIDTH, (_HEIGHT - _BOTTOM - _TOP) / _HEIGHT
        axes = figure.add_axes((_LEFT / WIDTH, _BOTTOM / _HEIGHT, *size))
        axes.patch.set_visible(False)
        for i, name in enumerate(names):
            points = sorted(lines[name], key=lambda r: r.shape["seq_len"])
            ours = points[0].is_ours
            axes.plot(
                [r.shape["seq_len"] for r in points],
                [(r.rate or 0.0) / unit for r in points],
                color=PALETTE[i % len(PALETTE)],
                label=formatting.printable(name),
                linewidth=2.4 if ours else 1.3,
                linestyle="-" if ours else (0, (5, 1.5)),
                marker=_MARKERS[i % len(_MARKERS)],
                markersize=4.5,
                markeredgewidth=0,
                gid=f"series-{formatting.slug(name)}",
            )
        axes.set_xscale("log")
        axes.set_ylim(bottom=0.0)
        low, high = axes.get_xlim()
        widths = [len(formatting.length(n)) + 1.5 for n in lengths]
        shown = thin(lengths, widths, (WIDTH - _LEFT - _RIGHT) / 7.2, low, high)
        axes.xaxis.set_major_locator(FixedLocator(shown))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: formatting.length(round(v))))
        axes.set_xlabel("tokens", fontsize=11.5)
        axes.grid(True, color=INK, alpha=0.13, linewidth=0.8)
        figure.text(0.012, 1 - 15 / _HEIGHT, title, fontsize=13.0, fontweight="bold", va="baseline")
        figure.text(0.012, 1 - 31 / _HEIGHT, subtitle, fontsize=11.0, va="baseline", alpha=0.8)
        figure.text(0.012, 1 - 49 / _HEIGHT, unit_name, fontsize=11.0, va="baseline")
        figure.legend(loc="lower left", ncols=4, frameon=False, fontsize=10.0, handlelength=2.2, columnspacing=1.1)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return inline(
        text.getvalue(), prefix=prefix, label=formatting.printable(f"{title}, {subtitle}: {unit_name} against length")
    )
