"""A sweep that is killed at any moment goes on where it stopped, and leaves no process behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longreel.reports.store import load

REPOSITORY = Path(__file__).resolve().parents[2]
KILLS = 20
# A dozen points of both kinds, seconds of work in all.
COMMAND = [
    sys.executable,
    str(REPOSITORY / "bench" / "sweep.py"),
    "--preset=smoke",
    "--measured-lens=64,128",
    "--ranks=2",
    "--sp-degrees=2",
    "--depth=1",
    "--hidden-size=32",
    "--model=dit-s-2",
    "--predicted-lens=8k",
    "--resume",
]


def start(out: Path) -> subprocess.Popen[bytes]:
    # A session of its own, by which its workers are found.
    return subprocess.Popen(
        [*COMMAND, f"--out={out}"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def alive(session: int) -> list[int]:
    """Processes of a session, by the kernel's own list."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def rows(out: Path) -> list[str]:
    return [record.key for record in load(out / "records.jsonl")]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_killed_at_random_twenty_times_and_resumed_it_has_the_rows_of_an_undisturbed_run(tmp_path) -> None:
    began = time.monotonic()
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read().decode()
    seconds = time.monotonic() - began
    expected = rows(tmp_path / "whole")
    assert len(expected) == len(set(expected)) >= 10
    source = random.Random(0)
    for kill in range(KILLS):
        out = tmp_path / str(kill)
        run = start(out)
        try:
            run.wait(source.uniform(0.05, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
        deadline = time.monotonic() + 60
        while (left := alive(run.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == [], f"kill {kill}: workers linger"
        before = rows(out) if (out / "records.jsonl").exists() else []
        again = start(out)
        assert again.wait() == 0, again.stderr.read().decode()
        found = rows(out)
        # What was there is there as it was; none twice, none lost.
        assert found[: len(before)] == before
        assert len(found) == len(set(found))
        assert set(found) == set(expected)
