"""Measured points on worker processes: the oracle of a length once, points of one world in turns, failures as rows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from longreel.bench import gate
from longreel.bench.cases import Point
from longreel.bench.failures import failure
from longreel.bench.grids import MeasuredGrid, measured_points
from longreel.bench.measure import FEWEST_SAMPLES, RankResult, measure_points
from longreel.bench.outcome import measured_record
from longreel.bench.provenance import stamped
from longreel.bench.reproduce import reproduce
from longreel.bench.settled import settled
from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout
from longreel.reports.records import Record

# Points that are timed in turns on GPUs, where their weights and optimizers lie beside each other.
TOGETHER_ON_GPU = 4

Done = Callable[[str], bool]
Saved = Callable[[str], Record | None]


def measured(
    grid: MeasuredGrid,
    pool: WorkerPool,
    provenance: dict[str, Any],
    *,
    device: str,
    done: Done = lambda key: False,
    saved: Saved = lambda key: None,
) -> Iterator[Record]:
    """Records of a grid's points that are not there yet, the oracle of each length computed once.

    Args:
        grid: what to measure. pool: workers, one per rank. provenance: of all records.
        device: what a rank runs on, in words. done: whether there is a record of a key. saved: that record.
    """
    with tempfile.TemporaryDirectory(prefix="oracle-", dir=pool.scratch) as folder:
        runner = _Runner(grid, pool, provenance, Path(folder))
        points = settled(grid, measured_points(grid, device=device), pool)
        for _, group in groupby(points, key=lambda point: (point.seq_len, point.num_devices)):
            found = list(group)
            keys = {id(point): point.key(provenance) for point in found}
            there = {id(point): saved(keys[id(point)]) for point in found if done(keys[id(point)])}
            waiting = [point for point in found if id(point) not in there or _too_few(point, there[id(point)])]
            for point in waiting:
                if point.impossible is not None:
                    yield point.record(
                        "skipped",
                        reason=point.impossible,
                        provenance=stamped(provenance, reproduce=reproduce(point)),
                    )
            possible = [point for point in waiting if point.impossible is None]
            # A baseline that was measured before runs beside what is left: a comparison wants the two in turns.
            beside = [point for point in found if point.is_baseline and possible and not _failed(there.get(id(point)))]
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
                        if _failed(record):
                            # It would fail beside every batch.
                            beside = []


def _failed(record: Record | None) -> bool:
    return record is not None and record.status != "ok"


def _too_few(point: Point, record: Record | None) -> bool:
    """Whether a saved record has fewer steps than are asked for now, and not because its time was over."""
    if record is None or record.status != "ok":
        return False
    taken, rule = record.samples_s, point.timing
    over = len(taken) >= FEWEST_SAMPLES and sum(taken) >= rule.wall_cap_s
    return len(taken) < rule.min_samples and not over


class NoOracleError(WorkerError):
    """There is nothing to compare points of a length with; says nothing about the points themselves."""


class _Deadline:
    """Ends a call in which one point takes longer than a point may, as the first rank's notes tell."""

    def __init__(self, at: Path, limit_s: float) -> None:
        self._at, self._limit_s = at, limit_s
        self._spent: dict[int, float] = {}
        self._last: tuple[int, float] | None = None

    def place(self) -> int | None:
        """Of the point that the call is at, None before the first."""
        text = self._at.read_text() if self._at.exists() else ""
        return int(text) if text else None

    def overdue(self) -> str | None:
        """See WorkerPool.run."""
        place, now = self.place(), time.monotonic()
        if place is None:
            return None
        if self._last is not None and self._last[0] == place:
            self._spent[place] = self._spent.get(place, 0.0) + now - self._last[1]
        self._last = place, now
        if self._spent.get(place, 0.0) <= self._limit_s:
            return None
        return f"did not finish within {self._limit_s:g} s and was ended; --point-timeout allows more"


class _Runner:
    def __init__(self, grid: MeasuredGrid, pool: WorkerPool, provenance: dict[str, Any], folder: Path) -> None:
        self._grid, self._pool, self._provenance, self._folder = grid, pool, provenance, folder
        self._no_oracle: dict[int, NoOracleError] = {}

    def run(self, points: Sequence[Point]) -> Iterator[tuple[Record, Point]]:
        """Records of points that run in turns; without the one at fault where the call fails, which then runs alone.

        One that took too long does not run again: it had the time of a point to itself.
        """
        if not points:
            return
        at = self._folder / "at"
        at.unlink(missing_ok=True)
        deadline = _Deadline(at, self._grid.point_timeout_s)
        try:
            oracle = self._oracle(points[0])
            ranks: list[list[RankResult]] = self._pool.run(
                measure_points,
                points[0].num_devices,
                points,
                oracle,
                str(at),
                timeout=len(points) * self._grid.point_timeout_s,
                overdue=deadline.overdue,
            )
        except NoOracleError as error:
            for point in points:
                # Whatever the oracle ran out of, the points did not.
                yield failure(point, error, self._provenance, status="error"), point
            return
        except WorkerError as error:
            noted = deadline.place()
            place = noted or 0
            if len(points) == 1 or (isinstance(error, WorkerTimeout) and noted is not None):
                yield failure(points[place], error, self._provenance), points[place]
            else:
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
                self._no_oracle[length] = NoOracleError(f"no oracle to compare with: {error}")
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
