"""How videos are cut into clips: which frames, how long, and where the picture is cropped."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from longreel.data.mp4 import MAX_FPS, MIN_FPS
from longreel.data.video import VideoInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class CutConfig:
    """How clips are cut out of a video. Nothing is scaled: size and length are those of the video.

    Args:
        clip_frames: frames of a clip at most; what remains at a video's end is a shorter one. None: whole videos, each
            held in memory.
        min_frames: shorter clips are left out, and counted.
        frame_stride: every so many frames of the video.
        fps: frames per second of clips, taken by time stamps, so that a variable frame rate becomes a constant one;
            None takes frames as they come. Videos slower than that give frames twice.
        scene_threshold: end a clip where two frames differ by more than this mean level of 0 to 255 (27 is usual);
            None does not look.
    """

    clip_frames: int | None = 64
    min_frames: int = 1
    frame_stride: int = 1
    fps: float | None = None
    scene_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("clip_frames", "min_frames", "frame_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.clip_frames is not None and self.min_frames > self.clip_frames:
            raise ValueError(f"min_frames {self.min_frames} is more than clip_frames {self.clip_frames}")
        if self.fps is not None and not MIN_FPS <= self.fps <= MAX_FPS:
            raise ValueError(f"fps must be between {MIN_FPS} and {MAX_FPS:.0f}, got {self.fps}")
        if self.fps is not None and self.frame_stride != 1:
            raise ValueError(f"give fps or frame_stride, not both; got {self.fps} and {self.frame_stride}")
        if self.scene_threshold is not None and not 0 < self.scene_threshold < 255:
            raise ValueError(f"scene_threshold must be between 0 and 255, got {self.scene_threshold}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig:
    """What sizes of clips must be multiples of; what is over is cropped, frames at the end, pixels on both sides.

    Args:
        frames: of the autoencoder's time_factor times the model's frames per patch. height, width: pixels.
    """

    frames: int = 1
    height: int = 1
    width: int = 1

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after cropping; 0 where a picture is smaller than the multiple."""
        return height // self.height * self.height, width // self.width * self.width


def chosen_frames(info: VideoInfo, cut: CutConfig) -> list[int]:
    """Indices of a video's frames that clips are made of, in order.

    With fps: for k = 0, 1, ... the frame that is shown at k / fps after the first, by time stamps; one without time
    stamps has its average rate.
    """
    if cut.fps is None:
        return list(range(0, info.num_frames, cut.frame_stride))
    step = 1 / Fraction(cut.fps).limit_denominator(100_000)
    if info.timestamps:
        times: Sequence[Fraction] = [(time - info.timestamps[0]) * info.time_base for time in info.timestamps]
    else:
        rate = Fraction(info.fps).limit_denominator(100_000) or Fraction(25)
        times = [index / rate for index in range(info.num_frames)]
    # The last frame is shown as long as the one before it.
    end = times[-1] + (times[-1] - times[-2] if len(times) > 1 else step)
    count = max(1, math.ceil(end / step))
    return [bisect_right(times, k * step) - 1 for k in range(count)]


def clip_fps(info: VideoInfo, cut: CutConfig) -> float:
    """Frames per second of clips cut this way."""
    return cut.fps if cut.fps is not None else info.fps / cut.frame_stride


def usable_length(num_frames: int, cut: CutConfig, crop: CropConfig) -> int:
    """Frames that a clip of so many keeps: a multiple of crop.frames, or 0 if it is too short."""
    kept = num_frames // crop.frames * crop.frames
    return kept if kept >= cut.min_frames else 0


def cut_by_length(frames: Sequence[int], cut: CutConfig, crop: CropConfig) -> list[tuple[int, ...]]:
    """Frames of each clip, one after the other; where scenes end is not asked."""
    length = cut.clip_frames or max(1, len(frames))
    clips = []
    for start in range(0, len(frames), length):
        piece = frames[start : start + length]
        if kept := usable_length(len(piece), cut, crop):
            clips.append(tuple(piece[:kept]))
    return clips


def check_clip_length(cut: CutConfig, crop: CropConfig) -> None:
    """ValueError if no clip could be as long as the autoencoder and the patches need."""
    if cut.clip_frames is not None and cut.clip_frames % crop.frames:
        raise ValueError(
            f"clip_frames {cut.clip_frames} is not a multiple of {crop.frames}, the autoencoder's time factor times "
            f"the frames of a patch; use {max(1, cut.clip_frames // crop.frames) * crop.frames}"
        )
