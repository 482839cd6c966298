"""The end of a sweep on one terminal screen: per group the baseline, the best configuration and the ratio by length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from longreel.reports import formatting
from longreel.reports.compare import Baselines, Group, configuration, fastest, group_records, sharing
from longreel.reports.records import Record
from longreel.reports.store import latest
from longreel.reports.verdicts import verdict

# Beyond this many lengths a group shows some of them: the shortest, the longest and those evenly between.
MAX_LENGTHS = 6


def summary_lines(records: Sequence[Record], *, max_lengths: int = MAX_LENGTHS) -> list[str]:
    """Plain text, one line per entry, at most about 110 characters wide.

    Args:
        records: all records of a sweep; of those with one key the last counts. max_lengths: rows per group.
    """
    points = latest(records)
    baselines = Baselines(points)
    lines: list[str] = []
    for group, found in group_records(points).items():
        if lines:
            lines.append("")
        lines += _group_lines(group, found, baselines, max_lengths)
    return lines


def _group_lines(group: Group, records: Sequence[Record], baselines: Baselines, max_lengths: int) -> list[str]:
    counts = Counter(r.status for r in records)
    statuses = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    lines = [f"{group.label}  {group.title}  ({statuses})"]
    if shared := sharing(records):
        lines.append(f"  {shared}: a check, not a race")
    chosen = [r for r in records if baselines.of(r) is r]
    if chosen:
        names = dict.fromkeys(configuration(r) for r in chosen)
        lines.append(f"  baseline: {' or '.join(names)}")
    lines.append(f"  {'length':>9}  {'baseline':>11}  {'best':>11}  {'ratio':>6}  tokens/s; best configuration")
    for seq_len in _spread(sorted({r.seq_len for r in records}), max_lengths):
        at_length = [r for r in records if r.seq_len == seq_len]
        baseline, best = baselines.of(at_length[0]), fastest(at_length)
        what: str = "none ran" if baseline is None else baseline.status
        if baseline is not None and baseline.status == "ok":
            what = formatting.number(baseline.tokens_per_s)
        if best is None:
            words = f"none: {at_length[0].reason}"
            row = f"  {seq_len:>9,}  {what:>11}  {formatting.MISSING:>11}  {formatting.MISSING:>6}  {words}"
        else:
            figure, ratio = formatting.number(best.tokens_per_s), formatting.ratio(baselines.ratio(best))
            name = "the baseline" if best is baseline else configuration(best)
            if best.kind == "measured" and best is not baseline and baselines.ratio(best) and not shared:
                # The best of several noisy figures is above 1 more often than not.
                ratio += f" {verdict(best, baselines) or 'no verdict'}"
            row = f"  {seq_len:>9,}  {what:>11}  {figure:>11}  {ratio:>6}  {name}"
        lines.append(row if len(row) <= 110 else row[:109] + "…")
    return [formatting.one_line(line) for line in lines]


def _spread(values: Sequence[int], most: int) -> list[int]:
    if len(values) <= most:
        return list(values)
    steps = max(1, most - 1)
    return [values[i * (len(values) - 1) // steps] for i in range(steps + 1)]
