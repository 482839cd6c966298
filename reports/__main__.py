"""`python -m longreel.reports FILE_OR_DIR [--out DIR]`: record files in, report.html, records.csv and figures out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from longreel.reports.html import DEFAULT_TITLE, write_report
from longreel.reports.store import load, warnings_as_lines
from longreel.reports.summary import summary_lines


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def record_files(source: Path) -> list[Path]:
    """The record file itself, or the *.jsonl files of a folder, by name.

    Raises:
        ValueError: neither is there.
    """
    if source.is_dir():
        files = sorted(source.glob("*.jsonl"))
        if not files:
            raise ValueError(f"no .jsonl file in {source}")
        return files
    if not source.exists():
        raise ValueError(f"no such file or folder: {source}")
    return [source]


def main(arguments: Sequence[str] | None = None) -> int:
    """Render record files; the exit code: 0, or 2 after one line on stderr that says what is wrong."""
    parser = _Parser(prog="longreel.reports", description="Render benchmark records as a self-contained HTML report.")
    parser.add_argument("source", type=Path, metavar="FILE_OR_DIR", help="a .jsonl record file, or a folder of them")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside the records)")
    parser.add_argument("--title", default=DEFAULT_TITLE, help="title of the page")
    options = parser.parse_args(arguments)
    source: Path = options.source
    try:
        files = record_files(source)
        with warnings_as_lines("longreel.reports: "):
            records = [record for file in files for record in load(file)]
        if not records:
            raise ValueError(f"no records in {', '.join(map(str, files))}")
        out = options.out or (source if source.is_dir() else source.parent)
        page = write_report(out, records, title=options.title, source_files=[file.name for file in files])
    except (ValueError, OSError) as error:
        print(f"longreel.reports: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    print("\n".join([*summary_lines(records), "", f"report: {page}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
