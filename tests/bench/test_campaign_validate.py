"""A campaign's validation: what passed is remembered at once, what hangs is ended with everything it started."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from longreel.bench import campaign_steps
from longreel.bench.campaign_plans import rehearsal
from longreel.bench.campaign_steps import STATE, Campaign
from longreel.bench.campaign_validate import Part, gpu_parts, rehearsed_parts, run_part, words
from longreel.parallel.workers import WorkerPool


@pytest.fixture
def campaign_in(tmp_path):
    """A campaign that validates parts of these names; nothing in it starts the worker."""
    with WorkerPool(1) as pool:

        def make(*parts: str) -> Campaign:
            plan = replace(rehearsal(()), validate=tuple(Part(arguments=(part,)) for part in parts))
            provenance = {"source": "abc", "environment": {"device": "a CPU"}}
            return Campaign(folder=tmp_path, plan=plan, provenance=provenance, pool=pool, run="now", say=lambda _: None)

        yield make


def test_a_part_that_passed_is_remembered_before_the_step_ends(campaign_in, tmp_path, monkeypatch):
    ran = []

    def interrupted_at_b(part, log, seconds):
        ran.append(part.name)
        if part.name == "b" and ran.count("b") == 1:
            raise KeyboardInterrupt
        return {"status": "passed", "passed": 1, "failed": 0}

    monkeypatch.setattr(campaign_steps, "run_part", interrupted_at_b)
    run = campaign_in("a", "b", "c")
    with pytest.raises(KeyboardInterrupt):
        campaign_steps.validate(run, time.monotonic() + 60.0)
    assert json.loads((tmp_path / STATE).read_text())["steps"]["validate"]["status"] == "partial"
    outcome = campaign_steps.validate(run, time.monotonic() + 60.0)
    assert ran == ["a", "b", "b", "c"]
    assert (outcome.status, outcome.summary) == ("done", "3 tests passed, 0 failed")


def test_the_step_says_how_many_were_skipped_and_why_it_failed(campaign_in, monkeypatch):
    nothing = {"status": "failed", "passed": 0, "failed": 0, "skipped": 2, "reason": "0 tests passed, at least 1 must"}
    monkeypatch.setattr(campaign_steps, "run_part", lambda *_: nothing)
    outcome = campaign_steps.validate(campaign_in("a"), time.monotonic() + 60.0)
    assert outcome.status == "failed"
    assert outcome.summary == "0 tests passed, 0 failed, 2 skipped; 0 tests passed, at least 1 must"


HANGING = """
import subprocess, sys, time
from pathlib import Path

def test_hangs():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(__file__).with_name("child").write_text(str(child.pid))
    time.sleep(300)
"""


def part_of(test: Path, processes: int = 1) -> Part:
    options = "-c", "/dev/null", "--rootdir", str(test.parent), "-p", "no:xdist"
    return Part(arguments=(str(test), *options), processes=processes)


@pytest.mark.slow
def test_a_run_that_hangs_is_ended_with_its_children(tmp_path):
    test = tmp_path / "test_hanging.py"
    test.write_text(HANGING)
    log = tmp_path / "validate-0"
    log.with_suffix(".xml").write_text("of an earlier run")
    part = run_part(part_of(test), log, 8.0)
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
    assert run_part(part_of(test), log, 60.0)["passed"] == 1
    test.write_text("import os\n\ndef test_dies():\n    os._exit(3)\n")
    part = run_part(part_of(test), log, 60.0)
    assert part == {"status": "failed", "reason": "pytest ended with 3; see validate-0.log"}


def test_a_failing_test_fails_the_step(tmp_path):
    test = tmp_path / "test_red.py"
    test.write_text("def test_red():\n    assert False\n\ndef test_green():\n    pass\n")
    part = run_part(part_of(test), tmp_path / "log", 60.0)
    assert part["status"] == "failed"
    assert (part["passed"], part["failed"]) == (1, 1)
    assert part["failures"][0].endswith("::test_red")


MANY = """
import pytest

@pytest.mark.parametrize("i", range(5))
def test_many(i):
    assert i != {bad}
"""


@pytest.mark.slow
def test_processes_share_the_tests_and_every_one_runs_once(tmp_path):
    test = tmp_path / "test_many.py"
    test.write_text(MANY.format(bad="None"))
    part = run_part(part_of(test, processes=3), tmp_path / "log", 100.0)
    assert (part["status"], part["passed"], part["failed"]) == ("passed", 5, 0)
    assert {p.name for p in tmp_path.glob("*.log")} == {"log-0.log", "log-1.log", "log-2.log"}
    # One that fails is enough, and a process without a test is none that fails.
    test.write_text(MANY.format(bad="4"))
    part = run_part(part_of(test, processes=7), tmp_path / "log", 100.0)
    assert (part["status"], part["passed"], part["failed"]) == ("failed", 4, 1)
    assert len(part["failures"]) == 1


SKIPPED = """
import pytest

@pytest.mark.parametrize("i", range(3))
def test_skipped(i):
    pytest.skip("there is no GPU here")
"""


@pytest.mark.parametrize(("source", "skipped"), [(SKIPPED, 3), ("x = 1\n", 0)], ids=["all-skipped", "no-test"])
def test_a_part_in_which_nothing_passed_has_failed(tmp_path, source, skipped):
    test = tmp_path / "test_nothing.py"
    test.write_text(source)
    part = part_of(test, processes=2)
    found = run_part(part, tmp_path / "log", 60.0)
    assert (found["status"], found["passed"], found["skipped"]) == ("failed", 0, skipped)
    assert found["reason"] == "0 tests passed, at least 1 must"
    said = words(found)
    assert found["reason"] in said
    assert ("3 skipped: there is no GPU here" in said) == bool(skipped)
    # A rehearsal only collects.
    assert run_part(replace(part, least=0), tmp_path / "log", 60.0)["status"] == "passed"
    assert [p.least for p in rehearsed_parts()] == [0]
    assert {p.least for p in gpu_parts()} == {1}


@pytest.mark.slow
def test_one_process_that_hangs_leaves_the_part_unfinished(tmp_path):
    test = tmp_path / "test_two.py"
    test.write_text("import time\n\ndef test_hangs():\n    time.sleep(300)\n\ndef test_green():\n    pass\n")
    part = run_part(part_of(test, processes=2), tmp_path / "log", 25.0)
    assert part["status"] == "unfinished after 25 s"
    assert part["passed"] == 1


def test_a_bad_share_is_refused(tmp_path):
    test = tmp_path / "test_green.py"
    test.write_text("def test_green():\n    pass\n")
    arguments = (*part_of(test).arguments, "-p", "longreel.bench.campaign_shards", "--shard=8/8")
    part = run_part(Part(arguments=arguments), tmp_path / "log", 60.0)
    assert part["status"] == "failed"
    assert "--shard must be I/N with I below N" in (tmp_path / "log.log").read_text()


def test_every_file_with_gpu_tests_is_validated_and_hopper_later():
    quick, hopper, large = gpu_parts()
    assert "tests/kernels/test_triton_attention_gpu.py" in quick.arguments
    assert "tests/kernels/test_triton_pointwise.py" in quick.arguments
    assert [name for name in hopper.arguments if "test_" in name] == ["tests/kernels/test_triton_attention_hopper.py"]
    assert {name for part in (quick, hopper) for name in part.arguments if "test_" in name} == {
        name for name in large.arguments if "test_" in name
    }
    assert "not 31" in quick.arguments
    assert quick.processes > 1 == large.processes
