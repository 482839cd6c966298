"""The loop over op cases: each in a worker process that is replaced when it fails, a record for whatever happens.

Providers of one case run in one process, so that they can be timed in alternation. Where that process dies, hangs or
raises, the provider that was at the gate becomes a row with its reason and the others run again; where it is not known
which one it was, each is tried alone first.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longreel.bench.op_run import AT, MADE, CaseRequest, failed_status, run_case
from longreel.bench.ops import OPS, OpCase
from longreel.bench.providers import providers_of
from longreel.bench.run import one_line
from longreel.bench.tiles import Tiles
from longreel.bench.timing import TimingRule
from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout
from longreel.reports import store
from longreel.reports.op_records import OpRecord

# Runs after the others, as the one most likely to take the device down with it.
_LAST = "triton-hopper"
# (op, provider, head_dim, dtype) -> the length at which it failed, and why it is not tried at further ones.
NotAgain = dict[tuple[str, str, int, str], tuple[int, str]]
# With less than this left of a budget nothing is started.
_LEAST_S = 5.0


class _OutOfTime(Exception):
    """The deadline of all cases came before this one was done: it is left for the next run, and is no failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroPlan:
    """Cases in the order in which they run, and how.

    Args:
        cases: what to measure. providers: None for all that an op has, else those of these names that it has.
        directions: some of forward, backward, both. rule: timing.
        device: torch device. isolate: every provider in a process of its own, never in alternation.
        label: pass of a campaign. tiles: see CaseRequest.
        setup_s: what a provider may take beside its timing, for compilation and the gate.
    """

    cases: tuple[OpCase, ...]
    providers: tuple[str, ...] | None
    directions: tuple[str, ...]
    rule: TimingRule
    device: str
    isolate: bool = False
    label: str = ""
    tiles: Tiles = ()
    setup_s: float = 120.0

    @property
    def limit_s(self) -> float:
        """Seconds for one provider at the gate, and for timing one direction."""
        return self.setup_s + self.rule.wall_cap_s

    def providers_for(self, op: str) -> tuple[str, ...]:
        """Names to try for an op, in this order; rooflines always have their one."""
        known = providers_of(op)
        if self.providers is None or not OPS[op].differentiable:
            wanted = known
        else:
            wanted = tuple(name for name in self.providers if name in known or name == "torch")
        return tuple(sorted(wanted, key=lambda name: name == _LAST))


def run_plan(
    plan: MicroPlan,
    file: Path,
    provenance: dict[str, Any],
    *,
    pool: WorkerPool,
    resume: bool = True,
    deadline: float | None = None,
    run: str | None = None,
    not_again: NotAgain | None = None,
    say: Callable[[str], None] = print,
) -> tuple[list[OpRecord], list[OpCase]]:
    """Run a plan, appending every record to a file as it arrives.

    Args:
        plan: what to run. file: records.jsonl, appended to. provenance: of all records.
        pool: of one worker, in which the cases run.
        resume: leave out cases whose points are all in the file already (same configuration, source, environment).
        deadline: time.monotonic() by which to stop; None for no limit.
        run: label of the run, the time now if not given. say: gets a line per record.
        not_again: what failed in earlier plans; what fails in this one is added.

    Returns:
        The records made, and the cases left undone at the deadline.
    """
    done = {r.key for r in load(file) if r.status != "error"} if resume and file.exists() else set()
    run = run or run_label()
    made: list[OpRecord] = []
    not_again = {} if not_again is None else not_again
    for i, case in enumerate(plan.cases):
        whole = _request(plan, case, run, provenance, not_again, pool.scratch)
        # A direction that was done before the deadline cut the case is not done again.
        directions = tuple(
            direction
            for direction in whole.possible_directions
            if any(key not in done for key in _keys(replace(whole, directions=(direction,))))
        )
        if not whole.providers or not directions:
            continue
        request = replace(whole, directions=directions)
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left < _LEAST_S:
            return made, list(plan.cases[i:])
        try:
            for record in _run_request(request, pool, left, isolate=plan.isolate):
                store.append(file, record)
                made.append(record)
                # A provider that is missing is missing in every direction.
                if record.status == "ok" or record.direction == request.possible_directions[0]:
                    say(line(record))
                if record.status == "error":
                    reason = f"failed at seq_len {case.seq_len:,}: {record.reason}"
                    not_again.setdefault((case.op, record.provider, case.head_dim, case.dtype), (case.seq_len, reason))
        except _OutOfTime:
            return made, list(plan.cases[i:])
    return made, []


