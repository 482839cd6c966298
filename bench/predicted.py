"""Predicted points on worker processes: several at a time, `auto` settled, the longest length that fits searched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from longreel.bench.cases import Point
from longreel.bench.failures import failure
from longreel.bench.grids import TargetGrid, marked, target_points
from longreel.bench.longest import STEP
from longreel.bench.outcome import predicted_record
from longreel.bench.predictor import HOST_BYTES, Answer, predict_share, search_share
from longreel.bench.provenance import stamped
from longreel.bench.reproduce import reproduce
from longreel.parallel.predict.hardware import GiB
from longreel.parallel.predict.policy import under_policy
from longreel.parallel.workers import WorkerError, WorkerPool
from longreel.reports.records import Record

Done = Callable[[str], bool]


def predicted(
    grid: TargetGrid,
    pool: WorkerPool,
    provenance: dict[str, Any],
    *,
    width: int,
    done: Done = lambda key: False,
    saved: Callable[[str], Record | None] = lambda key: None,
) -> Iterator[Record]:
    """Records of a grid's points that are not there yet, `width` at a time.

    Args:
        grid: what to predict. pool: workers. provenance: of all records.
        done: whether a point with this key has been answered. saved: the record of a key, if there is one.
    """
    wanted = Wanted(every_policy=grid.every_policy)
    needs: defaultdict[Point, dict[int, float]] = defaultdict(dict)
    for group in target_points(grid):
        points = [point for point in group if wanted(point)]
        for point in points:
            if (record := saved(point.key(provenance))) is not None:
                wanted.saw(point, record)
        points = [point for point in points if not done(point.key(provenance))]
        batches = [points[i : i + width] for i in range(0, len(points), width)]
        for batch in batches:
            for point, record in _answered(batch, pool, provenance, grid):
                wanted.saw(point, record)
                if record.memory:
                    needs[_anywhere(point)][point.seq_len] = float(record.memory["allocated"])
                yield record
    if grid.search:
        yield from _searched(grid, pool, provenance, width, done, needs)


def _answered(
    batch: Sequence[Point], pool: WorkerPool, provenance: dict[str, Any], grid: TargetGrid
) -> Iterator[tuple[Point, Record]]:
    possible = [point for point in batch if point.impossible is None]
    for point in batch:
        if point.impossible is not None:
            yield (
                point,
                point.record("skipped", reason=point.impossible, provenance=_details(point, provenance)),
            )
    if not possible:
        return
    try:
        answers: list[Answer] = pool.run(predict_share, len(possible), possible, timeout=grid.point_timeout_s)
    except WorkerError as error:
        if len(possible) == 1:
            yield possible[0], failure(possible[0], error, provenance)
            return
        # Only the point at fault shall have no figure.
        for point in possible:
            yield from _answered([point], pool, provenance, grid)
        return
    for point, answer in zip(possible, answers, strict=True):
        # A settled policy may have made it the baseline.
        yield point, _record(point, replace(answer, point=marked(grid, answer.point)), provenance)


def _record(asked: Point, answer: Answer, provenance: dict[str, Any]) -> Record:
    details = provenance
    if answer.point != asked:
        # Of what was asked for, so that it is not asked again.
        details = provenance | {"asked": {"key": asked.key(provenance), "policy": asked.parallel.policy}}
    if answer.chosen is not None:
        details = details | {"policy": answer.chosen}
    if answer.prediction is None:
        return asked.record(answer.status, reason=answer.reason, provenance=_details(asked, details))
    return predicted_record(answer.point, answer.prediction, details)


def _details(point: Point, provenance: dict[str, Any]) -> dict[str, Any]:
    return stamped(provenance, reproduce=reproduce(point))


class Wanted:
    """Which predicted points say something new: see TargetGrid.every_policy."""

    def __init__(self, *, every_policy: bool) -> None:
        self._every_policy = every_policy
        # Configuration -> policies that did not fit at a length so far, and lengths at which one fitted.
        self._too_large: dict[Point, set[str]] = defaultdict(set)
        self._fitted: dict[Point, set[int]] = defaultdict(set)

    def __call__(self, point: Point) -> bool:
        if self._every_policy or point.is_baseline:
            return True
        one, policy = _configuration(point), point.parallel.policy
        # `auto` is one answer for all policies, whatever else there is.
        return policy not in self._too_large[one] and (policy == "auto" or point.seq_len not in self._fitted[one])

    def saw(self, point: Point, record: Record) -> None:
        """Take note of what became of a point."""
        if record.status == "ok":
            self._fitted[_configuration(point)].add(point.seq_len)
        elif record.status == "oom":
            self._too_large[_configuration(point)].add(point.parallel.policy)


def _configuration(point: Point) -> Point:
    """What a point's policies and lengths are tried of: batch, engine, kernels and tiles decide what fits too."""
    return replace(_anywhere(point), parallel=under_policy(point.parallel, "none"))


def _anywhere(point: Point) -> Point:
    """The configuration without its length."""
    return replace(point, seq_len=1, is_baseline=False)


def _searched(
    grid: TargetGrid,
    pool: WorkerPool,
    provenance: dict[str, Any],
    width: int,
    done: Done,
    needs: dict[Point, dict[int, float]],
) -> Iterator[Record]:
    """A record for every configuration at the longest length that fits, or with why there is none."""
    one_length = replace(grid, seq_lens=(STEP,))
    asked = [
        point
        for point in dict.fromkeys(_anywhere(point) for group in target_points(one_length) for point in group)
        # Where the search begins: without a length, a point has fewer tokens than ranks.
        if replace(point, seq_len=STEP).impossible is None
        and point.parallel.policy != "auto"
        and not done(search_key(point, provenance))
    ]
    for start in range(0, len(asked), width):
        yield from _found(asked[start : start + width], pool, provenance, grid.point_timeout_s, needs)


def _found(
    batch: Sequence[Point],
    pool: WorkerPool,
    provenance: dict[str, Any],
    timeout: float,
    needs: dict[Point, dict[int, float]],
) -> Iterator[Record]:
    known = [needs.get(point, {}) for point in batch]
    try:
        answers = pool.run(search_share, len(batch), batch, known, timeout=timeout)
    except WorkerError as error:
        if len(batch) == 1:
            details = _of_search(batch[0], provenance)
            yield _searched_record(failure(replace(batch[0], seq_len=STEP), error, details))
            return
        for point in batch:
            yield from _found([point], pool, provenance, timeout, needs)
        return
    for point, answer in zip(batch, answers, strict=True):
        details = _of_search(point, provenance)
        if answer is None:
            shortest = replace(point, seq_len=STEP)
            reason = f"no length fits: {STEP:,} tokens, the shortest that is tried, need more memory than there is"
            record = shortest.record("oom", reason=reason, provenance=_details(shortest, details))
        else:
            record = predicted_record(answer.point, answer.prediction, details)
        yield _searched_record(record)


def _of_search(point: Point, provenance: dict[str, Any]) -> dict[str, Any]:
    return provenance | {
        "asked": {"key": search_key(point, provenance), "longest": True},
        "search": f"longest multiple of {STEP:,} tokens that fits, {HOST_BYTES // GiB} GiB of host memory per GPU "
        "assumed",
    }


def _searched_record(record: Record) -> Record:
    """Under a key of its own: the length found, or the one that stands for none, may be a point's of the grid."""
    return replace(record, config=dict(record.config) | {"search": "longest"})


def search_key(point: Point, provenance: dict[str, Any]) -> str:
    """What the search of a configuration is known by, whatever length it finds."""
    return f"longest-{_anywhere(point).key(provenance)}"
