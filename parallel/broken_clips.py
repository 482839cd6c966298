"""Clips that can no longer be read in the middle of a run, and which others take their places from then on.

Videos are decoded once before a run starts, so this is a file that was cut off, replaced or removed meanwhile, or a bad
disk. What was left out, since which step and why, is kept in `out`: a resumed run leaves out the same, although the
video would not pass for whole any more, and its loss curve stays that of the run before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from longreel.data.samples import ClipSource
from longreel.data.video import VideoInfo
from longreel.models.publish import published

BROKEN_CLIPS = "broken-clips.json"


class UnreadableClips(ValueError):
    """Clips of this rank's part of a step that cannot be read.

    Attributes:
        reasons: {clip: why}; each names its file.
    """

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = dict(reasons)


class LostClips(ValueError):
    """Clips that a run cannot go on without; the same on every rank, between two steps."""


class BrokenClips:
    """What is left out, the same on every rank; a function of the step, so that no resume changes a step.

    Args:
        clips: of the run. path: where it is kept. resume: read what is there.
        same_size: a clip may be replaced by one of its own size alone, as in batches that are not packed.

    Raises:
        ValueError: the file is damaged, or of other clips.
    """

    def __init__(self, clips: ClipSource, path: Path, *, resume: bool, same_size: bool) -> None:
        self._clips, self._path, self._same_size = clips, path, same_size
        self._noted: dict[int, dict[str, Any]] = {}
        if resume and path.is_file():
            self._noted = {entry["clip"]: entry for entry in _read(path)["clips"]}
            if self._noted and max(self._noted) >= len(clips):
                raise ValueError(f"{path}: of more clips than the {len(clips)} of this run; give another out")

    def in_place_of(self, clip: int, step: int) -> int:
        """The clip that a step, counted from 0, takes where its sample is `clip`: itself, if it can be read.

        Else the next one of its size; where clips are packed and there is none, the longest of the shorter ones.

        Raises:
            LostClips: no clip fits.
        """
        if self._whole(clip, step):
            return clip
        sizes, number = self._clips.sizes, len(self._clips)
        others = [other % number for other in range(clip + 1, clip + number) if self._whole(other % number, step)]
        fitting = [other for other in others if sizes[other] == sizes[clip]]
        if not fitting and not self._same_size:
            shorter = [other for other in others if all(a <= b for a, b in zip(sizes[other], sizes[clip], strict=True))]
            fitting = sorted(shorter, key=lambda other: -math.prod(sizes[other]))
        if not fitting:
            files = ", ".join(sorted({str(entry["file"]) for entry in self._noted.values()}))
            raise LostClips(
                f"{self._noted[clip]['reason']}; no other clip has a size that fits in its place: put what broke back "
                f"as it was ({files}), remove {self._path} if it is there, and --resume"
            )
        return fitting[0]

    def add(self, reasons: Mapping[int, str], step: int) -> None:
        """Leave clips out from a step on."""
        for clip, reason in sorted(reasons.items()):
            video = self._clips.video(clip)
            self._noted[clip] = {
                "clip": clip,
                "step": step,
                "reason": reason,
                "file": None if video is None else video[0],
            }

    def write(self) -> None:
        """Keep it; the first rank's work. OSError if it cannot be written."""
        files = {}
        for clip in self._noted:
            video = self._clips.video(clip)
            if video is not None:
                files[video[0]] = _to_json(video[1])
        entries = [self._noted[clip] for clip in sorted(self._noted)]
        with published(self._path) as partial:
            partial.write_text(json.dumps({"clips": entries, "files": files}, indent=1) + "\n", encoding="utf-8")

    def _whole(self, clip: int, step: int) -> bool:
        return clip not in self._noted or step < self._noted[clip]["step"]


def known_videos(path: Path) -> dict[str, VideoInfo]:
    """{file: what it held} of videos that broke in a run, which a resumed one must not judge anew.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return {file: _from_json(info) for file, info in _read(path)["files"].items()}
    except (TypeError, AttributeError, KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for entry in found["clips"]:
            if not (type(entry["clip"]) is type(entry["step"]) is int and isinstance(entry["reason"], str)):
                raise ValueError(f"not the entry of a clip: {entry}")
        files: Any = found["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    return {"clips": found["clips"], "files": files}


_FIELDS: Sequence[str] = tuple(VideoInfo.__dataclass_fields__)


def _to_json(info: VideoInfo) -> dict[str, Any]:
    fields = {name: getattr(info, name) for name in _FIELDS}
    return {name: str(value) if isinstance(value, Fraction) else value for name, value in fields.items()}


def _from_json(fields: dict[str, Any]) -> VideoInfo:
    # What older files lack has its default.
    made = {name: fields[name] for name in _FIELDS if name in fields}
    made["timestamps"] = tuple(made["timestamps"])
    made["keyframes"] = tuple((pts, dts) for pts, dts in made["keyframes"])
    for name in ("time_base", "pixel_aspect"):
        made[name] = Fraction(made[name])
    return VideoInfo(**made)
