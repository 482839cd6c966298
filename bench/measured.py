"""Measured points on worker processes: the oracle of a length once, points of one world in turns, failures as rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from longreel.bench import gate
from longreel.bench.cases import Point
from longreel.bench.failures import failure
from longreel.bench.grids import MeasuredGrid, measured_points
from longreel.bench.measure import RankResult, measure_points
from longreel.bench.outcome import measured_record
from longreel.bench.provenance import stamped
from longreel.bench.reproduce import reproduce
from longreel.bench.settled import settled
from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout
from longreel.reports.records import Record

# Points that are timed in turns on GPUs, where their weights and optimizers lie beside each other.
TOGETHER_ON_GPU = 4

Done = Callable[[str], bool]


def measured(
    grid: MeasuredGrid, pool: WorkerPool, provenance: dict[str, Any], *, device: str, done: Done = lambda key: False
) -> Iterator[Record]:
    """Records of a grid's points that are not there yet, the oracle of each length computed once.

    Args:
        grid: what to measure. pool: workers, one per rank. provenance: of all records.
        device: what a rank runs on, in words. done: whether there is a record of a key.
    """
    with tempfile.TemporaryDirectory(prefix="oracle-", dir=pool.scratch) as folder:
        runner = _Runner(grid, pool, provenance, Path(folder))
        points = settled(grid, measured_points(grid, device=device), pool)
        for _, group in groupby(points, key=lambda point: (point.seq_len, point.num_devices)):
            found = list(group)
            waiting = [point for point in found if not done(point.key(provenance))]
            for point in waiting:
                if point.impossible is not None:
                    yield point.record(
                        "skipped",
                        reason=point.impossible,
                        provenance=stamped(provenance, reproduce=reproduce(point)),
                    )
            possible = [point for point in waiting if point.impossible is None]
            # A baseline that was measured before runs beside what is left: a comparison wants the two in turns.
            beside = [point for point in found if point.is_baseline and possible]
            candidates = [point for point in possible if not point.is_baseline]
            share = TOGETHER_ON_GPU - len(beside) if grid.device_type == "cuda" else max(1, len(candidates))
            batches = [candidates[i : i + share] for i in range(0, len(candidates), share)] or [[]]
            told = set(map(id, beside)) - set(map(id, possible))
            for batch in batches:
                for record, point in runner.run([*beside, *batch]):
                    if id(point) not in told:
                        yield record
                    if point.is_baseline:
                        told.add(id(point))


class _Runner:
    def __init__(self, grid: MeasuredGrid, pool: WorkerPool, provenance: dict[str, Any], folder: Path) -> None:
        self._grid, self._pool, self._provenance, self._folder = grid, pool, provenance, folder
        self._no_oracle: dict[int, WorkerError] = {}

    def run(self, points: Sequence[Point]) -> Iterator[tuple[Record, Point]]:
        """Records of points that run in turns; without the one at fault, which runs alone, where the call fails."""
        if not points:
            return
        at = self._folder / "at"
        at.unlink(missing_ok=True)
        try:
            oracle = self._oracle(points[0])
            ranks: list[list[RankResult]] = self._pool.run(
                measure_points,
                points[0].num_devices,
                points,
                oracle,
                str(at),
                timeout=len(points) * self._grid.point_timeout_s,
            )
        except WorkerError as error:
            if len(points) == 1 or self._length(points[0]) in self._no_oracle:
                for point in points:
                    yield failure(point, error, self._provenance), point
                return
            place = int(at.read_text()) if at.exists() else 0
            yield from self.run([points[place]])
            yield from self.run([*points[:place], *points[place + 1 :]])
            return
        baseline = next((ranks[0][i] for i, point in enumerate(points) if point.is_baseline), None)
        for i, point in enumerate(points):
            yield measured_record(point, [rank[i] for rank in ranks], self._provenance, baseline=baseline), point

    def _length(self, point: Point) -> int:
        """Tokens of the gate's long sample."""
        return point.gate_len or point.seq_len

    def _oracle(self, point: Point) -> str:
        """The file that points of this length are compared with; WorkerError where there can be none."""
        length = self._length(point)
        path = self._folder / f"{length}.pt"
        if length in self._no_oracle:
            raise self._no_oracle[length]
        if not path.exists():
            model = replace(point.model, depth=point.gate_depth or point.model.depth)
            max_dp = max(self._grid.ranks)
            arguments = model, length, max_dp, point.seed, str(path), point.parallel.precision, point.device_type
            try:
                self._write(arguments)
            except WorkerError as error:
                # Once per length: every point of it would wait as long for the same.
                self._no_oracle[length] = type(error)(f"no oracle to compare with: {error}")
                raise self._no_oracle[length] from error
        return str(path)

    def _write(self, arguments: tuple[Any, ...]) -> None:
        limit = self._grid.point_timeout_s
        try:
            self._pool.run(gate.write_oracle, 1, *arguments, timeout=limit)
        except WorkerTimeout:
            raise
        except WorkerError:
            # A length's points hang on this one worker: a second one where the first was lost.
            self._pool.run(gate.write_oracle, 1, *arguments, timeout=limit)
