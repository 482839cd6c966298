"""Measure and predict training steps over strategies and lengths, and write a report: `python bench/sweep.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from longreel.bench.console import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run(sys.argv if arguments is None else ["bench/sweep.py", *arguments])


if __name__ == "__main__":
    sys.exit(main())
