"""longreel.parallel.workers: what a pool does with results, errors, deaths and hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longreel.parallel.workers import WorkerError, WorkerPool, WorkerTimeout


def summed(offset: float) -> float:
    x = torch.full((1,), dist.get_rank() + offset)
    dist.all_reduce(x)
    return x.item()


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one has had enough")
    dist.all_reduce(torch.ones(1))


def dies_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def hangs_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.all_reduce(torch.ones(1))


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2) as pool:
        yield pool


def test_results_come_by_rank_and_group_sizes_vary(pool):
    assert pool.run(summed, 2, 1.0) == [3.0, 3.0]
    assert pool.run(summed, 1, 1.0) == [1.0]


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (fails_on_rank_1, "rank 1 of 2 failed:.*rank one has had enough"),
        (dies_on_rank_1, "rank 1 of 2 died with exit code 7"),
        (hangs_on_rank_1, r"ranks \[1\] of 2 had not finished"),
    ],
    ids=["raise", "die", "hang"],
)
def test_a_failure_names_its_rank_and_the_pool_goes_on(pool, fn, says):
    with pytest.raises(WorkerError, match=f"(?s){says}"):
        pool.run(fn, 2, timeout=1.0)
    assert pool.run(summed, 2, 0.0) == [1.0, 1.0]


def test_a_call_that_is_overdue_ends_before_its_timeout(pool):
    began = time.monotonic()
    with pytest.raises(WorkerTimeout, match="one of its parts takes too long"):
        pool.run(hangs_on_rank_1, 2, timeout=50.0, overdue=lambda: "one of its parts takes too long")
    assert time.monotonic() - began < 30


def test_more_ranks_than_workers_is_an_error(pool):
    with pytest.raises(ValueError, match="world_size must be 1 to 2"):
        pool.run(summed, 3, 0.0)


def test_only_module_level_functions_travel(pool):
    with pytest.raises(ValueError, match="module-level function"):
        pool.run(lambda: None, 1)


def unpicklable():
    return lambda: None


def test_result_that_cannot_travel_is_the_ranks_failure(pool):
    with pytest.raises(WorkerError, match=r"(?s)rank 0 of 1 failed:.*pickle"):
        pool.run(unpicklable, 1)


def blocked_signals() -> set[int]:
    return {int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])}


def test_workers_leave_interrupts_to_the_parent(pool):
    assert pool.run(blocked_signals, 1) == [{int(signal.SIGINT)}]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


PARENT = """
import os, pathlib, sys, time
from longreel.parallel.workers import WorkerPool

if __name__ == "__main__":
    pool = WorkerPool(2)
    print(pool.scratch, *pool.run(os.getpid, 2), flush=True)
    pool.run(time.sleep, 2, 60)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_workers_end_with_a_parent_that_was_killed_and_clean_up(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with open(tmp_path / "errors", "w+") as errors:
        parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=errors, text=True)
        scratch, *workers = parent.stdout.readline().split()
        assert len(workers) == 2
        time.sleep(0.5)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 10
        while any(map(runs, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(runs, workers))
        assert not Path(scratch).exists()
        assert (tmp_path / "errors").read_text() == ""


def runs(process: str) -> bool:
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
