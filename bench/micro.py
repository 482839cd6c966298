"""Measure ops against their peers and write records and a report: `python bench/micro.py`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from longreel.bench import op_provenance
from longreel.bench.console import prepare_folder
from longreel.bench.micro_options import MicroConfig
from longreel.bench.micro_sweep import load, run_plan
from longreel.data.command_line import parse_arguments
from longreel.parallel.workers import WorkerPool
from longreel.reports.op_report import write_op_report
from longreel.reports.op_summary import summary_lines

RECORDS = "records.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 when a kernel of ours is wrong or fails; 2 after one `error:` line on stderr about a bad command; 130 when
        interrupted.
    """
    command = sys.argv if arguments is None else ["bench/micro.py", *arguments]
    start = time.monotonic()
    try:
        config = parse_arguments(MicroConfig, command[1:], prog="python bench/micro.py")
        plan = config.resolve()
        prepare_folder(config.folder)
        file = config.folder / RECORDS
        if file.exists():
            load(file)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    origin = op_provenance.gather(command, torch.device(plan.device), commit=config.commit)
    deadline = None if config.minutes is None else start + 60 * config.minutes
    try:
        with WorkerPool(1) as pool:
            made, left = run_plan(
                plan,
                file,
                origin,
                pool=pool,
                resume=config.resume,
                retry_errors=config.retry_errors,
                deadline=deadline,
            )
    except KeyboardInterrupt:
        print(f"interrupted; finished cases are in {file}, and the same command goes on", file=sys.stderr)
        return 130
    page = write_op_report(config.folder, load(file), source_files=[RECORDS])
    print("", *summary_lines(load(file)), "", sep="\n")
    if left:
        print(f"{len(left)} cases not started after {config.minutes:g} minutes; run the same command again to go on")
    print(f"{time.monotonic() - start:.0f} s. Report: {page}\nRecords: {file}, {config.folder / 'ops.csv'}")
    ours = [r for r in made if r.is_ours and r.status in ("wrong", "error")]
    if ours:
        print(f"error: {len(ours)} points of our kernels are wrong or failed; the report says why", file=sys.stderr)
    return 1 if ours else 0


if __name__ == "__main__":
    sys.exit(main())
