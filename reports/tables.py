"""The table of one group: which columns there are, and every record as a row of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longreel.reports import formatting
from longreel.reports.compare import Baselines
from longreel.reports.records import Record
from longreel.reports.verdicts import verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """`name` heads the column, with the unit of its figures; `about` explains it.

    `value` is the column of the CSV that it is sorted by, where its text is not enough.
    """

    name: str
    unit: str = ""
    numeric: bool = True
    about: str = ""
    value: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """`text` is what is sorted by; `note` stands small behind it."""

    text: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One record; `reason` in words where it has no figure."""

    cells: tuple[Cell, ...]
    status: str
    reason: str
    is_baseline: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """`caption` names the baseline that the ratio column refers to."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str


def build_table(records: Sequence[Record], baselines: Baselines) -> Table:
    """The table of one group's records, in their order."""
    second, second_name = formatting.time_unit(max((r.step_s for r in records if r.step_s), default=1.0) / 10)
    of_step = any(r.memory_meaning == "step" for r in records)
    memory, memory_name = formatting.byte_unit(max((r.peak_memory or 0 for r in records), default=0) / 2)
    sent, sent_name = formatting.byte_unit(max((sum(r.traffic.values()) for r in records), default=0) / 2)
    tolerances = {r.error["tolerance"] for r in records if "tolerance" in r.error}
    one_tolerance = len(tolerances) == 1
    columns = (
        Column(
            name="Length",
            unit="tokens",
            about="Tokens per sample, × samples per SP group where there are several",
            value="seq_len",
        ),
        Column(name="Strategy", numeric=False, about="Sequence-parallel strategy"),
        Column(name="SP", about="Sequence-parallel degree"),
        Column(name="DP", about="Data-parallel degree"),
        Column(name="Engine", numeric=False, about="Sharding engine"),
        Column(name="Policy", numeric=False, about="Activation policy"),
        Column(name="Attention", numeric=False, about="Attention provider that ran or is assumed"),
        Column(name="Step time", unit=second_name, about="Of the slowest rank, with its interval", value="step_s"),
        Column(name="Tokens/s", about="Over all devices", value="tokens_per_s"),
        Column(
            name="Ratio",
            unit="× baseline",
            about="Tokens/s over the baseline's at the same length",
            value="ratio_to_baseline",
        ),
        Column(name="Verdict", numeric=False, about="On the ratio, from its interval; see what the labels mean"),
        Column(
            name="Step memory" if of_step else "Memory",
            unit=f"{memory_name} of process" if of_step else memory_name,
            about="What a step adds to the process of the rank where that is most, of that process's peak"
            if of_step
            else "Peak of the rank that holds most",
            value="peak_memory_bytes",
        ),
        Column(name="Sent", unit=f"{sent_name}/step", about="Bytes one rank sends in a step", value="bytes_sent"),
        Column(
            name="Error",
            unit=f"≤ {tolerances.pop():.0e}".replace("e-0", "e-") if one_tolerance else "",
            about="Largest relative error of loss and gradient against the oracle, and its tolerance",
            value="worst_error",
        ),
    )

    def row(r: Record) -> Row:
        ok = r.status == "ok"
        ratio = baselines.ratio(r)
        worst = r.worst_error
        tolerance = r.error.get("tolerance")
        cells = (
            Cell(text=f"{r.seq_len:,}", note="" if r.batch_per_group == 1 else f"× {r.batch_per_group}"),
            Cell(text=r.strategy),
            Cell(text=str(r.sp_degree)),
            Cell(text=str(r.dp_degree)),
            Cell(text=formatting.engine(r.engine)),
            Cell(text=r.policy),
            Cell(text=r.attention),
            Cell(
                text=formatting.number(r.step_s / second if r.step_s and ok else None),
                note=formatting.interval(r.interval_s, second) if ok else "",
            ),
            Cell(text=formatting.number(r.tokens_per_s if ok else None)),
            Cell(text=formatting.MISSING if ratio is None else f"{ratio:.2f}"),
            Cell(text=verdict(r, baselines) or formatting.MISSING),
            Cell(
                text=formatting.number(None if r.peak_memory is None else r.peak_memory / memory),
                note=f"of {formatting.number(r.memory['process'] / memory)}" if r.memory_meaning == "step" else "",
            ),
            Cell(text=formatting.number(sum(r.traffic.values()) / sent if r.traffic else None)),
            Cell(
                text=formatting.MISSING if worst is None else f"{worst:.1e}".replace("e-0", "e-"),
                note=""
                if worst is None or tolerance is None or one_tolerance
                else f"≤ {tolerance:.0e}".replace("e-0", "e-"),
            ),
        )
        return Row(cells=cells, status=r.status, reason=r.reason or "", is_baseline=r is baselines.of(r))

    return Table(columns=columns, rows=tuple(row(r) for r in records), caption=_caption(records, baselines))


def _caption(records: Sequence[Record], baselines: Baselines) -> str:
    chosen = [r for r in records if r is baselines.of(r)]
    if not chosen:
        return "No baseline was run in this group, so there are no ratios."

    def values(field: str) -> str:
        return " or ".join(sorted({str(getattr(r, field)) for r in chosen}))

    engines = " or ".join(sorted({formatting.engine(r.engine) for r in chosen}))
    caption = (
        f"Baseline: {engines}, SP {values('sp_degree')}, DP {values('dp_degree')}, {values('strategy')}, "
        f"policy {values('policy')}. Ratios compare with it at the same length."
    )
    if sum(r.is_baseline for r in records) > len(chosen):
        caption += " Where several of its rows share a length, with the fastest, which is marked."
    return caption
