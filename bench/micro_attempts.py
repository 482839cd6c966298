"""One op case in a worker process that may fail: records of every provider, whatever becomes of it.

Providers of one case run in one process, so that they can be timed in alternation. Where that process dies, hangs or
raises, the provider that was at the gate becomes a row with its reason and the others run again; where it is not known
which one it was, each is tried alone first.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from longreel.bench.failures import one_line
from longreel.bench.op_run import AT, MADE, CaseRequest, failed_status, run_case
from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout
from longreel.reports import store
from longreel.reports.op_records import OpRecord

# With less than this left of a budget nothing is started.
LEAST_S = 5.0
# The worker stops by itself this much before it is ended, and hands over what it has measured.
_HAND_OVER_S = 1.0


class OutOfTime(Exception):
    """The deadline of all cases came before this one was done: it is left for the next run, and is no failure.

    Args:
        records: what was measured by then.
    """

    def __init__(self, records: Sequence[OpRecord] = ()) -> None:
        super().__init__()
        self.records = records


def run_request(
    request: CaseRequest, pool: WorkerPool, deadline: float | None, *, isolate: bool = False
) -> Iterator[OpRecord]:
    """Records of one case, as they are made.

    Args:
        request: the case. pool: of one worker. deadline: time.monotonic() by which to be done, None for none.
        isolate: every provider in a process of its own, never in alternation.

    Raises:
        OutOfTime: the deadline has come; what was measured by then was yielded.
    """
    if deadline is not None:
        request = replace(request, deadline=deadline - _HAND_OVER_S)
    try:
        yield from _isolated(request, pool, deadline) if isolate else _in_alternation(request, pool, deadline)
    except OutOfTime as error:
        yield from error.records
        raise


def _isolated(request: CaseRequest, pool: WorkerPool, deadline: float | None) -> Iterator[OpRecord]:
    for name in request.providers:
        yield from _attempt(_only(request, name), pool, deadline)


def _in_alternation(request: CaseRequest, pool: WorkerPool, deadline: float | None) -> Iterator[OpRecord]:
    while True:
        try:
            yield from _together(request, pool, deadline)
            return
        except WorkerError as error:
            at_fault, made = _left_behind(request)
            yield from made
            request = _without(request, made)
            if not request.directions:
                return
            if len(request.providers) == 1:
                yield from _failed(request, error)
                return
            if at_fault not in request.providers:
                break
            yield from _failed(_only(request, at_fault), error)
            request = replace(request, providers=tuple(name for name in request.providers if name != at_fault))
    yield from _one_by_one(request, pool, deadline)


def _one_by_one(request: CaseRequest, pool: WorkerPool, deadline: float | None) -> Iterator[OpRecord]:
    """Each provider alone, to see which one fails; those that can run are timed in alternation after all."""
    alone: dict[str, list[OpRecord]] = {}
    too_late: OutOfTime | None = None
    try:
        for name in request.providers:
            records = _attempt(_only(request, name), pool, deadline)
            if any(r.status == "error" for r in records):
                yield from records
            else:
                alone[name] = records
        if 1 < len(alone) < len(request.providers):
            together = _together(replace(request, providers=tuple(alone)), pool, deadline)
            alone = {name: [r for r in together if r.provider == name] for name in alone}
    except WorkerError:
        pass
    except OutOfTime as error:
        too_late = error
    for measured in alone.values():
        yield from measured
    if too_late is not None:
        raise too_late


def _only(request: CaseRequest, provider: str) -> CaseRequest:
    return replace(request, providers=(provider,))


def _without(request: CaseRequest, made: Sequence[OpRecord]) -> CaseRequest:
    """The request without the directions that are done."""
    done = {record.direction for record in made}
    return replace(request, directions=tuple(d for d in request.possible_directions if d not in done))


def _left_behind(request: CaseRequest) -> tuple[str, list[OpRecord]]:
    """What a worker that failed has left on its trail: the provider at the gate, or "", and records."""
    assert request.trail is not None
    at, made = request.trail / AT, request.trail / MADE
    return at.read_text() if at.exists() else "", store.load_lines(made, OpRecord.from_json) if made.exists() else []


def _together(request: CaseRequest, pool: WorkerPool, deadline: float | None) -> list[OpRecord]:
    """One call of the worker; WorkerError when it fails, OutOfTime with what is done when the deadline ends it."""
    assert request.limit_s is not None
    assert request.trail is not None
    for name in (AT, MADE):
        (request.trail / name).unlink(missing_ok=True)
    # The worker ends itself when one part takes too long; this is for what it does between them.
    limit = request.limit_s * (len(request.providers) + len(request.possible_directions) + 1)
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left < LEAST_S:
        raise OutOfTime
    try:
        records: list[OpRecord] = pool.run(run_case, 1, request, timeout=limit if left is None else min(limit, left))[0]
    except WorkerTimeout:
        if left is not None and left <= limit:
            raise OutOfTime(_left_behind(request)[1]) from None
        raise
    if {r.direction for r in records} != set(request.possible_directions):
        raise OutOfTime(records)
    return records


def _attempt(request: CaseRequest, pool: WorkerPool, deadline: float | None) -> list[OpRecord]:
    """One call of the worker, whose failure becomes rows."""
    try:
        return _together(request, pool, deadline)
    except WorkerError as error:
        made = _left_behind(request)[1]
        rest = _without(request, made)
        return [*made, *_failed(rest, error)] if rest.directions else made


def _failed(request: CaseRequest, error: WorkerError) -> list[OpRecord]:
    reason = one_line(error)
    if f"exit code -{signal.SIGALRM:d}" in reason:
        reason = f"did not finish compilation and gate, or timing, within {request.limit_s:g} s and was ended"
    return [r for name in request.providers for r in request.records(name, failed_status(reason), reason)]
