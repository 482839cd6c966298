"""The steps of a campaign: each resumable, within its budget of seconds, leaving records and a line of result.

validate -> ceilings -> micro -> tune -> micro2 -> more -> report
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longreel.bench import ceilings
from longreel.bench.campaign_plans import AFTER, CampaignPlan
from longreel.bench.campaign_validate import run_part, words
from longreel.bench.failures import one_line
from longreel.bench.micro_sweep import MicroPlan, NotAgain, line, load, run_plan
from longreel.bench.op_run import CaseRequest
from longreel.bench.tune import read_result, tune
from longreel.bench.tune_plans import TunePlan
from longreel.parallel.workers import WorkerError, WorkerPool
from longreel.reports import store
from longreel.reports.op_report import write_op_report
from longreel.reports.op_summary import summary_lines

# Seconds of each step in a campaign of nine minutes; a step that needs less leaves the rest to those after it.
BUDGETS = {
    "validate": 156.0,
    "ceilings": 25.0,
    "micro": 162.0,
    "tune": 115.0,
    "micro2": 50.0,
    "more": 22.0,
    "report": 10.0,
}
RECORDS, STATE, TUNING = "records.jsonl", "campaign.json", "tuning.json"
# What a step may still start when this many seconds are left of its budget.
_LEAST_S = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a step: `done`, `partial` (run the command again to go on) or `failed`; said in words."""

    status: str
    summary: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Campaign:
    """One campaign's folder, what it does, and the worker that does it.

    Args:
        run: label of all records of this invocation. retry_errors: see run_plan. say: gets a line per finding.
    """

    folder: Path
    plan: CampaignPlan
    provenance: dict[str, Any]
    pool: WorkerPool
    run: str
    retry_errors: bool = False
    say: Callable[[str], None] = print

    @property
    def records(self) -> Path:
        """The record file."""
        return self.folder / RECORDS

    def state(self) -> dict[str, Any]:
        """Outcome of every step so far, of this source on this machine."""
        file = self.folder / STATE
        found = json.loads(file.read_text()) if file.exists() else {}
        same = all(found.get(name) == self.provenance[name] for name in ("source", "environment"))
        return found["steps"] if same else {}

    def remember(self, step: str, outcome: Outcome, seconds: float) -> None:
        """Write a step's outcome beside the others'."""
        more = {"status": outcome.status, "summary": outcome.summary, "seconds": round(seconds, 1), **outcome.details}
        content = {
            "steps": self.state() | {step: more},
            "source": self.provenance["source"],
            "environment": self.provenance["environment"],
            "provenance": self.provenance,
        }
        store.write_files({self.folder / STATE: json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"})


def validate(campaign: Campaign, deadline: float) -> Outcome:
    """pytest in processes of its own; every part that passed is not run again."""
    began = time.monotonic()
    before = campaign.state().get("validate", {}).get("parts", {})
    earlier = {name: found for name, found in before.items() if found.get("status") == "passed"}
    parts: dict[str, dict[str, Any]] = {}
    for i, part in enumerate(campaign.plan.validate):
        name = part.name
        if name in earlier:
            parts[name] = earlier[name]
            continue
        left = deadline - time.monotonic()
        if left < _LEAST_S:
            parts[name] = {"status": "not run"}
            continue
        parts[name] = run_part(part, campaign.folder / f"validate-{i}", left)
        campaign.say(f"validate {name}: {words(parts[name])}")
        # At once: what passed is not run again after an interruption either.
        so_far = Outcome(status="partial", summary="interrupted", details={"parts": earlier | parts})
        campaign.remember("validate", so_far, time.monotonic() - began)
    statuses = [found["status"] for found in parts.values()]
    status = "failed" if "failed" in statuses else "done" if set(statuses) == {"passed"} else "partial"
    passed = sum(found.get("passed", 0) for found in parts.values())
    failed = sum(found.get("failed", 0) for found in parts.values())
    unfinished = len(statuses) - statuses.count("passed") - statuses.count("failed")
    skipped = sum(found.get("skipped", 0) for found in parts.values())
    summary = f"{passed} tests passed, {failed} failed" + (f", {skipped} skipped" if skipped else "")
    summary += f", {unfinished} parts unfinished" if unfinished else ""
    reasons = [found["reason"] for found in parts.values() if "reason" in found]
    summary += "".join(f"; {reason}" for reason in reasons)
    return Outcome(status=status, summary=summary, details={"parts": parts})


def measure_ceilings(campaign: Campaign, deadline: float) -> Outcome:
    """Burst as every op is timed, then sustained with energy."""
    plan = campaign.plan
    burst = replace(plan.micro[0], cases=plan.rooflines, label=ceilings.BURST, directions=("forward",))
    done, left = _run_plans(campaign, [burst], deadline)
    summary, known = [], {record.key for record in load(campaign.records)}
    for case in plan.rooflines:
        request = CaseRequest(
            case=case,
            providers=(ceilings.PROVIDER,),
            directions=("forward",),
            rule=burst.rule,
            device=plan.device,
            run=campaign.run,
            label=ceilings.SUSTAINED,
            provenance=campaign.provenance,
        )
        if request.record(ceilings.PROVIDER, "forward", "skipped", reason="its key only").key in known:
            continue
        rest = deadline - time.monotonic()
        if rest < plan.sustained_s + _LEAST_S:
            return Outcome(status="partial", summary="sustained ceilings not measured: no time left")
        try:
            record = campaign.pool.run(ceilings.run_sustained, 1, request, plan.sustained_s, timeout=rest)[0]
        except WorkerError as error:
            record = request.record(ceilings.PROVIDER, "forward", "error", reason=one_line(error))
        store.append(campaign.records, record)
        campaign.say(f"sustained: {line(record)}")
    for record in load(campaign.records):
        label = record.config["label"]
        if label in (ceilings.BURST, ceilings.SUSTAINED) and record.rate:
            unit = "TFLOP/s" if record.is_compute_bound else "TB/s"
            summary.append(f"{record.op} {label} {record.rate / 1e12:.3g} {unit}")
    return Outcome(status="partial" if left else "done", summary=", ".join(summary) or f"{done} records")


def micro(campaign: Campaign, deadline: float) -> Outcome:
    """Every plan in turn, with the constants as they are in the code."""
    return _micro(campaign, list(campaign.plan.micro), deadline)


def run_tune(campaign: Campaign, deadline: float) -> Outcome:
    """The constants that matter most; tuning.json holds what was chosen, and from which records."""
    return _tune(campaign, campaign.plan.tune, deadline)


def _tune(campaign: Campaign, plan: TunePlan, deadline: float) -> Outcome:
    file = campaign.folder / TUNING
    result = read_result(file, campaign.provenance["source"])
    result = tune(
        plan,
        campaign.records,
        campaign.provenance,
        pool=campaign.pool,
        run=campaign.run,
        deadline=deadline,
        result=result,
        say=campaign.say,
    )
    result.write(file, campaign.provenance)
    words = [f"{e['kernel']} {e['width']} {e['length']}: {e['verdict']}" for e in result.entries]
    return Outcome(status="done" if result.done else "partial", summary="; ".join(words) or "nothing decided yet")


def micro2(campaign: Campaign, deadline: float) -> Outcome:
    """The most important points once more, with the constants that tuning chose."""
    tiles = read_result(campaign.folder / TUNING, campaign.provenance["source"]).tiles()
    if not tiles:
        return Outcome(status="partial", summary="waits for tuning to decide something")
    plans = [replace(plan, label=AFTER, tiles=tiles) for plan in campaign.plan.micro_after]
    return _micro(campaign, plans, deadline)


def more(campaign: Campaign, deadline: float) -> Outcome:
    """What nine minutes are not promised for: the constants of other shapes, then further points with them."""
    if not campaign.plan.tune_more.targets and not campaign.plan.micro_more:
        return Outcome(status="done", summary="nothing further planned")
    tuned = _tune(campaign, campaign.plan.tune_more, deadline)
    if tuned.status != "done":
        return tuned
    tiles = read_result(campaign.folder / TUNING, campaign.provenance["source"]).tiles()
    return _micro(campaign, [replace(plan, label=AFTER, tiles=tiles) for plan in campaign.plan.micro_more], deadline)


def report(campaign: Campaign, deadline: float) -> Outcome:
    """report.html and ops.csv from all records of the folder."""
    records = load(campaign.records) if campaign.records.exists() else []
    if not records:
        return Outcome(status="partial", summary="there are no records yet")
    for text in summary_lines(records):
        campaign.say(text)
    page = write_op_report(campaign.folder, records, title="Longreel kernels: campaign", source_files=[RECORDS])
    return Outcome(status="done", summary=f"{len(records)} records on {page.name}")


STEPS: dict[str, Callable[[Campaign, float], Outcome]] = {
    "validate": validate,
    "ceilings": measure_ceilings,
    "micro": micro,
    "tune": run_tune,
    "micro2": micro2,
    "more": more,
    "report": report,
}


def _micro(campaign: Campaign, plans: list[MicroPlan], deadline: float) -> Outcome:
    done, left = _run_plans(campaign, plans, deadline)
    summary = f"{done} records made" + (f", {left} cases left" if left else "")
    return Outcome(status="partial" if left else "done", summary=summary)


def _run_plans(campaign: Campaign, plans: list[MicroPlan], deadline: float) -> tuple[int, int]:
    """Records made and cases left."""
    made = left = 0
    not_again: NotAgain = {}
    for plan in plans:
        records, undone = run_plan(
            plan,
            campaign.records,
            campaign.provenance,
            pool=campaign.pool,
            run=campaign.run,
            retry_errors=campaign.retry_errors,
            deadline=deadline,
            not_again=not_again,
            say=campaign.say,
        )
        made, left = made + len(records), left + len(undone)
    return made, left


@contextmanager
def interpreting(wanted: bool) -> Iterator[None]:
    """Within this context new worker processes interpret Triton kernels on the CPU."""
    before = os.environ.get("TRITON_INTERPRET")
    if wanted:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if wanted:
            os.environ.pop("TRITON_INTERPRET")
            if before is not None:
                os.environ["TRITON_INTERPRET"] = before
