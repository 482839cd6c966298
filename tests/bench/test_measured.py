"""longreel.bench.measured: points in turns with their baseline; a point that fails is a row, and the sweep goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch.distributed as dist

from longreel.bench import gate
from longreel.bench.cases import Point, Timing
from longreel.bench.failures import one_line
from longreel.bench.grids import MeasuredGrid, measured_points
from longreel.bench.measure import RankResult, measure_points
from longreel.bench.measured import _Deadline, measured
from longreel.bench.presets import small_dit
from longreel.parallel import parallelize
from longreel.parallel.strategies import USP
from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout
from longreel.reports.records import Record

HANG_LIMIT_S = 15.0
PROVENANCE = {"commit": "c", "environment": {}}
GRID = MeasuredGrid(seq_lens=(64,), ranks=(2,), sp_degrees=(2,), strategies=("ulysses", "fastseq"), model=small_dit())
RESULT = RankResult(
    verdict=gate.Verdict(loss=0.0, grad=0.0, parameter="x"),
    reason=None,
    traffic={},
    traffic_formula={},
    flops=1,
    samples_s=(1.0, 1.0),
    memory={"process": 2, "process_before": 1},
)


class ScriptedPool:
    """A pool whose oracle calls end as told, and whose points fail as told, the place of the one at fault noted.

    Args:
        scratch: its folder. oracles: how calls for an oracle end, all well if not given.
        faults: strategy -> how a point of it fails in company, and how alone (None: it does not).
    """

    def __init__(self, scratch: Path, oracles: Sequence[WorkerError | None] = (), faults=None) -> None:
        self.scratch = scratch
        self.ends = iter(oracles)
        self.num_oracles = 0
        self.faults = faults or {}
        self.calls: list[list[str]] = []
        # What the place is noted as, itself if None.
        self.note: str | None = None

    def run(self, fn, world_size: int, *args, timeout: float, overdue=lambda: None):
        if fn is gate.write_oracle:
            self.num_oracles += 1
            if (end := next(self.ends, None)) is not None:
                raise end
            Path(args[4]).write_text("oracle")
            return [None]
        assert fn is measure_points
        points, oracle, at = args
        assert Path(oracle).read_text() == "oracle"
        assert timeout == len(points) * GRID.point_timeout_s
        self.calls.append([point.strategy for point in points])
        for place, point in enumerate(points):
            together, alone = self.faults.get(point.strategy, (None, None))
            Path(at).write_text(str(place) if self.note is None else self.note)
            if (error := alone if len(points) == 1 else together) is not None:
                raise error
        return [[replace(RESULT, samples_s=(1.0 + place,) * 4) for place in range(len(points))]] * world_size


def run(pool: ScriptedPool, **changes) -> list[Record]:
    return list(measured(replace(GRID, **changes), pool, PROVENANCE, device="CPU"))


def test_points_of_a_length_are_timed_in_turns_with_their_baseline(tmp_path) -> None:
    pool = ScriptedPool(tmp_path)
    records = run(pool, seq_lens=(64, 128))
    assert pool.calls == [["local", "ulysses", "fastseq"]] * 2
    assert pool.num_oracles == 2
    assert [(r.strategy, r.seq_len, r.is_baseline) for r in records] == [
        (strategy, seq_len, strategy == "local")
        for seq_len in (64, 128)
        for strategy in ("local", "ulysses", "fastseq")
    ]
    baseline, ulysses, fastseq = records[:3]
    assert (baseline.policy, baseline.engine, baseline.attention) == ("full", "fsdp2-zero2", "sdpa-flash")
    assert baseline.comparison == {}
    # Twice and three times the baseline's seconds, for half its samples.
    assert (ulysses.comparison["ratio"], fastseq.comparison["ratio"]) == (4.0, 6.0)
    assert ulysses.comparison["verdict"] == "SLOW"
    assert ulysses.comparison["baseline_samples_s"] == list(baseline.samples_s)


@pytest.mark.parametrize(
    ("message", "status"), [("rank 1 of 2 died with exit code 7", "error"), ("CUDA out of memory. Tried", "oom")]
)
def test_failure_costs_its_own_point_only(tmp_path, message, status) -> None:
    pool = ScriptedPool(tmp_path, faults={"ulysses": (WorkerError(message), WorkerError(message))})
    records = {r.strategy: r for r in run(pool)}
    assert (records["ulysses"].status, records["ulysses"].reason) == (status, message)
    assert [records[name].status for name in ("local", "fastseq")] == ["ok", "ok"]
    assert records["fastseq"].comparison["verdict"] == "SLOW"
    assert pool.calls == [["local", "ulysses", "fastseq"], ["ulysses"], ["local", "fastseq"]]
    assert all(Record.from_json(r.to_json()) == r for r in records.values())


def test_point_that_does_not_fit_beside_others_is_measured_alone(tmp_path) -> None:
    pool = ScriptedPool(tmp_path, faults={"fastseq": (WorkerError("out of memory"), None)})
    records = {r.strategy: r for r in run(pool)}
    assert {r.status for r in records.values()} == {"ok"}
    assert records["fastseq"].comparison == {}
    assert records["ulysses"].comparison != {}


def test_baseline_that_fails_leaves_candidates_without_a_comparison(tmp_path) -> None:
    pool = ScriptedPool(tmp_path, faults={"local": (WorkerError("out of memory"), WorkerError("out of memory"))})
    records = {r.strategy: r for r in run(pool)}
    assert {name: r.status for name, r in records.items()} == {"local": "oom", "ulysses": "ok", "fastseq": "ok"}
    assert all(r.comparison == {} for r in records.values())


def test_point_that_hangs_ends_the_call_once_and_does_not_run_again(tmp_path) -> None:
    pool = ScriptedPool(tmp_path, faults={"ulysses": (WorkerTimeout("did not finish"), None)})
    records = {r.strategy: r.status for r in run(pool)}
    assert records == {"local": "ok", "ulysses": "error", "fastseq": "ok"}
    assert pool.calls == [["local", "ulysses", "fastseq"], ["local", "fastseq"]]


def test_worker_that_dies_before_its_first_note_is_looked_for(tmp_path) -> None:
    pool = ScriptedPool(tmp_path, faults={"local": (WorkerError("died"), None)})
    pool.note = ""
    assert {r.status for r in run(pool)} == {"ok"}
    assert pool.calls == [["local", "ulysses", "fastseq"], ["local"], ["ulysses", "fastseq"]]


def test_one_point_may_take_the_time_of_one_point_only(tmp_path, monkeypatch) -> None:
    clock = iter(range(0, 100, 4))
    monkeypatch.setattr("longreel.bench.measured.time", SimpleNamespace(monotonic=lambda: next(clock)))
    at = tmp_path / "at"
    deadline = _Deadline(at, limit_s=10.0)
    assert deadline.overdue() is None
    # 8 s of the first point, 8 of the second, and 4 more of the first.
    for place in (0, 0, 0, 1, 1, 1, 0):
        at.write_text(str(place))
        assert deadline.overdue() is None
    assert deadline.overdue() == "did not finish within 10 s and was ended; --point-timeout allows more"


def test_baseline_that_fails_is_not_tried_beside_every_batch(tmp_path) -> None:
    out = WorkerError("out of memory")
    grid = replace(GRID, strategies=("ulysses", "fastseq", "ring"), policies=("none", "full"))
    grid = replace(grid, device_type="cuda", precision="bf16")
    pool = ScriptedPool(tmp_path, faults={"local": (out, out)})
    records = list(measured(grid, pool, PROVENANCE, device="NVIDIA H800"))
    assert [r.status for r in records if r.is_baseline] == ["oom"]
    assert sum("local" in call for call in pool.calls) == 2
    # Nor when what it came to is known from before.
    (baseline,) = (r for r in records if r.is_baseline)
    pool = ScriptedPool(tmp_path, faults={"local": (out, out)})
    there = {baseline.key: baseline}
    records = list(measured(grid, pool, PROVENANCE, device="NVIDIA H800", done=there.__contains__, saved=there.get))
    assert len(records) == 6
    assert not any("local" in call for call in pool.calls)


@pytest.mark.parametrize(
    ("rule", "again"),
    [
        (Timing(min_samples=4), False),
        (Timing(min_samples=5), True),
        (Timing(min_samples=5, wall_cap_s=4.0), False),
    ],
    ids=["enough", "too-few", "time-was-over"],
)
def test_points_with_fewer_steps_than_asked_for_run_again(tmp_path, rule, again) -> None:
    there = {r.key: r for r in run(ScriptedPool(tmp_path))}
    assert all(len(r.samples_s) == 4 for r in there.values())
    pool = ScriptedPool(tmp_path)
    grid = replace(GRID, timing=rule)
    records = list(measured(grid, pool, PROVENANCE, device="CPU", done=there.__contains__, saved=there.get))
    assert (len(records), bool(pool.calls)) == ((3, True) if again else (0, False))


def test_records_that_are_there_are_not_made_again(tmp_path) -> None:
    baseline, ulysses, fastseq = (point.key(PROVENANCE) for point in measured_points(GRID, device="CPU"))
    for there, ran, made in (
        ({baseline, ulysses, fastseq}, [], []),
        # The baseline is timed beside what is left, and its record stays the one there is.
        ({baseline, ulysses}, [["local", "fastseq"]], ["fastseq"]),
        ({ulysses, fastseq}, [["local"]], ["local"]),
    ):
        pool = ScriptedPool(tmp_path)
        records = list(measured(GRID, pool, PROVENANCE, device="CPU", done=there.__contains__))
        assert (pool.calls, [r.strategy for r in records]) == (ran, made)


def test_on_gpus_few_models_lie_beside_each_other_each_time_with_the_baseline(tmp_path) -> None:
    pool = ScriptedPool(tmp_path)
    strategies = ("ulysses", "fastseq", "ring")
    grid = replace(GRID, strategies=strategies, policies=("none", "full"), device_type="cuda", precision="bf16")
    records = list(measured(grid, pool, PROVENANCE, device="NVIDIA H800"))
    assert pool.calls == [["local", *strategies]] * 2
    assert len(records) == len({r.key for r in records}) == 7
    assert all(r.comparison for r in records if not r.is_baseline)


@pytest.mark.parametrize(
    ("oracles", "num_oracles", "status"),
    [
        ([WorkerError("died"), None], 2, "ok"),
        ([WorkerError("died"), WorkerError("died again")], 2, "error"),
        ([WorkerTimeout("too slow")], 1, "error"),
        # The oracle needs more memory than any point: that it found too little says nothing of theirs.
        ([WorkerError("CUDA out of memory"), WorkerError("CUDA out of memory")], 2, "error"),
    ],
    ids=["lost-once", "lost-twice", "timeout", "out-of-memory"],
)
def test_lost_oracle_is_computed_once_more_and_a_slow_one_is_not(tmp_path, oracles, num_oracles, status) -> None:
    pool = ScriptedPool(tmp_path, oracles)
    records = run(pool)
    assert {r.status for r in records} == {status}
    assert status == "ok" or all(r.reason.startswith("no oracle to compare with: ") for r in records)
    assert len(records) == 3
    assert pool.num_oracles == num_oracles
    assert list(tmp_path.iterdir()) == []


def test_impossible_points_are_skipped_with_their_reason_and_never_run(tmp_path) -> None:
    pool = ScriptedPool(tmp_path)
    records = run(pool, ranks=(4,), sp_degrees=(4,), model=small_dit(num_heads=2))
    assert sorted((r.strategy, r.status) for r in records) == [
        ("fastseq", "skipped"),
        ("local", "ok"),
        ("ulysses", "skipped"),
    ]
    assert all("degrees that work: 1, 2" in r.reason for r in records if r.status == "skipped")
    assert pool.calls == [["local"]]


class Faulty(USP):
    """Self-attention that rank 1 raises in, dies in, or never comes to."""

    how = "hang"

    def self_attention(self, x, qkv, *, num_heads, lengths):
        if dist.get_rank() == 1:
            if self.how == "raise":
                raise ValueError("no such luck")
            if self.how == "crash":
                os._exit(7)
            time.sleep(60)
        return super().self_attention(x, qkv, num_heads=num_heads, lengths=lengths)


def measure_with_fault(points: Sequence[Point], oracle: str, at: str, how: str) -> list[RankResult]:
    """measure_points in which FastSeq's points go wrong (in a worker)."""
    build = parallelize.build_strategy

    def faulty(config, mesh):
        if config.strategy != "fastseq":
            return build(config, mesh)
        right = build(replace(config, strategy="ulysses"), mesh)
        Faulty.how = how
        return Faulty(**{field.name: getattr(right, field.name) for field in fields(right)})

    with mock.patch.object(parallelize, "build_strategy", faulty):
        return measure_points(points, oracle, at)


