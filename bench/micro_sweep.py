"""The loop over op cases: each in a worker process that is replaced when it fails, a record for whatever happens.

Providers of one case run in one process, so that they can be timed in alternation; where that process dies, hangs or
raises, each is tried alone in a fresh one, the one at fault becomes a row with its reason, and the others run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longreel.bench.op_run import CaseRequest, run_case
from longreel.bench.ops import OPS, OpCase
from longreel.bench.providers import providers_of
from longreel.bench.run import one_line
from longreel.bench.tiles import Tiles
from longreel.bench.timing import TimingRule
from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout
from longreel.reports import store
from longreel.reports.op_records import OpRecord
from longreel.reports.records import Status

# What a case may take beside its timing: inputs, oracle, compilation of every provider.
_SETUP_S = 120.0
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
    """

    cases: tuple[OpCase, ...]
    providers: tuple[str, ...] | None
    directions: tuple[str, ...]
    rule: TimingRule
    device: str
    isolate: bool = False
    label: str = ""
    tiles: Tiles = ()

    def providers_for(self, op: str) -> tuple[str, ...]:
        """Names to try for an op; rooflines always have their one."""
        known = providers_of(op)
        if self.providers is None or not OPS[op].differentiable:
            return known
        return tuple(name for name in self.providers if name in known or name == "torch")


def run_plan(
    plan: MicroPlan,
    file: Path,
    provenance: dict[str, Any],
    *,
    pool: WorkerPool,
    resume: bool = True,
    deadline: float | None = None,
    run: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[list[OpRecord], list[OpCase]]:
    """Run a plan, appending every record to a file as its case finishes.

    Args:
        plan: what to run. file: records.jsonl, appended to. provenance: of all records.
        pool: of one worker, in which the cases run.
        resume: leave out cases whose points are all in the file already (same configuration, source, environment).
        deadline: time.monotonic() by which to stop; None for no limit.
        run: label of the run, the time now if not given. say: gets a line per record.

    Returns:
        The records made, and the cases left undone at the deadline.
    """
    done = {r.key for r in load(file) if r.status != "error"} if resume and file.exists() else set()
    run = run or run_label()
    made: list[OpRecord] = []
    # (op, provider, head_dim, dtype) -> why it is not tried at further lengths.
    not_again: dict[tuple[str, str, int, str], str] = {}
    for i, case in enumerate(plan.cases):
        request = _request(plan, case, run, provenance, not_again)
        if not request.providers or all(key in done for key in _keys(request)):
            continue
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left < _LEAST_S:
            return made, list(plan.cases[i:])
        try:
            records = _run_request(request, pool, left, isolate=plan.isolate)
        except _OutOfTime:
            return made, list(plan.cases[i:])
        for record in records:
            store.append(file, record)
            made.append(record)
            # A provider that is missing is missing in every direction.
            if record.status == "ok" or record.direction == request.possible_directions[0]:
                say(line(record))
            if record.status == "error":
                reason = f"failed at seq_len {case.seq_len:,}: {record.reason}"
                not_again.setdefault((case.op, record.provider, case.head_dim, case.dtype), reason)
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
    not_again: dict[tuple[str, str, int, str], str],
) -> CaseRequest:
    names = plan.providers_for(case.op)
    return CaseRequest(
        case=case,
        providers=names,
        directions=plan.directions,
        rule=plan.rule,
        device=plan.device,
        run=run,
        label=plan.label,
        tiles=plan.tiles,
        not_again={
            name: not_again[case.op, name, case.head_dim, case.dtype]
            for name in names
            if (case.op, name, case.head_dim, case.dtype) in not_again
        },
        provenance=provenance,
    )


def _keys(request: CaseRequest) -> list[str]:
    return [record.key for name in request.providers for record in request.records(name, "skipped", "its key only")]


def _run_request(request: CaseRequest, pool: WorkerPool, left: float | None, *, isolate: bool) -> list[OpRecord]:
    """Records of one case, whatever becomes of its worker. left: seconds until the deadline, None for none."""
    deadline = None if left is None else time.monotonic() + left
    if isolate:
        return [record for name in request.providers for record in _attempt(_only(request, name), pool, deadline)]
    try:
        return _together(request, pool, deadline)
    except WorkerError:
        alone = {name: _attempt(_only(request, name), pool, deadline) for name in request.providers}
    sound = tuple(name for name, records in alone.items() if all(r.status != "error" for r in records))
    if 1 < len(sound) < len(request.providers):
        # Those that can run are timed in alternation after all.
        try:
            records = _together(replace(request, providers=sound), pool, deadline)
            alone |= {name: [r for r in records if r.provider == name] for name in sound}
        except WorkerError:
            pass
    return [record for records in alone.values() for record in records]


def _only(request: CaseRequest, provider: str) -> CaseRequest:
    return replace(request, providers=(provider,))


def _together(request: CaseRequest, pool: WorkerPool, deadline: float | None) -> list[OpRecord]:
    """One call of the worker; WorkerError when it fails, _OutOfTime when the deadline ends it."""
    limit = request.rule.wall_cap_s * len(request.possible_directions) + _SETUP_S
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
        reason = one_line(error)
        status: Status = "oom" if "OutOfMemoryError" in reason or "can't allocate memory" in reason else "error"
        return [record for name in request.providers for record in request.records(name, status, reason)]


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
