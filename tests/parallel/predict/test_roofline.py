"""Step time of hand-made costs, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from longreel.parallel.predict.hardware import COLLECTIVE_LATENCY, KERNEL_FLOOR, get_profile
from longreel.parallel.predict.ledger import OpCost
from longreel.parallel.predict.roofline import StepTime, step_time
from longreel.parallel.predict.schedule import fastseq_backward_waits, fastseq_waits, ring_waits, ulysses_waits

H800 = get_profile("H800")
GROUPS = {"sp": 4, "all": 8}


def _time(costs: dict[OpCost, int]) -> StepTime:
    return step_time(costs, H800, group_sizes=GROUPS)


def _op(kind: str, name: str = "mm", **fields: Any) -> OpCost:
    return OpCost(**({"kind": kind, "name": name, "phase": "forward", "scope": "", "flops": 0, "bytes": 0} | fields))


def test_an_op_takes_the_slower_of_arithmetic_and_memory() -> None:
    busy = _time({_op("matmul", flops=10**12, bytes=10**6): 3})
    assert busy.breakdown["matmul"] == pytest.approx(3 * 1e12 / H800.matmul.value)
    starved = _time({_op("matmul", flops=10**6, bytes=10**10): 1})
    assert starved.breakdown["matmul"] == pytest.approx(1e10 / H800.memory.value)
    tiny = _time({_op("memory", bytes=4): 5})
    assert tiny.seconds == pytest.approx(5 * KERNEL_FLOOR.value)


def test_attention_has_rates_of_its_own() -> None:
    forward = _op("attention", "attention_packed", flops=10**13, head_dim=72)
    backward = _op("attention", "attention_packed_backward", flops=10**13, head_dim=72)
    assert _time({forward: 1}).seconds == pytest.approx(1e13 / H800.attention(72, backward=False).value)
    assert _time({backward: 1}).seconds == pytest.approx(1e13 / H800.attention(72, backward=True).value)


def test_ulysses_waits_for_its_exchange() -> None:
    exchange = _op("collective", "alltoall_base_", scope="exchange_attention", bytes=10**9, group="sp")
    time = _time({exchange: 2, _op("matmul", scope="exchange_attention", flops=10**15): 1})
    assert time.breakdown["sequence"] == pytest.approx(2 * (COLLECTIVE_LATENCY.value + 1e9 / H800.link.value))
    assert time.hidden["sequence"] == 0


def test_chunks_of_heads_hide_all_but_one_way_in_and_back() -> None:
    exchange = _op("collective", "alltoall_base_", scope="exchange_attention", bytes=10**9, group="sp", chunks=4)
    wire = 8 * (COLLECTIVE_LATENCY.value + 1e9 / H800.link.value)
    for share in (0.5, 2.0):
        flops = int(share * wire * H800.attention(72, backward=False).value)
        attention = _op("attention", "attention_packed", scope="exchange_attention", flops=flops, head_dim=72)
        # Twice as long as the exchange, all but a way in and back hides; half as long, the link is what is waited for.
        exposed = wire / 4 if share > 1 else ulysses_waits(4, wire, share * wire, share_in=0.75)
        assert wire / 4 <= exposed < wire
        assert _time({exchange: 8, attention: 1}).breakdown["sequence"] == pytest.approx(exposed, rel=1e-6)


def test_fastseq_hides_its_exchange_behind_the_projections_in_flight() -> None:
    sends = {_op("collective", "send", scope="fastseq_attention", bytes=10**9, group="sp"): 3}
    exchange = 3 * (COLLECTIVE_LATENCY.value + 1e9 / H800.link.value)
    flops = int(0.5 * exchange * H800.matmul.value) // 4
    projections = {_op("matmul", scope="fastseq_attention", flops=flops): 4}
    time = _time(sends | projections)
    # Half as long as the exchange, of which three projections of four run while chunks are in flight.
    assert time.breakdown["sequence"] == pytest.approx(exchange * (1 - 0.5 * 3 / 4), rel=1e-6)
    assert time.hidden["sequence"] == pytest.approx(exchange * 0.5 * 3 / 4, rel=1e-6)
    # Another op's matrix products hide nothing.
    elsewhere = {_op("matmul", scope="", flops=flops): 4}
    assert _time(sends | elsewhere).breakdown["sequence"] == pytest.approx(exchange)


def test_attention_covers_an_exchange_only_where_it_runs_chunk_by_chunk() -> None:
    exchange = 3 * (COLLECTIVE_LATENCY.value + 1e9 / H800.link.value)
    for scope, chunks, hides in (
        ("fastseq_attention", 1, False),
        ("fastseq_attention", 4, True),
        ("fastseq_attention_backward", 1, False),
        ("fastseq_attention_backward", 4, True),
        ("exchange_attention", 1, True),
        ("exchange_attention_backward", 1, True),
    ):
        sends = {_op("collective", "send", scope=scope, bytes=10**9, group="sp", chunks=chunks): 3}
        attention = {_op("attention", "attention", scope=scope, flops=10**13, head_dim=72): 4}
        time = _time(sends | attention)
        assert time.breakdown["sequence"] == pytest.approx(0 if hides else exchange), scope


def test_sharding_hides_behind_compute_but_for_one_collective() -> None:
    gathers = {_op("collective", "_allgather_base_", bytes=10**9, group="all"): 4}
    one = COLLECTIVE_LATENCY.value + 1e9 / H800.link.value
    long = _time(gathers | {_op("matmul", flops=10**15): 1})
    assert long.breakdown["sharding"] == pytest.approx(one)
    assert long.hidden["sharding"] == pytest.approx(3 * one)
    # Compute of another phase covers nothing.
    other = _time(gathers | {_op("matmul", flops=10**15, phase="backward"): 1})
    assert other.breakdown["sharding"] == pytest.approx(4 * one)


def test_interval_and_breakdown() -> None:
    costs = {
        _op("matmul", flops=10**13): 1,
        _op("memory", "add", bytes=10**9, phase="optimizer"): 1,
        _op("collective", "send", scope="fastseq_attention", bytes=10**9, group="sp"): 1,
        _op("collective", "_reduce_scatter_base_", bytes=10**8, group="all"): 2,
    }
    time = _time(costs)
    assert time.low < time.seconds < time.high
    assert sum(time.breakdown.values()) == pytest.approx(time.seconds)
    assert time.breakdown["optimizer"] == pytest.approx(1e9 / H800.memory.value)
    # Slow: every rate at its low end, nothing overlaps.
    slow_wire = 3 * COLLECTIVE_LATENCY.high + 1.2e9 / H800.link.low
    assert time.high == pytest.approx(1e13 / H800.matmul.low + 1e9 / H800.memory.low + slow_wire)
    assert {rate.provenance for rate in time.rates.values()} == {"assumed"}


def test_groups_that_span_nodes_go_by_the_network() -> None:
    gather = {_op("collective", "_allgather_base_", bytes=10**9, group="all"): 1}
    inside, across = (step_time(gather, H800, group_sizes=GROUPS, group_extents={"all": extent}) for extent in (8, 16))
    assert inside.seconds == pytest.approx(COLLECTIVE_LATENCY.value + 1e9 / H800.link.value)
    assert across.seconds == pytest.approx(COLLECTIVE_LATENCY.value + 1e9 / H800.node_link.value)
    assert "node_link_byte_s" in across.rates
    assert "node_link_byte_s" not in inside.rates


SECOND = 10**12


def _exposed(scope: str, name: str, size: int, ratio: float, *, chunks: int, linear: float = 0.0) -> float:
    """Of transfers of 1 s (scaled up, so that latencies are nothing) beside attention of `ratio` s, what is exposed."""
    sent = int(H800.link.value * SECOND)
    is_backward = scope.endswith("backward")
    rate = H800.attention(72, backward=is_backward).value
    op = "attention_backward" if is_backward else "attention"
    costs = {
        _op("collective", name, scope=scope, bytes=sent, group="sp", chunks=chunks): 1,
        _op("attention", op, scope=scope, flops=int(ratio * (1 - linear) * SECOND * rate), head_dim=72): 1,
        _op("matmul", scope=scope, flops=int(ratio * linear * SECOND * H800.matmul.value)): 1,
    }
    return step_time(costs, H800, group_sizes={"sp": size}).breakdown["sequence"] / SECOND


RATIOS = pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0, 16.0])
DEGREES = pytest.mark.parametrize("degree", [2, 4, 8], ids=lambda p: f"P{p}")


@RATIOS
@DEGREES
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_exposed_communication_is_that_of_the_schedule(degree: int, ratio: float, backward: bool) -> None:
    """tests/parallel/test_overlap.py holds the schedules' functions to the real code."""
    suffix = "_backward" if backward else ""
    ring = _exposed(f"exchange_attention{suffix}", "send", degree, ratio, chunks=1)
    assert ring == pytest.approx(ring_waits(degree, 1.0, ratio), abs=1e-6)
    for chunks in (1, 2, 4):
        found = _exposed(f"exchange_attention{suffix}", "alltoall_base_", degree, ratio, chunks=chunks)
        assert found == pytest.approx(ulysses_waits(chunks, 1.0, ratio, share_in=0.25 if backward else 0.75), abs=1e-6)
    parts = 0.01 * ratio, 0.99 * ratio
    found = _exposed(f"fastseq_attention{suffix}", "send", degree, ratio, chunks=degree, linear=0.01)
    waits_of = fastseq_backward_waits if backward else fastseq_waits
    assert found == pytest.approx(waits_of(degree, 1.0, *parts), abs=1e-6)
    found = _exposed(f"fastseq_attention{suffix}", "send", degree, ratio, chunks=1, linear=0.01)
    assert found == pytest.approx(ring_waits(degree, 1.0, parts[0]), abs=1e-6)


def test_attention_of_two_head_dims_has_a_named_rate_of_each_whatever_the_order() -> None:
    wide, narrow = (
        _op("attention", "attention_packed", flops=flops, head_dim=dim) for flops, dim in ((10**13, 72), (10**12, 128))
    )
    for costs in ({wide: 1, narrow: 1}, {narrow: 1, wide: 1}):
        rates = _time(costs).rates
        assert rates["attention_forward_flop_s"] == H800.attention(72, backward=False)
        assert rates["attention_forward_head_dim_128_flop_s"] == H800.attention(128, backward=False)
