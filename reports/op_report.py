"""Op records in, one self-contained HTML page and a CSV out."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from longreel.reports import embed, formatting
from longreel.reports.export import csv_cell
from longreel.reports.op_compare import ROOFLINE_OPS, Peers, Rooflines, groups
from longreel.reports.op_figures import draw_rates, rate_unit
from longreel.reports.op_gaps import Gap, gaps
from longreel.reports.op_goals import HEADINGS as GOAL_HEADINGS
from longreel.reports.op_goals import goal_rows
from longreel.reports.op_records import DIRECTIONS, OpRecord
from longreel.reports.op_summary import HEADINGS, NAMED_PEERS, duels
from longreel.reports.op_tuning import HEADINGS as TUNING_HEADINGS
from longreel.reports.op_tuning import is_tuning, tuning_rows
from longreel.reports.provenance import origins
from longreel.reports.store import latest, write_files
from longreel.reports.tables import Cell, Column, Row, Table

# CSV column -> field of the record, dotted where it lies inside a mapping.
CSV_FIELDS = {
    "key": "key",
    "kind": "kind",
    "run": "run",
    "pass": "config.label",
    "status": "status",
    "reason": "reason",
    "op": "op",
    "direction": "direction",
    "provider": "provider",
    "is_ours": "is_ours",
    "dtype": "dtype",
    "device": "device",
    "batch": "shape.batch",
    "seq_len": "shape.seq_len",
    "num_heads": "shape.num_heads",
    "head_dim": "shape.head_dim",
    "hidden_size": "shape.hidden_size",
    "median_s": "median_s",
    "p20_s": "interval_s.0",
    "p80_s": "interval_s.1",
    "host_s": "host_s",
    "flops": "flops",
    "bytes_moved": "bytes_moved",
    "memory_allocated_bytes": "memory.allocated",
    "energy_j": "energy_j",
    "verdict": "comparison.verdict",
    "against": "comparison.provider",
    "time_ratio": "comparison.ratio",
    "time_ratio_low": "comparison.low",
    "time_ratio_high": "comparison.high",
    "commit": "provenance.commit",
    "source": "provenance.source",
}
# Computed: rate over that of each peer that the goals name.
CSV_NAMED = {f"speedup_{name.replace('-', '_')}": name for name in NAMED_PEERS}
# Computed: useful FLOP/s or bytes/s, fraction of the run's roofline, rate over the best peer's, largest relative error
# and the part of its bar that the worst result uses, median SM clock, number of samples.
CSV_DERIVED = (
    "rate",
    "roofline_fraction",
    "speedup",
    *CSV_NAMED,
    "error",
    "error_of_allowed",
    "sm_clock_mhz",
    "num_samples",
)

DEFAULT_TITLE = "Longreel kernels"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    id: str
    kind: str
    title: str
    figures: list[str]
    table: Table
    gaps: list[Gap]


def write_op_report(
    out_dir: str | os.PathLike[str],
    records: Sequence[OpRecord],
    *,
    title: str = DEFAULT_TITLE,
    source_files: Sequence[str] = (),
) -> Path:
    """Write report.html and ops.csv to a folder, both or neither.

    Args:
        out_dir: created where it does not exist. records: of those with one key only the last counts.
        title: of the page. source_files: names of the files that the records come from, for the reader.

    Returns:
        The path of report.html.

    Raises:
        ValueError: there are no records. OSError: the folder cannot be written.
    """
    page = Path(out_dir) / "report.html"
    write_files(
        {page: render(records, title=title, source_files=source_files), page.with_name("ops.csv"): csv_text(records)}
    )
    return page


def render(records: Sequence[OpRecord], *, title: str = DEFAULT_TITLE, source_files: Sequence[str] = ()) -> str:
    """The page as text; see write_op_report."""
    points = latest(records)
    if not points:
        raise ValueError("there are no records to report")
    environment = Environment(
        loader=PackageLoader("longreel.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The figures and the data are made by our own code and hold no markup of the records'.
    environment.filters["markup"] = Markup
    # Candidates of tuning have a table of their own.
    sections = _sections([r for r in points if not is_tuning(r)])
    return environment.get_template("ops.html.j2").render(
        title=title,
        source_files=[Path(name).name for name in source_files],
        num_records=len(points),
        statuses=Counter(r.status for r in points).most_common(),
        sections=sections,
        goal_headings=GOAL_HEADINGS,
        goals=goal_rows(points),
        headings=HEADINGS,
        duels=[duel.words() for duel in duels(points)],
        columns=_COLUMNS,
        tuning_headings=TUNING_HEADINGS,
        tuning=tuning_rows(points),
        origins=origins(points),
        data=embed.script_json(_data(points)),
    )


def csv_text(records: Sequence[OpRecord]) -> str:
    """The records as CSV, the last of each key, with the columns of CSV_FIELDS and CSV_DERIVED."""
    points = latest(records)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_FIELDS, *CSV_DERIVED])
    for record, computed in zip(points, _derived(points), strict=True):
        row = [*(_field(record, path) for path in CSV_FIELDS.values()), *computed.values()]
        writer.writerow([csv_cell(value) for value in row])
    return out.getvalue()


def _derived(points: Sequence[OpRecord]) -> list[dict[str, float | int | None]]:
    rooflines, peers = Rooflines(points), Peers(points)
    return [
        {
            "rate": r.rate,
            "roofline_fraction": rooflines.fraction(r),
            "speedup": peers.speedup(r),
            **{column: peers.speedup(r, name) for column, name in CSV_NAMED.items()},
            "error": r.worst_error,
            "error_of_allowed": max((e / r.allowed[n] for n, e in r.error.items() if r.allowed.get(n)), default=None),
            "sm_clock_mhz": statistics.median(clocks) if (clocks := r.readings.get("sm_clock_mhz")) else None,
            "num_samples": len(r.samples_s),
        }
        for r in points
    ]


def _sections(points: Sequence[OpRecord]) -> list[_Section]:
    derived = dict(zip((r.key for r in points), _derived(points), strict=True))
    peers = Peers(points)
    found = []
    # Rooflines last: they are what the others are read against, not the subject.
    ordered = sorted(groups(points).items(), key=lambda item: item[0][2] in ROOFLINE_OPS)
    for i, ((kind, device, op, dtype, label), records) in enumerate(ordered, start=1):
        title = f"{op.replace('_', ' ')}, {dtype}" + (f" ({label})" if label else "")
        figures = []
        for direction in DIRECTIONS:
            chosen = [r for r in records if r.direction == direction]
            figures += draw_rates(f"{title}: {direction} ({kind.upper()})", chosen)
        table = _table([r for r in records if r.status == "ok"], derived, peers, caption=_caption(records))
        found.append(
            _Section(
                id=f"g{i}", kind=kind, title=f"{title} on {device}", figures=figures, table=table, gaps=gaps(records)
            )
        )
    return found


_COLUMNS = (
    Column(name="Length", unit="tokens", about="Tokens of one sample"),
    Column(name="Width", numeric=False, about="Heads x head dim, or hidden size; samples where there are several"),
    Column(name="Direction", numeric=False, about="Forward as in training, backward of a kept graph, or both"),
    Column(name="Provider", numeric=False, about="Who computed it; ours is marked"),
    Column(name="Rate", unit="TFLOP/s or TB/s", about="Useful FLOPs, or fewest bytes, over the median time"),
    Column(name="Time", unit="ms, p20–p80", about="Median time of one call, cold caches"),
    Column(name="Roofline", unit="%", about="Rate over that of matmul or clone in the same run"),
    Column(name="Speed-up", unit="× best peer", about="Rate over the fastest peer's at the same point of the same run"),
    Column(name="Verdict", numeric=False, about="From the interval of the time ratio to the best peer, in alternation"),
    Column(
        name="Error", unit="% of bar", about="Largest relative error against the oracle; small: per cent of its bar"
    ),
    Column(name="Memory", unit="GiB", about="Peak beside the inputs, forward and backward"),
    Column(name="SM clock", unit="MHz", about="Median over the samples; small: what held it down"),
    Column(name="Samples", about="Timed calls"),
)


def _table(
    records: Sequence[OpRecord], derived: dict[str, dict[str, float | int | None]], peers: Peers, *, caption: str
) -> Table:
    rows = []
    for r in sorted(records, key=_order):
        values = derived[r.key]
        rate, per_cent, used = values["rate"], values["roofline_fraction"], values["error_of_allowed"]
        unit, unit_name = rate_unit(r)
        best = peers.best(r)
        scale = 1e-3
        cells = (
            Cell(text=f"{r.shape['seq_len']:,}"),
            Cell(text=_width(r)),
            Cell(text=r.direction),
            Cell(text=r.provider),
            Cell(text=formatting.number(None if rate is None else rate / unit), note=unit_name if rate else ""),
            Cell(
                text=formatting.number(None if r.median_s is None else r.median_s / scale),
                note=formatting.interval(r.interval_s, scale),
            ),
            Cell(text=formatting.number(None if per_cent is None else 100 * per_cent)),
            Cell(text=formatting.ratio(values["speedup"]), note="" if best is None else best.provider),
            Cell(text=str(r.comparison.get("verdict", formatting.MISSING))),
            Cell(
                text=formatting.MISSING if r.worst_error is None else f"{r.worst_error:.1e}",
                note="" if used is None else f"{100 * used:.0f} %",
            ),
            Cell(text=formatting.number(r.memory["allocated"] / 2**30 if "allocated" in r.memory else None)),
            Cell(text=formatting.number(values["sm_clock_mhz"]), note=" ".join(r.readings.get("throttle", ()))),
            Cell(text=str(len(r.samples_s))),
        )
        rows.append(Row(cells=cells, status=r.status, reason=r.reason or "", is_baseline=r.is_ours))
    return Table(columns=_COLUMNS, rows=tuple(rows), caption=caption)


def _order(r: OpRecord) -> tuple[object, ...]:
    sizes = r.shape.get("head_dim", 0), r.shape["seq_len"]
    return *sizes, DIRECTIONS.index(r.direction), not r.is_ours, -(r.rate or 0.0), r.provider


def _caption(records: Sequence[OpRecord]) -> str:
    held = "a matrix product" if records[0].is_compute_bound else "a copy, read and write counted"
    unread = {str(r.readings["unavailable"]) for r in records if "unavailable" in r.readings}
    words = f"Roofline: {held}, of the same run. Ours is marked; speed-up and verdict compare with the fastest peer."
    return words + (f" Clocks: not available: {', '.join(sorted(unread))}." if unread else "")


def _width(r: OpRecord) -> str:
    words = (
        f"{r.shape['num_heads']} × {r.shape['head_dim']}" if "head_dim" in r.shape else f"{r.shape['hidden_size']:,}"
    )
    return words if r.shape.get("batch", 1) == 1 else f"{words}, {r.shape['batch']} samples"


def _data(points: Sequence[OpRecord]) -> dict[str, Any]:
    computed = _derived(points)
    return {
        "about": "op records packed by column (longreel.reports.embed), and what ops.csv has beside them",
        "num_records": len(points),
        "records": embed.pack([json.loads(record.to_json()) for record in points]),
        "csv_fields": CSV_FIELDS,
        "csv_derived": {name: [_finite(row[name]) for row in computed] for name in CSV_DERIVED},
    }


def _finite(value: float | int | None) -> float | int | str | None:
    if not isinstance(value, float):
        return value
    return float(f"{value:.9g}") if abs(value) < float("inf") else str(value)


def _field(record: OpRecord, path: str) -> object:
    name, _, rest = path.partition(".")
    value = getattr(record, name)
    if not rest or value is None:
        return value
    return value[int(rest)] if rest.isdigit() else value.get(rest)
