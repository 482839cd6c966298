"""The published result that the project reproduces, as data, and our records of the same points beside it.

Source: Open-Sora, 4 March 2024, the two tables of its acceleration report: DiT-XL/2 on H800 SXM 80 GB, batch 1 per
data-parallel rank, throughput in samples/s over all GPUs, "ZeRO-2" at sequence-parallel size 1 as the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longreel.reports import formatting
from longreel.reports.compare import Baselines, Group, fastest
from longreel.reports.records import Record

SOURCE = "Open-Sora, 4 March 2024: DiT-XL/2 on H800 SXM 80 GB, batch 1 per data-parallel rank"
CAVEAT = (
    "Read the ratios, not the samples/s: the benchmark script released that week multiplies the number of samples by "
    "the number of GPUs once too often, and it is not known whether the tables were made with it. Ratios between rows "
    "of one number of GPUs hold either way. The code behind them had no self-attention over the patches, so its regime "
    "is text attention only."
)
# The ratio of a row is to ZeRO-2 on as many GPUs, at this length.
REFERENCE_LENGTH = 614_400
_LAYOUTS = {"published": "text laid out as published", "replicated": "text laid out as ours"}
# DiT-XL/2, whatever a record calls it: depth, width, heads, patch of one frame.
_DIT_XL_2 = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "patch_size": [1, 2, 2]}


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedRow:
    """A row of the tables. strategy: ours of the same name; `local` is ZeRO-2. samples_per_s: over all GPUs."""

    num_gpus: int
    seq_len: int
    sp_degree: int
    strategy: str
    samples_per_s: float


PUBLISHED = (
    PublishedRow(num_gpus=8, seq_len=614_400, sp_degree=1, strategy="local", samples_per_s=0.79),
    PublishedRow(num_gpus=8, seq_len=614_400, sp_degree=2, strategy="fastseq", samples_per_s=1.15),
    PublishedRow(num_gpus=4, seq_len=614_400, sp_degree=1, strategy="local", samples_per_s=0.44),
    PublishedRow(num_gpus=4, seq_len=614_400, sp_degree=2, strategy="ulysses", samples_per_s=0.62),
    PublishedRow(num_gpus=8, seq_len=819_200, sp_degree=2, strategy="ulysses", samples_per_s=0.88),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ours:
    """Our record of a published row. ratio: of samples/s to our baseline at REFERENCE_LENGTH, with its interval."""

    record: Record
    ratio: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """Records of one kind, regime, layout and device. cells: of each row of PUBLISHED, None where there is none."""

    kind: str
    title: str
    cells: tuple[Ours | None, ...]


def published_ratio(row: PublishedRow) -> float:
    """A row's samples/s over that of ZeRO-2 on as many GPUs at REFERENCE_LENGTH, as the tables give them."""
    (reference,) = (r for r in PUBLISHED if r.strategy == "local" and r.num_gpus == row.num_gpus)
    return row.samples_per_s / reference.samples_per_s


def columns(records: Sequence[Record]) -> list[Column]:
    """A column for each kind, regime, text layout and device of which a record matches one row or more.

    Rows are matched by GPUs, length, degree and strategy, on DiT-XL/2 with one sample per group; where several policies
    match, by the fastest that ran.
    """
    matching = [r for r in records if _is_dit_xl_2(r) and r.batch_per_group == 1]
    families: dict[tuple[str, str, str, str], list[Record]] = {}
    for record in sorted(matching, key=lambda r: Group.of(r).sort_key):
        families.setdefault((record.kind, record.regime, _layout(record), record.device), []).append(record)
    found = []
    for (kind, regime, layout, device), members in families.items():
        cells = tuple(_ours(row, members) for row in PUBLISHED)
        if any(cells):
            words = f"{formatting.REGIME_LABELS[regime]}, {_LAYOUTS.get(layout, layout)}, {device}"
            found.append(Column(kind=kind, title=words, cells=cells))
    return found


def _ours(row: PublishedRow, members: Sequence[Record]) -> Ours | None:
    at = [
        r
        for r in members
        if (r.num_devices, r.seq_len, r.sp_degree, r.strategy)
        == (row.num_gpus, row.seq_len, row.sp_degree, row.strategy)
        # At SP 1 every policy of the same strategy is another baseline: ours is the one.
        and (row.strategy != "local" or r.is_baseline)
    ]
    if not at:
        return None
    record = fastest(at) or at[-1]
    baselines = Baselines(members)
    same = (r for r in members if r.num_devices == row.num_gpus and r.seq_len == REFERENCE_LENGTH and r.is_baseline)
    baseline = next((b for r in same if (b := baselines.of(r)) is not None and b.status == "ok"), None)
    if record.status != "ok" or baseline is None or not record.samples_per_s or not baseline.samples_per_s:
        return Ours(record=record, ratio=None, interval=None)
    if record.seq_len == REFERENCE_LENGTH:
        # At one length samples/s are to each other as tokens/s: the ratio and the interval that every other table has.
        return Ours(record=record, ratio=baselines.ratio(record), interval=baselines.ratio_interval(record))
    ratio = record.samples_per_s / baseline.samples_per_s
    return Ours(record=record, ratio=ratio, interval=_interval(ratio, record, baseline))


def _interval(ratio: float, record: Record, baseline: Record) -> tuple[float, float] | None:
    """The ratio with both step times at the ends of their intervals that are furthest apart."""
    if record is baseline or record.interval_s is None or baseline.interval_s is None:
        return None
    if not record.step_s or not baseline.step_s or min(*record.interval_s, *baseline.interval_s) <= 0:
        return None
    (low, high), (base_low, base_high) = record.interval_s, baseline.interval_s
    seconds = record.step_s / baseline.step_s
    return ratio * seconds * base_low / high, ratio * seconds * base_high / low


def _is_dit_xl_2(record: Record) -> bool:
    model = record.config.get("model")
    return isinstance(model, dict) and all(model.get(name) == size for name, size in _DIT_XL_2.items())


def _layout(record: Record) -> str:
    model = record.config.get("model")
    return str(model.get("cross_layout", "replicated")) if isinstance(model, dict) else ""
