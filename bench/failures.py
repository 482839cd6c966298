"""What went wrong with a point, as a record and in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from longreel.bench.cases import Point
from longreel.bench.provenance import stamped
from longreel.bench.reproduce import reproduce
from longreel.parallel.workers import WorkerError
from longreel.reports.records import Record, Status

# What PyTorch, CUDA and Python say where an allocation failed.
_OUT_OF_MEMORY = ("can't allocate memory", "MemoryError", "OutOfMemoryError", "out of memory")

# What a rank says that is not at fault: another one is gone.
_BROKEN = r"(?i)connection (closed|reset|refused)|broken pipe|read error|socketException|remote process exited"


def failure(point: Point, error: WorkerError, provenance: dict[str, Any], *, status: Status | None = None) -> Record:
    """The record of a point whose workers raised, died or took too long; None: `oom` or `error` by what they said."""
    reason = one_line(error)
    if status is None:
        status = "oom" if any(words in reason for words in _OUT_OF_MEMORY) else "error"
    return point.record(status, reason=reason, provenance=stamped(provenance, reproduce=reproduce(point)))


def one_line(error: WorkerError) -> str:
    """What went wrong: the first rank that failed, its exception, and where it was raised."""
    blocks = re.split(r"\n(?=rank \d+ of \d+ )", str(error))
    # A rank that lost its connection to another says what happened to it, not what went wrong.
    text = next((block for block in blocks if not re.search(_BROKEN, block)), blocks[0])
    if "\nTraceback" not in text:
        return " ".join(text.split())
    who, _, trace = text.partition("\nTraceback")
    trace = re.split(r"\nranks \[", trace)[0]
    lines = [line for line in trace.splitlines() if line.strip()]
    message = next(
        (line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)), lines[-1]
    )
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace)
    where = f" ({Path(frames[-1][0]).name}:{frames[-1][1]})" if frames else ""
    return f"{' '.join(who.split())} {message.strip()}{where}"
