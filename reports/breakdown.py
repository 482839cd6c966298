"""Where a step's time goes: its parts stacked, communication behind computation beside them, and what is exposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from longreel.reports import formatting
from longreel.reports.compare import Group
from longreel.reports.exposure import COMMUNICATION
from longreel.reports.frame import LEGEND_LINE, WIDTH, Drawing, Mark, finish, frame, mark
from longreel.reports.records import Record
from longreel.reports.series import Series
from longreel.reports.svg import INK, PALETTE

LABELS = {
    "attention": "attention",
    "matmul": "matrix products",
    "memory": "memory-bound ops",
    "optimizer": "optimizer",
    "sequence": "sequence exchange",
    "sharding": "sharding",
    "offload": "offload",
}
# Communication is hatched: told apart without colour.
_LOOKS = {
    "attention": (PALETTE[0], ""),
    "matmul": (PALETTE[4], ""),
    "memory": (PALETTE[2], ""),
    "optimizer": (PALETTE[5], ""),
    "sequence": (PALETTE[1], "///"),
    "sharding": (PALETTE[3], "\\\\\\"),
    "offload": (INK, "..."),
}
_OTHER_HATCHES = ("xx", "++", "oo", "--")
_ROW, _LEFT, _RIGHT = 24.0, 206.0, 64.0
_MAX_LABEL = 31
# Lengths that are shown: where communication weighs most, and where the sequence does.
_NUM_LENGTHS = 2


def draw_breakdowns(group: Group, series: Sequence[Series], *, png: bool) -> list[Drawing]:
    """A figure for the shortest and one for the longest length at which two lines or more have parts."""
    at: dict[int, list[Record]] = {}
    for line in series:
        for point in line.points:
            if point.breakdown and point not in at.setdefault(point.seq_len, []):
                at[point.seq_len].append(point)
    lengths = sorted(seq_len for seq_len, points in at.items() if len(points) > 1) or sorted(at)
    chosen = list(dict.fromkeys([*lengths[:1], *lengths[-1:]]))[:_NUM_LENGTHS]
    return [_draw(group, seq_len, at[seq_len], png=png) for seq_len in chosen if at[seq_len]]


def _draw(group: Group, seq_len: int, points: Sequence[Record], *, png: bool) -> Drawing:
    title = f"Parts of a step at {seq_len:,} tokens"
    names = ", ".join(_label(p) for p in points)
    return finish(
        lambda: _figure(title, group, points),
        group=group,
        name=f"parts-{seq_len}",
        caption=f"{title}, {group.label}: {group.title}",
        axis="seconds per sample",
        more=f"Rows: {names}.",
        png=png,
    )


def _label(record: Record) -> str:
    return f"{record.strategy}, SP {record.sp_degree}, {record.policy}" + (" *" if record.is_baseline else "")


def _figure(title: str, group: Group, points: Sequence[Record]) -> tuple[Figure, list[Mark]]:
    parts = [*LABELS, *sorted({n for p in points for n in p.breakdown} - set(LABELS))]
    parts = [name for name in parts if any(p.breakdown.get(name) for p in points)]
    legend = LEGEND_LINE * ((len(parts) + 2 + 1) // 2) + 12.0
    axis = "seconds of a step over the samples in it; * baseline"
    height = _ROW * len(points)
    figure, axes = frame(title, axis, group, height=height, below=legend, left=_LEFT, right=_RIGHT)
    samples = [p.batch_per_group * p.dp_degree for p in points]
    totals = [(p.step_s or 0.0) / n for p, n in zip(points, samples, strict=True)]
    rows = list(range(len(points)))
    left = [0.0] * len(points)
    for name in parts:
        colour, hatch = _look(name, parts)
        seconds = [max(0.0, p.breakdown.get(name, 0.0)) / n for p, n in zip(points, samples, strict=True)]
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": _EDGE, "linewidth": 0}
        axes.barh([row - 0.07 for row in rows], seconds, left=left, height=0.56, **look)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    hidden = [sum(p.hidden.values()) / n for p, n in zip(points, samples, strict=True)]
    axes.barh([row + 0.34 for row in rows], hidden, height=0.13, color=INK, alpha=0.45, linewidth=0)
    for row, point in enumerate(points):
        words = _label(point)
        words = formatting.printable(words if len(words) <= _MAX_LABEL else f"{words[: _MAX_LABEL - 1]}…")
        axes.annotate(words, (0, row), xytext=(-6, 0), textcoords="offset points", ha="right", va="center", fontsize=12)
        note = f"{formatting.number(totals[row])} s"
        place = (WIDTH - _LEFT - _RIGHT + 6, 0)
        axes.annotate(note, (0, row), xytext=place, textcoords="offset points", ha="left", va="center", fontsize=12)
    axes.set_xlim(0.0, max([*totals, *hidden]) or 1.0)
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set_axis_off()
    axes.axvline(0.0, color=INK, linewidth=0.8, clip_on=False)
    handles = []
    for name in parts:
        colour, hatch = _look(name, parts)
        label = formatting.printable(LABELS.get(name, name)) + (", exposed" if name in COMMUNICATION else "")
        handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor=_EDGE, linewidth=0, label=label))
    if any(hidden):
        handles.append(Patch(facecolor=INK, alpha=0.45, linewidth=0, label="thin: hidden comm."))
    figure.legend(handles=handles, loc="lower left", ncols=2, frameon=False, fontsize=12, borderaxespad=0.2)
    return figure, [mark(figure, axes, totals[row], row, p, totals[row]) for row, p in enumerate(points)]


_EDGE = "#fffffe"


def _look(name: str, parts: Sequence[str]) -> tuple[str, str]:
    if name in _LOOKS:
        return _LOOKS[name]
    others = [n for n in parts if n not in _LOOKS]
    return PALETTE[5], _OTHER_HATCHES[others.index(name) % len(_OTHER_HATCHES)]
