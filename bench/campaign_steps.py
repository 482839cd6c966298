"""The steps of a campaign: each resumable, within its budget of seconds, leaving records and a line of result.

validate -> ceilings -> micro -> tune -> micro2 -> report
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longreel.bench import ceilings
from longreel.bench.campaign_plans import AFTER, CampaignPlan
from longreel.bench.micro_sweep import MicroPlan, NotAgain, line, load, run_plan
from longreel.bench.op_run import CaseRequest
from longreel.bench.run import one_line
from longreel.bench.tune import read_result, tune
from longreel.parallel.workers import WorkerError, WorkerPool
from longreel.reports import store
from longreel.reports.op_report import write_op_report
from longreel.reports.op_summary import summary_lines

# Seconds of each step in a campaign of nine minutes; a step that needs less leaves the rest to those after it.
BUDGETS = {"validate": 120.0, "ceilings": 30.0, "micro": 180.0, "tune": 110.0, "micro2": 80.0, "report": 10.0}
RECORDS, STATE, TUNING = "records.jsonl", "campaign.json", "tuning.json"
# pytest's exit status where no test was selected.
_NO_TESTS = 5
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
        run: label of all records of this invocation. say: gets a line per finding.
    """

    folder: Path
    plan: CampaignPlan
    provenance: dict[str, Any]
    pool: WorkerPool
    run: str
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
    earlier = {name: part for name, part in before.items() if part.get("status") == "passed"}
    parts: dict[str, dict[str, Any]] = {}
    for i, arguments in enumerate(campaign.plan.validate):
        name = " ".join(arguments)
        if name in earlier:
            parts[name] = earlier[name]
            continue
        left = deadline - time.monotonic()
        if left < _LEAST_S:
            parts[name] = {"status": "not run"}
            continue
        parts[name] = _pytest(arguments, campaign.folder / f"validate-{i}", left)
        campaign.say(f"validate {name}: {_words(parts[name])}")
        # At once: what passed is not run again after an interruption either.
        so_far = Outcome(status="partial", summary="interrupted", details={"parts": earlier | parts})
        campaign.remember("validate", so_far, time.monotonic() - began)
    statuses = [part["status"] for part in parts.values()]
    status = "failed" if "failed" in statuses else "done" if set(statuses) == {"passed"} else "partial"
    passed = sum(part.get("passed", 0) for part in parts.values())
    failed = sum(part.get("failed", 0) for part in parts.values())
    unfinished = len(statuses) - statuses.count("passed") - statuses.count("failed")
    summary = f"{passed} tests passed, {failed} failed" + (f", {unfinished} parts unfinished" if unfinished else "")
    return Outcome(status=status, summary=summary, details={"parts": parts})


def _words(part: dict[str, Any]) -> str:
    counts = ", ".join(f"{part[name]} {name}" for name in ("passed", "failed", "skipped") if name in part)
    return f"{part['status']}: {counts}" if counts else part["status"]


def _pytest(arguments: tuple[str, ...], log: Path, seconds: float) -> dict[str, Any]:
    """Outcome of one pytest run; its output is in log.log, its cases in log.xml."""
    report = log.with_suffix(".xml")
    # -P: python -m would put the repository's root on sys.path.
    command = [sys.executable, "-P", "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    root = Path(__file__).resolve().parents[1]
    # A run that is killed writes none, and an earlier one's is not its own.
    report.unlink(missing_ok=True)
    with open(log.with_suffix(".log"), "w", encoding="utf-8") as output:
        # A session of its own, to be ended with all its workers, which hold the GPU.
        run = subprocess.Popen(command, cwd=root, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = run.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"status": f"unfinished after {seconds:.0f} s"}
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
    if code == _NO_TESTS:
        return {"status": "passed", "passed": 0, "failed": 0, "skipped": 0, "failures": []}
    if not report.exists():
        return {
            "status": "failed",
            "reason": f"pytest ended with {code}; see {log.with_suffix('.log').name}",
        }
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    bad = totals["failures"] + totals["errors"]
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in ElementTree.parse(report).getroot().iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "status": "passed" if code == 0 else "failed",
        "passed": totals["tests"] - bad - totals["skipped"],
        "failed": bad,
        "skipped": totals["skipped"],
        "failures": names,
    }


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
    """Attention's constants; tuning.json holds what was chosen, and from which records."""
    file = campaign.folder / TUNING
    result = read_result(file, campaign.provenance["source"])
    result = tune(
        campaign.plan.tune,
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
