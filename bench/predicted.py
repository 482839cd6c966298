"""Predicted points on worker processes: several at a time, `auto` settled, the longest length that fits searched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from longreel.bench.cases import Point
from longreel.bench.failures import failure
from longreel.bench.grids import TargetGrid, target_points
from longreel.bench.longest import STEP, longest_that_fits
from longreel.bench.measure import silence_fsdp
from longreel.bench.outcome import predicted_record
from longreel.bench.provenance import stamped
from longreel.bench.reproduce import reproduce
from longreel.parallel.config import ParallelConfig
from longreel.parallel.predict.hardware import GiB, get_profile
from longreel.parallel.predict.policy import choose_policy, under_policy
from longreel.parallel.predict.predict import Prediction, PredictionCase, predict_step
from longreel.parallel.workers import WorkerError, WorkerPool
from longreel.reports.records import Record, Status

# Assumed of policies `auto` and `offload`: half of a node's 2 TiB, shared by its 8 GPUs.
HOST_BYTES = 128 * GiB

Done = Callable[[str], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a worker says to a point: the point that was predicted and its prediction, or status and reason of none.

    chosen: why policy `auto` became the one of the point.
    """

    point: Point
    prediction: Prediction | None = None
    chosen: str | None = None
    status: Status = "ok"
    reason: str | None = None


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
                wanted.saw(record)
        points = [point for point in points if not done(point.key(provenance))]
        batches = [points[i : i + width] for i in range(0, len(points), width)]
        for batch in batches:
            for point, record in _answered(batch, pool, provenance, grid.point_timeout_s):
                wanted.saw(record)
                if record.memory:
                    needs[_anywhere(point)][point.seq_len] = float(record.memory["allocated"])
                yield record
    if grid.search:
        yield from _searched(grid, pool, provenance, width, done, needs)


def _answered(
    batch: Sequence[Point], pool: WorkerPool, provenance: dict[str, Any], timeout: float
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
        answers: list[Answer] = pool.run(predict_share, len(possible), possible, timeout=timeout)
    except WorkerError as error:
        if len(possible) == 1:
            yield possible[0], failure(possible[0], error, provenance)
            return
        # Only the point at fault shall have no figure.
        for point in possible:
            yield from _answered([point], pool, provenance, timeout)
        return
    for point, answer in zip(possible, answers, strict=True):
        yield point, _record(point, answer, provenance)


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


def predict_share(points: Sequence[Point]) -> Answer:
    """In a worker: predict this rank's one of the points. Prediction needs a process group of its own."""
    return _alone(_predict, points[dist.get_rank()])


def _alone(work: Callable[..., Any], *arguments: Any) -> Any:
    dist.destroy_process_group()
    silence_fsdp()
    try:
        return work(*arguments)
    finally:
        # The worker takes down the group that it set up.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _predict(point: Point) -> Answer:
    chosen = None
    if point.parallel.policy == "auto":
        try:
            parallel, chosen = _with_policy(point)
        except ValueError as error:
            return Answer(point=point, status="oom" if "none fits" in str(error) else "skipped", reason=str(error))
        point = replace(point, parallel=parallel)
    try:
        case = case_of(point)
    except ValueError as error:
        return Answer(point=point, status="skipped", reason=str(error))
    return Answer(point=point, prediction=predict_step(case), chosen=chosen)


def _with_policy(point: Point) -> tuple[ParallelConfig, str]:
    """The configuration with policy `auto` settled, and why."""
    assert point.target is not None
    profile = get_profile(point.target)
    choice = choose_policy(
        point.model,
        point.parallel,
        world_size=point.num_devices,
        grid=case_of(replace(point, parallel=under_policy(point.parallel, "full"))).grid,
        batch=point.batch_per_group,
        limit_bytes=profile.usable_bytes,
        host_limit_bytes=HOST_BYTES,
        gpu=profile,
    )
    return under_policy(point.parallel, choice.policy), choice.reason


def case_of(point: Point) -> PredictionCase:
    """What to predict of a point; ValueError where nothing can be."""
    assert point.target is not None
    return PredictionCase(
        model=point.model,
        parallel=point.parallel,
        num_gpus=point.num_devices,
        target=point.target,
        seq_len=point.seq_len,
        batch_per_group=point.batch_per_group,
    )


class Wanted:
    """Which predicted points say something new: see TargetGrid.every_policy."""

    def __init__(self, *, every_policy: bool) -> None:
        self._every_policy = every_policy
        # (strategy, SP degree) -> policies that did not fit at a length so far, and lengths at which one fitted.
        self._too_large: dict[tuple[str, int], set[str]] = defaultdict(set)
        self._fitted: dict[tuple[str, int], set[int]] = defaultdict(set)

    def __call__(self, point: Point) -> bool:
        if self._every_policy or point.is_baseline:
            return True
        spread = point.strategy, point.parallel.sp_degree
        return point.parallel.policy not in self._too_large[spread] and point.seq_len not in self._fitted[spread]

    def saw(self, record: Record) -> None:
        spread = record.strategy, record.sp_degree
        if record.status == "ok":
            self._fitted[spread].add(record.seq_len)
        elif record.status == "oom":
            self._too_large[spread].add(record.policy)


def _anywhere(point: Point) -> Point:
    """The configuration without its length."""
    return replace(point, seq_len=1)


def _searched(
    grid: TargetGrid,
    pool: WorkerPool,
    provenance: dict[str, Any],
    width: int,
    done: Done,
    needs: dict[Point, dict[int, float]],
) -> Iterator[Record]:
    """A record for every configuration at the longest length that fits."""
    asked = [
        point
        for point in dict.fromkeys(_anywhere(point) for group in target_points(grid) for point in group)
        if point.impossible is None and point.parallel.policy != "auto" and not done(search_key(point, provenance))
    ]
    for start in range(0, len(asked), width):
        batch = asked[start : start + width]
        known = [needs.get(point, {}) for point in batch]
        try:
            answers = pool.run(search_share, len(batch), batch, known, timeout=grid.point_timeout_s)
        except WorkerError as error:
            for point in batch:
                yield failure(replace(point, seq_len=max(grid.seq_lens)), error, provenance)
            continue
        for point, answer in zip(batch, answers, strict=True):
            if answer is not None:
                found = provenance | {
                    "asked": {"key": search_key(point, provenance), "longest": True},
                    "search": f"longest multiple of {STEP:,} tokens that fits, {HOST_BYTES // GiB} GiB of host memory "
                    "per GPU assumed",
                }
                yield predicted_record(answer.point, answer.prediction, found)


def search_key(point: Point, provenance: dict[str, Any]) -> str:
    """What the search of a configuration is known by, whatever length it finds."""
    return f"longest-{_anywhere(point).key(provenance)}"


def search_share(points: Sequence[Point], known: Sequence[dict[int, float]]) -> Answer | None:
    """In a worker: the longest length that fits this rank's one of the configurations; None where none does."""
    rank = dist.get_rank()
    return _alone(_search, points[rank], known[rank])


def _search(point: Point, known: dict[int, float]) -> Answer | None:
    assert point.target is not None

    usable = get_profile(point.target).usable_bytes

    def need(seq_len: int) -> float:
        found = predict_step(case_of(replace(point, seq_len=seq_len)))
        return max(found.memory_bytes / usable, found.host_bytes / HOST_BYTES)

    # Of host memory nothing is known yet.
    known = {} if point.parallel.policy == "offload" else {n: memory / usable for n, memory in known.items()}
    longest = longest_that_fits(need, 1.0, known=known)
    return None if longest is None else _predict(replace(point, seq_len=longest, is_baseline=False))
