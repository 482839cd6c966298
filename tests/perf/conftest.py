"""What was not timed stands in pytest-benchmark's JSON too, each with its reason."""

from __future__ import annotations

from typing import Any

import pytest

_SKIPPED: list[dict[str, str]] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Keeps the reason of a point that is skipped."""
    outcome = yield
    report = outcome.get_result()
    callspec = getattr(item, "callspec", None)
    if report.skipped and callspec is not None and isinstance(report.longrepr, tuple):
        point = {name: callspec.params[name] for name in ("op", "provider", "direction")}
        _SKIPPED.append({"name": item.name, **point, "reason": report.longrepr[2].removeprefix("Skipped: ")})


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Adds them as `skipped`, beside `benchmarks`."""
    output_json["skipped"] = list(_SKIPPED)
