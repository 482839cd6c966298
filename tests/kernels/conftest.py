"""Interpreting Triton kernels: TRITON_INTERPRET=1 is read when a kernel is defined, so they run in a worker process.

Compiling without a GPU happens in the test's own process: longreel.kernels.triton_aot.compile_kernel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from longreel.parallel.workers import WorkerPool


@pytest.fixture(scope="session")
def _interpreter_pool() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


@pytest.fixture
def run_interpreted(_interpreter_pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """run_interpreted(fn, *args, timeout=120) -> fn(*args), in a process whose Triton kernels are interpreted on CPU.

    fn is a module-level function of the test's file.
    """
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def run(fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
        return _interpreter_pool.run(fn, 1, *args, timeout=timeout)[0]

    return run


@pytest.fixture
def compile_kernel() -> Callable[..., Any]:
    """longreel.kernels.triton_aot.compile_kernel, skipped with a reason where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    from longreel.kernels.triton_aot import compile_kernel

    return compile_kernel
