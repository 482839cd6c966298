"""Names of configurations: what tells the records of a report apart, apart from their length and group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from longreel.reports import formatting
from longreel.reports.records import Record


def labels(records: Sequence[Record]) -> list[str]:
    """A name for each record's configuration: strategy, degree and policy, and what else differs between records.

    Options of the parallel configuration are named where records that would share a name differ in them.
    """
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

    names = [label(r) for r in records]
    seen: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    options = [_options(r) for r in records]
    for name, found in zip(names, options, strict=True):
        for option, value in found.items():
            seen[name][option].add(value)
    told = {name: sorted(o for o, values in found.items() if len(values) > 1) for name, found in seen.items()}
    return [
        ", ".join([name, *(f"{option} {found.get(option, formatting.MISSING)}" for option in told.get(name, ()))])
        for name, found in zip(names, options, strict=True)
    ]


def _options(record: Record) -> dict[str, str]:
    """The options of the parallel configuration that no field of the record has."""
    parallel = record.config.get("parallel")
    if not isinstance(parallel, dict):
        return {}
    return {str(name): str(value) for name, value in parallel.items() if not hasattr(record, str(name))}
