"""Emulated points on a worker process: planned, within a time budget, every one a record or left for later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from longreel.bench.cases import Point
from longreel.bench.emulated_plans import START_S, Estimates, plan_of, plan_seconds
from longreel.bench.emulated_record import block_s, emulated_record
from longreel.bench.emulated_result import Emulated, Plan
from longreel.bench.emulation import cannot_emulate, emulate_point
from longreel.bench.failures import failure
from longreel.bench.grids import TargetGrid, target_points
from longreel.bench.measure import silence_fsdp
from longreel.bench.predicted import Wanted
from longreel.bench.provenance import num_cores, stamped
from longreel.bench.reproduce import reproduce
from longreel.bench.settled import settled
from longreel.kernels import resolve_attention_provider
from longreel.parallel.predict.hardware import get_profile
from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout
from longreel.reports import formatting
from longreel.reports.records import Record

# What a worker may take beyond three times its estimate before it counts as hanging.
_PATIENCE, _PATIENCE_S = 3.0, 120.0
# A rehearsal divides lengths by this and has a model of these sizes: every path, no meaning.
_REHEARSED_LENGTH = 1024
_REHEARSED: dict[str, Any] = {"depth": 4, "hidden_size": 128, "num_heads": 16, "text_dim": 32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Emulator:
    """Where points are emulated and for how long.

    Args:
        device: torch device. name: of it, in words.
        rehearse: tiny models and lengths in place of the points', to go the same path on a CPU.
        deadline: time.monotonic() after which nothing is started; None for no limit.
        say: takes lines for the user.
    """

    device: str
    name: str
    rehearse: bool = False
    deadline: float | None = None
    say: Callable[[str], None] = print

    def point(self, point: Point) -> Point:
        """The point as it runs here: who stands in for the target, and which attention `auto` is."""
        device = torch.device(self.device)
        provider = resolve_attention_provider(point.parallel.attention_provider, device, torch.bfloat16)
        assert point.target is not None
        where = f"{get_profile(point.target).label} (one rank on {self.name})"
        point = replace(point, parallel=replace(point.parallel, attention_provider=provider), device=where)
        if not self.rehearse:
            return point
        return replace(
            point,
            model=replace(point.model, **_REHEARSED),
            model_name=f"rehearsal of {point.model_name}",
            seq_len=max(point.seq_len // _REHEARSED_LENGTH, point.parallel.sp_degree),
        )

    def plan(self, asked: Point, block_seconds: float, *, whole_depth: bool) -> Plan:
        """How a point runs, by the seconds of a block of the true one."""
        plan = plan_of(asked, block_seconds, whole_depth=whole_depth)
        if not self.rehearse:
            return plan
        # The model's depth is another one; 1 and 2 stay.
        depths = tuple(_REHEARSED["depth"] if depth == asked.model.depth else depth for depth in plan.depths)
        return replace(plan, depths=depths)


def this_emulator(*, rehearse: bool, deadline: float | None, say: Callable[[str], None]) -> Emulator:
    """The GPU of this machine, or its CPU for a rehearsal.

    Raises:
        ValueError: there is no GPU.
    """
    if rehearse:
        cores = num_cores()
        name = f"CPU with {cores} core{'s' if cores > 1 else ''}"
        return Emulator(device="cpu", name=name, rehearse=True, deadline=deadline, say=say)
    if not torch.cuda.is_available():
        raise ValueError(
            "mode emulated runs one rank on a GPU, and there is none here; --rehearse goes its path on a CPU"
        )
    return Emulator(device="cuda", name=torch.cuda.get_device_name(), deadline=deadline, say=say)


def emulated(
    grid: TargetGrid,
    pool: WorkerPool,
    provenance: dict[str, Any],
    emulator: Emulator,
    estimates: Estimates,
    *,
    done: Callable[[str], bool] = lambda key: False,
    saved: Callable[[str], Record | None] = lambda key: None,
) -> Iterator[Record]:
    """Records of a grid's points that are not there yet, in their order.

    What time is not left for has no record: the next run of the command goes on there.

    Args:
        grid: what to emulate. pool: its first worker runs the ranks. provenance: of all records.
        emulator: where. estimates: of all grids of a sweep.
        done: whether there is a record of a key. saved: that record.
    """
    silence_fsdp()
    wanted = Wanted(every_policy=grid.every_policy)
    for first in (point for group in target_points(grid) for point in group):
        if not wanted(first):
            continue
        if first.parallel.policy == "auto" and emulator.deadline is not None and time.monotonic() > emulator.deadline:
            emulator.say(f"left for the next run of this command: {formatting.length(first.seq_len)} policy auto")
            continue
        (asked,) = settled(grid, [first], pool)
        point = emulator.point(asked)
        key = point.key(provenance)
        if done(key):
            if (record := saved(key)) is not None:
                wanted.saw(first, record)
            continue
        record = _run(asked, point, grid, pool, provenance, emulator, estimates)
        if record is not None:
            wanted.saw(first, record)
            yield record


def _run(
    asked: Point,
    point: Point,
    grid: TargetGrid,
    pool: WorkerPool,
    provenance: dict[str, Any],
    emulator: Emulator,
    estimates: Estimates,
) -> Record | None:
    """The record of a point, None where time was too short."""
    again = reproduce(replace(asked, parallel=point.parallel)) + (" --rehearse" if emulator.rehearse else "")
    provenance = provenance | {"reproduce": again, "ran_on": emulator.name}
    reason = point.impossible or cannot_emulate(point)
    if reason is not None:
        return point.record("skipped", reason=reason, provenance=stamped(provenance))
    block = estimates.block_s(asked)
    words = f"{formatting.length(asked.seq_len)} {point.strategy} SP {point.parallel.sp_degree} {point.parallel.policy}"
    left = f"left for the next run of this command: {words}"
    # Before its memory is predicted, which takes a second that may not be there.
    least = 0.0 if emulator.rehearse else 3 * block
    if emulator.deadline is not None and time.monotonic() + least > emulator.deadline:
        emulator.say(f"{left}, more than {least:.0f} s")
        return None
    plan = emulator.plan(asked, block, whole_depth=grid.whole_depth)
    seconds = 0.0 if emulator.rehearse else plan_seconds(plan, block)
    if emulator.deadline is not None and time.monotonic() + seconds > emulator.deadline:
        emulator.say(f"{left}, about {seconds:.0f} s")
        return None
    limit = min(grid.point_timeout_s, START_S + _PATIENCE * seconds + _PATIENCE_S)
    if emulator.deadline is not None:
        limit = min(limit, max(1.0, emulator.deadline - time.monotonic()))
    try:
        (found,) = pool.run(emulate_point, 1, point, plan, emulator.device, emulator.deadline, timeout=limit)
    except WorkerTimeout as error:
        if emulator.deadline is not None and time.monotonic() >= emulator.deadline:
            emulator.say(f"{left}, which the deadline ended")
            return None
        return failure(point, error, provenance)
    except WorkerError as error:
        return failure(point, error, provenance)
    assert isinstance(found, Emulated)
    took = block_s(point, found.runs)
    if took is not None and not emulator.rehearse:
        estimates.saw(asked, took)
    record = emulated_record(point, plan, found, provenance)
    if record is None:
        emulator.say(f"{left}: {found.unfinished}")
    return record