class FaultyPool:
    """A real pool in which FastSeq's points go wrong."""

    def __init__(self, pool: WorkerPool, how: str) -> None:
        self.pool, self.how, self.scratch = pool, how, pool.scratch

    def run(self, fn, world_size: int, *args, timeout: float, overdue=lambda: None):
        if fn is not measure_points:
            return self.pool.run(fn, world_size, *args, timeout=120.0)
        return self.pool.run(measure_with_fault, world_size, *args, self.how, timeout=120.0, overdue=overdue)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        pytest.param(
            "raise", "rank 1 of 2 failed: ValueError: no such luck (test_measured.py:", marks=pytest.mark.slow
        ),
        pytest.param("crash", "rank 1 of 2 died with exit code 7", marks=pytest.mark.slow),
        pytest.param("hang", "did not finish within 15 s", marks=pytest.mark.slow),
    ],
)
def test_worker_that_fails_is_a_row_and_the_other_points_are_measured(how, reason) -> None:
    grid = replace(GRID, strategies=("fastseq", "ulysses"), model=small_dit(depth=1, hidden_size=32))
    grid = replace(grid, point_timeout_s=HANG_LIMIT_S if how == "hang" else grid.point_timeout_s)
    with WorkerPool(2) as pool:
        records = {r.strategy: r for r in measured(grid, FaultyPool(pool, how), PROVENANCE, device="CPU")}
    assert records["fastseq"].status == "error"
    assert reason in records["fastseq"].reason
    assert "\n" not in records["fastseq"].reason
    for name in ("local", "ulysses"):
        assert records[name].status == "ok", records[name].reason
    assert records["ulysses"].comparison["verdict"] in ("SAME", "FAST", "SLOW", "AMBIGUOUS")


def test_one_line_names_the_outermost_exception() -> None:
    trace = (
        "rank 0 of 2 failed:\nTraceback (most recent call last):\n"
        '  File "/home/me/a.py", line 3, in f\n    g()\n'
        '  File "/home/me/b.py", line 9, in g\n    raise KeyError(1)\n'
        "torch.distributed.DistBackendError: peer gone\nframe #0: c10::foo\n\n"
        "rank 1 of 2 failed:\nTraceback (most recent call last):\n"
        '  File "/home/me/z.py", line 1, in f\nValueError: second\n'
    )
    assert one_line(WorkerError(trace)) == (
        "rank 0 of 2 failed: torch.distributed.DistBackendError: peer gone (b.py:9)"
    )
    # The rank at fault, not the one that lost it.
    lost = trace.replace("peer gone", "Connection closed by peer [127.0.0.1]:37651")
    assert one_line(WorkerError(lost)) == "rank 1 of 2 failed: ValueError: second (z.py:1)"
    died = lost.partition("\n\nrank 1")[0] + "\nrank 1 of 2 died with exit code -9"
    assert one_line(WorkerError(died)) == "rank 1 of 2 died with exit code -9"
