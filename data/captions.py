"""The captions file: a JSON list of {"file": relative path, "captions": [one caption or more]}."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePath


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionedFile:
    """One entry of a captions file.

    Args:
        file: path of the video, relative to the folder of videos.
        captions: at least one caption; training draws one per sample and step.
    """

    file: str
    captions: tuple[str, ...]


def load_captions(path: Path) -> list[CaptionedFile]:
    """Read and check a captions file.

    Args:
        path: JSON file holding a list of {"file", "captions"}; other keys of an entry are ignored.

    Returns:
        The entries, in the order of the file.

    Raises:
        ValueError: one line naming the file and the place, `path:line:column` for broken JSON and the index and
            key of the entry for a wrong structure.
        OSError: the file cannot be read.
    """
    entries = _parse(path)
    if not isinstance(entries, list):
        raise ValueError(f'{path}: expected a list of {{"file", "captions"}}, got {_kind(entries)}')
    if not entries:
        raise ValueError(f"{path}: the list is empty; it needs at least one entry")
    loaded: list[CaptionedFile] = []
    seen: dict[PurePath, int] = {}
    for index, entry in enumerate(entries):
        item = _entry(f"{path}: entry {index}", entry)
        first = seen.setdefault(PurePath(item.file), index)
        if first != index:
            raise ValueError(
                f'{path}: entry {index}: "file" {item.file!r} is already entry {first}; put all its captions there'
            )
        loaded.append(item)
    return loaded


def _parse(path: Path) -> object:
    raw = path.read_bytes()
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}:{column}: not UTF-8 text: {error.reason}") from error
    except ValueError as error:
        # Numbers of more digits than Python turns into one.
        raise ValueError(f"{path}: not a captions file: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: not a captions file: brackets are nested too deeply") from error


def _entry(where: str, entry: object) -> CaptionedFile:
    if not isinstance(entry, dict):
        raise ValueError(f'{where}: expected {{"file", "captions"}}, got {_kind(entry)}')
    for key in ("file", "captions"):
        if key not in entry:
            raise ValueError(f'{where}: "{key}" is missing; keys are {", ".join(map(repr, entry)) or "none"}')
    file, captions = entry["file"], entry["captions"]
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        raise ValueError(f'{where}: "file" must be a path relative to the folder of videos, got {file!r}')
    if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
        raise ValueError(f'{where}: "file" {file!r} leaves the folder of videos; use a path inside it, without ".."')
    if not isinstance(captions, list) or not captions:
        raise ValueError(f'{where}: "captions" must be a list of at least one string, got {_kind(captions)}')
    for position, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f'{where}: "captions"[{position}] must be a string that is not blank, got {caption!r}')
    return CaptionedFile(file=file, captions=tuple(captions))


def _kind(value: object) -> str:
    if isinstance(value, list | dict) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
