"""Which record is compared with which: groups, the one baseline of each, ratios to it, and who is fastest.

Records are compared only inside a group: same kind (measured, emulated, predicted), regime, model, device and number
of devices; and against the baseline only at the same sequence length.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from longreel.reports import formatting
from longreel.reports.records import Kind, Record, Regime
from longreel.reports.turns import MIN_DECISIVE, compare

# Timed steps of either side below which nothing is said about who is faster.
MIN_SAMPLES = MIN_DECISIVE


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """What records must have in common to share a figure, a table and a baseline."""

    kind: Kind
    regime: Regime
    model: str
    device: str
    num_devices: int

    @classmethod
    def of(cls, record: Record) -> Group:
        return cls(
            kind=record.kind,
            regime=record.regime,
            model=record.model,
            device=record.device,
            num_devices=record.num_devices,
        )

    @property
    def label(self) -> str:
        """MEASURED, EMULATED or PREDICTED."""
        return self.kind.upper()

    @property
    def title(self) -> str:
        """The group without its label, in words."""
        return self.title_of(str(self.num_devices))

    def title_of(self, num_devices: str) -> str:
        """The same of several groups that differ in their number of devices alone."""
        return f"{num_devices} × {self.device}, {self.model}, {formatting.REGIME_LABELS[self.regime]}"

    @property
    def sort_key(self) -> tuple[int, int, str, str, int]:
        kinds, regimes = get_args(Kind), get_args(Regime)
        return kinds.index(self.kind), regimes.index(self.regime), self.model, self.device, self.num_devices


def group_records(records: Iterable[Record]) -> dict[Group, list[Record]]:
    """Records by group: measured first, then emulated, then predicted; in a group by length, strategy and degree."""
    found: defaultdict[Group, list[Record]] = defaultdict(list)
    for record in records:
        found[Group.of(record)].append(record)

    def order(record: Record) -> tuple[int, bool, str, int, str, str]:
        r = record
        return r.seq_len, not r.is_baseline, r.strategy, r.sp_degree, r.engine, r.policy

    return {group: sorted(found[group], key=order) for group in sorted(found, key=lambda g: g.sort_key)}


def fastest(records: Iterable[Record]) -> Record | None:
    """The record with status `ok` and the most tokens per second, None where no record is `ok`."""
    timed = [r for r in records if r.status == "ok"]
    return max(timed, key=lambda r: r.tokens_per_s or 0.0, default=None)


def _place(record: Record) -> tuple[Any, ...]:
    """Group and length: asked for so often that Group itself takes too long to make."""
    return record.kind, record.regime, record.model, record.device, record.num_devices, record.seq_len


class Baselines:
    """The baseline of each (group, sequence length), found once for all records.

    Where several records at one length are marked as baseline (activation policies of the same configuration, a run
    repeated on another commit), the fastest one that ran is the baseline: the strongest opponent.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        marked: defaultdict[tuple[Any, ...], list[Record]] = defaultdict(list)
        for record in records:
            if record.is_baseline:
                marked[_place(record)].append(record)
        self._of = {where: fastest(found) or found[-1] for where, found in marked.items()}

    def of(self, record: Record) -> Record | None:
        """The baseline at the record's group and length (which may have failed), None where none was run."""
        return self._of.get(_place(record))

    def in_turns(self, record: Record) -> tuple[float, float, float] | None:
        """Ratio of tokens/s and its bounds, of samples that were taken in turns with those of this very baseline.

        None where there are none, or where they are of the baseline of another commit or environment.
        """
        if not record.comparison:
            return None
        baseline = self.of(record)
        if baseline is None or record is baseline or baseline.status != "ok" or record.status != "ok":
            return None
        if any(record.provenance.get(name) != baseline.provenance.get(name) for name in ("commit", "environment")):
            return None
        found = [record.comparison.get(name) for name in ("low", "ratio", "high")]
        seconds = [value for value in found if isinstance(value, int | float) and 0 < value < math.inf]
        if len(seconds) < 3 or sorted(seconds) != seconds:
            return None
        low, middle, high = seconds
        return 1 / middle, 1 / high, 1 / low

    def ratio(self, record: Record) -> float | None:
        """Tokens/s of the record over the baseline's, of samples taken in turns where there are such.

        None unless both ended `ok`.
        """
        if turns := self.in_turns(record):
            return turns[0]
        baseline = self.of(record)
        if baseline is None or baseline.status != "ok" or record.status != "ok":
            return None
        if not record.tokens_per_s or not baseline.tokens_per_s:
            return None
        return record.tokens_per_s / baseline.tokens_per_s

    def ratio_interval(self, record: Record) -> tuple[float, float] | None:
        """Bounds of `ratio`: those of samples taken in turns with the baseline's, where the record has them.

        Else by the same rule from both records' own samples where both were measured (percentiles of either side would
        call one equal pair in ten different); where not, both step times take the ends of their intervals that are
        furthest apart.
        """
        if turns := self.in_turns(record):
            return turns[1:]
        ratio, baseline = self.ratio(record), self.of(record)
        if ratio is None or baseline is None or record is baseline:
            return None
        if record.interval_s is None or baseline.interval_s is None or not record.step_s or not baseline.step_s:
            return None
        if record.kind == "measured":
            if not record.samples_s or not baseline.samples_s or min(*record.samples_s, *baseline.samples_s) <= 0:
                return None
            found = compare(record.samples_s, baseline.samples_s)
            tokens = ratio * record.step_s / baseline.step_s
            return tokens / found.high, tokens / found.low
        slow = record.interval_s[1] / record.step_s
        fast = record.interval_s[0] / record.step_s
        if slow <= 0 or fast <= 0:
            return None
        return (
            ratio * baseline.interval_s[0] / baseline.step_s / slow,
            ratio * baseline.interval_s[1] / baseline.step_s / fast,
        )


