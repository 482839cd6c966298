"""How long a case takes before it runs: its work over a rate measured at another length, else over an assumed one.

A case that would take too long is cut by one rule: fewer samples first, down to LEAST_SAMPLES, then without the peers
that are slowest, the fastest peer and our own kernels never. What is cut is a row with its reason.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from longreel.bench import providers
from longreel.bench.ops import OPS, OpCase, work_of
from longreel.bench.timing import TimingRule
from longreel.reports.op_records import OpRecord

LEAST_SAMPLES = 2
# Gate: one run to see the memory and one that is compared. A forward and backward of LONG_S is run once for both, and
# never to warm up.
_GATE_RUNS = 2
LONG_S = 3.0
# Assumed, seconds: compilation of a provider at a new shape, of a kernel at a new head_dim, and what is always spent.
_COMPILES = {"flex": 20.0, "compiled": 5.0}
_COMPILES_ONCE = 2.5
_ALWAYS = 0.3
# Assumed useful FLOP/s of attention on one H200, forward and backward, below published figures and our aims.
_ATTENTION = {
    "triton": (300e12, 200e12),
    "triton-atomic": (300e12, 250e12),
    "triton-hopper": (400e12, 200e12),
    "triton-hopper-atomic": (400e12, 250e12),
    "sdpa-flash": (240e12, 200e12),
    "sdpa-cudnn": (350e12, 280e12),
    "sdpa-efficient": (150e12, 100e12),
    "flex": (250e12, 150e12),
    "flash-attn-2": (240e12, 200e12),
    "flash-attn-3": (390e12, 350e12),
    "flash-attn-4": (400e12, 400e12),
    "eager": (15e12, 15e12),
    "compiled": (20e12, 20e12),
}
# Assumed bytes/s by the fewest an op must move: eager moves several times as many.
_POINTWISE = {
    "triton": (2.5e12, 2.0e12),
    "compiled": (2.0e12, 1.0e12),
    "liger": (2.0e12, 1.0e12),
    "eager": (5e11, 4e11),
}
_MATMUL, _CLONE = 500e12, 3e12
# The oracle of an op on tokens, in fp64 and in the dtype, forward and backward: bytes moved per byte of the op's own.
_ORACLE_TRAFFIC, _ORACLE_RATE = 40.0, 2e12


class Rates:
    """Seconds of one call, from records of the same device; on CUDA also from assumed rates of an H200.

    Args:
        records: whatever a record file holds. device: in words, as records have it.
        assume: use the rates assumed above where nothing was measured.
    """

    def __init__(self, records: Iterable[OpRecord], device: str, *, assume: bool) -> None:
        self._assume = assume
        self._measured: defaultdict[tuple[object, ...], dict[int, float]] = defaultdict(dict)
        self._missing: set[tuple[str, str]] = set()
        for r in records:
            if r.device != device or str(r.config.get("label", "")).startswith("tune"):
                continue
            if r.rate:
                where = (r.op, r.provider, _sizes(r.shape), r.dtype, r.direction)
                self._measured[where][r.shape["seq_len"]] = r.rate
            elif r.status == "skipped" and "not installed" in (r.reason or ""):
                self._missing.add((r.op, r.provider))

    def seconds(self, case: OpCase, provider: str, direction: str) -> float | None:
        """One call of a provider; None where nothing is known about it."""
        if direction == "both":
            halves = [self.seconds(case, provider, half) for half in ("forward", "backward")]
            return None if None in halves else sum(half for half in halves if half is not None)
        found = self._rate(case, provider, direction)
        work = work_of(case, direction)
        return None if found is None else (work["flops"] or work["bytes_moved"] or 0.0) / found

    def _rate(self, case: OpCase, provider: str, direction: str) -> float | None:
        ran = providers.same_as(provider, direction) or provider
        at = self._measured.get((case.op, ran, _sizes(case.shape()), case.dtype, direction))
        if at:
            # The longest one that is not longer, as short ones launch more than they compute; else the shortest.
            return at[max((n for n in at if n <= case.seq_len), default=min(at))]
        if not self._assume:
            return None
        if case.op in ("matmul", "clone"):
            return _MATMUL if case.op == "matmul" else _CLONE
        assumed = _ATTENTION if OPS[case.op].compute_bound else _POINTWISE
        return assumed[provider][direction == "backward"] if provider in assumed else None

    def is_new(self, case: OpCase, provider: str) -> bool:
        """Whether the provider has no figure yet at this op, dtype and width: it has to be compiled."""
        sizes = _sizes(case.shape())
        return not any(
            (case.op, provider, sizes, case.dtype, d) in self._measured for d in ("forward", "backward", "both")
        )

    def is_missing(self, case: OpCase, provider: str) -> bool:
        """Whether an earlier record says that the provider is not installed."""
        return (case.op, provider) in self._missing

    def is_long(self, case: OpCase, provider: str) -> bool:
        """Whether a forward and backward is known to take LONG_S."""
        return sum(self.seconds(case, provider, d) or 0.0 for d in _directions(case)) >= LONG_S

    def gate_seconds(self, case: OpCase, provider: str) -> float:
        """Compilation, the runs of the gate, and the oracle."""
        if self.is_missing(case, provider):
            return 0.0
        once = _COMPILES_ONCE if self.is_new(case, provider) else 0.0
        compiles = _COMPILES.get(provider, once) if self._assume else 0.0
        runs = sum(self.seconds(case, provider, d) or 0.0 for d in _directions(case))
        oracle = 0.0
        if self._assume and not OPS[case.op].compute_bound:
            oracle = _ORACLE_TRAFFIC * sum(OPS[case.op].work(case)) / _ORACLE_RATE
        return compiles + (_ALWAYS if self._assume else 0.0) + (1 if runs >= LONG_S else _GATE_RUNS) * runs + oracle

    def timing_seconds(self, case: OpCase, provider: str, direction: str, rule: TimingRule, samples: int) -> float:
        """Warm-up and samples of one direction; a sample of a backward runs the forward before it."""
        if self.is_missing(case, provider) or providers.same_as(provider, direction) is not None:
            return 0.0
        call = self.seconds(case, provider, direction)
        if call is None:
            return 0.0
        sample = call if direction != "backward" else call + (self.seconds(case, provider, "forward") or 0.0)
        most = min(rule.max_samples, max(samples, round(rule.budget_s / call)))
        warm_up = 0.0 if self.is_long(case, provider) else max(rule.warm_up_s, sample)
        return warm_up + most * sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How a case is run within its time. samples: least of each direction. left_out: provider -> why. seconds: all."""

    samples: int
    left_out: Mapping[str, str]
    seconds: float


