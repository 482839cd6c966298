"""A comparison of two runs in words: for a terminal, and as an HTML page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longreel.reports import formatting
from longreel.reports.html import page_environment
from longreel.reports.runs import Change, Outcome, Point, RunComparison

HEADINGS: dict[Outcome, str] = {
    "regression": "Regressions",
    "improvement": "Improvements",
    "undecided": "Large, but not significant",
    "other": "Failed in both, for different reasons",
}
_MAX_POINTS = 20


def about(comparison: RunComparison) -> str:
    """What was compared and what is reported, in one sentence."""
    limits = comparison.thresholds
    changed = {(c.group, c.label, c.seq_len) for c in comparison.changes if c.outcome != "undecided"}
    return (
        f"{comparison.num_common} points in both runs, {comparison.num_common - len(changed)} without a change of at "
        f"least {100 * limits.size:g} %; sampled times must differ at {100 * limits.confidence:g} % confidence, too"
    )


def lines(comparison: RunComparison, names: tuple[str, str]) -> list[str]:
    """Plain text, regressions first.

    Args:
        names: of the old and the new run, for points that only one has.
    """
    found = [about(comparison) + "."]
    for outcome, heading in HEADINGS.items():
        changes = comparison.of(outcome)
        if changes or outcome == "regression":
            found += ["", f"{heading}: {len(changes)}"]
        found += [f"  {row}" for row in _aligned(changes)]
    for name, points in zip(names, (comparison.only_old, comparison.only_new), strict=True):
        if points:
            found += ["", f"Only in {name}: {len(points)}"]
            found += [f"  {_where(p)}  {p.status}" for p in points[:_MAX_POINTS]]
            found += [f"  and {len(points) - _MAX_POINTS} more"] if len(points) > _MAX_POINTS else []
    if comparison.reconfigured:
        found += ["", f"Compared although details of their configuration differ: {len(comparison.reconfigured)}"]
        found += [f"  {formatting.one_line(name)}" for name in comparison.reconfigured[:_MAX_POINTS]]
    return found


def page(comparison: RunComparison, names: tuple[str, str]) -> str:
    """The same as one self-contained HTML page."""
    filters: dict[str, Callable[..., object]] = {"per_cent": per_cent, "interval": formatting.interval}
    return (
        page_environment(filters)
        .get_template("runs.html.j2")
        .render(
            title=f"{names[1]} against {names[0]}",
            names=names,
            about=about(comparison),
            comparison=comparison,
            outcomes=[(outcome, heading, comparison.of(outcome)) for outcome, heading in HEADINGS.items()],
        )
    )


def per_cent(ratio: float | None) -> str:
    """A ratio as a change, `+12.3 %`."""
    return "" if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def _aligned(changes: Sequence[Change]) -> list[str]:
    rows = [
        (
            _where(c),
            c.quantity,
            f"{c.before} -> {c.after}",
            per_cent(c.ratio),
            f"({formatting.interval(c.interval)})" if c.interval else "",
            formatting.one_line(c.why),
        )
        for c in changes
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(6)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _where(item: Change | Point) -> str:
    return formatting.one_line(f"{item.group.label} {item.group.title}: {item.label}, {item.seq_len:,} tokens")
