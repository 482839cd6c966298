"""bench/loader.py: runs end to end, and fails where loading is slower than asked for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "loader.py"


@pytest.mark.slow
@pytest.mark.parametrize(("least", "status"), [("0", 0), ("1000000", 2)])
def test_every_way_of_loading_has_a_rate(least: str, status: int) -> None:
    command = [sys.executable, str(SCRIPT), "--steps", "2", "--seconds", "0.2", "--least", least]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    rates = re.findall(r"^(.+?) +([\d,]+) tokens/s +([\d.]+)", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in rates] == [
        "training, preset smoke",
        "decoded, one size",
        "decoded, own sizes, packed",
        "shards, packed",
    ]
    assert all(int(rate.replace(",", "")) > 0 for _, rate, _ in rates)
    assert ("at least 1e+06 was asked for" in done.stderr) == (status == 2)
