"""The loop of a sweep: points in, one record each, whatever becomes of them; the sweep goes on."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longreel.bench import gate
from longreel.bench.cases import MeasuredGrid, Point, PredictedGrid, Sweep, measured_points, predicted_points
from longreel.bench.measure import measure_point, silence_fsdp
from longreel.bench.outcome import measured_record, predicted_record
from longreel.bench.provenance import num_cores, stamped
from longreel.parallel.predict.predict import Prediction, PredictionCase, predict_step
from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout
from longreel.reports.records import Record, Status

# Workers take seconds to start and a prediction a second: more of them would not pay.
MAX_PREDICTORS = 8

Work = Callable[[Sequence[Point]], list[Record]]


def run_points(batches: Iterable[Sequence[Point]], work: Work, provenance: dict[str, Any]) -> Iterator[Record]:
    """Run batches of points one after the other and yield a record per point.

    Args:
        batches: points that run at the same time. A batch that fails is run again point by point, so that only the
            points at fault have no figure.
        work: runs one batch; WorkerError says that it raised, died or took too long.
        provenance: of failed and skipped points.
    """
    for batch in batches:
        possible = [point for point in batch if point.impossible is None]
        for point in batch:
            if point.impossible is not None:
                yield point.record("skipped", reason=point.impossible, provenance=stamped(provenance))
        if not possible:
            continue
        try:
            records = work(possible)
        except WorkerError as error:
            if len(possible) > 1:
                yield from run_points([[point] for point in possible], work, provenance)
                continue
            reason = one_line(error)
            status: Status = "oom" if _out_of_memory(reason) else "error"
            records = [possible[0].record(status, reason=reason, provenance=stamped(provenance))]
        yield from records


def one_line(error: WorkerError) -> str:
    """What went wrong: the first rank that failed, its exception, and where it was raised."""
    text = str(error)
    if "\nTraceback" not in text:
        return " ".join(text.split())
    who, _, trace = text.partition("\nTraceback")
    trace = re.split(r"\nrank(s \[| \d+ of)", trace)[0]
    lines = [line for line in trace.splitlines() if line.strip()]
    message = next(
        (line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)), lines[-1]
    )
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    where = f" ({Path(frames[-1][0]).name}:{frames[-1][1]})" if frames else ""
    return f"{' '.join(who.split())} {message.strip()}{where}"


def _out_of_memory(reason: str) -> bool:
    return "can't allocate memory" in reason or "MemoryError" in reason


def measured(grid: MeasuredGrid, pool: WorkerPool, provenance: dict[str, Any], *, device: str) -> Iterator[Record]:
    """Records of a grid's measured points, the oracle of each length computed once."""
    with tempfile.TemporaryDirectory(prefix="oracle-", dir=pool.scratch) as folder:
        no_oracle: dict[int, WorkerError] = {}

        def oracle_of(point: Point) -> str:
            path = Path(folder) / f"{point.seq_len}.pt"
            if point.seq_len in no_oracle:
                raise no_oracle[point.seq_len]
            if not path.exists():
                try:
                    write(point, path)
                except WorkerError as error:
                    # Once per length: every point of it would wait as long for the same.
                    no_oracle[point.seq_len] = type(error)(f"no oracle to compare with: {error}")
                    raise no_oracle[point.seq_len] from error
            return str(path)

        def write(point: Point, path: Path) -> None:
            arguments = point.model, point.seq_len, max(grid.ranks), point.seed, str(path)
            try:
                pool.run(gate.write_oracle, 1, *arguments, timeout=grid.point_timeout_s)
            except WorkerTimeout:
                raise
            except WorkerError:
                # A length's points hang on this one worker: a second one where the first was lost.
                pool.run(gate.write_oracle, 1, *arguments, timeout=grid.point_timeout_s)

        def work(batch: Sequence[Point]) -> list[Record]:
            (point,) = batch
            path = oracle_of(point)
            ranks = pool.run(measure_point, point.num_devices, point, path, timeout=grid.point_timeout_s)
            return [measured_record(point, ranks, provenance)]

        yield from run_points(([point] for point in measured_points(grid, device=device)), work, provenance)


def predicted(grid: PredictedGrid, pool: WorkerPool, provenance: dict[str, Any], *, width: int) -> Iterator[Record]:
    """Records of a grid's predicted points, `width` at a time."""

    def work(batch: Sequence[Point]) -> list[Record]:
        cases = [_case(point) for point in batch]
        found = pool.run(predict_share, len(batch), cases, timeout=grid.point_timeout_s)
        return [predicted_record(point, one, provenance) for point, one in zip(batch, found, strict=True)]

    wanted = _Wanted(every_policy=grid.every_policy)
    for group in predicted_points(grid):
        points = [point for point in group if wanted(point)]
        batches = [points[i : i + width] for i in range(0, len(points), width)]
        for record in run_points(batches, work, provenance):
            wanted.saw(record)
            yield record


class _Wanted:
    """Which predicted points say something new: see PredictedGrid.every_policy."""

    def __init__(self, *, every_policy: bool) -> None:
        self._every_policy = every_policy
        # (strategy, SP degree) -> policies that did not fit at a length so far, and lengths at which one fitted.
        self._too_large: dict[tuple[str, int], set[str]] = defaultdict(set)
        self._fitted: dict[tuple[str, int], set[int]] = defaultdict(set)

    def __call__(self, point: Point) -> bool:
        if self._every_policy or point.is_baseline:
            return True
        spread = point.parallel.strategy, point.parallel.sp_degree
        return point.parallel.policy not in self._too_large[spread] and point.seq_len not in self._fitted[spread]

    def saw(self, record: Record) -> None:
        spread = record.strategy, record.sp_degree
        if record.status == "ok":
            self._fitted[spread].add(record.seq_len)
        elif record.status == "oom":
            self._too_large[spread].add(record.policy)


def _case(point: Point) -> PredictionCase:
    assert point.target is not None
    return PredictionCase(
        model=point.model,
        parallel=point.parallel,
        num_gpus=point.num_devices,
        target=point.target,
        seq_len=point.seq_len,
        batch_per_group=point.batch_per_group,
    )


def predict_share(cases: Sequence[PredictionCase]) -> Prediction:
    """In a worker: predict this rank's one of the cases. Prediction needs a process group of its own."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    silence_fsdp()
    try:
        return predict_step(cases[rank])
    finally:
        # The worker takes down the group that it set up.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def num_points(sweep: Sweep) -> int:
    """Points at most, for progress bars."""
    measured_count = sum(len(measured_points(grid, device="")) for grid in sweep.measured)
    return measured_count + sum(len(group) for grid in sweep.predicted for group in predicted_points(grid))


def run_sweep(sweep: Sweep, pool: WorkerPool, provenance: dict[str, Any]) -> Iterator[Record]:
    """Every record of a sweep as its point finishes: measured points first, then predicted ones."""
    # Every rank computes with one thread; ranks beyond the number of cores share them.
    cores = num_cores()
    device = f"CPU process on {cores} core{'s' if cores > 1 else ''}"
    for grid in sweep.measured:
        yield from measured(grid, pool, provenance, device=device)
    for predicted_grid in sweep.predicted:
        yield from predicted(predicted_grid, pool, provenance, width=pool_width(sweep))


def pool_width(sweep: Sweep) -> int:
    """Workers that predict at the same time."""
    return min(num_cores(), MAX_PREDICTORS) if sweep.predicted else 1
