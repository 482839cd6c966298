"""The headline table of a folder of records, in Markdown: `python -m longreel.bench.headline DIR`.

Per model, device and number of devices, and per length: the baseline and the best configuration, how fast both are
and what memory they need; then how straight the line from depths 1 and 2 was where the model's depth ran too, and the
longest sequence that fits. Of a point that ran more than once, on whatever commit, the last record counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreel.reports import formatting
from longreel.reports.compare import Baselines, Group, group_records
from longreel.reports.records import Record
from longreel.reports.sources import load_steps

GiB = 2**30
# What tells one configuration from another whatever its length, besides `config`.
_CONFIGURATION = ("model", "device", "strategy", "sp_degree", "engine", "policy", "attention", "batch_per_group")


def table(records: Sequence[Record]) -> list[str]:
    """Lines of Markdown.

    Args:
        records: of one sweep; emulated ones of the regime `full` count.

    Raises:
        ValueError: there are none.
    """
    # Of records of two commits the faster one would stand for a configuration that the newer code no longer has.
    points = {r.point: r for r in records if r.kind == "emulated" and r.regime == "full"}
    if not points:
        raise ValueError("no emulated records of regime full; make them with: python bench/sweep.py --preset headline")
    lines: list[str] = []
    for group, rows in group_records(points.values()).items():
        lines += [*([""] if lines else []), *_group(group, rows)]
    return lines


def _group(group: Group, rows: Sequence[Record]) -> list[str]:
    lines = [
        f"Emulated: {group.title}.",
        "",
        "| tokens | baseline, tokens/s | memory | best, tokens/s | memory | ratio | best configuration |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    baselines = Baselines(rows)
    for seq_len in sorted({r.seq_len for r in rows}):
        here = [r for r in rows if r.seq_len == seq_len]
        timed = [r for r in here if r.tokens_per_s is not None]
        best = max(timed, key=lambda r: r.tokens_per_s or 0.0, default=None)
        sides = *_baseline_figures(baselines.of(here[0]), rows, seq_len), *_figures(best)
        cells = [f"{seq_len:,}", *sides, _ratio(best, baselines), _words(best)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *_linearity(rows), *_longest(rows)]


def _baseline_figures(baseline: Record | None, rows: Sequence[Record], seq_len: int) -> tuple[str, str]:
    """As _figures; where it was not run, what the line through its two longest lengths says of its memory."""
    if baseline is None:
        for line in lines_of_memory([r for r in rows if r.is_baseline]):
            if seq_len > line.longest.seq_len and line.at(seq_len) > line.usable:
                return "out of memory, by the line", f"{line.at(seq_len) / GiB:.1f} GiB"
    return _figures(baseline)


def _figures(record: Record | None) -> tuple[str, str]:
    """Tokens/s and memory of a row."""
    if record is None:
        return "not run", ""
    memory = record.memory.get("allocated", record.peak_memory)
    size = "" if memory is None else f"{memory / GiB:.1f} GiB"
    if record.status != "ok":
        return ("out of memory" if record.status == "oom" else record.status), size
    return f"{record.tokens_per_s:,.0f}", size


def _ratio(best: Record | None, baselines: Baselines) -> str:
    """With its interval, where it is not of the baseline itself."""
    ratio = None if best is None else baselines.ratio(best)
    if best is None or ratio is None:
        return "-"
    bounds = baselines.ratio_interval(best)
    return f"{ratio:.2f}" + (f" ({formatting.interval(bounds)})" if bounds else "")


def _words(record: Record | None) -> str:
    if record is None:
        return "-"
    return f"{record.strategy}, SP {record.sp_degree}, {record.policy}, {record.attention}"


def _linearity(rows: Sequence[Record]) -> list[str]:
    """How far figures continued from depths 1 and 2 are off where the model's depth ran."""
    found = []
    for r in rows:
        line = r.provenance.get("emulation", {}).get("linearity")
        if line:
            off = ", ".join(f"{name} {100 * (value - 1):+.1f} %" for name, value in line.items() if name != "depth")
            found.append(f"- {r.seq_len:,}, {_words(r)}: {off}")
    return ["", "Continued from depths 1 and 2, against the model's depth as it ran:", *found] if found else []


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLine:
    """Allocated bytes of one configuration over length, through the two longest lengths at which they are known.

    Memory is linear in length, as activations and buffers are and the rest is constant.

    Args:
        longest: the record at the longer one. slope: bytes a token. usable: bytes that there are.
    """

    longest: Record
    slope: float
    usable: int

    def at(self, seq_len: int) -> float:
        """Bytes at a length."""
        return self.longest.memory["allocated"] + self.slope * (seq_len - self.longest.seq_len)

    @property
    def fits(self) -> int:
        """The longest sequence that fits, tokens."""
        return int(self.longest.seq_len + (self.usable - self.longest.memory["allocated"]) / self.slope)


def lines_of_memory(rows: Sequence[Record]) -> list[MemoryLine]:
    """The line of every configuration that was emulated at two lengths and needs more at the longer one."""
    by_place: dict[tuple[Any, ...], dict[int, Record]] = {}
    for r in rows:
        if "allocated" in r.memory and r.memory_usable:
            place = [getattr(r, name) for name in _CONFIGURATION] + [json.dumps(dict(r.config), sort_keys=True)]
            by_place.setdefault(tuple(place), {})[r.seq_len] = r
    found = []
    for at in by_place.values():
        if len(at) < 2:
            continue
        low, high = (at[n] for n in sorted(at)[-2:])
        slope = (high.memory["allocated"] - low.memory["allocated"]) / (high.seq_len - low.seq_len)
        if slope > 0:
            found.append(MemoryLine(longest=high, slope=slope, usable=high.memory_usable or 0))
    return found


def _longest(rows: Sequence[Record]) -> list[str]:
    lines = [
        f"- {_words(line.longest)}{_batch(line.longest)}: {line.fits:,} tokens, extrapolated from "
        f"{line.longest.seq_len:,}"
        for line in lines_of_memory(rows)
    ]
    if not lines:
        return []
    return ["", "Longest sequence that fits, on the line through the two longest lengths emulated:", *lines]


def _batch(record: Record) -> str:
    return "" if record.batch_per_group == 1 else f", batch {record.batch_per_group}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 0, or 2 after one `error:` line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if len(arguments) != 1:
            raise ValueError("give one folder of records, such as reports/measured/headline")
        print("\n".join(table(load_steps(Path(arguments[0]))[0])))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
