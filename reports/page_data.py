"""What a page's scripts work with: the records, packed, and beside them what tables and ratios need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from longreel.reports import embed
from longreel.reports.compare import Baselines
from longreel.reports.configurations import labels
from longreel.reports.export import CSV_DERIVED, CSV_FIELDS, derived
from longreel.reports.heatmap import LEVELS
from longreel.reports.records import Record
from longreel.reports.tables import Table
from longreel.reports.turns import CONFIDENCE, MARGIN, left_out
from longreel.reports.verdicts import may_be_judged


def page_data(points: Sequence[Record], sections: Sequence[tuple[str, Sequence[Record], Table]]) -> dict[str, Any]:
    """The data of a page, JSON.

    Args:
        points: every record, one per key. sections: (id, its records, their table) of each group.
    """
    baselines = Baselines(points)
    index = {id(record): i for i, record in enumerate(points)}
    computed = [derived(record, baselines) for record in points]
    names = labels(points)
    known = list(dict.fromkeys(names))
    place = {name: i for i, name in enumerate(known)}
    return {
        "about": "records packed by column (longreel.reports.embed), and what tables and records.csv have beside them",
        "num_records": len(points),
        "records": embed.pack([record.to_dict() for record in points]),
        "csv_fields": CSV_FIELDS,
        "csv_derived": {name: embed.pack([_finite(row[name]) for row in computed]) for name in CSV_DERIVED},
        "configurations": known,
        "configuration": [place[name] for name in names],
        "baseline": [-1 if (found := baselines.of(record)) is None else index[id(found)] for record in points],
        "judged": [may_be_judged(record) for record in points],
        "rules": {"margin": MARGIN, "levels": LEVELS, "left_out": _left_out(points)},
        "groups": [_group(name, [index[id(r)] for r in records], table) for name, records, table in sections],
    }


def _group(name: str, order: list[int], table: Table) -> dict[str, Any]:
    """One table: its columns, which record each row is, and the cells column by column."""
    columns = range(len(table.columns))
    return {
        "id": name,
        "columns": [
            {"name": c.name, "unit": c.unit, "numeric": c.numeric, "about": c.about, "value": c.value}
            for c in table.columns
        ],
        "records": order,
        "texts": [embed.pack([row.cells[i].text for row in table.rows]) for i in columns],
        "notes": [embed.pack([row.cells[i].note for row in table.rows]) for i in columns],
        "is_baseline": [row.is_baseline for row in table.rows],
    }


def _left_out(points: Sequence[Record]) -> dict[str, int]:
    """What an interval of two measured records leaves out at each end, by the numbers of their samples."""
    sizes = sorted({len(r.samples_s) for r in points if r.kind == "measured" and r.samples_s})
    return {f"{few} {many}": left_out(few, many, 1 - CONFIDENCE) for few in sizes for many in sizes if few <= many}


def _finite(value: float | int | str | None) -> float | int | str | None:
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else str(value)
