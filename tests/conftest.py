"""Fixtures of the whole suite."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longreel.parallel.workers import WorkerPool

PERF = Path(__file__).parent / "perf"


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--benchmark`: the timings of tests/perf instead of the tests; pytest-benchmark's own options apply to them.

    `--full-grid`: see the fixture full_grid.
    """
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks of tests/perf, and nothing else")
    parser.addoption("--full-grid", action="store_true", help="slow grids whole, not only every two choices together")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Benchmarks and tests never run together: timing has no place between tests, nor tests between timings."""
    in_perf = collection_path.is_relative_to(PERF)
    if config.getoption("--benchmark"):
        return None if in_perf or PERF.is_relative_to(collection_path) else True
    return True if in_perf else None


@pytest.fixture(scope="session")
def full_grid(pytestconfig: pytest.Config) -> bool:
    """Whether slow grids run whole: a quarter of an hour instead of minutes."""
    return bool(pytestconfig.getoption("--full-grid"))


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model("t5" | "clip" | "sd-vae" | "vqvae") -> its folder: random weights, written once per session."""
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).with_name("tiny_models.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp("tiny-models")

    def folder(kind: str) -> Path:
        if not (root / kind).is_dir():
            module.WRITERS[kind](root / kind)
        return root / kind

    return folder
