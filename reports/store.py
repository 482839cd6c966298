"""Record files: append-only JSON lines that survive a crash in the middle of a write."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import json
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from longreel.reports.records import Record


class Keyed(Protocol):
    """What a record file holds a line of."""

    @property
    def key(self) -> str: ...

    def to_json(self) -> str: ...


AnyRecord = TypeVar("AnyRecord", bound=Keyed)


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
    data = read_bytes(path)
    lines = data.split(b"\n")
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


def read_bytes(path: Path) -> bytes:
    """The lines of a record file, unpacked where its name ends in .gz; ValueError where that is not whole."""
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from None


def latest(records: Iterable[AnyRecord]) -> list[AnyRecord]:
    """One record per key, the last one written, in the order in which the points first appeared.

    A point that failed and was run again is in the file twice; its last word counts.
    """
    by_key: dict[str, AnyRecord] = {}
    for record in records:
        by_key[record.key] = record
    return list(by_key.values())


@contextlib.contextmanager
def warnings_as_lines(prefix: str = "") -> Iterator[None]:
    """Print warnings as `<prefix>warning: <message>` on stderr: a user has no use for the line of code behind one."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"{prefix}warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def write_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write files as a set: all are complete under temporary names before the first gets its own."""
    staged: list[tuple[Path, Path]] = []
    try:
        for path, text in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            staged.append((temporary, path))
            temporary.write_bytes(text if isinstance(text, bytes) else text.encode())
        for temporary, path in staged:
            os.replace(temporary, path)
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
