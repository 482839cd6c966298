"""A campaign's validation: what passed is remembered at once, what hangs is ended with everything it started."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from longreel.bench import campaign, campaign_steps
from longreel.bench.campaign_plans import rehearsal
from longreel.bench.campaign_steps import STATE, Campaign
from longreel.parallel.workers import WorkerPool


@pytest.fixture
def campaign_in(tmp_path):
    """A campaign that validates parts of these names; nothing in it starts the worker."""
    with WorkerPool(1) as pool:

        def make(*parts: str) -> Campaign:
            plan = replace(rehearsal(()), validate=tuple((part,) for part in parts))
            provenance = {"source": "abc", "environment": {"device": "a CPU"}}
            return Campaign(folder=tmp_path, plan=plan, provenance=provenance, pool=pool, run="now", say=lambda _: None)

        yield make


def test_a_part_that_passed_is_remembered_before_the_step_ends(campaign_in, tmp_path, monkeypatch):
    ran = []

    def interrupted_at_b(arguments, log, seconds):
        ran.append(arguments[0])
        if arguments[0] == "b" and ran.count("b") == 1:
            raise KeyboardInterrupt
        return {"status": "passed", "passed": 1, "failed": 0}

    monkeypatch.setattr(campaign_steps, "_pytest", interrupted_at_b)
    run = campaign_in("a", "b", "c")
    with pytest.raises(KeyboardInterrupt):
        campaign_steps.validate(run, time.monotonic() + 60.0)
    assert json.loads((tmp_path / STATE).read_text())["steps"]["validate"]["status"] == "partial"
    outcome = campaign_steps.validate(run, time.monotonic() + 60.0)
    assert ran == ["a", "b", "b", "c"]
    assert (outcome.status, outcome.summary) == ("done", "3 tests passed, 0 failed")


HANGING = """
import subprocess, sys, time
from pathlib import Path

def test_hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(__file__).with_name("child").write_text(str(child.pid))
    time.sleep(300)
"""


def options(test: Path) -> tuple[str, ...]:
    return str(test), "-c", "/dev/null", "--rootdir", str(test.parent), "-p", "no:xdist"


def test_a_run_that_hangs_is_ended_with_its_children(tmp_path):
    test = tmp_path / "test_hanging.py"
    test.write_text(HANGING)
    log = tmp_path / "validate-0"
    log.with_suffix(".xml").write_text("of an earlier run")
    part = campaign_steps._pytest(options(test), log, 8.0)
    assert part == {"status": "unfinished after 8 s"}
    assert not log.with_suffix(".xml").exists()
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10.0
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """False also for a process that has ended and that nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_run_that_dies_does_not_report_an_earlier_one(tmp_path):
    test = tmp_path / "test_dying.py"
    test.write_text("def test_green():\n    pass\n")
    log = tmp_path / "validate-0"
    assert campaign_steps._pytest(options(test), log, 60.0)["passed"] == 1
    test.write_text("import os\n\ndef test_dies():\n    os._exit(3)\n")
    part = campaign_steps._pytest(options(test), log, 60.0)
    assert part == {"status": "failed", "reason": "pytest ended with 3; see validate-0.log"}


def test_hopper_is_validated_last():
    *quick, large = campaign._validation()
    names = [part[0] for part in quick]
    assert names[-1] == "tests/kernels/test_triton_attention_hopper.py"
    assert large[len(names) - 1] == names[-1]
