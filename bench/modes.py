"""What a machine can do with a sweep: measure it on its GPUs, emulate one rank of it, or predict it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from longreel.bench.cases import Timing
from longreel.bench.grids import MeasuredGrid, TargetGrid
from longreel.bench.presets import Sweep


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """GPUs of this machine. gpu_name: of all of them, None where there is none."""

    num_gpus: int = 0
    gpu_name: str | None = None


def this_machine() -> Machine:
    """The machine that this process runs on; its GPUs are equal, or the first one's name stands for all."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(num_gpus=count, gpu_name=torch.cuda.get_device_name(0) if count else None)


def for_machine(
    sweep: Sweep,
    mode: str,
    machine: Machine,
    *,
    wants_gpus: bool = False,
    wants_cpu: bool = False,
    timing: Timing | None = None,
) -> Sweep:
    """The sweep as a mode has it on a machine.

    `auto` measures grids of true size where there are as many GPUs as they ask for, emulates them where there is one,
    and predicts them where there is none. `measured` without GPUs runs a preset's small grids on the CPU. A preset that
    has small grids beside those of true size measures the small ones and predicts the others, unless GPUs are asked
    for. The search for the longest length that fits is predicted beside whatever runs.

    Args:
        sweep: with its grids of true size as predicted ones. mode: `auto`, `measured`, `emulated` or `predicted`.
        wants_gpus: a number of GPUs was asked for. wants_cpu: a number of CPU processes was.
        timing: of steps that are measured on GPUs.

    Raises:
        ValueError: the machine has no GPU for what is asked.
    """
    on_cpu = () if wants_gpus and not wants_cpu else sweep.measured
    searches = tuple(
        dict.fromkeys(replace(grid, kind="predicted", seq_lens=()) for grid in sweep.targets if grid.search)
    )
    emulated = {grid: replace(grid, kind="emulated", search=False) for grid in sweep.targets}
    if mode == "predicted":
        return replace(sweep, measured=(), rehearsal=())
    if mode == "emulated":
        if machine.num_gpus == 0:
            raise ValueError(
                "mode emulated runs one rank on a GPU, and there is none here; use --mode predicted, or --rehearse"
            )
        return replace(sweep, measured=(), rehearsal=(), targets=(*emulated.values(), *searches))
    if mode == "measured" and machine.num_gpus == 0:
        if wants_gpus:
            raise ValueError(
                "gpus: there is no GPU here to measure on; use --mode predicted, or --ranks for processes on the CPU"
            )
        if not sweep.measured and not sweep.rehearsal:
            raise ValueError(f"mode: preset {sweep.name} has nothing to measure without a GPU; use --mode predicted")
        return replace(sweep, measured=(*sweep.measured, *sweep.rehearsal), targets=(), rehearsal=())
    if mode == "measured" and wants_cpu and not wants_gpus:
        return replace(sweep, measured=(*sweep.measured, *sweep.rehearsal), targets=(), rehearsal=())
    fits = [grid for grid in sweep.targets if grid.num_gpus <= machine.num_gpus]
    if mode == "measured":
        if not fits and not on_cpu:
            asked = ", ".join(map(str, sorted({grid.num_gpus for grid in sweep.targets})))
            raise ValueError(f"gpus: {asked} asked for, {machine.num_gpus} here; give --gpus {machine.num_gpus}")
        gpu_grids = (on_gpus(grid, machine, timing) for grid in sweep.targets)
        return replace(sweep, measured=(*on_cpu, *gpu_grids), targets=searches, rehearsal=())
    # A preset of the CPU stays what it is; one of true size goes to what there is.
    if machine.num_gpus == 0 or (sweep.measured and not wants_gpus):
        return replace(sweep, measured=on_cpu, rehearsal=())
    measured = (on_gpus(grid, machine, timing) for grid in fits)
    targets = (emulated[grid] for grid in sweep.targets if grid not in fits)
    return replace(sweep, measured=(*on_cpu, *measured), targets=(*targets, *searches), rehearsal=())


def on_gpus(grid: TargetGrid, machine: Machine, timing: Timing | None = None) -> MeasuredGrid:
    """A grid of true size as one that is measured on this machine's GPUs, or that they are too few for."""
    assert machine.gpu_name is not None
    missing = f"needs {grid.num_gpus} GPUs, and there are {machine.num_gpus} here; --mode auto emulates it"
    return MeasuredGrid(
        seq_lens=grid.seq_lens,
        strategies=grid.strategies,
        sp_degrees=grid.sp_degrees,
        policies=grid.policies,
        engines=grid.engines,
        attentions=grid.attentions,
        head_chunks=grid.head_chunks,
        mlp_tiles=grid.mlp_tiles,
        batches=grid.batches,
        peers=grid.peers,
        baseline=grid.baseline,
        point_timeout_s=grid.point_timeout_s,
        ranks=(grid.num_gpus,),
        model=grid.dit,
        name=grid.model_name,
        precision="bf16",
        device_type="cuda",
        timing=replace(timing or Timing(), budget_s=10.0),
        refused=missing if grid.num_gpus > machine.num_gpus else None,
    )
