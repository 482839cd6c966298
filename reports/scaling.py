"""Throughput over P, the sequence-parallel degree on the same devices, and over the number of devices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from longreel.reports import formatting
from longreel.reports.compare import Group, throughput_interval
from longreel.reports.frame import (
    COLOUR_OF,
    LEGEND_LINE,
    MARGIN_LEFT,
    MARGIN_X_AXIS,
    MARKERS,
    Drawing,
    Mark,
    draw_axes,
    finish,
    frame,
    mark,
)
from longreel.reports.records import Record
from longreel.reports.series import Series, build_series
from longreel.reports.svg import INK, PALETTE
from longreel.reports.ticks import linear_ticks

_HEIGHT = 220.0

Lines = dict[str, list[Record]]


def draw_degrees(group: Group, series: Sequence[Series], *, png: bool) -> list[Drawing]:
    """Throughput over the degree, at the shortest and the longest length at which a strategy has two degrees."""
    at: defaultdict[int, Lines] = defaultdict(dict)
    for line in series:
        if not line.is_baseline and line.sp_degree > 1:
            for point in line.points:
                at[point.seq_len].setdefault(line.strategy, []).append(point)
    lengths = sorted(n for n, found in at.items() if any(len(points) > 1 for points in found.values()))
    baseline = {p.seq_len: p for line in series if line.is_baseline for p in line.points}
    drawings = []
    for seq_len in dict.fromkeys([*lengths[:1], *lengths[-1:]]):
        lines = {name: sorted(points, key=lambda p: p.sp_degree) for name, points in at[seq_len].items()}
        title = f"Throughput over P at {seq_len:,} tokens"
        drawings.append(_draw(title, group, lines, baseline.get(seq_len), name=f"degrees-{seq_len}", png=png))
    return drawings


def draw_devices(groups: dict[Group, list[Record]], *, png: bool) -> list[tuple[Group, Drawing]]:
    """Throughput over the number of devices, for groups that differ in nothing else, at their longest common length."""
    families: defaultdict[Group, dict[int, list[Record]]] = defaultdict(dict)
    for group, records in groups.items():
        families[replace(group, num_devices=0)][group.num_devices] = records
    drawn = []
    for family, members in families.items():
        lengths = [{r.seq_len for r in records if r.status == "ok"} for records in members.values()]
        common = set.intersection(*lengths)
        if len(members) < 2 or not common:
            continue
        seq_len = max(common)
        lines: Lines = defaultdict(list)
        for _, records in sorted(members.items()):
            best: dict[str, Record] = {}
            for line in build_series([r for r in records if r.seq_len == seq_len]):
                for point in line.points:
                    name = "baseline" if line.is_baseline else line.strategy
                    if name not in best or (point.tokens_per_s or 0) > (best[name].tokens_per_s or 0):
                        best[name] = point
            for name, point in best.items():
                lines[name].append(point)
        group = replace(family, num_devices=max(members))
        title = f"Throughput over devices at {seq_len:,} tokens"
        name = f"devices-{seq_len}"
        drawn.append((group, _draw(title, group, dict(lines), None, name=name, png=png, over_devices=True)))
    return drawn


def _draw(
    title: str,
    group: Group,
    lines: Lines,
    baseline: Record | None,
    *,
    name: str,
    png: bool,
    over_devices: bool = False,
) -> Drawing:
    return finish(
        lambda: _figure(title, group, lines, baseline, over_devices=over_devices),
        group=group,
        name=name,
        caption=f"{title}, {group.label}: {_about(group, lines, over_devices)}",
        axis="tokens/s, all devices",
        more=f"Lines: {', '.join(lines)}.",
        png=png,
    )


def _figure(
    title: str, group: Group, lines: Lines, baseline: Record | None, *, over_devices: bool
) -> tuple[Figure, list[Mark]]:
    legend = LEGEND_LINE * ((len(lines) + 2) // 2) + 8.0
    below = legend + MARGIN_X_AXIS
    about = _about(group, lines, over_devices)
    figure, axes = frame(
        title, "tokens/s, all devices", group, height=_HEIGHT, below=below, left=MARGIN_LEFT, about=about
    )
    handles: list[Line2D] = []
    degrees = sorted({_across(p, over_devices) for points in lines.values() for p in points})
    for i, (strategy, points) in enumerate(lines.items()):
        is_baseline = strategy == "baseline"
        colour = INK if is_baseline else COLOUR_OF.get(strategy, PALETTE[5])
        x, y = [_across(p, over_devices) for p in points], [p.tokens_per_s or 0.0 for p in points]
        for at, bounds in zip(x, map(throughput_interval, points), strict=True):
            if bounds:
                axes.plot([at * (1 + 0.012 * (i - len(lines) / 2))] * 2, bounds, color=colour, alpha=0.4, linewidth=1.1)
        handles += axes.plot(
            x,
            y,
            color=colour,
            label=formatting.printable(strategy),
            linewidth=2.4 if is_baseline else 1.5,
            linestyle=(0, (4, 1.6)) if is_baseline else "-",
            marker=MARKERS[i % len(MARKERS)],
            markersize=5.5,
            markeredgewidth=0,
            gid=f"series-{formatting.slug(strategy)}",
        )
    if baseline is not None and baseline.tokens_per_s:
        label = f"baseline: {formatting.engine(baseline.engine)}, SP 1"
        style: dict[str, Any] = {"color": INK, "linewidth": 2.0, "linestyle": (0, (4, 1.6)), "gid": "series-baseline"}
        handles.append(axes.axhline(baseline.tokens_per_s, label=formatting.printable(label), **style))
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0.0)
    axes.set_xlim(degrees[0] / 1.25, degrees[-1] * 1.25)
    words = "devices" if over_devices else f"P, sequence-parallel degree on {group.num_devices} devices"
    ticks = linear_ticks(axes.get_ylim()[1])
    draw_axes(
        axes,
        x=[(n, str(n)) for n in degrees],
        y=[(value, formatting.number(value)) for value in ticks],
        name=words,
    )
    figure.legend(
        handles=handles,
        loc="lower left",
        ncols=2,
        frameon=False,
        fontsize=12.5,
        handlelength=2.5,
        borderaxespad=0.2,
    )
    marks = [
        mark(figure, axes, _across(p, over_devices), p.tokens_per_s, p, p.tokens_per_s)
        for points in lines.values()
        for p in points
        if p.tokens_per_s
    ]
    return figure, marks


def _about(group: Group, lines: Lines, over_devices: bool) -> str:
    """The group in words; of a figure over devices with all numbers of them."""
    if not over_devices:
        return group.title
    return group.title_of(", ".join(map(str, sorted({p.num_devices for points in lines.values() for p in points}))))


def _across(record: Record, over_devices: bool) -> int:
    return record.num_devices if over_devices else record.sp_degree
