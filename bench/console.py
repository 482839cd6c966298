"""A sweep on a terminal: parse, run with live progress, write the files, print the summary."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from longreel.bench import provenance
from longreel.bench.cases import Sweep
from longreel.bench.options import SweepConfig
from longreel.bench.run import num_points, pool_width, run_sweep
from longreel.parallel.command_line import parse_arguments
from longreel.parallel.workers import WorkerPool
from longreel.reports import formatting, store
from longreel.reports.html import write_report
from longreel.reports.records import Record
from longreel.reports.summary import summary_lines

RECORDS = "records.jsonl"


def run(command: Sequence[str]) -> int:
    """Run a command line.

    Args:
        command: program, then arguments.

    Returns:
        0; 2 after one `error:` line on stderr about what the user got wrong; 130 when interrupted.
    """
    try:
        config = parse(command[1:])
        sweep = config.resolve()
        prepare_folder(config.folder)
        if (config.folder / RECORDS).exists():
            store.load(config.folder / RECORDS)
    except (ValueError, OSError) as error:
        return _complain(error)
    try:
        _sweep(sweep, config.folder, command)
    except OSError as error:
        return _complain(error)
    except KeyboardInterrupt:
        print(f"interrupted; finished points are in {config.folder / RECORDS}", file=sys.stderr)
        return 130
    return 0


def _complain(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _sweep(sweep: Sweep, folder: Path, command: Sequence[str]) -> None:
    start = time.monotonic()
    origin = provenance.gather(command)
    records_file = folder / RECORDS
    console = Console(highlight=False, soft_wrap=True)
    num_workers = max([pool_width(sweep), *(ranks for grid in sweep.measured for ranks in grid.ranks)])
    with WorkerPool(num_workers) as pool, _progress(console) as progress:
        task = progress.add_task("starting workers", total=num_points(sweep))
        for record in run_sweep(sweep, pool, origin):
            store.append(records_file, record)
            style = None if record.status == "ok" else "yellow"
            progress.console.print(point_line(record), style=style, markup=False)
            progress.update(task, advance=1, description=f"{record.kind} {formatting.length(record.seq_len)}")
        progress.update(task, description="done", total=progress.tasks[0].completed)
    records = of_origin(store.load(records_file), origin)
    page = write_report(folder, records, title=f"Longreel sweep: {sweep.name}", source_files=[RECORDS])
    console.print()
    for line in summary_lines(records):
        console.print(line, markup=False)
    console.print(f"\n{time.monotonic() - start:.0f} s. Report: {page}", markup=False)
    console.print(f"Records: {records_file}, {folder / 'records.csv'}", markup=False)


def parse(arguments: Sequence[str]) -> SweepConfig:
    """The configuration; ValueError with one line for a bad command line."""
    return parse_arguments(SweepConfig, arguments, prog="python bench/sweep.py")


def prepare_folder(folder: Path) -> None:
    """Make sure that files can be written there; OSError or ValueError names the folder."""
    folder = folder.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"out: cannot write to {folder}: {error.strerror}; give another folder with --out") from None


def of_origin(records: Sequence[Record], origin: dict[str, Any]) -> list[Record]:
    """The records of this commit on this machine: a folder may hold older ones, which a figure must not mix in."""
    same = ("commit", "environment")
    return [r for r in records if all(r.provenance.get(name) == origin[name] for name in same)]


def point_line(record: Record) -> str:
    """A finished point in one line."""
    where = (
        f"{record.kind:9} {record.seq_len:>8,}  {record.num_devices} x {record.strategy:8} SP {record.sp_degree} "
        f"DP {record.dp_degree} {record.policy:4}"
    )
    if record.status != "ok":
        return f"{where}  {record.status}: {record.reason}"
    figures = (
        f"{formatting.number(record.tokens_per_s):>10} tokens/s  {formatting.in_bytes(record.peak_memory):>9}"
        f"  sent {formatting.in_bytes(sum(record.traffic.values())):>9}"
    )
    if record.kind == "measured":
        figures += f"  gradient error {record.error['grad']:.0e}, {len(record.samples_s)} steps"
    return f"{where}  {figures}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