def throughput_interval(record: Record) -> tuple[float, float] | None:
    """Tokens/s at both ends of the step time's interval, low first; None where there is none."""
    if record.interval_s is None or record.tokens_per_s is None or record.step_s is None or record.interval_s[0] <= 0:
        return None
    tokens = record.tokens_per_s * record.step_s
    return tokens / record.interval_s[1], tokens / record.interval_s[0]


def configuration(record: Record) -> str:
    """A record's configuration in words: `ulysses, SP 2, DP 4, ZeRO-2, policy none`."""
    engine = formatting.engine(record.engine)
    return f"{record.strategy}, SP {record.sp_degree}, DP {record.dp_degree}, {engine}, policy {record.policy}"


def sharing(records: Iterable[Record]) -> str | None:
    """How the group's ranks shared cores (`4 ranks share 2 cores`), None where each had its own device."""
    notes = dict.fromkeys(str(r.provenance["sharing"]) for r in records if r.provenance.get("sharing"))
    return "; ".join(notes) or None


@dataclass(frozen=True, kw_only=True, slots=True)
class Headline:
    """A group in one sentence: the fastest configuration against the baseline.

    They are compared at the longest length at which the baseline has a figure, which leaves no choice that could
    flatter; `longest` says how far any configuration got. Only where `is_conclusive` may the ratio be read as a result.
    """

    group: Group
    best: Record | None
    baseline: Record | None
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    longest: Record | None
    verdict: str
    is_conclusive: bool


def headline(group: Group, records: Sequence[Record], baselines: Baselines) -> Headline:
    """The headline of one group's records."""
    timed = [r for r in records if r.status == "ok"]
    with_baseline = [r for r in timed if baselines.ratio(r) is not None]
    candidates = with_baseline or timed
    reach = max((r.seq_len for r in candidates), default=0)
    best = fastest(r for r in candidates if r.seq_len == reach)
    baseline = baselines.of(best) if best and with_baseline else None
    ratio = baselines.ratio(best) if best and baseline else None
    bounds = baselines.ratio_interval(best) if best and baseline else None
    furthest = max((r.seq_len for r in timed), default=0)
    longest = fastest(r for r in timed if r.seq_len == furthest)
    doubt = _doubt([r for r in with_baseline if r.seq_len == reach])
    if best is None:
        verdict = "No configuration has a figure."
    elif doubt is not None:
        verdict = f"No verdict: {doubt}."
    elif baseline is None:
        verdict = "The baseline has no figure at any length, so there is no ratio."
    elif best is baseline:
        others = any(r is not baseline for r in with_baseline if r.seq_len == reach)
        verdict = "Nothing beats the baseline here." if others else "Only the baseline has a figure here."
    elif bounds is None:
        verdict = "Faster than the baseline; no interval was recorded."
    elif bounds[0] > 1:
        verdict = "Faster than the baseline over the whole interval."
        if group.kind == "measured":
            order = "in turns" if baselines.in_turns(best) else "one after the other"
            verdict += f" The two were timed {order}."
        elif group.kind == "emulated" and (few := _fewest([best, baseline])) < MIN_SAMPLES:
            verdict += f" It is what the extremes of {few} timed steps of each allow."
    else:
        verdict = "The interval includes 1: not distinguishable from the baseline."
        if group.kind == "predicted":
            verdict = (
                "The interval includes 1. It is wider than the model's doubt: it takes slow rates for one side and "
                "fast ones for the other, though both would run on the same GPUs."
            )
    return Headline(
        group=group,
        best=best,
        baseline=baseline,
        ratio=ratio,
        ratio_interval=bounds,
        longest=longest,
        verdict=verdict,
        is_conclusive=doubt is None,
    )


def _doubt(compared: Sequence[Record]) -> str | None:
    """Why these records, timed at one length, say nothing about who is faster; None where they may."""
    if len(compared) < 2:
        return None
    if shared := sharing(compared):
        return f"{shared}, so this checks correctness, not speed"
    # Emulated steps may take minutes; two or three are timed, and the interval is that of their extremes.
    fewest = _fewest(r for r in compared if r.kind == "measured")
    if fewest < MIN_SAMPLES:
        return (
            f"too few samples, {fewest} timed step{'s' if fewest > 1 else ''} where at least {MIN_SAMPLES} are needed"
        )
    return None


def _fewest(records: Iterable[Record]) -> int:
    """Timed steps of the record that has fewest of them."""
    return min((len(r.samples_s) for r in records), default=MIN_SAMPLES)
