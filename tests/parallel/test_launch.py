"""longreel.parallel.launch: one line for what the user got wrong, said once, and our own defects raised."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.parallel.launch import run_script


@dataclass(frozen=True, kw_only=True, slots=True)
class Nothing:
    """A run without choices."""


def python_memory(*_: Any) -> None:
    raise MemoryError


def torch_memory(*_: Any) -> None:
    torch.empty(10**17)


def torch_size(*_: Any) -> None:
    torch.empty(10**12, 10**12)


@pytest.mark.parametrize("work", [python_memory, torch_memory, torch_size])
def test_sizes_that_do_not_fit_are_one_line(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(work, Nothing, []) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: sizes are too large for the memory of this machine; use a smaller model")


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    assert run_script(interrupted, Nothing, []) == 130
    assert not torch.distributed.is_initialized()
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_is_raised_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run_script(broken, Nothing, [])
    assert not torch.distributed.is_initialized()
    assert capsys.readouterr().err == ""


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from dataclasses import dataclass
from longreel.parallel.launch import run_script

@dataclass(frozen=True, kw_only=True)
class Nothing:
    pass

def work(config, device):
    if dist.get_rank() == 1:
        raise ValueError("only rank 1 knows")
    dist.all_reduce(torch.ones(1))

sys.exit(run_script(work, Nothing, []))
"""


def test_an_error_of_one_rank_is_all_that_any_rank_says(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "work.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert ran.returncode != 0
    assert ran.stderr.count("error: only rank 1 knows") == 1
    assert "all_reduce" not in ran.stderr
