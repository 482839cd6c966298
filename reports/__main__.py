"""`python -m longreel.reports`: records in, a page with its table and figures out; or two runs, compared.

python -m longreel.reports FILE_OR_FOLDER [--out DIR]      a sweep, or a campaign of single ops
python -m longreel.reports RUN_FOLDER [--out DIR]          a training run: run.html
python -m longreel.reports DOCUMENT.md [--out DIR]         a document as a page, such as docs/codegen.md
python -m longreel.reports OLD NEW [--html FILE]           what changed between two runs
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from longreel.reports import op_report, parts, runs_report
from longreel.reports.crossover import crossover_part, load_cells
from longreel.reports.html import DEFAULT_TITLE, write_report
from longreel.reports.run_page import is_run, write_run_page
from longreel.reports.runs import Thresholds, compare_runs
from longreel.reports.sources import holds_ops, load_ops, load_steps
from longreel.reports.store import warnings_as_lines, write_files
from longreel.reports.summary import summary_lines


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 where a comparison finds regressions; 2 after one line on stderr that says what is wrong.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings_as_lines("longreel.reports: "):
            if options.new is not None:
                return _compare(options)
            if is_run(options.source):
                print(f"report: {write_run_page(options.source, options.out or options.source)}")
                return 0
            if options.source.suffix == ".md":
                return _document(options)
            if holds_ops(options.source):
                return _kernels(options)
            with _uncollected():
                return _sweep(options)
    except (ValueError, OSError) as error:
        print(f"longreel.reports: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2


@contextmanager
def _uncollected() -> Iterator[None]:
    """Records live to the end, and looking through ten thousand again and again takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="longreel.reports",
        description="Render benchmark records as a self-contained HTML page, or compare two runs.",
        epilog="Exit status: 0; 1 where a comparison finds regressions; 2 for bad input.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a record file, a folder of them, or a document.md")
    parser.add_argument("new", type=Path, nargs="?", metavar="NEW", help="a second run, to compare SOURCE with")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: beside the records)")
    parser.add_argument("--title", help="title of the page")
    page = parser.add_argument_group("a sweep's page")
    page.add_argument("--kernels", type=Path, metavar="PATH", help="records of single ops, as a section")
    page.add_argument("--codegen", type=Path, metavar="FILE.md", help="what the kernels compile to, as a section")
    page.add_argument("--crossover", type=Path, metavar="FILE.json", help="a map of bench/crossover.py, as a section")
    page.add_argument("--png", action="store_true", help="write each figure but the heat maps as a PNG, too")
    page.add_argument("--page-only", action="store_true", help="write report.html and nothing beside it")
    changes = parser.add_argument_group("two runs")
    changes.add_argument(
        "--min-change", type=float, default=5.0, metavar="PERCENT", help="smallest change reported (default: 5)"
    )
    changes.add_argument(
        "--confidence", type=float, default=95.0, metavar="PERCENT", help="that sampled times differ (default: 95)"
    )
    changes.add_argument("--html", type=Path, metavar="FILE", help="write the comparison as a page, too")
    changes.add_argument("--fail-on-missing", action="store_true", help="points that NEW lacks are regressions")
    return parser


def _sweep(options: argparse.Namespace) -> int:
    source: Path = options.source
    records, files = load_steps(source)
    sections = []
    if options.kernels is not None:
        sections.append(parts.kernels_part(load_ops(options.kernels)[0]))
    if options.crossover is not None:
        sections.append(crossover_part(load_cells(options.crossover)))
    if options.codegen is not None:
        text = options.codegen.read_text(encoding="utf-8")
        sections.append(parts.document_part(text, id="codegen", name="Generated code"))
    page = write_report(
        options.out or (source if source.is_dir() else source.parent),
        records,
        title=options.title or DEFAULT_TITLE,
        source_files=files,
        parts=sections,
        png=options.png,
        page_only=options.page_only,
    )
    print("\n".join([*summary_lines(records), "", f"report: {page}"]))
    return 0


def _kernels(options: argparse.Namespace) -> int:
    records, files = load_ops(options.source)
    out = options.out or (options.source if options.source.is_dir() else options.source.parent)
    title = options.title or op_report.DEFAULT_TITLE
    print(f"report: {op_report.write_op_report(out, records, title=title, source_files=files)}")
    return 0


def _document(options: argparse.Namespace) -> int:
    text = options.source.read_text(encoding="utf-8")
    page = (options.out or options.source.parent) / f"{options.source.stem}.html"
    title = options.title or parts.title_of(text, options.source.stem)
    write_files({page: parts.document_page(text, title=title)})
    print(f"page: {page}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    thresholds = Thresholds(size=options.min_change / 100, confidence=options.confidence / 100)
    old, new = (load_steps(path)[0] for path in (options.source, options.new))
    comparison = compare_runs(old, new, thresholds)
    names = str(options.source), str(options.new)
    print("\n".join(runs_report.lines(comparison, names)))
    if options.html is not None:
        write_files({options.html: runs_report.page(comparison, names)})
        print(f"\npage: {options.html}")
    is_worse = bool(comparison.of("regression")) or (options.fail_on_missing and bool(comparison.only_old))
    return 1 if is_worse else 0


if __name__ == "__main__":
    # Thousands of records stay to the end of this process: looking through them for garbage would cost a sixth of it.
    gc.disable()
    sys.exit(main())
