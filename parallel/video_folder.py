"""The folder of videos that a run decodes while training, and what is said of those that it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from longreel.data.video import VideoInfo
from longreel.parallel.broken_clips import BROKEN_CLIPS, known_videos
from longreel.parallel.run_config import TrainConfig

Say = Callable[[str], None]


def video_folder(config: TrainConfig) -> tuple[Path, Path]:
    """(folder of videos, captions file)."""
    folder = config.videos
    assert folder is not None
    if not folder.is_dir():
        raise ValueError(f"videos: {folder} is not a folder")
    return folder, config.captions or folder / "captions.json"


def videos_known(config: TrainConfig) -> dict[str, VideoInfo]:
    """What a resumed run must not look at anew: videos that broke while it was training."""
    return known_videos(config.out / BROKEN_CLIPS) if config.resume else {}


def say_skipped(skipped: list[tuple[str, str]], number: int, say: Say) -> None:
    """Name videos that were left out, and why."""
    if skipped:
        say(f"skipped {len(skipped)} of {number} videos:")
        for name, reason in skipped:
            say(f"  {name}: {reason}")
