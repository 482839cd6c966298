"""A sweep on a terminal: parse, run with live progress, write the files, print the summary."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from longreel.bench import op_provenance, provenance
from longreel.bench.emulated_run import this_emulator
from longreel.bench.folder import RECORDS, Records, only_sweep, prepare_folder
from longreel.bench.modes import Machine, this_machine
from longreel.bench.options import SweepConfig
from longreel.bench.presets import Sweep
from longreel.bench.run import backend, num_points, pool_size, run_sweep
from longreel.data.command_line import parse_arguments
from longreel.parallel.workers import NCCL, WorkerPool
from longreel.reports import formatting, store
from longreel.reports.html import check_ours, write_report
from longreel.reports.records import Record
from longreel.reports.summary import summary_lines

# Kept of a sweep's minutes for the report.
REPORT_S = 10.0


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
        machine = this_machine()
        sweep = config.resolve(machine)
        folder = config.folder
        check_ours(folder)
        with store.warnings_as_lines():
            if (folder / RECORDS).exists():
                store.load(folder / RECORDS)
        prepare_folder(folder)
        origin = _origin(sweep, command, commit=config.commit, on_gpu=not config.rehearse and machine.num_gpus > 0)
        with only_sweep(folder, origin["command"]), _termination_as_interrupt(), store.warnings_as_lines():
            # A sweep that ends with its minutes goes on where it ended.
            kept = Records(folder, origin, resume=config.resume or sweep.minutes is not None)
            records = _sweep(sweep, machine, folder, kept, rehearse=config.rehearse)
    except (ValueError, OSError) as error:
        return _complain(error)
    except KeyboardInterrupt as stop:
        where = f"finished points are in {folder / RECORDS}" if (folder / RECORDS).exists() else "no point had finished"
        print(f"interrupted; {where}", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    if failure := failure_line(records):
        print(f"error: {failure}", file=sys.stderr)
        return 1
    return 0


def failure_line(records: Sequence[Record]) -> str | None:
    """What makes a finished run a failed one, in words: wrong or failed points of it, or none with a figure."""
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


def _origin(sweep: Sweep, command: Sequence[str], *, commit: str | None, on_gpu: bool) -> dict[str, Any]:
    """Provenance of all records: with the GPU, where points run on one."""
    emulates = any(grid.kind == "emulated" for grid in sweep.targets)
    if on_gpu and (emulates or backend(sweep) == NCCL):
        found = op_provenance.gather(command, torch.device("cuda"), commit=commit)
        return found | {"environment": found["environment"] | provenance.software()}
    return provenance.gather(command)


def _sweep(sweep: Sweep, machine: Machine, folder: Path, kept: Records, *, rehearse: bool) -> list[Record]:
    """Run a sweep and report it with what the folder has of its origin; returns the records of this sweep."""
    start = time.monotonic()
    deadline = None if sweep.minutes is None else start + 60 * sweep.minutes - REPORT_S
    console = Console(highlight=False, soft_wrap=True)
    if kept.num_saved:
        console.print(f"resumed: {kept.num_saved} records of this code on this machine are kept", markup=False)
    with WorkerPool(pool_size(sweep), backend=backend(sweep)) as pool, _progress(console) as progress:
        task = progress.add_task("starting workers", total=num_points(sweep))
        emulator = None
        if any(grid.kind == "emulated" for grid in sweep.targets):
            emulator = this_emulator(
                rehearse=rehearse, deadline=deadline, say=lambda text: progress.console.print(text, markup=False)
            )
        for record in run_sweep(
            sweep, pool, kept.origin, machine=machine, emulator=emulator, done=kept.done, saved=kept.saved
        ):
            if not kept.add(record):
                continue
            style = None if record.status == "ok" else "yellow"
            progress.console.print(point_line(record), style=style, markup=False)
            progress.update(
                task, completed=len(kept.of_sweep()), description=f"{record.kind} {formatting.length(record.seq_len)}"
            )
        made = len(kept.of_sweep())
        progress.update(task, description="done", completed=made, total=made)
    records = kept.all()
    page = write_report(folder, records, title=f"Longreel sweep: {sweep.name}", source_files=[RECORDS])
    console.print()
    for line in summary_lines(records):
        console.print(line, markup=False)
    console.print(f"\n{time.monotonic() - start:.0f} s. Report: {page}", markup=False)
    console.print(f"Records: {kept.path}, {folder / 'records.csv'}", markup=False)
    return kept.of_sweep()


def parse(arguments: Sequence[str]) -> SweepConfig:
    """The configuration; ValueError with one line for a bad command line."""
    return parse_arguments(SweepConfig, arguments, prog="python bench/sweep.py")


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
