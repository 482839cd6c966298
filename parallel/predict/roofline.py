"""First, readable model of step time: every op at the slower of its arithmetic and its memory traffic.

Time of a call = max(FLOPs / rate, bytes / bandwidth, launch floor); collectives: latency + bytes / link bandwidth. One
after the other, except where the schedule overlaps:
- a strategy's exchange hides behind its attention and projections as its schedule lets it (schedule.py): all-to-alls of
  heads in chunks (Ulysses) behind attention on other chunks, what goes round a ring behind attention on the chunk that
  is there, FastSeq's chunks behind their projections, and attention where that runs chunk by chunk; an all-to-all that
  is not in chunks (FastSeq's output) is waited for;
- the sharding engine's collectives hide behind the compute of their phase, but for the largest one, which has nothing
  to hide behind at the start of forward or the end of backward;
- activations that go to host memory and back hide behind the compute of forward and of backward.
The interval takes every rate at the fast end with this overlap, and every rate at the slow end without any overlap of
communication. It covers the assumed rates, not what the model leaves out (stragglers, clocks under load, data loading).
Source: Williams, Waterman and Patterson 2009, Roofline.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from longreel.parallel.predict.hardware import COLLECTIVE_LATENCY, HOST_LINK, KERNEL_FLOOR, GPUProfile, Rate
from longreel.parallel.predict.ledger import OpCost
from longreel.parallel.predict.schedule import fastseq_backward_waits, fastseq_waits, ring_waits, ulysses_waits

# The op, forward and backward, whose point-to-point exchange is a ring.
_RING = "exchange_attention"
# Of Ulysses' exchange what goes in: q, k and v forward, the output's gradient backward, in self-attention.
_SHARE_IN = {False: 0.75, True: 0.25}

Pace = Literal["expected", "fast", "slow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Predicted time of one step on one rank, seconds.

    Args:
        seconds, low, high: the estimate and its interval.
        breakdown: seconds that add up to `seconds`: matmul, attention, memory, optimizer, and the exposed
            communication of the sequence exchange and of the sharding engine.
        hidden: communication seconds that overlap with compute, by the same names.
        rates: every figure used, with its provenance.
    """

    seconds: float
    low: float
    high: float
    breakdown: Mapping[str, float]
    hidden: Mapping[str, float]
    rates: Mapping[str, Rate]


def step_time(
    costs: Mapping[OpCost, float],
    profile: GPUProfile,
    *,
    group_sizes: Mapping[str, int],
    group_extents: Mapping[str, int] | None = None,
    host_bytes: int = 0,
) -> StepTime:
    """Time of one step.

    Args:
        costs: calls of every op on one rank.
        profile: the GPU.
        group_sizes: ranks of every process group that a collective names. group_extents: consecutive ranks that it
            lies in; where they are more than a node's GPUs, its slowest link is the network. None: all in one node.
        host_bytes: activations that go to host memory in forward and come back in backward.
    """
    far = frozenset(name for name, ranks in (group_extents or {}).items() if ranks > profile.gpus_per_node)
    parts, hidden = _parts(costs, profile, group_sizes, far, host_bytes, "expected", overlap=True)
    low, _ = _parts(costs, profile, group_sizes, far, host_bytes, "fast", overlap=True)
    high, _ = _parts(costs, profile, group_sizes, far, host_bytes, "slow", overlap=False)
    return StepTime(
        seconds=sum(parts.values()),
        low=sum(low.values()),
        high=sum(high.values()),
        breakdown=parts,
        hidden=hidden,
        rates=_rates_used(costs, profile, far) | ({"host_byte_s": HOST_LINK} if host_bytes else {}),
    )


def _rates_used(costs: Mapping[OpCost, float], profile: GPUProfile, far: frozenset[str]) -> dict[str, Rate]:
    rates = {
        "matmul_flop_s": profile.matmul,
        "memory_byte_s": profile.memory,
        "link_byte_s": profile.link,
        "collective_latency_s": COLLECTIVE_LATENCY,
        "kernel_floor_s": KERNEL_FLOOR,
    }
    if far:
        rates["node_link_byte_s"] = profile.node_link
    dims: dict[str, int] = {}
    # Of the calls with most work, which are those of self-attention; another head_dim has a rate of its own name.
    attention = [cost for cost in costs if cost.kind == "attention"]
    for cost in sorted(attention, key=lambda cost: (-cost.flops, -cost.seq_len, cost.head_dim, cost.name)):
        backward = cost.name.endswith("backward")
        name = f"attention_{'backward' if backward else 'forward'}"
        rate = profile.attention(cost.head_dim, backward=backward, seq_len=cost.seq_len)
        if dims.setdefault(name, cost.head_dim) != cost.head_dim:
            name += f"_head_dim_{cost.head_dim}"
        rates.setdefault(f"{name}_flop_s", rate)
    return rates


