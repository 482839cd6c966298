"""Tensors to mp4 files."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from longreel.models.publish import published

# What players and the mp4 time base can hold.
MIN_FPS, MAX_FPS = 0.1, 1000.0


def write_mp4(path: Path, frames: Tensor, fps: float, *, metadata: Mapping[str, str] | None = None) -> str:
    """Encode frames as an mp4 that any player opens; the file appears complete or not at all.

    Args:
        path: file to write; its folder must exist.
        frames: [T, H, W, 3] RGB in [-1, 1], values outside are clipped. Odd sizes lose nothing: the last row or column
            is repeated, since 4:2:0 video needs even sizes.
        fps: frames per second, MIN_FPS to MAX_FPS.
        metadata: of the container, by the keys that mp4 has: `title`, `comment`, `artist`, ...

    Returns:
        Name of the encoder that wrote it: `libx264`, or `mpeg4` where this build of FFmpeg has no H.264.

    Raises:
        ValueError: frames or fps are not as described.
        OSError: the file cannot be written.
    """
    if frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames must be [T, H, W, 3] and not empty, got {list(frames.shape)}")
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"fps must be between {MIN_FPS} and {MAX_FPS:.0f}, got {fps}")
    if not torch.isfinite(frames).all():
        raise ValueError("frames hold values that are not finite, so there is no picture to write")
    levels = ((frames.detach().to("cpu", torch.float32).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    levels = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2), (0, levels.shape[2] % 2), (0, 0)), mode="edge")
    encoder = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": "16", "preset": "medium"} if encoder == "libx264" else {"qscale": "2"}
    with published(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(encoder, rate=Fraction(fps).limit_denominator(30000), options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = levels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Said in the file, so that every reader turns the colours back with the matrix used here.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        for picture in levels:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return encoder
