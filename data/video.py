"""Video files to tensors and back, by PyAV: frame-exact clips of a fixed size, and mp4 files."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

# What players and the mp4 time base can hold.
MIN_FPS, MAX_FPS = 0.1, 1000.0

# Containers of videos. Others that FFmpeg reads are not: playlists and concatenations name other files and addresses,
# pictures and text have a "video" of their own.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,ogg,flv,asf,ivf,nut,mxf,gxf,rm,dv,wtv,"
    "h264,hevc,av1,obu,vc1,h263,yuv4mpegpipe,gif,"
    # Sound alone, to be told so.
    "wav,mp3,flac,aac,aiff"
)


class VideoError(ValueError):
    """A video file that cannot serve; the one-line message names the file and says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What a video file's best video stream holds.

    Args:
        codec: name of the decoder. num_frames: frames that the container really holds, counted.
        width, height: pixels of the coded picture. fps: average frames per second.
        timestamps: presentation time of every frame in display order, in units of time_base; empty where the container
            stores none (then reading starts at the first frame).
        keyframes: (presentation, decoding) times of the frames that decoding can start from, ascending.
        time_base: seconds per unit. quarter_turns: counter-clockwise turns that make the coded picture upright.
        pixel_aspect: width of a pixel over its height.
    """

    codec: str
    num_frames: int
    width: int
    height: int
    fps: float
    timestamps: tuple[int, ...] = field(repr=False)
    keyframes: tuple[tuple[int, int], ...] = field(repr=False)
    time_base: Fraction = Fraction(1)
    quarter_turns: int = 0
    pixel_aspect: Fraction = Fraction(1)

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the picture as it is shown: upright, its pixels square."""
        size = self.height, max(1, round(self.width * self.pixel_aspect))
        return size[::-1] if self.quarter_turns % 2 else size


def scan(path: Path) -> VideoInfo:
    """What a file's best video stream holds, from its packets: one frame is decoded, so broken ones may follow.

    Args:
        path: video file.

    Returns:
        The stream's description, as probe's.

    Raises:
        VideoError: the file is missing, is not a video, or its first frame cannot be decoded.
    """
    return _describe(path, every_frame=False)


def probe(path: Path) -> VideoInfo:
    """Count the frames of a file's best video stream and decode every one, so that training meets no broken one.

    Args:
        path: video file.

    Returns:
        The stream's description; pass it to read_clip, which then need not scan the file again.

    Raises:
        VideoError: the file is missing, is not a video, or some frame of it cannot be decoded.
    """
    return _describe(path, every_frame=True)


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
    filled = 0
    with open_video(path) as (container, stream):
        aspect = stream.codec_context.sample_aspect_ratio or Fraction(1)
        for index, frame in frames_from(container, stream, info, start):
            if index == start + filled * stride:
                clip[filled] = upright_picture(frame, height, width, aspect)
                filled += 1
                if filled == num_frames:
                    break
    if filled < num_frames:
        raise VideoError(f"{path}: frame {start + filled * stride} cannot be decoded")
    return torch.from_numpy(clip)


def to_float(clip: Tensor) -> Tensor:
    """uint8 colours to float32 in [-1, 1]."""
    return clip.to(torch.float32) / 127.5 - 1.0


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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
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
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return encoder


def _describe(path: Path, *, every_frame: bool) -> VideoInfo:
    shown: list[int | None] = []
    first: av.VideoFrame | None = None
    with open_video(path) as (container, stream):
        # Only counted, so several frames may be decoded at a time.
        stream.thread_type = "AUTO"
        num_frames = 0
        times: list[tuple[int, int, bool]] = []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                num_frames += 1
                if packet.pts is not None:
                    # (presentation, decoding, is a keyframe); containers without decoding times seek by the others.
                    times.append((packet.pts, packet.pts if packet.dts is None else packet.dts, packet.is_keyframe))
            if every_frame or first is None:
                frames = packet.decode()
                shown += [frame.pts for frame in frames]
                first = first or next(iter(frames), None)
        timed = len({pts for pts, _, _ in times}) == num_frames
        info = VideoInfo(
            codec=stream.codec_context.name,
            num_frames=num_frames,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=float(stream.average_rate or 0),
            timestamps=tuple(sorted(pts for pts, _, _ in times)) if timed else (),
            keyframes=tuple(sorted((pts, dts) for pts, dts, key in times if key)) if timed else (),
            time_base=stream.time_base or Fraction(1),
            quarter_turns=round(first.rotation / 90) % 4 if first is not None else 0,
            pixel_aspect=stream.codec_context.sample_aspect_ratio or Fraction(1),
        )
    if info.num_frames == 0:
        raise VideoError(f"{path}: its video stream holds no frames")
    if first is None:
        raise VideoError(f"{path}: none of its {info.num_frames} frames can be decoded")
    decoded = len(set(shown) & set(info.timestamps)) if info.timestamps else len(shown)
    if every_frame and decoded < info.num_frames:
        raise VideoError(f"{path}: only {decoded} of its {info.num_frames} frames can be decoded")
    return info


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its best video stream; whatever FFmpeg says about the file becomes a VideoError."""
    if not path.is_file():
        raise VideoError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    try:
        # The whitelist's file: a name such as "http:x.mp4" would be an address.
        try:
            container = av.open(f"file:{path}", options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"})
        except av.ArgumentError as error:
            raise VideoError(f"{path}: is in no format of videos that is read (mp4, mkv, webm, avi, ts ...)") from error
        with container:
            stream = container.streams.best("video")
            # Sound files may hold their cover as a video stream.
            if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
                raise VideoError(f"{path}: holds no video stream that can be decoded")
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def frames_from(
    container: av.container.InputContainer, stream: av.VideoStream, info: VideoInfo, start: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(index, frame) in display order, from a keyframe at or before frame `start` on."""
    if not info.timestamps:
        yield from enumerate(container.decode(stream))
        return
    # Containers look for decoding times: asking for the frame's own time could land behind the frames it depends on.
    first = bisect_right(info.keyframes, info.timestamps[start], key=lambda times: times[0]) - 1
    if start > 0 and first > 0:
        container.seek(info.keyframes[first][1], stream=stream, backward=True)
    index_of = {time: index for index, time in enumerate(info.timestamps)}
    for frame in container.decode(stream):
        if frame.pts in index_of:
            yield index_of[frame.pts], frame


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
