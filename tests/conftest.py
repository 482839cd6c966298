"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from longreel.parallel.workers import WorkerPool


@pytest.fixture(scope="session")
def worker_pool() -> Iterator[WorkerPool]:
    """One pool of up to 8 gloo ranks for all tests: starting 8 processes takes seconds, a call milliseconds."""
    with WorkerPool(8) as pool:
        yield pool


@pytest.fixture
def run_distributed(worker_pool: WorkerPool) -> Callable[..., list[Any]]:
    """run_distributed(fn, world_size, *args, timeout=120) -> results by rank."""
    return worker_pool.run


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, so that an element nobody wrote shows."""
    real_empty, real_empty_like, real_new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() and x.device.type != "meta" else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(real_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(real_empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: poison(real_new_empty(self, *a, **k)))
