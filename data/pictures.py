"""Frames of videos as tensors: frame-exact clips of a fixed size, upright, in the colours that the file says."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from longreel.data.video import VideoError, VideoInfo, errors_about, probe
from longreel.data.whole_frames import WholeFrames


def read_clip(
    path: Path,
    num_frames: int,
    height: int,
    width: int,
    *,
    start: int = 0,
    stride: int = 1,
    info: VideoInfo | None = None,
) -> Tensor:
    """Frames start, start + stride, ... of a video, scaled and centre-cropped to a fixed size.

    Args:
        path: video file.
        num_frames: T, frames to read.
        height, width: H and W of the result in pixels; the picture is scaled until it covers them, keeping its aspect
            ratio (that of the pixels and the rotation stored in the file included), and its centre is kept.
        start: index of the first frame.
        stride: distance between two frames.
        info: what probe(path) returned, to spare a scan of the file.

    Returns:
        [T, H, W, 3] float32 RGB in [-1, 1].

    Raises:
        VideoError: the file cannot be read or holds too few frames.
        ValueError: an argument is out of range.
    """
    return to_float(decode_clip(path, num_frames, height, width, start=start, stride=stride, info=info))


def decode_clip(
    path: Path,
    num_frames: int,
    height: int,
    width: int,
    *,
    start: int = 0,
    stride: int = 1,
    info: VideoInfo | None = None,
) -> Tensor:
    """As read_clip, but [T, H, W, 3] uint8 RGB: a quarter of the memory."""
    for name, value, least in (
        ("num_frames", num_frames, 1),
        ("height", height, 1),
        ("width", width, 1),
        ("stride", stride, 1),
        ("start", start, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    info = info or probe(path)
    needed = start + (num_frames - 1) * stride + 1
    if needed > info.num_frames:
        raise VideoError(
            f"{path}: has {info.num_frames} frames; {num_frames} at stride {stride} from frame {start} need {needed}"
        )
    clip = np.empty((num_frames, height, width, 3), np.uint8)
    frames = WholeFrames(path, info)
    try:
        for number, index in enumerate(range(start, needed, stride)):
            frame = frames.read(index)
            with errors_about(f"{path}: frame {index} cannot be shown"):
                clip[number] = upright_picture(frame, height, width, info.pixel_aspect)
    finally:
        frames.close()
    return torch.from_numpy(clip)


def to_float(clip: Tensor) -> Tensor:
    """uint8 colours to float32 in [-1, 1]."""
    return clip.to(torch.float32) / 127.5 - 1.0


def upright_picture(frame: av.VideoFrame, height: int, width: int, pixel_aspect: Fraction) -> np.ndarray:
    """One frame as [H, W, 3] uint8: upright, scaled to cover (height, width), centre kept.

    Matrix and range of the colours are those the frame is tagged with; one thread, so that no machine differs.
    """
    quarter_turns = round(frame.rotation / 90) % 4
    if quarter_turns % 2:
        height, width = width, height
    shown_width = frame.width * pixel_aspect
    scale = max(Fraction(height, frame.height), width / shown_width)
    cover_height = max(height, round(frame.height * scale))
    cover_width = max(width, round(shown_width * scale))
    scaled = frame.reformat(
        width=cover_width,
        height=cover_height,
        format="rgb24",
        interpolation="BICUBIC",
        threads=1,
    ).to_ndarray()
    top, left = (cover_height - height) // 2, (cover_width - width) // 2
    return np.rot90(scaled[top : top + height, left : left + width], quarter_turns)
