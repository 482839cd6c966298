"""The loop over op cases: what is done already is left out, what takes too long is cut, every point gets a record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longreel.bench.micro_attempts import LEAST_S, OutOfTime, run_request
from longreel.bench.op_estimate import Rates, fit
from longreel.bench.op_provenance import device_words
from longreel.bench.op_run import LEFT_OUT, CaseRequest
from longreel.bench.ops import OPS, OpCase
from longreel.bench.providers import providers_of
from longreel.bench.tiles import Tiles
from longreel.bench.timing import TimingRule
from longreel.parallel.workers import WorkerPool
from longreel.reports import store
from longreel.reports.op_records import OpRecord

# Run after the others, as those most likely to take the device down with them.
_LAST = ("triton-hopper", "triton-hopper-atomic")
# (op, provider, head_dim or hidden size, dtype) -> the length at which it failed, and why it is not tried further on.
NotAgain = dict[tuple[str, str, int, str], tuple[int, str]]
_FAILED = "failed at seq_len"
_VERDICTS = {
    "FAST": "faster than",
    "SLOW": "slower than",
    "SAME": "as fast as",
    "AMBIGUOUS": "not clearly faster or slower than",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroPlan:
    """Cases in the order in which they run, and how.

    Args:
        cases: what to measure. providers: None for all that an op has, else those of these names that it has.
        directions: some of forward, backward, both. rule: timing.
        device: torch device. isolate: every provider in a process of its own, never in alternation.
        label: pass of a campaign. tiles: see CaseRequest.
        setup_s: what a provider may take beside its timing, for compilation and the gate.
        case_s: what all of a case may take by its estimate, else it is cut (op_estimate); None for no limit.
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
    case_s: float | None = None

    @property
    def limit_s(self) -> float:
        """Seconds for one provider at the gate, and for timing one direction."""
        return self.setup_s + self.rule.wall_cap_s

    def directions_of(self, case: OpCase) -> tuple[str, ...]:
        """The directions that a case's op has."""
        return self.directions if OPS[case.op].differentiable else ("forward",)

    def providers_for(self, op: str) -> tuple[str, ...]:
        """Names to try for an op, in this order; rooflines always have their one."""
        known = providers_of(op)
        if self.providers is None or not OPS[op].differentiable:
            wanted = known
        else:
            wanted = tuple(name for name in self.providers if name in known or name == "torch")
        return tuple(sorted(wanted, key=lambda name: name in _LAST))


def run_plan(
    plan: MicroPlan,
    file: Path,
    provenance: dict[str, Any],
    *,
    pool: WorkerPool,
    resume: bool = True,
    retry_errors: bool = False,
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
        retry_errors: what failed before is tried again; otherwise its row stands.
        deadline: time.monotonic() by which to stop; None for no limit. A case that would take longer is not started.
        run: label of the run, the time now if not given. say: gets a line per record.
        not_again: what failed in earlier plans; what fails in this one is added.

    Returns:
        The records made, and the cases left undone at the deadline.
    """
    history = load(file) if file.exists() else []
    earlier = [r for r in history if _same_origin(r, provenance)] if resume else []
    if retry_errors:
        earlier = [r for r in earlier if r.status != "error" and not (r.reason or "").startswith(_FAILED)]
    not_again = {} if not_again is None else not_again
    for record in earlier:
        _learn(not_again, record)
    device = torch.device(plan.device)
    run = run or run_label()
    made: list[OpRecord] = []
    left_over: list[OpCase] = []
    for case in plan.cases:
        names = plan.providers_for(case.op)
        rates = Rates([*history, *made], device_words(device), assume=device.type == "cuda")
        fitted = fit(case, names, plan.directions_of(case), plan.rule, rates, case_s=plan.case_s)
        whole = replace(
            _request(plan, case, run, provenance, not_again, pool.scratch),
            left_out=fitted.left_out,
            samples=fitted.samples,
            long=tuple(name for name in names if rates.is_long(case, name)),
        )
        # A direction that was done before the deadline cut the case is not done again.
        directions = _missing_directions(whole, earlier)
        if not names or not directions:
            continue
        left = None if deadline is None else deadline - time.monotonic()
        seconds = fit(case, names, directions, plan.rule, rates, case_s=plan.case_s).seconds
        if left is not None and left < max(LEAST_S, seconds):
            if left >= LEAST_S:
                say(f"{case.label()}: left for the next run; it would take {seconds:.0f} s, there are {left:.0f} s")
            left_over.append(case)
            continue
        try:
            for record in run_request(replace(whole, directions=directions), pool, deadline, isolate=plan.isolate):
                store.append(file, record)
                made.append(record)
                # A provider that is missing is missing in every direction.
                if record.status == "ok" or record.direction == directions[0]:
                    say(line(record))
                _learn(not_again, record)
        except OutOfTime:
            left_over.append(case)
    return made, left_over


def _same_origin(record: OpRecord, provenance: dict[str, Any]) -> bool:
    return all(record.provenance.get(name) == provenance.get(name) for name in ("commit", "source", "environment"))


def _learn(not_again: NotAgain, record: OpRecord) -> None:
    """What failed at one length is not tried at further ones."""
    if record.status == "error":
        seq_len = record.shape["seq_len"]
        where = record.op, record.provider, _width(record.shape), record.dtype
        not_again.setdefault(where, (seq_len, f"{_FAILED} {seq_len:,}: {record.reason}"))


def _width(shape: Mapping[str, int]) -> int:
    """head_dim, of ops without heads the hidden size."""
    return shape["head_dim"] if "head_dim" in shape else shape["hidden_size"]


def _missing_directions(request: CaseRequest, earlier: Sequence[OpRecord]) -> tuple[str, ...]:
    """The directions of a request of which the records lack a point."""
    # What had no time then may have it now.
    done = {r.key for r in earlier if r.provider in request.left_out or not r.provenance.get(LEFT_OUT)}
    return tuple(
        direction
        for direction in request.possible_directions
        if any(key not in done for key in _keys(replace(request, directions=(direction,))))
    )


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
    failed = {name: not_again.get((case.op, name, _width(case.shape()), case.dtype)) for name in names}
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


def line(record: OpRecord) -> str:
    """A finished point in one line."""
    shape = " ".join(f"{name} {size:,}" for name, size in record.shape.items() if size != 1)
    where = f"{record.op:20} {record.direction:8} {record.provider:14} {record.dtype} {shape}"
    if record.status != "ok":
        return f"{where}  {record.status}: {record.reason}"
    rate = record.rate or 0.0
    figure = f"{rate / 1e12:8.3f} {'TFLOP/s' if record.is_compute_bound else 'TB/s'}"
    against = (
        f", {_VERDICTS[record.comparison['verdict']]} {record.comparison['provider']}" if record.comparison else ""
    )
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
        dtypes: names. batch: samples, of ops that take so many: one packed sequence, at least two where layouts change.
    """
    cases = []
    for dtype in dtypes:
        for op in ops:
            attends = op.startswith("attention")
            for head_dim in head_dims if attends else head_dims[:1]:
                for seq_len in seq_lens:
                    heads = num_heads if attends else model_heads
                    samples = 1 if OPS[op].packs else max(batch, OPS[op].least_batch)
                    cases.append(
                        OpCase(op=op, dtype=dtype, seq_len=seq_len, num_heads=heads, head_dim=head_dim, batch=samples)
                    )
    return tuple(cases)