def fit(
    case: OpCase,
    names: Sequence[str],
    directions: Sequence[str],
    rule: TimingRule,
    rates: Rates,
    *,
    case_s: float | None,
) -> Fit:
    """What of a case fits into case_s seconds, by the rule at the head of this file; None for all of it."""
    kept, left_out = list(names), {}

    def seconds(samples: int) -> float:
        return sum(
            rates.gate_seconds(case, name) + sum(rates.timing_seconds(case, name, d, rule, samples) for d in directions)
            for name in kept
        )

    samples = rule.min_samples
    if case_s is None:
        return Fit(samples=samples, left_out={}, seconds=seconds(samples))
    while seconds(samples) > case_s and samples > LEAST_SAMPLES:
        samples -= 1
    ours = providers.kernel_providers(case.op)

    def cost(name: str) -> float:
        return sum(rates.seconds(case, name, d) or 0.0 for d in _directions(case))

    peers = [name for name in kept if name not in ours and cost(name) > 0 and not rates.is_missing(case, name)]
    peers.sort(key=cost)
    while seconds(samples) > case_s and len(peers) > 1:
        slowest = peers.pop()
        left_out[slowest] = (
            f"left out: one forward and backward would take {cost(slowest):.3g} s, and all of this case "
            f"{seconds(samples):.3g} s of the {case_s:g} s it may take"
        )
        kept.remove(slowest)
    return Fit(samples=samples, left_out=left_out, seconds=seconds(samples))


def _directions(case: OpCase) -> tuple[str, ...]:
    return ("forward", "backward") if OPS[case.op].differentiable else ("forward",)


def _sizes(shape: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """All of a shape but its length."""
    return tuple(sorted((name, size) for name, size in shape.items() if name != "seq_len"))
