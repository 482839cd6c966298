"""Measure and predict training steps over strategies and lengths, and write a report: `python bench/sweep.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        # It imports torch, which takes long enough to be interrupted.
        from longreel.bench.console import run

        return run(sys.argv if arguments is None else ["bench/sweep.py", *arguments])
    except KeyboardInterrupt:
        print("interrupted before the first point", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
