"""A sweep on a terminal: parse, run with live progress, write the files, print the summary."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from longreel.bench import provenance
from longreel.bench.cases import Sweep
from longreel.bench.options import SweepConfig
from longreel.bench.run import num_points, pool_width, run_sweep
from longreel.data.command_line import parse_arguments
from longreel.parallel.workers import WorkerPool
from longreel.reports import formatting, store
from longreel.reports.html import check_ours, write_report
from longreel.reports.records import Record
from longreel.reports.summary import summary_lines

RECORDS = "records.jsonl"


def run(command: Sequence[str]) -> int:
    """Run a command line.

    Args:
        command: program, then arguments.

    Returns:
        0; 1 after the report when a point of this run is `wrong` or `error`, or none is `ok`; 2 after one `error:` line
        on stderr about what the user got wrong; 130 when interrupted, 143 when terminated.
    """
    try:
        config = parse(command[1:])
        sweep = config.resolve()
        folder = config.folder
        check_ours(folder)
        with store.warnings_as_lines():
            if (folder / RECORDS).exists():
                store.load(folder / RECORDS)
        prepare_folder(folder)
    except (ValueError, OSError) as error:
        return _complain(error)
    try:
        with _termination_as_interrupt(), store.warnings_as_lines():
            records = _sweep(sweep, folder, command)
    except (ValueError, OSError) as error:
        return _complain(error)
    except KeyboardInterrupt as stop:
        kept = f"finished points are in {folder / RECORDS}" if (folder / RECORDS).exists() else "no point had finished"
        print(f"interrupted; {kept}", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    if failure := failure_line(records):
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def failure_line(records: Sequence[Record]) -> str | None:
    """What makes a finished run a failed one, in words: wrong or failed points, or none with a figure."""
    counts = Counter(record.status for record in records)
    bad = [f"{counts[status]} {status}" for status in ("wrong", "error") if counts[status]]
    if bad:
        return f"points without a valid figure: {', '.join(bad)}; the report says why"
    return None if counts["ok"] else "no point has a figure; the report says why"


class _Terminated(KeyboardInterrupt):
    """SIGTERM: unwinds as Ctrl-C does, so that workers end and finished points stay."""


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _sweep(sweep: Sweep, folder: Path, command: Sequence[str]) -> list[Record]:
    """Run a sweep and report it with what the folder has of its origin; returns the records of this run."""
    start = time.monotonic()
    origin = provenance.gather(command)
    records_file = folder / RECORDS
    console = Console(highlight=False, soft_wrap=True)
    num_workers = max([pool_width(sweep), *(ranks for grid in sweep.measured for ranks in grid.ranks)])
    with WorkerPool(num_workers) as pool, _progress(console) as progress:
        task = progress.add_task("starting workers", total=num_points(sweep))
        finished = []
        for record in run_sweep(sweep, pool, origin):
            store.append(records_file, record)
            finished.append(record)
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
    return finished


def parse(arguments: Sequence[str]) -> SweepConfig:
    """The configuration; ValueError with one line for a bad command line."""
    return parse_arguments(SweepConfig, arguments, prog="python bench/sweep.py")


def prepare_folder(folder: Path) -> None:
    """Make sure that files can be written there; OSError names the folder."""
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
        f"DP {record.dp_degree} {record.policy:14}"
    )
    if record.status != "ok":
        return f"{where}  {record.status}: {record.reason}"
    memory = f"{formatting.MEMORY_LABELS[record.memory_meaning]} {formatting.in_bytes(record.peak_memory):>9}"
    sent = f"sent {formatting.in_bytes(sum(record.traffic.values())):>9}"
    figures = f"{formatting.number(record.tokens_per_s):>10} tokens/s  {memory}  {sent}"
    if record.kind == "measured":
        figures += f"  gradient error {record.error['grad']:.0e}, {len(record.samples_s)} steps"
    return f"{where}  {figures}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
