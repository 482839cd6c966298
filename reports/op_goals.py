"""What the kernels are to reach on one H200, against what was measured: goal, beyond, measured, met.

A goal counts at its worst point of 32,768 tokens and more, each taken by our fastest kernel there that qualifies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from longreel.reports import formatting
from longreel.reports.op_compare import Peers, Point, Rooflines, point_of
from longreel.reports.op_records import OpRecord
from longreel.reports.store import latest

HEADINGS = ("Goal", "Goal at", "Beyond at", "Measured", "Met", "Worst at")
LEAST_TOKENS = 32_768
# Between these two lengths the rate may fall by FALL_OFF.
SHORT, LONG, FALL_OFF = 65_536, 819_200, 0.03
_HEAD_DIM = 72
# Backwards that add up in no fixed order.
_ATOMIC = "atomic"
FLASH, CUDNN = "sdpa-flash", "sdpa-cudnn"


class Measured(NamedTuple):
    """A figure, and where it was."""

    value: float
    where: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """One goal.

    Args:
        name: in words. ops, direction: of the records it is about.
        at, beyond: figures to reach, in the unit; one may be None.
        unit: `TFLOP/s`, `of clone`, `x <provider>`, `x best peer`, or `fall-off`, where less is better.
        deterministic: only kernels that give the same bits every time qualify.
    """

    name: str
    ops: tuple[str, ...]
    direction: str
    unit: str
    at: float | None
    beyond: float | None = None
    deterministic: bool = False

    @property
    def less_is_better(self) -> bool:
        """Whether the figure must stay below the goal."""
        return self.unit == "fall-off"

    def reaches(self, value: float, target: float) -> bool:
        """Whether a figure meets one of the goal's two."""
        if self.unit == "x best peer":
            # As fast as a peer is not faster.
            return value > target
        return value <= target if self.less_is_better else value >= target

    def met(self, value: float | None) -> str:
        """In a word or two."""
        if value is None:
            return "not measured"
        if self.beyond is not None and self.reaches(value, self.beyond):
            return "beyond"
        if self.at is not None and self.reaches(value, self.at):
            return "yes"
        target = self.at if self.at is not None else self.beyond
        return "no" if self.less_is_better or not target else f"no, {100 * value / target:.0f} % of it"

    def words(self, value: float | None) -> str:
        """A figure in the goal's unit."""
        if value is None:
            return formatting.MISSING
        if self.unit in ("of clone", "fall-off"):
            return f"{100 * value:.1f} % {self.unit}"
        return f"{value:.0f} {self.unit}" if self.unit == "TFLOP/s" else f"{value:.2f} {self.unit}"


_ATTENTION = ("attention", "attention_packed")
_ROWS = {
    "adaLN": ("adaln_modulate", "adaln_frames"),
    "gated residual, alone and with adaLN": ("gated_residual", "gated_residual_adaln", "gated_adaln_frames"),
    "bias-GELU": ("bias_gelu",),
    "pack and unpack": ("sp_pack_heads", "sp_unpack_heads", "sp_pack_tokens", "sp_unpack_tokens"),
}


def _attention(name: str, direction: str, unit: str, at: float | None, beyond: float | None = None) -> Goal:
    return Goal(name=f"attention {name}", ops=_ATTENTION, direction=direction, unit=unit, at=at, beyond=beyond)


GOALS = (
    _attention("forward", "forward", "TFLOP/s", 450.0, 500.0),
    _attention("forward, faster than every peer", "forward", "x best peer", 1.0),
    Goal(
        name="attention backward, deterministic",
        ops=_ATTENTION,
        direction="backward",
        unit="TFLOP/s",
        at=340.0,
        deterministic=True,
    ),
    _attention("backward, fastest form", "backward", "TFLOP/s", None, 400.0),
    _attention("forward and backward", "both", f"x {FLASH}", 1.5),
    _attention("forward and backward", "both", f"x {CUDNN}", 1.05, 1.2),
    _attention(f"forward, {LONG:,} against {SHORT:,} tokens", "forward", "fall-off", FALL_OFF),
    _attention(f"forward and backward, {LONG:,} against {SHORT:,} tokens", "both", "fall-off", FALL_OFF),
    *(
        Goal(name=f"{name}, {direction}", ops=ops, direction=direction, unit="of clone", at=at, beyond=beyond)
        for name, ops in _ROWS.items()
        for direction, at, beyond in (("forward", 0.95, 0.98), ("backward", 0.88, 0.92))
    ),
)


