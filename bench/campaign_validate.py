"""A campaign's first step: pytest on the GPU, in processes of its own, within its time.

What passed is remembered at once and not run again; what hangs is ended with everything it started.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
# pytest's exit status where no test was selected.
_NO_TESTS = 5
# Tests past 2^31 elements take tens of GB each: one after the other. They have 31 in their names.
_LARGE = "31"
PROCESSES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some tests. arguments: of pytest. processes: that share them. least: tests that must pass for it to pass."""

    arguments: tuple[str, ...]
    processes: int = 1
    least: int = 1

    @property
    def name(self) -> str:
        """What the part is remembered by."""
        return " ".join(self.arguments)


def gpu_parts(tests: Path = _ROOT / "tests" / "kernels") -> tuple[Part, ...]:
    """The GPU tests of the kernels: in parallel, those of the kernel most likely to take the device down apart and
    later, the large and slow ones last and one by one."""
    found = [path for path in sorted(tests.glob("test_*.py")) if re.search(r"mark\.gpu\b", path.read_text())]
    files = [f"tests/kernels/{path.name}" for path in found if not path.stem.endswith("_hopper")]
    hopper = [f"tests/kernels/{path.name}" for path in found if path.stem.endswith("_hopper")]
    quick = ("-m", "gpu and not slow", "-k", f"not {_LARGE}")
    large = ("-m", "gpu", "-k", f"{_LARGE} or slow")
    return (
        Part(arguments=(*files, *quick), processes=PROCESSES),
        Part(arguments=(*hopper, *quick), processes=PROCESSES),
        Part(arguments=(*files, *hopper, *large)),
    )


def rehearsed_parts() -> tuple[Part, ...]:
    """Where there is no GPU to run the tests on: that they are found and can be imported, by two processes."""
    return (Part(arguments=("tests/kernels", "-m", "gpu", "--collect-only"), processes=2, least=0),)


def run_part(part: Part, log: Path, seconds: float) -> dict[str, Any]:
    """Outcome of a part: status, numbers of tests, names of failures.

    Args:
        part: what to run. log: output goes to <log>.log and .xml, of several processes to <log>-<i>.log and .xml.
        seconds: after which what still runs is ended.
    """
    logs = [log] if part.processes == 1 else [log.with_name(f"{log.name}-{i}") for i in range(part.processes)]
    deadline = time.monotonic() + seconds
    started: list[tuple[subprocess.Popen[bytes], Path]] = []
    try:
        for i, name in enumerate(logs):
            shard = ("-p", "longreel.bench.campaign_shards", f"--shard={i}/{len(logs)}") if len(logs) > 1 else ()
            started.append((_start((*part.arguments, *shard), name), name))
        outcomes = [_outcome(run, name, deadline, seconds) for run, name in started]
    finally:
        for run, _ in started:
            _end(run)
    found = outcomes[0] if len(outcomes) == 1 else _together(outcomes)
    if found["status"] == "passed" and found["passed"] < part.least:
        return found | {"status": "failed", "reason": f"{found['passed']} tests passed, at least {part.least} must"}
    return found


def words(outcome: dict[str, Any]) -> str:
    """An outcome in one line, with why it failed and why tests were skipped."""
    counts = ", ".join(f"{outcome[name]} {name}" for name in ("passed", "failed", "skipped") if name in outcome)
    skips = "; ".join(f"{count} skipped: {reason}" for reason, count in outcome.get("skips", {}).items())
    return ": ".join(text for text in (outcome["status"], counts, outcome.get("reason", ""), skips) if text)


def _start(arguments: tuple[str, ...], log: Path) -> subprocess.Popen[bytes]:
    report = log.with_suffix(".xml")
    # -P: python -m would put the repository's root on sys.path.
    command = [sys.executable, "-P", "-m", "pytest", *arguments, "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # A run that is killed writes none, and an earlier one's is not its own.
    report.unlink(missing_ok=True)
    # Oracles on the CPU: the processes share its cores.
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    with open(log.with_suffix(".log"), "wb") as output:
        # A session of its own, to be ended with all its workers, which hold the GPU.
        return subprocess.Popen(
            command, cwd=_ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def _end(run: subprocess.Popen[bytes]) -> None:
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def _outcome(run: subprocess.Popen[bytes], log: Path, deadline: float, seconds: float) -> dict[str, Any]:
    report = log.with_suffix(".xml")
    try:
        code = run.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        _end(run)
        return {"status": f"unfinished after {seconds:.0f} s"}
    if code == _NO_TESTS:
        return {"status": "passed", "passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": {}}
    if not report.exists():
        return {"status": "failed", "reason": f"pytest ended with {code}; see {log.with_suffix('.log').name}"}
    root = ElementTree.parse(report).getroot()
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in root.iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    bad = totals["failures"] + totals["errors"]
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in root.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "status": "passed" if code == 0 else "failed",
        "passed": totals["tests"] - bad - totals["skipped"],
        "failed": bad,
        "skipped": totals["skipped"],
        "failures": names,
        "skips": Counter(skip.get("message", "") for skip in root.iter("skipped")),
    }


def _together(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """One outcome of all processes of a part: failed where one failed, else unfinished where one is."""
    statuses = [outcome["status"] for outcome in outcomes]
    unfinished = next((status for status in statuses if status not in ("passed", "failed")), "passed")
    reasons = [outcome["reason"] for outcome in outcomes if "reason" in outcome]
    return {
        "status": "failed" if "failed" in statuses else unfinished,
        **{name: sum(outcome.get(name, 0) for outcome in outcomes) for name in ("passed", "failed", "skipped")},
        "failures": [name for outcome in outcomes for name in outcome.get("failures", ())],
        "skips": sum((Counter(outcome.get("skips")) for outcome in outcomes), Counter()),
        **({"reason": "; ".join(reasons)} if reasons else {}),
    }