def _speed(rate: Rate, pace: Pace) -> float:
    return {"expected": rate.value, "fast": rate.high, "slow": rate.low}[pace]


def _delay(seconds: Rate, pace: Pace) -> float:
    return {"expected": seconds.value, "fast": seconds.low, "slow": seconds.high}[pace]


def _op_seconds(cost: OpCost, profile: GPUProfile, far: frozenset[str], pace: Pace) -> float:
    if cost.kind == "collective":
        link = profile.node_link if cost.group in far else profile.link
        return _delay(COLLECTIVE_LATENCY, pace) + cost.bytes / _speed(link, pace)
    seconds = max(cost.bytes / _speed(profile.memory, pace), _delay(KERNEL_FLOOR, pace))
    if cost.kind == "attention":
        rate = profile.attention(cost.head_dim, backward=cost.name.endswith("backward"), seq_len=cost.seq_len)
        return max(seconds, cost.flops / _speed(rate, pace))
    if cost.kind == "matmul":
        return max(seconds, cost.flops / _speed(profile.matmul, pace))
    return seconds


def _parts(
    costs: Mapping[OpCost, float],
    profile: GPUProfile,
    group_sizes: Mapping[str, int],
    far: frozenset[str],
    host_bytes: int,
    pace: Pace,
    *,
    overlap: bool,
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds that count and seconds that are hidden, by part."""
    parts = dict.fromkeys(("matmul", "attention", "memory", "optimizer", "sequence", "sharding"), 0.0)
    total = {"sequence": 0.0, "sharding": 0.0}
    compute: dict[str, float] = defaultdict(float)
    work: dict[tuple[str, str], float] = defaultdict(float)
    chunked: set[str] = set()
    exchange: dict[tuple[str, int], float] = defaultdict(float)
    all_to_all: dict[tuple[str, int], float] = defaultdict(float)
    sharding: dict[str, float] = defaultdict(float)
    largest: dict[str, float] = defaultdict(float)
    for cost, calls in costs.items():
        one = _op_seconds(cost, profile, far, pace)
        if cost.kind != "collective":
            parts["optimizer" if cost.phase == "optimizer" else cost.kind] += calls * one
            compute[cost.phase] += calls * one
            if cost.kind in ("matmul", "attention"):
                work[cost.scope, cost.kind] += calls * one
            continue
        total["sequence" if cost.scope else "sharding"] += calls * one
        if not cost.scope:
            sharding[cost.phase] += calls * one
            largest[cost.phase] = max(largest[cost.phase], one)
        elif cost.name == "send":
            exchange[cost.scope, group_sizes[cost.group]] += calls * one
            if cost.chunks > 1:
                chunked.add(cost.scope)
        else:
            all_to_all[cost.scope, cost.chunks] += calls * one
    for (scope, chunks), seconds in all_to_all.items():
        share_in = _SHARE_IN[scope.endswith("backward")]
        waits = ulysses_waits(chunks, seconds, work[scope, "attention"], share_in=share_in) if overlap else seconds
        parts["sequence"] += waits
    for (scope, size), seconds in exchange.items():
        if not overlap:
            parts["sequence"] += seconds
            continue
        projection, attention = work[scope, "matmul"], work[scope, "attention"]
        if scope.startswith(_RING):
            parts["sequence"] += ring_waits(size, seconds, projection + attention)
        elif scope not in chunked:
            parts["sequence"] += ring_waits(size, seconds, projection)
        else:
            waits_of = fastseq_backward_waits if scope.endswith("backward") else fastseq_waits
            parts["sequence"] += waits_of(size, seconds, projection, attention)
    for phase, seconds in sharding.items():
        cover = compute[phase] if overlap else 0.0
        parts["sharding"] += largest[phase] + max(0.0, seconds - largest[phase] - cover)
    if host_bytes:
        one_way = host_bytes / _speed(HOST_LINK, pace)
        covers = (compute[phase] if overlap else 0.0 for phase in ("forward", "backward"))
        total["offload"], parts["offload"] = 2 * one_way, sum(max(0.0, one_way - cover) for cover in covers)
    return parts, {name: seconds - parts[name] for name, seconds in total.items()}
