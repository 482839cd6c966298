"""Names of configurations: what tells the records of a report apart, apart from their length and group."""

from __future__ import annotations

from collections.abc import Sequence

from longreel.reports import formatting
from longreel.reports.records import Record


def labels(records: Sequence[Record]) -> list[str]:
    """A name for each record's configuration: strategy, degree and policy, and what else differs between records."""
    engines = {r.engine for r in records}
    attentions = {r.attention for r in records}
    batches = {r.batch_per_group for r in records}

    def label(r: Record) -> str:
        words = [r.strategy, f"SP {r.sp_degree}"]
        if len(engines) > 1:
            words.append(formatting.engine(r.engine))
        words.append(r.policy)
        if len(attentions) > 1:
            words.append(r.attention)
        if len(batches) > 1:
            words.append(f"× {r.batch_per_group}")
        return ", ".join(words)

    return [label(r) for r in records]
