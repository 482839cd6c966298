"""bench/prepare_speed.py: runs end to end, and fails where several processes save less than asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "prepare_speed.py"


@pytest.mark.slow
def test_seconds_and_ratio_are_told(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--videos", "2", "--folder", str(tmp_path), "--least", "1000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    counts = re.findall(r"^ *(\d+) processes +\d+\.\d s$", done.stdout, re.MULTILINE)
    assert (len(counts), counts[0], counts[3]) == (4, "1", "1")
    assert re.search(r"processes are \d+\.\d\d times as fast as one$", done.stdout, re.MULTILINE)
    assert "at least 1000 was asked for" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_named_before() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--videos", "100000000"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "videos 100000000 become 16588800.0 GB, and there are " in done.stderr


def test_one_process_is_nothing_to_compare() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--processes", "1"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "processes must be at least 2, to compare with one, got 1" in done.stderr
    assert len(done.stderr.splitlines()) == 1
