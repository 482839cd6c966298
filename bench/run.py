"""The loop of a sweep: grids in, a record for every point, whatever becomes of it; the sweep goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from longreel.bench.emulated_plans import Estimates
from longreel.bench.emulated_run import Emulator, emulated
from longreel.bench.grids import MeasuredGrid, measured_points, target_points
from longreel.bench.measured import measured
from longreel.bench.modes import Machine
from longreel.bench.predicted import predicted
from longreel.bench.presets import Sweep
from longreel.bench.provenance import num_cores
from longreel.parallel.workers import GLOO, NCCL, WorkerPool
from longreel.reports.records import Record

# Workers take seconds to start and a prediction a second: more of them would not pay.
MAX_PREDICTORS = 8


def run_sweep(
    sweep: Sweep,
    pool: WorkerPool,
    provenance: dict[str, Any],
    *,
    machine: Machine | None = None,
    emulator: Emulator | None = None,
    done: Callable[[str], bool] = lambda key: False,
    saved: Callable[[str], Record | None] = lambda key: None,
) -> Iterator[Record]:
    """Every record of a sweep as its point finishes: measured points first, then those of true size.

    Args:
        sweep: what to run. pool: workers. provenance: of all records. machine: whose GPUs measured points run on.
        emulator: where emulated points run.
        done: whether a point with this key needs no run. saved: the record of a key that is there already.
    """
    for grid in sweep.measured:
        yield from measured(grid, pool, provenance, device=device_of(grid, machine), done=done, saved=saved)
    estimates = Estimates()
    for target in sweep.targets:
        if target.kind == "emulated":
            assert emulator is not None
            yield from emulated(target, pool, provenance, emulator, estimates, done=done, saved=saved)
            continue
        yield from predicted(target, pool, provenance, width=pool_width(sweep), done=done, saved=saved)


def device_of(grid: MeasuredGrid, machine: Machine | None = None) -> str:
    """What a measured rank runs on, in words."""
    if grid.device_type == "cuda":
        assert machine is not None
        assert machine.gpu_name is not None
        return machine.gpu_name
    # Every rank computes with one thread; ranks beyond the number of cores share them.
    cores = num_cores()
    return f"CPU process on {cores} core{'s' if cores > 1 else ''}"


def num_points(sweep: Sweep) -> int:
    """Points at most, for progress bars."""
    return sum(len(measured_points(grid, device="")) for grid in sweep.measured) + sum(
        len(group) for grid in sweep.targets for group in target_points(grid)
    )


def pool_width(sweep: Sweep) -> int:
    """Workers that predict at the same time."""
    return min(num_cores(), MAX_PREDICTORS) if any(grid.kind == "predicted" for grid in sweep.targets) else 1


def pool_size(sweep: Sweep) -> int:
    """Workers at most."""
    return max([pool_width(sweep), *(ranks for grid in _run_here(sweep) for ranks in grid.ranks)])


def backend(sweep: Sweep) -> str:
    """What the workers' collectives run by."""
    return NCCL if any(grid.device_type == "cuda" for grid in _run_here(sweep)) else GLOO


def _run_here(sweep: Sweep) -> list[MeasuredGrid]:
    return [grid for grid in sweep.measured if grid.refused is None]
