"""data/processes.py: work shared out ends with its results, an error or a named death, and never waits for ever."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from longreel.data.processes import ProcessDied, shared_out

# Children import what they call; this module they cannot.
WORK = """
import os, signal, sys, time

class Squares:
    def __init__(self, offset, more=b""):
        self.offset = offset

    def __call__(self, item):
        return os.getpid(), item * item + self.offset

def failing():
    def work(item):
        if item == 3:
            raise FileNotFoundError(2, "no such thing", "three")
        return item
    return work

def dying(pause):
    def work(item):
        time.sleep(pause)
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item
    return work

def busy():
    def work(item):
        if item > 1:
            time.sleep(60)
        time.sleep(0.5)
        return os.getpid()
    return work

class Far(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

def unsendable():
    def work(item):
        class Local(Exception):
            pass
        raise Local("cannot be sent") if item == 0 else Far("cannot", "be read")
    return work

def lambdas():
    return lambda item: lambda: item

def deaf():
    def work(item):
        os.closerange(3, 4096)
        time.sleep(60)
    return work

def torn():
    def work(item):
        # The length of a message and a bit of it, and the process is gone.
        connection = sys._getframe(2).f_locals["connection"]
        os.write(connection.fileno(), bytes([0, 0, 1, 0]) + b"abc")
        os._exit(9)
    return work

def failing_beside(item_that_fails):
    def work(item):
        if item == item_that_fails:
            time.sleep(0.5)
            raise ValueError("enough")
        time.sleep(60)
    return work

def broken():
    raise ValueError("no weights there")

def dying_at_once():
    os._exit(7)
"""

PARENT = """
import work
from longreel.data.processes import shared_out

if __name__ == "__main__":
    for pid in shared_out(work.busy, (), range(9), processes=2):
        print(pid, flush=True)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("work")
    del sys.modules["work"]


def test_every_item_is_worked_off_once_by_all_processes(work: ModuleType) -> None:
    # More than a pipe holds: it is sent when all processes have been started.
    found = list(shared_out(work.Squares, (1, bytes(1 << 20)), range(200), processes=2))
    assert sorted(value for _, value in found) == [item * item + 1 for item in range(200)]
    assert len({pid for pid, _ in found} - {os.getpid()}) == 2


def test_more_processes_than_items(work: ModuleType) -> None:
    assert [value for _, value in shared_out(work.Squares, (0,), [3], processes=2)] == [9]


def test_an_error_is_raised_here_with_its_traceback_there(work: ModuleType) -> None:
    with pytest.raises(FileNotFoundError, match="no such thing: 'three'") as caught:
        list(shared_out(work.failing, (), range(9), processes=2))
    assert "in work" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("make", "args", "code"), [("dying", (0.0,), -9), ("dying", (0.05,), -9), ("dying_at_once", (), 7)]
)
def test_a_death_is_an_error(work: ModuleType, make: str, args: tuple[float, ...], code: int) -> None:
    with pytest.raises(ProcessDied, match=f"ended before its work was done, with exit code {code}"):
        list(shared_out(getattr(work, make), args, range(9), processes=2))


@pytest.mark.parametrize(("item", "message"), [(0, "Local: cannot be sent"), (1, "Far: cannot and be read")])
def test_an_error_that_cannot_travel_is_told(work: ModuleType, item: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        list(shared_out(work.unsendable, (), [item], processes=1))
    assert "in work" in "".join(caught.value.__notes__)


def test_a_result_that_cannot_travel_is_an_error(work: ModuleType) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"(?i)can't pickle|can't get local"):
        list(shared_out(work.lambdas, (), [0], processes=1))


@pytest.mark.parametrize(("make", "code"), [("deaf", -9), ("torn", 9)])
def test_a_pipe_that_ends_early_is_a_death(
    work: ModuleType, make: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longreel.data.processes._GRACE_S", 1.0)
    with pytest.raises(ProcessDied, match=f"with exit code {code}"):
        list(shared_out(getattr(work, make), (), [0], processes=1))


def test_an_error_ends_what_others_are_at(work: ModuleType) -> None:
    began, before = time.monotonic(), multiprocessing.active_children()
    with pytest.raises(ValueError, match="enough"):
        list(shared_out(work.failing_beside, (1,), range(2), processes=2))
    assert time.monotonic() - began < 30
    # Others are those of other tests' pools.
    assert set(multiprocessing.active_children()) <= set(before)


def test_no_process_is_an_error() -> None:
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        list(shared_out(print, (), [0], processes=0))


def test_what_cannot_begin_is_an_error(work: ModuleType) -> None:
    with pytest.raises(ValueError, match="no weights there"):
        list(shared_out(work.broken, (), range(9), processes=2))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_busy_children_end_with_a_parent_that_was_killed(work: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as lines:
        pids = {int(lines.readline()) for _ in range(2)}
        parent.kill()
        parent.wait()
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_running(pid) for pid in pids)
