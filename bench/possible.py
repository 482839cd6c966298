"""Whether the points that were asked for can be, before any of them runs."""

from __future__ import annotations

from dataclasses import dataclass

from longreel.bench.cases import Point
from longreel.bench.grids import measured_points, target_points
from longreel.bench.presets import Sweep


@dataclass(frozen=True, kw_only=True, slots=True)
class _Worlds:
    """Into what a grid may split its devices: `option` sets the worlds, `must_split` are those that have to."""

    option: str
    worlds: tuple[int, ...]
    must_split: tuple[int, ...]
    sp_degrees: tuple[int, ...]
    strategies: tuple[str, ...]
    points: list[Point]


def check_possible(sweep: Sweep, *, asked_ranks: tuple[int, ...], asked_degrees: tuple[int, ...] | None) -> None:
    """ValueError where degrees and ranks leave nothing to split, or only points that cannot run."""
    found = [
        _Worlds(
            option="ranks" if grid.device_type == "cpu" else "gpus",
            worlds=grid.ranks,
            must_split=asked_ranks if grid.device_type == "cpu" else grid.ranks,
            sp_degrees=grid.sp_degrees,
            strategies=(*grid.strategies, *grid.peers),
            points=measured_points(grid, device=""),
        )
        for grid in sweep.measured
        if grid.refused is None
    ] + [
        _Worlds(
            option="gpus",
            worlds=(grid.num_gpus,),
            must_split=(grid.num_gpus,),
            sp_degrees=grid.sp_degrees,
            strategies=(*grid.strategies, *grid.peers),
            points=[point for group in target_points(grid) for point in group],
        )
        for grid in sweep.targets
        # One without lengths only searches for them.
        if grid.seq_lens
    ]
    for measured_grid in sweep.measured:
        if "auto" in measured_grid.policies and measured_grid.device_type == "cpu":
            raise ValueError(
                "policies: auto goes by the memory of a GPU, and points on the CPU have none; use --mode predicted"
            )
    if {name for grid in found for name in grid.strategies} <= {"local"}:
        return
    everywhere = [world for grid in found for world in grid.worlds]
    for grid in found:
        if set(grid.strategies) <= {"local"}:
            continue
        for world in grid.must_split:
            if world > 1 and all(world % degree for degree in grid.sp_degrees):
                degrees = ", ".join(map(str, grid.sp_degrees))
                raise ValueError(
                    f"{grid.option}: {world} is not a multiple of any SP degree ({degrees}); sp_degrees that divide "
                    f"it: {_divisors(world)}"
                )
        for degree in asked_degrees or ():
            if all(world % degree for world in everywhere):
                raise ValueError(
                    f"sp_degrees: {degree} divides none of {grid.option} {', '.join(map(str, grid.worlds))}; degrees "
                    f"that do: {_divisors(*grid.worlds)}"
                )
        splitting = [point for point in grid.points if point.parallel.strategy != "local"]
        if not splitting and "local" not in grid.strategies:
            raise ValueError(
                f"strategies: {', '.join(grid.strategies)} with sp_degrees {', '.join(map(str, grid.sp_degrees))} have "
                f"no point on {grid.option} {', '.join(map(str, grid.worlds))}; give other sp_degrees (usp needs one "
                "with a divisor between 1 and itself that divides the heads), or add local"
            )
        reasons = [point.impossible for point in splitting if point.peer is None]
        # Where only some points are impossible, they become rows with their reason.
        if reasons and all(reasons):
            raise ValueError(
                f"strategies: none of {', '.join(grid.strategies)} can run with sp_degrees "
                f"{', '.join(map(str, grid.sp_degrees))}: {reasons[0]}"
            )


def _divisors(*worlds: int) -> str:
    return ", ".join(map(str, sorted({d for world in worlds for d in range(1, world + 1) if world % d == 0})))
