"""What a path holds: records of steps, records of single ops, or a document."""

from __future__ import annotations

import json
from pathlib import Path

from longreel.reports.op_records import OpRecord
from longreel.reports.records import Record
from longreel.reports.store import load, load_lines, read_bytes

_SUFFIXES = (".jsonl", ".jsonl.gz")


def record_files(source: Path) -> list[Path]:
    """The record file itself, or the *.jsonl and *.jsonl.gz files of a folder, by name.

    Raises:
        ValueError: neither is there.
    """
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.name.endswith(_SUFFIXES))
        if not files:
            raise ValueError(f"no .jsonl file in {source}")
        return files
    if not source.exists():
        raise ValueError(f"no such file or folder: {source}")
    return [source]


def load_steps(source: Path) -> tuple[list[Record], list[str]]:
    """The records of steps of a file or folder, and the names of its files.

    Raises:
        ValueError: nothing is there, no record, or what is not one. OSError: cannot be read.
    """
    files = record_files(source)
    records = [record for file in files for record in load(file)]
    if not records:
        raise ValueError(f"no records in {', '.join(map(str, files))}")
    return records, [file.name for file in files]


def load_ops(source: Path) -> tuple[list[OpRecord], list[str]]:
    """As load_steps, for records of single ops."""
    files = record_files(source)
    records = [record for file in files for record in load_lines(file, OpRecord.from_json)]
    if not records:
        raise ValueError(f"no records in {', '.join(map(str, files))}")
    return records, [file.name for file in files]


def holds_ops(source: Path) -> bool:
    """Whether the first record of a file or folder is one of a single op."""
    for file in record_files(source):
        for line in read_bytes(file).splitlines():
            try:
                first = json.loads(line)
            except ValueError:
                break
            return isinstance(first, dict) and "op" in first and "provider" in first
    return False