def run_label() -> str:
    """The time now, as the label of a run."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def load(file: Path) -> list[OpRecord]:
    """The op records of a file."""
    return store.load_lines(file, OpRecord.from_json)


def _request(
    plan: MicroPlan,
    case: OpCase,
    run: str,
    provenance: dict[str, Any],
    not_again: NotAgain,
    trail: Path,
) -> CaseRequest:
    names = plan.providers_for(case.op)
    failed = {name: not_again.get((case.op, name, case.head_dim, case.dtype)) for name in names}
    return CaseRequest(
        case=case,
        providers=names,
        directions=plan.directions,
        rule=plan.rule,
        device=plan.device,
        run=run,
        label=plan.label,
        tiles=plan.tiles,
        # Plans come in no order of length; what fails at a long one may run at a short one.
        not_again={name: found[1] for name, found in failed.items() if found is not None and case.seq_len >= found[0]},
        provenance=provenance,
        limit_s=plan.limit_s,
        trail=trail,
    )


def _keys(request: CaseRequest) -> list[str]:
    return [record.key for name in request.providers for record in request.records(name, "skipped", "its key only")]


def _run_request(request: CaseRequest, pool: WorkerPool, left: float | None, *, isolate: bool) -> Iterator[OpRecord]:
    """Records of one case, whatever becomes of its worker. left: seconds until the deadline, None for none."""
    deadline = None if left is None else time.monotonic() + left
    if isolate:
        for name in request.providers:
            yield from _attempt(_only(request, name), pool, deadline)
        return
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
        except _OutOfTime:
            yield from _left_behind(request)[1]
            raise
    yield from _one_by_one(request, pool, deadline)


def _one_by_one(request: CaseRequest, pool: WorkerPool, deadline: float | None) -> Iterator[OpRecord]:
    """Each provider alone, to see which one fails; those that can run are timed in alternation after all."""
    alone: dict[str, list[OpRecord]] = {}
    too_late: _OutOfTime | None = None
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
    except _OutOfTime as error:
        too_late = error
    for records in alone.values():
        yield from records
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
    return at.read_text() if at.exists() else "", load(made) if made.exists() else []


def _together(request: CaseRequest, pool: WorkerPool, deadline: float | None) -> list[OpRecord]:
    """One call of the worker; WorkerError when it fails, _OutOfTime when the deadline ends it."""
    assert request.limit_s is not None
    assert request.trail is not None
    for name in (AT, MADE):
        (request.trail / name).unlink(missing_ok=True)
    # The worker ends itself when one part takes too long; this is for what it does between them.
    limit = request.limit_s * (len(request.providers) + len(request.possible_directions) + 1)
    left = None if deadline is None else deadline - time.monotonic()
    if left is not None and left < _LEAST_S:
        raise _OutOfTime
    try:
        return pool.run(run_case, 1, request, timeout=limit if left is None else min(limit, left))[0]
    except WorkerTimeout:
        if left is not None and left <= limit:
            raise _OutOfTime from None
        raise


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


def line(record: OpRecord) -> str:
    """A finished point in one line."""
    shape = " ".join(f"{name} {size:,}" for name, size in record.shape.items() if size != 1)
    where = f"{record.op:20} {record.direction:8} {record.provider:14} {record.dtype} {shape}"
    if record.status != "ok":
        return f"{where}  {record.status}: {record.reason}"
    rate = record.rate or 0.0
    figure = f"{rate / 1e12:8.3f} {'TFLOP/s' if record.is_compute_bound else 'TB/s'}"
    against = f", {record.comparison['verdict']} than {record.comparison['provider']}" if record.comparison else ""
    return f"{where}  {figure}  error {record.worst_error or 0.0:.1e}, {len(record.samples_s)} samples{against}"


def sweep_cases(
    ops: Sequence[str],
    *,
    seq_lens: Sequence[int],
    head_dims: Sequence[int],
    num_heads: int,
    model_heads: int,
    dtypes: Sequence[str],
    batch: int = 1,
) -> tuple[OpCase, ...]:
    """The grid of cases, rooflines first, lengths ascending within an op.

    Args:
        ops: names. seq_lens: lengths. head_dims, num_heads: of attention.
        model_heads: heads of the other ops, of the first head_dim: their hidden size is model_heads x head_dim.
        dtypes: names. batch: samples.
    """
    cases = []
    for dtype in dtypes:
        for op in ops:
            attends = op.startswith("attention")
            for head_dim in head_dims if attends else head_dims[:1]:
                for seq_len in seq_lens:
                    heads = num_heads if attends else model_heads
                    cases.append(
                        OpCase(op=op, dtype=dtype, seq_len=seq_len, num_heads=heads, head_dim=head_dim, batch=batch)
                    )
    return tuple(cases)
