"""Policy `auto` of points that run for real or emulated, settled by prediction before they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longreel.bench.cases import Point
from longreel.bench.failures import one_line
from longreel.bench.grids import Axes, marked
from longreel.bench.predictor import settle_share
from longreel.parallel.workers import WorkerError, WorkerPool


def settled(grid: Axes, points: Sequence[Point], pool: WorkerPool) -> list[Point]:
    """The points with policy `auto` replaced by the one chosen, each point once; what cannot be chosen is refused.

    Args:
        grid: of the points. points: those of one device; the baseline before what may become the same.
        pool: its first worker predicts.
    """
    found: dict[Point, Point] = {}
    for point in points:
        one = point if point.parallel.policy != "auto" or point.impossible else _settled(grid, point, pool)
        found.setdefault(replace(one, chosen=None), one)
    return list(found.values())


def _settled(grid: Axes, point: Point, pool: WorkerPool) -> Point:
    try:
        (answer,) = pool.run(settle_share, 1, [point], timeout=grid.point_timeout_s)
    except WorkerError as error:
        return replace(point, refused=f"policy auto was not settled: {one_line(error)}")
    if answer.status != "ok":
        return replace(point, refused=f"by prediction: {answer.reason}")
    return replace(marked(grid, answer.point), chosen=answer.chosen)
