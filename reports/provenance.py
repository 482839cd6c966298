"""Where records come from: the distinct environments, commits and commands behind the records of each kind."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longreel.reports import formatting
from longreel.reports.op_records import OpRecord
from longreel.reports.records import Record

# What tells one origin from another; anything else in a record's provenance may vary from point to point.
IDENTITY = ("commit", "dirty", "command", "versions", "environment")
TIME = "time"


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Records of one kind, environment, commit and command. `facts`: (name, value) pairs in words."""

    num_records: int
    kind: str
    facts: tuple[tuple[str, str], ...]


def origins(records: Sequence[Record] | Sequence[OpRecord]) -> list[Origin]:
    """The distinct origins of the records, in order of appearance."""
    found: defaultdict[str, list[Record | OpRecord]] = defaultdict(list)
    for record in records:
        identity = {"kind": record.kind} | {name: record.provenance.get(name) for name in IDENTITY}
        found[json.dumps(identity, sort_keys=True, default=str)].append(record)
    return [_origin(group) for group in found.values()]


def _origin(records: Sequence[Record | OpRecord]) -> Origin:
    values: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        for name, value in _flatten(record.provenance):
            values[name][value] = None
    facts = []
    for name in sorted(values, key=lambda n: (_rank(n), n)):
        distinct = sorted(values[name])
        if len(distinct) == 1:
            text = distinct[0]
        elif name == TIME:
            text = f"{distinct[0]} to {distinct[-1]}"
        else:
            text = f"{len(distinct)} different values, see the records"
        facts.append((name.removeprefix("versions.").removeprefix("environment."), text))
    return Origin(num_records=len(records), kind=records[0].kind, facts=tuple(facts))


def _rank(name: str) -> int:
    first = name.partition(".")[0]
    order = ("command", "commit", "dirty", TIME, "versions", "environment")
    return order.index(first) if first in order else len(order)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat: list[tuple[str, str]] = []
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat += _flatten(item, f"{prefix}{name}.")
        elif isinstance(item, bool):
            flat.append((prefix + name, "yes" if item else "no"))
        elif isinstance(item, list | tuple):
            flat.append((prefix + name, " ".join(map(str, item))))
        elif name.endswith("_bytes") and isinstance(item, int):
            flat.append((prefix + name.removesuffix("_bytes"), formatting.in_bytes(item)))
        elif item is not None:
            flat.append((prefix + name, str(item)))
    return flat
