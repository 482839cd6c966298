"""pytest plugin: `-p longreel.bench.campaign_shards --shard 2/8` runs every eighth test, from the third on.

A GPU waits while kernels compile, so several processes test at a time; pytest-xdist is not on every GPU machine.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --shard."""
    parser.addoption("--shard", metavar="I/N", help="of N shares of the tests, the one with index I (from 0)")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps a share of what the other options have selected: neighbours, which cost alike, go to different shares."""
    text = config.getoption("--shard")
    if text is None:
        return
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise pytest.UsageError(f"--shard must be I/N with I below N, such as 0/8; got {text!r}")
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % int(count) != int(index)])
    items[:] = items[int(index) :: int(count)]
