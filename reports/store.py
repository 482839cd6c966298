"""Record files: append-only JSON lines that survive a crash in the middle of a write, and their export to CSV."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from longreel.reports.compare import Baselines
from longreel.reports.records import Record


class Keyed(Protocol):
    """What a record file holds a line of."""

    @property
    def key(self) -> str: ...

    def to_json(self) -> str: ...


AnyRecord = TypeVar("AnyRecord", bound=Keyed)

# CSV column -> field of the record, dotted where it lies inside a mapping.
CSV_FIELDS = {
    "key": "key",
    "kind": "kind",
    "regime": "regime",
    "status": "status",
    "reason": "reason",
    "model": "model",
    "device": "device",
    "num_devices": "num_devices",
    "strategy": "strategy",
    "sp_degree": "sp_degree",
    "dp_degree": "dp_degree",
    "engine": "engine",
    "policy": "policy",
    "attention": "attention",
    "seq_len": "seq_len",
    "batch_per_group": "batch_per_group",
    "is_baseline": "is_baseline",
    "step_s": "step_s",
    "step_low_s": "interval_s.0",
    "step_high_s": "interval_s.1",
    "memory_allocated_bytes": "memory.allocated",
    "memory_reserved_bytes": "memory.reserved",
    "memory_device_bytes": "memory.device",
    "memory_process_bytes": "memory.process",
    "memory_process_before_bytes": "memory.process_before",
    "memory_limit_bytes": "memory_limit",
    "memory_usable_bytes": "memory_usable",
    "flops": "flops",
    "hw_flops": "hw_flops",
    "mfu": "mfu",
    "hfu": "hfu",
    "error_loss": "error.loss",
    "error_grad": "error.grad",
    "error_tolerance": "error.tolerance",
    "energy_j": "energy_j",
    "commit": "provenance.commit",
}
# Columns that are computed: tokens and samples per second over all devices, tokens/s over the baseline's of the same
# group and length, bytes one rank sends in a step over all collectives, number of timed steps.
CSV_DERIVED = ("tokens_per_s", "samples_per_s", "ratio_to_baseline", "bytes_sent", "num_samples")


def append(path: str | os.PathLike[str], record: Keyed) -> None:
    """Append one record: the whole line is on the disk when this returns, or the file is as it was.

    What a crash left of a line at the end of the file is cut off first, with a warning.

    Args:
        path: the JSONL file, created (with its folder) where it does not exist. record: what to write.

    Raises:
        ValueError: the record cannot be written as JSON, or the file ends in what is no part of a record.
        OSError: the file cannot be written.
    """
    line = record.to_json().encode() + b"\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        size, line = _finish_last_line(file, size, line, path)
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes of a record could be written to {path}")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _finish_last_line(file: io.FileIO, size: int, line: bytes, path: Path) -> tuple[int, bytes]:
    """The file's size and the bytes to append, once the last line is whole or gone."""
    if size == 0:
        return size, line
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size, line
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if _is_whole(last):
        return size, b"\n" + line
    if not _is_beginning(last):
        raise ValueError(f"{path}: the last line is not a record; use another file")
    warnings.warn(f"{path}: cut off {len(last)} bytes of an unfinished last line", stacklevel=3)
    file.truncate(size - len(last))
    return size - len(last), line


def _is_whole(line: bytes) -> bool:
    """Whether a line without its newline is complete: no proper beginning of a JSON object is itself JSON."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _is_beginning(line: bytes) -> bool:
    """Whether a line can be what is left of a record's: nothing else is ours to drop."""
    return line[:2] == b'{"'[: len(line)]


def load(path: str | os.PathLike[str]) -> list[Record]:
    """All records of a file, in the order they were written.

    What a crash left of a last line is dropped with a warning.

    Raises:
        ValueError: another line is broken, or of a newer schema; names file and line. OSError: cannot be read.
    """
    return load_lines(path, Record.from_json)


def load_lines(path: str | os.PathLike[str], parse: Callable[[str], AnyRecord]) -> list[AnyRecord]:
    """As load, for records that another function reads from their lines."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    last = lines.pop()
    if _is_whole(last) or not last.strip() or not _is_beginning(last):
        lines.append(last)
    else:
        warnings.warn(f"{path}:{len(lines) + 1}: dropped an unfinished last line", stacklevel=2)
    records = []
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(parse(line.decode()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{i}: not a record: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise ValueError(f"{path}:{i}: {error}") from None
    return records


def latest(records: Iterable[AnyRecord]) -> list[AnyRecord]:
    """One record per key, the last one written, in the order in which the points first appeared.

    A point that failed and was run again is in the file twice; its last word counts.
    """
    by_key: dict[str, AnyRecord] = {}
    for record in records:
        by_key[record.key] = record
    return list(by_key.values())


def derived(record: Record, baselines: Baselines) -> dict[str, float | int | None]:
    """The values of CSV_DERIVED for one record; None (an empty cell) where there is no valid figure."""
    ok = record.status == "ok"
    return {
        "tokens_per_s": record.tokens_per_s if ok else None,
        "samples_per_s": record.samples_per_s if ok else None,
        "ratio_to_baseline": baselines.ratio(record),
        "bytes_sent": sum(record.traffic.values()) if record.traffic else None,
        "num_samples": len(record.samples_s),
    }


def csv_text(records: Sequence[Record]) -> str:
    """The records as CSV: a header line, then a line per record with the columns of CSV_FIELDS and CSV_DERIVED.

    Units are in the names: `_s` seconds, `_bytes` bytes; throughputs are per second over all devices.
    """
    baselines = Baselines(records)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*CSV_FIELDS, *CSV_DERIVED])
    for record in records:
        writer.writerow([*(_field(record, name) for name in CSV_FIELDS.values()), *derived(record, baselines).values()])
    return out.getvalue()


@contextlib.contextmanager
def warnings_as_lines(prefix: str = "") -> Iterator[None]:
    """Print warnings as `<prefix>warning: <message>` on stderr: a user has no use for the line of code behind one."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"{prefix}warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def write_files(contents: dict[Path, str]) -> None:
    """Write files as a set: all are complete under temporary names before the first gets its own."""
    staged: list[tuple[Path, Path]] = []
    try:
        for path, text in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            staged.append((temporary, path))
            temporary.write_text(text, encoding="utf-8")
        for temporary, path in staged:
            os.replace(temporary, path)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def _field(record: Record, path: str) -> object:
    name, _, rest = path.partition(".")
    value = getattr(record, name)
    if not rest or value is None:
        return value
    return value[int(rest)] if rest.isdigit() else value.get(rest)
