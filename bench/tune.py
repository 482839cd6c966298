"""The kernels' tile constants chosen by measurement: candidates against the constants in use, in alternation.

A candidate passes the correctness gate, then is timed as part of the whole op (forward, or backward), and takes the
place of the constants in use only where the interval of the ratio says that it is faster.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from longreel.bench import op_gate, providers
from longreel.bench.failures import one_line
from longreel.bench.nvml import Monitor
from longreel.bench.op_run import CaseRequest, works_of
from longreel.bench.ops import OpCase, make_inputs
from longreel.bench.tiles import AnyTiles, Kernel, Tiles, candidates, listed_width, tiles_row, use_tiles
from longreel.bench.timing import TimingRule, Work, clock_for, measure
from longreel.bench.tune_plans import TunePlan
from longreel.kernels.triton_attention_tuning import LengthClass, length_class
from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout
from longreel.reports import store
from longreel.reports.op_records import OpRecord
from longreel.reports.turns import compare


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneRequest:
    """One candidate (base.tiles) against the constants in use (current), for one provider and direction."""

    base: CaseRequest
    current: Tiles

    @property
    def provider(self) -> str:
        """Who launches the kernel."""
        return self.base.providers[0]

    @property
    def direction(self) -> str:
        """What is timed."""
        return self.base.directions[0]


def run_candidate(request: TuneRequest) -> OpRecord:
    """Gate and time one candidate; its record compares it with the constants in use."""
    from triton.runtime.errors import OutOfResources

    base, provider, direction = request.base, request.provider, request.direction
    device = torch.device(base.device)
    context = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with context, Monitor(device) as monitor:
        inputs = make_inputs(base.case, device)
        function = providers.build(base.case, provider, device)
        try:
            with use_tiles(base.tiles):
                verdict = op_gate.check(base.case, function, inputs, is_ours=True)
        except OutOfResources as error:
            return base.record(provider, direction, "error", reason=str(error).partition("\n")[0])
        outcome: dict[str, Any] = {"error": verdict.error, "allowed": verdict.allowed}
        if verdict.reason is not None:
            return base.record(provider, direction, "wrong", reason=verdict.reason, **outcome)
        work = works_of(base.case, function, inputs)[direction]
        works = {"candidate": _with_tiles(work, base.tiles), "current": _with_tiles(work, request.current)}
        timings = measure(works, clock=clock_for(device), rule=base.rule, monitor=monitor)
    candidate, current = timings["candidate"], timings["current"]
    comparison = compare(candidate.samples_s, current.samples_s)
    return base.record(
        provider,
        direction,
        "ok",
        samples_s=candidate.samples_s,
        median_s=candidate.median_s,
        interval_s=candidate.interval_s,
        host_s=candidate.host_s,
        readings=candidate.readings,
        comparison={"provider": "constants in use", "verdict": comparison.verdict} | asdict(comparison),
        provenance={"current_median_s": current.median_s, "stopped_by": candidate.stopped_by},
        **outcome,
    )


def _with_tiles(work: Work, tiles: Tiles) -> Work:
    def run(state: Any) -> Any:
        with use_tiles(tiles):
            return work.run(state)

    return replace(work, run=run)


@dataclass(kw_only=True, slots=True)
class TuneResult:
    """What was chosen so far. done: every target of the last plan was decided."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False

    def tiles(self) -> Tiles:
        """All chosen constants."""
        return tuple(
            (e["kernel"], e["width"], e["length"], json.dumps(e["chosen"], sort_keys=True)) for e in self.entries
        )

    def write(self, file: Path, provenance: Mapping[str, Any]) -> None:
        """As JSON, from which the constants in kernels/triton_*_tuning.py are updated."""
        chosen = [
            {"kernel": e["kernel"], "width": e["width"], "length": e["length"], "tiles": e["chosen"]}
            for e in self.entries
        ]
        content = {"chosen": chosen, "entries": self.entries, "provenance": dict(provenance)}
        store.write_files({file: json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"})


def tune(
    plan: TunePlan,
    file: Path,
    provenance: dict[str, Any],
    *,
    pool: WorkerPool,
    run: str,
    deadline: float,
    result: TuneResult,
    say: Callable[[str], None] = print,
) -> TuneResult:
    """Decide kernel after kernel until all are decided or the deadline has come.

    Args:
        plan: what to tune. file: records.jsonl, appended to. provenance: of the records.
        pool: of one worker. run: label of the run.
        deadline: time.monotonic() at which to stop; a kernel whose search was cut short is not decided.
        result: of an earlier run with the same plan; its entries are kept. say: gets a line per candidate.
    """
    decided = {(e["kernel"], e["width"], e["length"]) for e in result.entries}
    result.done = False
    for target in plan.targets:
        case, provider = target.case, target.provider
        what = target.kernel, listed_width(target.kernel, case.head_dim), length_class(case.batch * case.seq_len)
        if provider is None or what in decided:
            continue
        search = _Search(
            plan=plan,
            case=case,
            what=what,
            before=result.tiles(),
            pool=pool,
            file=file,
            deadline=deadline,
            base=CaseRequest(
                case=case,
                providers=(provider,),
                directions=(target.direction,),
                rule=plan.rule,
                device=plan.device,
                run=run,
                provenance=provenance,
            ),
            say=say,
        )
        entry = search.decide()
        if entry is None:
            return result
        result.entries.append(entry)
        decided.add(what)
    result.done = True
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Search:
    """The decision about one kernel's constants. what: (kernel, width, length class). before: decided earlier."""

    plan: TunePlan
    case: OpCase
    what: tuple[Kernel, int, LengthClass]
    before: Tiles
    pool: WorkerPool
    file: Path
    deadline: float
    base: CaseRequest
    say: Callable[[str], None]

    def decide(self) -> dict[str, Any] | None:
        """The entry of this kernel, or None when there was no time to decide."""
        kernel, width, length = self.what
        current, *others = candidates(*self.what)
        name = f"{kernel} {width} {length}"
        tried: list[dict[str, Any]] = []
        best: tuple[float, AnyTiles] | None = None
        for tiles in others[: self.plan.most]:
            record = self._time(tiles, self.plan.rule, f"tune {name}")
            if record is None:
                return None
            tried.append(_tried(tiles, record))
            ratio = record.comparison.get("ratio")
            if ratio is not None and (best is None or ratio < best[0]):
                best = ratio, tiles
        entry = {
            "kernel": kernel,
            "width": width,
            "length": length,
            "provider": self.base.providers[0],
            "case": asdict(self.case),
            "current": asdict(current),
            "tried": tried,
        }
        if best is None:
            return entry | {"chosen": asdict(current), "verdict": "no candidate ran"}
        final = self._time(best[1], self.plan.final_rule, f"tuned {name}")
        if final is None:
            return None
        tried.append(_tried(best[1], final))
        if final.status != "ok":
            # Nothing was compared: the constants in use keep the evidence that they had.
            return entry | {"chosen": asdict(current), "verdict": f"not decided: {final.status}: {final.reason}"}
        faster = final.comparison["verdict"] == "FAST"
        chosen = replace(best[1] if faster else current, evidence="measured", record=final.key)
        verdict = f"{1 / final.comparison['ratio']:.3f} x as fast" if faster else "current stays"
        return entry | {"chosen": asdict(chosen), "verdict": verdict}

    def _time(self, tiles: AnyTiles, rule: TimingRule, label: str) -> OpRecord | None:
        """The record of one candidate, made now or by an earlier run that was cut short; None after the deadline."""
        row = tiles_row(*self.what, tiles)
        base = replace(self.base, rule=rule, label=label, tiles=(*self.before, row))
        provider, direction = base.providers[0], base.directions[0]
        key = base.record(provider, direction, "skipped", reason="its key only").key
        for record in store.load_lines(self.file, OpRecord.from_json) if self.file.exists() else ():
            if record.key == key:
                return record
        left = self.deadline - time.monotonic()
        if left <= 0:
            return None
        limit = self.plan.setup_s + rule.wall_cap_s
        request = TuneRequest(base=base, current=self.before)
        try:
            record = self.pool.run(run_candidate, 1, request, timeout=min(left, limit))[0]
        except WorkerError as error:
            if isinstance(error, WorkerTimeout) and left <= limit:
                # Cut short by the deadline: to be timed by the next run.
                return None
            record = base.record(provider, direction, "error", reason=one_line(error))
        store.append(self.file, record)
        self.say(f"{label}: {_line(tiles, record)}")
        return record


def _tried(tiles: AnyTiles, record: OpRecord) -> dict[str, Any]:
    return {
        "tiles": asdict(tiles),
        "status": record.status,
        "reason": record.reason,
        "median_s": record.median_s,
        "comparison": dict(record.comparison),
        "record": record.key,
    }


def _line(tiles: AnyTiles, record: OpRecord) -> str:
    words = ", ".join(f"{name} {value}" for name, value in asdict(tiles).items() if name not in ("evidence", "record"))
    if record.status != "ok":
        return f"{words}: {record.status}: {record.reason}"
    return f"{words}: {record.comparison['verdict']}, {record.comparison['ratio']:.3f} of the time in use"


def read_result(file: Path, source: str | None) -> TuneResult:
    """What an earlier run of the same source decided; empty where there is none."""
    if not file.exists():
        return TuneResult()
    found = json.loads(file.read_text())
    return TuneResult(entries=found["entries"] if found["provenance"].get("source") == source else [])