def goal_rows(records: Sequence[OpRecord]) -> dict[str, list[tuple[str, ...]]]:
    """For every GPU that measured a kernel of ours, a row of words per goal, in the order of HEADINGS.

    Where several passes of a campaign measured a goal, the last one counts. Tuning's candidates are left out.
    """
    points = [r for r in latest(records) if r.kind == "measured" and not r.device.startswith("CPU")]
    points = [r for r in points if not str(r.config.get("label", "")).startswith("tune")]
    rooflines = Rooflines(points)
    found = {}
    for device in dict.fromkeys(r.device for r in points if r.is_ours and r.rate):
        here = [r for r in points if r.device == device]
        passes = dict.fromkeys(str(r.config.get("label", "")) for r in here)
        found[device] = [_row(goal, here, list(passes), rooflines) for goal in GOALS]
    return found


def goal_lines(records: Sequence[OpRecord]) -> list[str]:
    """goal_rows as aligned text; empty where no GPU measured a kernel of ours."""
    lines = []
    for device, rows in goal_rows(records).items():
        table = [HEADINGS, *rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]
        lines.append(f"Goals for one H200, measured on {device}:")
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    return lines


def _row(goal: Goal, records: Sequence[OpRecord], passes: Sequence[str], rooflines: Rooflines) -> tuple[str, ...]:
    last: Measured | None = None
    for label in passes:
        chosen = [r for r in records if str(r.config.get("label", "")) == label]
        found = _measure(goal, chosen, rooflines)
        if found is not None:
            last = Measured(found.value, found.where + (f" ({label})" if label else ""))
    value = None if last is None else last.value
    where = formatting.MISSING if last is None else last.where
    return goal.name, goal.words(goal.at), goal.words(goal.beyond), goal.words(value), goal.met(value), where


def _measure(goal: Goal, records: Sequence[OpRecord], rooflines: Rooflines) -> Measured | None:
    """The worst figure of one pass; None where it has none."""
    ours = [r for r in records if r.is_ours and _is_about(goal, r)]
    if goal.less_is_better:
        return _fall_off(ours)
    value = _value_of(goal, Peers(records), rooflines)
    best: dict[Point, Measured] = {}
    for record in ours:
        figure = value(record)
        if figure is not None and (point_of(record) not in best or best[point_of(record)].value < figure):
            best[point_of(record)] = Measured(figure, _place(record))
    return min(best.values(), key=lambda m: m.value, default=None)


def _is_about(goal: Goal, r: OpRecord) -> bool:
    if r.op not in goal.ops or r.direction != goal.direction or not r.rate or r.shape["seq_len"] < LEAST_TOKENS:
        return False
    if goal.ops is _ATTENTION and r.shape["head_dim"] != _HEAD_DIM:
        return False
    return not (goal.deterministic and _ATOMIC in r.provider)


def _value_of(goal: Goal, peers: Peers, rooflines: Rooflines) -> Callable[[OpRecord], float | None]:
    if goal.unit == "TFLOP/s":
        return lambda r: (r.rate or 0.0) / 1e12
    if goal.unit == "of clone":
        return rooflines.fraction
    if goal.unit == "x best peer":
        return peers.speedup
    return lambda r: peers.speedup(r, goal.unit.removeprefix("x "))


def _fall_off(ours: Iterable[OpRecord]) -> Measured | None:
    """By how much of it the rate at SHORT tokens is above that at LONG, by the fastest kernel at either."""
    fastest: defaultdict[tuple[object, ...], dict[int, OpRecord]] = defaultdict(dict)
    for r in ours:
        length = r.shape["seq_len"]
        rest = r.op, r.dtype, tuple(sorted((name, n) for name, n in r.shape.items() if name != "seq_len"))
        known = fastest[rest].get(length)
        if known is None or (known.rate or 0.0) < (r.rate or 0.0):
            fastest[rest][length] = r
    found = []
    for at in fastest.values():
        if SHORT in at and LONG in at:
            fall = 1 - (at[LONG].rate or 0.0) / (at[SHORT].rate or 1.0)
            found.append(Measured(fall, f"{_place(at[LONG])}, {at[SHORT].provider} at {SHORT:,}"))
    return max(found, key=lambda m: m.value, default=None)


def _place(r: OpRecord) -> str:
    return f"{r.op} {r.shape['seq_len']:,}, {r.provider}"
