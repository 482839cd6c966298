"""What torch.profiler saw: transfers are in flight while projections and attention run, forward and backward.

Gloo's `gloo:recv` spans the time from the start of a receive to the end of the wait for it, so that a computation
inside it is one that the transfer ran beside. Its `gloo:all_to_all` does not, so that all-to-alls are spans of our own.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from longreel.models.sequence import SequenceLengths
from longreel.parallel import comm
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.step_trace import StepTrace
from longreel.parallel.strategies import build_strategy

HEADS, WIDTH, ROWS = 4, 64, 32

# What must run inside each flight, by pass: projections are addmm, their gradients and eager attention bmm.
PROJECTION, ATTENTION = {"aten::addmm"}, {"longreel::attention"}
CASES = [
    pytest.param(
        "fastseq",
        {"fastseq_overlap": "projection"},
        {"forward": [PROJECTION], "backward": [{"aten::bmm", "aten::mm"}]},
        id="fastseq-projection",
    ),
    pytest.param(
        "fastseq",
        {"fastseq_overlap": "attention"},
        {"forward": [PROJECTION, ATTENTION], "backward": [{"aten::bmm", "aten::mm"}]},
        id="fastseq-attention",
    ),
    pytest.param("ring", {}, {"forward": [ATTENTION], "backward": [{"longreel::attention_backward"}]}, id="ring"),
]


def flights(name: str, options: dict[str, Any], wait_at_once: bool) -> dict[str, list[list[str]]]:
    """By pass, the ops that ran wholly inside each receive of this rank, in the order of the receives."""
    degree = dist.get_world_size()
    config = ParallelConfig(strategy=name, sp_degree=degree, attention_provider="torch", **options)
    sp = build_strategy(config, build_mesh(sp_degree=degree))
    lengths = SequenceLengths(valid=ROWS * degree, padded=ROWS * degree)
    x, qkv = torch.randn(1, ROWS, WIDTH, requires_grad=True), nn.Linear(WIDTH, 3 * WIDTH)

    def step() -> None:
        with record_function("forward"):
            out = sp.self_attention(x, qkv, num_heads=HEADS, lengths=lengths)
        with record_function("backward"):
            out.sum().backward()

    start = comm.start_exchange

    def finished(*args: Any, **kwargs: Any) -> comm.Exchange:
        exchange = start(*args, **kwargs)
        exchange.wait()
        # Waiting again would be no second flight.
        return mock.Mock(wait=lambda: exchange.received)

    step()
    with (
        mock.patch.object(comm, "start_exchange", finished) if wait_at_once else nullcontext(),
        profile(activities=[ProfilerActivity.CPU]) as profiled,
    ):
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    spans = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("ph") == "X"]
    passes = {n: next(span for span in spans if span[2] == n) for n in ("forward", "backward")}
    return {
        n: [
            [op[2] for op in spans if inside(op, recv)]
            for recv in sorted(spans)
            if recv[2] == "gloo:recv" and inside(recv, of)
        ]
        for n, of in passes.items()
    }


def inside(span: tuple[float, float, str], other: tuple[float, float, str]) -> bool:
    return other[0] <= span[0] and span[1] <= other[1]


def all_to_all_flights(name: str, options: dict[str, Any], wait_at_once: bool) -> dict[str, list[list[str]]]:
    """By pass, the ops that ran wholly between the start of each all-to-all and the end of the wait for it."""
    degree = dist.get_world_size()
    config = ParallelConfig(strategy=name, sp_degree=degree, attention_provider="torch", **options)
    sp = build_strategy(config, build_mesh(sp_degree=degree, ulysses_degree=config.ulysses_degree))
    lengths = SequenceLengths(valid=ROWS * degree, padded=ROWS * degree)
    x, qkv = torch.randn(1, ROWS, 2 * WIDTH, requires_grad=True), nn.Linear(2 * WIDTH, 6 * WIDTH)
    start, wait = comm.start_all_to_all, comm.Exchange.wait
    # Kept, so that no two have one identity.
    started: list[comm.Exchange] = []

    def recorded(*args: Any) -> comm.Exchange:
        with record_function(f"start {len(started)}"):
            started.append(start(*args))
        if wait_at_once:
            started[-1].wait()
        return started[-1]

    def recorded_wait(exchange: comm.Exchange) -> Any:
        number = next((n for n, one in enumerate(started) if one is exchange), None)
        with nullcontext() if number is None else record_function(f"wait {number}"):
            return wait(exchange)

    with (
        mock.patch.object(comm, "start_all_to_all", recorded),
        mock.patch.object(comm.Exchange, "wait", recorded_wait),
        profile(activities=[ProfilerActivity.CPU]) as profiled,
    ):
        with record_function("forward"):
            out = sp.self_attention(x, qkv, num_heads=2 * HEADS, lengths=lengths)
        forward = len(started)
        with record_function("backward"):
            out.sum().backward()
    events = [(e.time_range.start, e.time_range.end, e.name) for e in profiled.events()]

    def first(name: str) -> tuple[float, float, str]:
        # A second wait for what has arrived is no flight.
        return min(event for event in events if event[2] == name)

    flown = [
        [e[2] for e in events if inside(e, (first(f"start {n}")[0], first(f"wait {n}")[1], ""))]
        for n in range(len(started))
    ]
    return {"forward": flown[:forward], "backward": flown[forward:]}


def hidden(names: list[list[str]], wanted: set[str]) -> int:
    """Receives that a wanted op ran inside."""
    return sum(bool(wanted & set(inside_one)) for inside_one in names)


@pytest.mark.parametrize("degree", [2, 4], ids=lambda p: f"P{p}")
@pytest.mark.parametrize(("name", "options", "wanted"), CASES)
def test_every_transfer_has_computation_beside_it(run_distributed, name, options, wanted, degree):
    for seen in run_distributed(flights, degree, name, options, False):
        assert len(seen["forward"]) == degree - 1
        for ops in wanted["forward"]:
            assert hidden(seen["forward"], ops) == degree - 1, seen["forward"]
        # Backward: the chunks again and, of every other rank, a share of the gradient; the last share has no work left.
        assert len(seen["backward"]) == 2 * (degree - 1)
        for ops in wanted["backward"]:
            assert hidden(seen["backward"], ops) >= 2 * (degree - 1) - 1, seen["backward"]


@pytest.mark.parametrize(("name", "options", "wanted"), CASES)
def test_a_wait_at_once_shows(run_distributed, name, options, wanted):
    for seen in run_distributed(flights, 2, name, options, True):
        assert len(seen["forward"]) == 1
        for direction, ops in wanted.items():
            assert all(hidden(seen[direction], some) == 0 for some in ops), seen


@pytest.mark.parametrize("chunks", [2, 4], ids=lambda k: f"K{k}")
@pytest.mark.parametrize(
    ("name", "options", "degree"),
    [
        pytest.param("ulysses", {}, 2, id="ulysses"),
        pytest.param("usp", {"ulysses_degree": 2}, 4, id="usp", marks=pytest.mark.slow),
    ],
)
def test_all_to_alls_of_head_chunks_have_attention_beside_them(run_distributed, name, options, degree, chunks):
    for wait_at_once in (False, True):
        for seen in run_distributed(all_to_all_flights, degree, name, options | {"head_chunks": chunks}, wait_at_once):
            for direction, op in (("forward", "longreel::attention"), ("backward", "longreel::attention_backward")):
                # A way in and a way back per chunk; the first way in and the last way back have nothing beside them.
                assert len(seen[direction]) == 2 * chunks
                assert hidden(seen[direction], {op}) == (0 if wait_at_once else 2 * (chunks - 1)), seen[direction]


def test_steps_asked_for_are_traced_and_no_others(tmp_path):
    trace = StepTrace(tmp_path / "traces", (2, 3), rank=5, device=torch.device("cpu"))
    for number in range(1, 5):
        with trace.step(number):
            torch.ones(number) @ torch.ones(number)
        assert (tmp_path / "traces").exists() == (number >= 3)
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["rank-5.json"]
    events = json.loads((tmp_path / "traces" / "rank-5.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    assert [name for name in names if str(name).startswith("step")] == ["step 2", "step 3"]
    assert names.count("aten::dot") == 2
