"""longreel.bench.run: a point that fails is a row, and the sweep goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed as dist

from longreel.bench import gate
from longreel.bench.cases import Point
from longreel.bench.grids import MeasuredGrid, TargetGrid, measured_points, target_points
from longreel.bench.presets import small_dit
from longreel.parallel.predict.predict import PredictionCase
from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout
from longreel.reports.records import Record

HANG_LIMIT_S = 4.0
PROVENANCE = {"commit": "c", "environment": {}}


@pytest.fixture(scope="module")
def points() -> list[Point]:
    grid = MeasuredGrid(seq_lens=(64,), ranks=(2,), sp_degrees=(2,), model=small_dit())
    return measured_points(grid, device="CPU")


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


def behave(how: str) -> int:
    """In a worker: do as told, in rank 1 only."""
    # A rank that leaves while the other still connects would fail it in another way.
    dist.barrier()
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("no such luck")
        if how == "crash":
            os._exit(7)
        if how == "hang":
            time.sleep(60)
    return os.getpid()


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("raise", "error", "rank 1 of 2 failed: ValueError: no such luck (test_run.py:"),
        ("crash", "error", "rank 1 of 2 died with exit code 7"),
        ("hang", "error", "did not finish within 4 s"),
    ],
)
def test_failure_is_a_row_and_the_next_point_runs(pool, points, how, status, reason) -> None:
    told = iter([how, "work", "work"])
    # New workers import the package within their first call's limit; only the call that hangs shall meet a short one.
    pool.run(behave, 2, "work", timeout=120.0)

    def work(batch: Sequence[Point]) -> list[Record]:
        what = next(told)
        pool.run(behave, 2, what, timeout=HANG_LIMIT_S if what == "hang" else 120.0)
        return [point.record("ok", step_s=1.0, provenance=PROVENANCE) for point in batch]

    records = list(run_points([[point] for point in points], work, PROVENANCE))
    assert [r.status for r in records] == [status, "ok", "ok"]
    assert reason in records[0].reason
    assert "\n" not in records[0].reason
    assert [r.strategy for r in records] == [p.parallel.strategy for p in points]
    assert all(Record.from_json(r.to_json()) == r for r in records)


def test_allocation_that_failed_is_out_of_memory(points) -> None:
    def work(batch: Sequence[Point]) -> list[Record]:
        raise WorkerError(
            "rank 0 of 1 failed:\nTraceback (most recent call last):\n"
            "RuntimeError: [enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
        )

    (record,) = run_points([points[:1]], work, PROVENANCE)
    assert record.status == "oom"
    assert "9 bytes" in record.reason


def test_batch_that_fails_costs_only_the_point_at_fault(points) -> None:
    calls: list[int] = []

    def work(batch: Sequence[Point]) -> list[Record]:
        calls.append(len(batch))
        if points[1] in batch:
            raise WorkerError("rank 0 of 1 died with exit code 9")
        return [point.record("ok", step_s=1.0, provenance=PROVENANCE) for point in batch]

    records = list(run_points([points], work, PROVENANCE))
    assert [r.status for r in records] == ["ok", "error", "ok"]
    assert calls == [3, 1, 1, 1]


class OraclePool:
    """A pool whose oracle calls end as told; measured points are what their oracle says."""

    def __init__(self, scratch: Path, fates: list[WorkerError | None]) -> None:
        self.scratch = scratch
        self.fates = iter(fates)
        self.oracles = 0

    def run(self, fn, world_size: int, *args, timeout: float):
        if fn is gate.write_oracle:
            self.oracles += 1
            if (fate := next(self.fates)) is not None:
                raise fate
            Path(args[-1]).write_text("oracle")
            return [None]
        raise WorkerError(f"measured against {Path(args[-1]).read_text()}")


@pytest.mark.parametrize(
    ("fates", "oracles", "reason"),
    [
        ([WorkerError("died"), None], 2, "measured against oracle"),
        ([WorkerError("died"), WorkerError("died again")], 2, "no oracle to compare with: died again"),
        ([WorkerTimeout("too slow")], 1, "no oracle to compare with: too slow"),
    ],
    ids=["lost-once", "lost-twice", "timeout"],
)
def test_lost_oracle_is_computed_once_more_and_a_slow_one_is_not(tmp_path, fates, oracles, reason) -> None:
    pool = OraclePool(tmp_path, fates)
    grid = MeasuredGrid(seq_lens=(64,), ranks=(2,), sp_degrees=(2,), model=small_dit())
    records = list(measured(grid, pool, PROVENANCE, device="CPU"))
    assert [(r.status, r.reason) for r in records] == [("error", reason)] * 3
    assert pool.oracles == oracles
    assert list(tmp_path.iterdir()) == []


def test_impossible_points_are_skipped_with_their_reason_and_never_run() -> None:
    grid = MeasuredGrid(seq_lens=(64,), ranks=(4,), sp_degrees=(4,), model=small_dit(num_heads=2))

    def work(batch: Sequence[Point]) -> list[Record]:
        assert all(point.parallel.strategy == "local" for point in batch)
        return [point.record("ok", step_s=1.0, provenance=PROVENANCE) for point in batch]

    records = list(run_points([measured_points(grid, device="CPU")], work, PROVENANCE))
    assert sorted((r.strategy, r.status) for r in records) == [
        ("fastseq", "skipped"),
        ("local", "ok"),
        ("ulysses", "skipped"),
    ]
    assert all("degrees that work: 1, 2" in r.reason for r in records if r.status == "skipped")


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


def test_quick_predictions_leave_out_what_says_nothing_new() -> None:
    grid = TargetGrid(regime="full", seq_lens=(1, 2, 3), strategies=("local", "ulysses"), sp_degrees=(2,))
    wanted = _Wanted(every_policy=False)
    ran = {"local": [], "ulysses": []}
    for group in target_points(grid):
        for point in group:
            if wanted(point):
                ran[point.parallel.strategy].append((point.seq_len, point.parallel.policy))
                longest = {"none": 1, "keep_attention": 2, "full": 9}[point.parallel.policy]
                fits = point.seq_len <= longest
                outcome = {"step_s": 1.0} if fits else {"reason": "needs more"}
                wanted.saw(point.record("ok" if fits else "oom", provenance=PROVENANCE, **outcome))
    assert ran["ulysses"] == [(1, "none"), (2, "none"), (2, "keep_attention"), (3, "keep_attention"), (3, "full")]
    # The baseline of every ratio, local with recomputation, is predicted at every length.
    assert ran["local"] == [(1, "none"), (1, "full"), *ran["ulysses"][1:3], (2, "full"), *ran["ulysses"][3:]]


def test_the_baseline_is_there_whatever_policies_are_asked_for() -> None:
    grid = TargetGrid(regime="full", seq_lens=(1,), sp_degrees=(2,), policies=("none",))
    points = [point for group in target_points(grid) for point in group]
    assert [(p.parallel.strategy, p.parallel.policy) for p in points if p.is_baseline] == [("local", "full")]
    assert {p.parallel.policy for p in points if p.parallel.strategy != "local"} == {"none"}


def test_recomputation_alone_is_predicted_everywhere() -> None:
    grid = TargetGrid(regime="full", seq_lens=(1, 2), strategies=("local",), policies=("full",))
    wanted = _Wanted(every_policy=False)
    assert all(wanted(point) for group in target_points(grid) for point in group)


def test_predictions_run_beside_each_other_in_workers(pool, points) -> None:
    grid = TargetGrid(regime="full", seq_lens=(512,), strategies=("ulysses",), sp_degrees=(2, 4), model="dit-s-2")
    cases = [
        PredictionCase(model=p.model, parallel=p.parallel, num_gpus=8, target="H800", seq_len=p.seq_len)
        for p in target_points(grid)[0]
        if p.parallel.sp_degree == 2
    ]
    first, second = pool.run(predict_share, 2, [cases[0], cases[0]], timeout=120.0)
    assert first == second
    assert first.memory_bytes > 0
    # The workers still serve.
    assert len(pool.run(behave, 2, "work", timeout=120.0)) == 2
