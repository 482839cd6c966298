"""Which files of a folder are videos with captions, and what else lies there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from longreel.data.captions import CaptionedFile
from longreel.data.video import VideoError

# What counts as a video without captions. Files that captions name may be called anything.
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".ogv", ".flv", ".wmv"}
    | {".3gp", ".ivf", ".mxf", ".gif", ".y4m"}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceVideo:
    """A captioned file that is there, with its size in bytes."""

    file: str
    captions: tuple[str, ...]
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What a folder and its captions hold together.

    Args:
        videos: captioned files that are there, by path. missing: captioned files that are not.
        outside: (file, reason) of those that leave the folder. uncaptioned: videos that no caption names.
    """

    videos: tuple[SourceVideo, ...]
    missing: tuple[str, ...] = ()
    outside: tuple[tuple[str, str], ...] = ()
    uncaptioned: tuple[str, ...] = field(default=())


def inside(folder: Path, file: str) -> Path:
    """folder / file, if that stays in the folder once links are followed.

    Raises:
        VideoError: an absolute path, one with "..", or a link that leads out of the folder.
    """
    path = folder / file
    relative = PurePath(file)
    leaves = relative.is_absolute() or ".." in relative.parts
    if leaves or not path.resolve().is_relative_to(folder.resolve()):
        raise VideoError(f"{path}: leaves the folder of videos{'' if leaves else ' through a link'}")
    return path


def find_sources(folder: Path, entries: Sequence[CaptionedFile]) -> Sources:
    """Match captions with the files of a folder.

    Raises:
        ValueError: folder is none.
    """
    if not folder.is_dir():
        raise ValueError(f"videos: {folder} is not a folder")
    videos: list[SourceVideo] = []
    missing: list[str] = []
    outside: list[tuple[str, str]] = []
    for entry in sorted(entries, key=lambda entry: PurePath(entry.file).as_posix()):
        try:
            path = inside(folder, entry.file)
            size = path.stat().st_size if path.is_file() else None
        except VideoError as error:
            outside.append((entry.file, str(error)))
            continue
        except (OSError, RuntimeError, UnicodeEncodeError):
            # Names too long for the file system, loops of links, lone surrogates: no file is called so.
            missing.append(entry.file)
            continue
        if size is None:
            missing.append(entry.file)
        else:
            videos.append(SourceVideo(file=PurePath(entry.file).as_posix(), captions=entry.captions, size=size))
    named = {PurePath(entry.file) for entry in entries}
    uncaptioned = []
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            relative = PurePath(root, name).relative_to(folder)
            if relative.suffix.lower() in VIDEO_SUFFIXES and relative not in named:
                uncaptioned.append(os.fsencode(relative).decode("utf-8", errors="backslashreplace"))
    return Sources(
        videos=tuple(videos), missing=tuple(missing), outside=tuple(outside), uncaptioned=tuple(sorted(uncaptioned))
    )
