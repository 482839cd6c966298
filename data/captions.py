"""The captions file: JSON, JSON lines or CSV.

- `.json`: a list of {"file": relative path, "captions": [one caption or more]};
- `.jsonl`: one such object per line;
- `.csv`: a header with the columns `path` and `text`; several rows of one path are its captions.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

_SUFFIXES = (".json", ".jsonl", ".csv")
# Longer than any caption; Python's own limit is 128 KiB.
_CSV_FIELD_LIMIT = 1 << 30
# What `surrogateescape` makes of bytes that are not UTF-8.
_NOT_UTF8 = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionedFile:
    """One entry of a captions file.

    Args:
        file: path of the video, relative to the folder of videos.
        captions: at least one caption; training draws one per sample and step.
    """

    file: str
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionProblem:
    """An entry that cannot be used, or not as it stands.

    Args:
        where: `path: entry N` or `path: line N`. reason: one line.
        merged: the captions joined those of an earlier entry of the same file, so nothing is lost.
    """

    where: str
    reason: str
    merged: bool = False


def load_captions(path: Path) -> list[CaptionedFile]:
    """Read a captions file whose every entry must be right.

    Args:
        path: `.json`, `.jsonl` or `.csv`; other keys and columns are ignored.

    Returns:
        The entries, in the order of the file.

    Raises:
        ValueError: one line naming the file and the place, `path:line:column` for broken JSON and the index and
            key of the entry for a wrong structure.
        OSError: the file cannot be read.
    """
    if path.suffix == ".json":
        _decode(path, path.read_bytes())
    entries, problems = read_captions(path)
    if problems:
        raise ValueError(f"{problems[0].where}: {problems[0].reason}")
    return entries


def read_captions(path: Path) -> tuple[list[CaptionedFile], list[CaptionProblem]]:
    """Read a captions file and leave out what is wrong, for folders too large to be right everywhere.

    A wrong caption costs itself, and its entry only if that has no other.

    Args:
        path: as of load_captions.

    Returns:
        (usable entries in the order of the file, what was wrong with others and with captions of these).

    Raises:
        ValueError: the file as a whole is no captions file: broken JSON, not a list, no such columns, no entry, another
            suffix.
        OSError: the file cannot be read.
    """
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: a captions file ends in {', '.join(_SUFFIXES)}")
    read = {".json": _json_entries, ".jsonl": _jsonl_entries, ".csv": _csv_entries}[path.suffix]
    loaded: dict[PurePath, CaptionedFile] = {}
    first_at: dict[PurePath, str] = {}
    problems: list[CaptionProblem] = []
    seen = 0
    for place, entry in read(path):
        seen += 1
        where = f"{path}: {place}"
        try:
            item, left_out = _entry(entry)
        except ValueError as error:
            problems.append(CaptionProblem(where=where, reason=str(error)))
            continue
        problems += [CaptionProblem(where=where, reason=reason) for reason in left_out]
        key = PurePath(item.file)
        if key in loaded:
            earlier = loaded[key]
            loaded[key] = CaptionedFile(file=earlier.file, captions=earlier.captions + item.captions)
            if path.suffix != ".csv":
                reason = f'"file" {item.file!r} is already {first_at[key]}; put all its captions there'
                problems.append(CaptionProblem(where=where, reason=reason, merged=True))
            continue
        first_at[key] = place
        loaded[key] = item
    if not seen:
        what = "the list is empty; it needs" if path.suffix == ".json" else "holds no entry; a captions file needs"
        raise ValueError(f"{path}: {what} at least one entry")
    return list(loaded.values()), problems


def _json_entries(path: Path) -> Iterator[tuple[str, object]]:
    text = _text(path)
    entries = _parse(text, str(path))
    if not isinstance(entries, list):
        raise ValueError(f'{path}: expected a list of {{"file", "captions"}}, got {_kind(entries)}')
    for index, entry in enumerate(entries):
        yield f"entry {index}", entry


def _jsonl_entries(path: Path) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", _parse(line, "")
        except ValueError as error:
            yield f"line {number}", error


def _csv_entries(path: Path) -> Iterator[tuple[str, object]]:
    text = _text(path)
    limit = csv.field_size_limit(_CSV_FIELD_LIMIT)
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        if missing := {"path", "text"} - set(rows.fieldnames or []):
            raise ValueError(
                f"{path}: has no column {' and '.join(sorted(missing))}; its first line must name path and text, "
                f"it has {', '.join(rows.fieldnames or []) or 'nothing'}"
            )
        for row in rows:
            yield f"line {rows.line_num}", {"file": row["path"], "captions": [row["text"]]}
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _text(path: Path) -> str:
    """Bytes that are not UTF-8 stay recognisable, so that they cost their caption and not the file."""
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path}: UTF-16 text; save it as UTF-8")
    return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}:{column}: not UTF-8 text: {error.reason}") from error


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}:{error.colno}: " if where else ""
        raise ValueError(f"{place}not valid JSON: {error.msg}") from error
    except ValueError as error:
        # Numbers of more digits than Python turns into one.
        raise ValueError(f"{where + ': ' if where else ''}not a captions file: {error}") from error
    except RecursionError as error:
        raise ValueError(
            f"{where + ': ' if where else ''}not a captions file: brackets are nested too deeply"
        ) from error


def _entry(entry: object) -> tuple[CaptionedFile, list[str]]:
    """An entry, and why captions of it were left out."""
    if isinstance(entry, ValueError):
        raise entry
    if not isinstance(entry, dict):
        raise ValueError(f'expected {{"file", "captions"}}, got {_kind(entry)}')
    for key in ("file", "captions"):
        if key not in entry:
            raise ValueError(f'"{key}" is missing; keys are {", ".join(map(repr, entry)) or "none"}')
    file, captions = entry["file"], entry["captions"]
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        raise ValueError(f'"file" must be a path relative to the folder of videos, got {_short(file)}')
    if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
        raise ValueError(f'"file" {_short(file)} leaves the folder of videos; use a path inside it, without ".."')
    if not isinstance(captions, list) or not captions:
        raise ValueError(f'"captions" must be a list of at least one string, got {_kind(captions)}')
    if _NOT_UTF8.search(file):
        raise ValueError(f"not UTF-8 text: {file[:80]!r}")
    good: list[str] = []
    left_out: list[str] = []
    for position, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            left_out.append(f'"captions"[{position}] must be a string that is not blank, got {_short(caption)}')
        elif _NOT_UTF8.search(caption):
            left_out.append(f"not UTF-8 text: {caption[:80]!r}")
        else:
            good.append(caption)
    if not good:
        raise ValueError(left_out[0])
    return CaptionedFile(file=file, captions=tuple(good)), left_out


def _kind(value: object) -> str:
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
