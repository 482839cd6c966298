"""Records as CSV: fields of the record, and what is computed from them beside the baseline."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from longreel.reports.compare import Baselines, throughput_interval
from longreel.reports.exposure import exposed_seconds
from longreel.reports.frame import Mark
from longreel.reports.records import Record
from longreel.reports.verdicts import verdict

# CSV column -> field of the record, dotted where it lies inside a mapping.
CSV_FIELDS = {
    "key": "key",
    "kind": "kind",
    "regime": "regime",
    "status": "status",
    "reason": "reason",
    "model": "model",
    "device": "device",
    "num_devices": "num_devices",
    "strategy": "strategy",
    "sp_degree": "sp_degree",
    "dp_degree": "dp_degree",
    "engine": "engine",
    "policy": "policy",
    "attention": "attention",
    "seq_len": "seq_len",
    "batch_per_group": "batch_per_group",
    "is_baseline": "is_baseline",
    "step_s": "step_s",
    "step_low_s": "interval_s.0",
    "step_high_s": "interval_s.1",
    "memory_allocated_bytes": "memory.allocated",
    "memory_reserved_bytes": "memory.reserved",
    "memory_device_bytes": "memory.device",
    "memory_process_bytes": "memory.process",
    "memory_process_before_bytes": "memory.process_before",
    "memory_limit_bytes": "memory_limit",
    "memory_usable_bytes": "memory_usable",
    "flops": "flops",
    "hw_flops": "hw_flops",
    "mfu": "mfu",
    "hfu": "hfu",
    "error_loss": "error.loss",
    "error_grad": "error.grad",
    "error_tolerance": "error.tolerance",
    "comparison_verdict": "comparison.verdict",
    "energy_j": "energy_j",
    "commit": "provenance.commit",
}
# Columns that are computed: tokens and samples per second over all devices, tokens/s over the baseline's of the same
# group and length with its interval and verdict, bytes one rank sends in a step over all collectives, seconds of a step
# that wait for communication, number of timed steps, the memory figure and the error that tables show, the command that
# makes the record again.
CSV_DERIVED = (
    "tokens_per_s",
    "samples_per_s",
    "ratio_to_baseline",
    "ratio_low",
    "ratio_high",
    "verdict",
    "bytes_sent",
    "exposed_s",
    "num_samples",
    "peak_memory_bytes",
    "worst_error",
    "reproduce",
)
# What begins a formula in Excel, LibreOffice and Google Sheets; a tab or a line end may stand before it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def derived(record: Record, baselines: Baselines) -> dict[str, float | int | str | None]:
    """The values of CSV_DERIVED for one record; None (an empty cell) where there is no valid figure."""
    ok = record.status == "ok"
    low, high = baselines.ratio_interval(record) or (None, None)
    return {
        "tokens_per_s": record.tokens_per_s if ok else None,
        "samples_per_s": record.samples_per_s if ok else None,
        "ratio_to_baseline": baselines.ratio(record),
        "ratio_low": low,
        "ratio_high": high,
        "verdict": verdict(record, baselines),
        "bytes_sent": sum(record.traffic.values()) if record.traffic else None,
        "exposed_s": exposed_seconds(record),
        "num_samples": len(record.samples_s),
        "peak_memory_bytes": record.peak_memory,
        "worst_error": record.worst_error,
        "reproduce": reproduce(record),
    }


def reproduce(record: Record) -> str | None:
    """The command that makes a record again, None where it does not say."""
    command = record.provenance.get("reproduce") or record.provenance.get("command")
    return None if command is None else str(command)


def csv_text(records: Sequence[Record]) -> str:
    """The records as CSV: a header line, then a line per record with the columns of CSV_FIELDS and CSV_DERIVED.

    Units are in the names: `_s` seconds, `_bytes` bytes; throughputs are per second over all devices.
    """
    baselines = Baselines(records)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_FIELDS, *CSV_DERIVED])
    for record in records:
        row = [*(_field(record, name) for name in CSV_FIELDS.values()), *derived(record, baselines).values()]
        writer.writerow([csv_cell(value) for value in row])
    return out.getvalue()


def figure_csv(marks: Sequence[Mark], axis: str) -> str:
    """The points of a figure as CSV: which record, what the figure shows of it, and the interval of its throughput.

    Args:
        marks: of a drawing. axis: what its values are, the name of their column.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("kind", "regime", "strategy", "sp_degree", "engine", "policy", "num_devices", "seq_len", "is_baseline")
    writer.writerow([*names, "status", axis, "tokens_per_s_low", "tokens_per_s_high", "key"])
    for mark in marks:
        low, high = throughput_interval(mark.record) or (None, None)
        row = [*(getattr(mark.record, name) for name in names), mark.record.status, mark.value, low, high]
        writer.writerow([csv_cell(value) for value in (*row, mark.record.key)])
    return out.getvalue()


def csv_cell(value: object) -> object:
    """A value as it goes into a CSV: a text that a spreadsheet would take for a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in _FORMULA else value


def _field(record: Record, path: str) -> object:
    name, _, rest = path.partition(".")
    value = getattr(record, name)
    if not rest or value is None:
        return value
    return value[int(rest)] if rest.isdigit() else value.get(rest)
