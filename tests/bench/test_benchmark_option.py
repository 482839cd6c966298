"""`pytest --benchmark` runs tests/perf and nothing else; without it they are left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pytest_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    # As a user starts it: beside other workers of xdist, pytest-benchmark would measure nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)


def test_plain_pytest_leaves_benchmarks_out():
    done = pytest_run("--collect-only", "tests/perf", "tests/test_package.py")
    assert "test_package.py" in done.stdout
    assert "tests/perf" not in done.stdout


def test_samples_of_our_clock_are_in_the_json(tmp_path):
    file = tmp_path / "benchmark.json"
    done = pytest_run(
        "--benchmark", f"--benchmark-json={file}", "-rs", "-k", "clone or (gated_residual-fp32 and not compiled)"
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed, 3 skipped" in done.stdout
    assert "provider 'triton' needs a CUDA device" in done.stdout
    written = json.loads(file.read_text())
    # What did not run is there as well.
    assert {(s["op"], s["provider"]) for s in written["skipped"]} == {("gated_residual", "triton")}
    assert {s["direction"] for s in written["skipped"]} == {"forward", "backward", "both"}
    assert all("needs a CUDA device" in s["reason"] for s in written["skipped"])
    found = {b["extra_info"]["op"] + " " + b["extra_info"]["direction"]: b for b in written["benchmarks"]}
    assert set(found) == {"clone forward", *(f"gated_residual {d}" for d in ("forward", "backward", "both"))}
    for benchmark in found.values():
        stats, info = benchmark["stats"], benchmark["extra_info"]
        assert stats["rounds"] == len(stats["data"]) >= 5
        # Times of a call, not of playing them back.
        assert info["bytes_moved"] / info["bytes_moved_per_s"] == pytest.approx(stats["median"])
        assert all(info["error"][name] <= info["allowed"][name] for name in info["error"])
