"""Video files by PyAV: what they hold, and their frames in order, each known to be whole or damaged."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
from av.stream import Disposition
from av.video.frame import PictureType

# Containers of videos. Others that FFmpeg reads are not: playlists and concatenations name other files and addresses,
# pictures and text have a "video" of their own.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,ogg,flv,asf,ivf,nut,mxf,gxf,rm,dv,wtv,"
    "h264,hevc,av1,obu,vc1,h263,yuv4mpegpipe,gif,"
    # Sound alone, to be told so.
    "wav,mp3,flac,aac,aiff"
)

_PREDICTED = (PictureType.P, PictureType.B)


class VideoError(ValueError):
    """A video file that cannot serve; the one-line message names the file and says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What a video file's best video stream holds.

    Args:
        codec: name of the decoder. num_frames: frames that the container really holds, counted.
        width, height: pixels of the coded picture. fps: average frames per second, by their time stamps.
        timestamps: presentation time of every frame in display order, in units of time_base; empty where the container
            stores none (then reading starts at the first frame).
        keyframes: (presentation, decoding) times of the frames that decoding can start from, ascending.
        seekable: whether reading can start in the middle. In program streams it cannot: it would start within a frame,
            and its rest would take the next one's time.
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
    seekable: bool = True
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


def _describe(path: Path, *, every_frame: bool) -> VideoInfo:
    first: av.VideoFrame | None = None
    whole: list[int | None] = []
    num_frames, times = 0, list[tuple[int, int, bool]]()

    def counted(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
        nonlocal num_frames
        for packet in packets:
            if packet.size and not packet.is_discard:
                num_frames += 1
                if packet.pts is not None:
                    # (presentation, decoding, is a keyframe); containers without decoding times seek by the others.
                    times.append((packet.pts, packet.pts if packet.dts is None else packet.dts, packet.is_keyframe))
            yield packet

    with open_video(path) as (container, stream):
        # Only counted, so several frames may be decoded at a time.
        stream.thread_type = "AUTO"
        packets = counted(container.demux(stream))
        for frame, is_whole in decoded(packets):
            first = first or frame
            if is_whole:
                whole.append(frame.pts)
            if not every_frame:
                break
        # What is not decoded is counted all the same.
        for _ in packets:
            pass
        timed = len({pts for pts, _, _ in times}) == num_frames
        stamps = tuple(sorted(pts for pts, _, _ in times)) if timed else ()
        info = VideoInfo(
            codec=stream.codec_context.name,
            num_frames=num_frames,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=_average_rate(stream, stamps),
            timestamps=stamps,
            keyframes=tuple(sorted((pts, dts) for pts, dts, key in times if key)) if timed else (),
            seekable=timed and container.format.name != "mpeg",
            time_base=stream.time_base or Fraction(1),
            quarter_turns=round(first.rotation / 90) % 4 if first is not None else 0,
            pixel_aspect=stream.codec_context.sample_aspect_ratio or Fraction(1),
        )
    if info.num_frames == 0:
        raise VideoError(f"{path}: its video stream holds no frames")
    if first is None:
        raise VideoError(f"{path}: none of its {info.num_frames} frames can be decoded")
    good = len(set(whole) & set(info.timestamps)) if info.timestamps else len(whole)
    if every_frame and good < info.num_frames:
        raise VideoError(f"{path}: damaged: only {good} of its {info.num_frames} frames can be decoded whole")
    return info


def _average_rate(stream: av.VideoStream, stamps: tuple[int, ...]) -> float:
    """Frames per second: what the container says, unless the time stamps say another."""
    told = float(stream.average_rate or 0)
    seconds = float((stamps[-1] - stamps[0]) * (stream.time_base or Fraction(1))) if len(stamps) > 1 else 0.0
    if not seconds:
        return told
    found = (len(stamps) - 1) / seconds
    # The rate is exact where stamps are rounded, to a thousandth of a second or worse.
    return told if abs(found - told) <= 0.05 * told else found


@contextmanager
def errors_about(what: str) -> Iterator[None]:
    """Whatever FFmpeg or the disk says while the block runs becomes a VideoError about `what`."""
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{what}: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its best video stream; whatever FFmpeg says about the file becomes a VideoError."""
    if not path.is_file():
        raise VideoError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    with errors_about(str(path)):
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
            # FFmpeg would paint over what is damaged: grey, or what was there before.
            stream.codec_context.options = {"err_detect": "crccheck+explode"}
            yield container, stream


def keyframe_before(info: VideoInfo, index: int) -> int:
    """Number of the keyframe to start from for frame `index`; 0 is the start of the file."""
    if not info.seekable:
        return 0
    return max(0, bisect_right(info.keyframes, info.timestamps[index], key=lambda times: times[0]) - 1)


def frames_from(
    container: av.container.InputContainer, stream: av.VideoStream, info: VideoInfo, start: int, keyframe: int
) -> Generator[tuple[int, av.VideoFrame, bool]]:
    """(index, frame, whether it is whole) in display order, from a keyframe on.

    Args:
        start: the first frame that matters; one that is missing from there on breaks those behind it. keyframe: its
            number, that of keyframe_before or an earlier one, or 0.
    """
    if not info.timestamps:
        for index, (frame, whole) in enumerate(decoded(container.demux(stream))):
            yield index, frame, whole
        return
    if "av1" in info.codec:
        # dav1d's threads answer some frames late: an error would be laid to the wrong ones.
        stream.codec_context.thread_count = 1
    if keyframe > 0:
        # Containers look for decoding times: asking for the frame's own time could land behind what it depends on.
        container.seek(info.keyframes[keyframe][1], stream=stream, backward=True)
    index_of = {time: index for index, time in enumerate(info.timestamps)}
    expected, broken_until = start, start
    for frame, whole in decoded(container.demux(stream)):
        index = index_of.get(frame.pts, -1) if frame.pts is not None else -1
        if index > expected:
            # One is missing, and others up to the next keyframe may be predicted from it.
            behind = bisect_right(info.keyframes, info.timestamps[expected], key=lambda times: times[0])
            broken_until = index_of[info.keyframes[behind][0]] if behind < len(info.keyframes) else info.num_frames
        expected = max(expected, index + 1)
        if index >= 0:
            yield index, frame, whole and index >= broken_until


@dataclass(slots=True)
class _Group:
    """Packets from one keyframe up to the next, in decoding order.

    Args:
        key: presentation time of the keyframe. before: the group before, until this one's keyframe is shown.
        broken: one of its packets is damaged; leading_broken: so is one that those shown before the keyframe need.
        inherits: its keyframe is predicted, and from what is damaged.
    """

    key: int | None = None
    before: _Group | None = None
    broken: bool = False
    leading_broken: bool = False
    inherits: bool = False


def decoded(packets: Iterator[av.Packet]) -> Iterator[tuple[av.VideoFrame, bool]]:
    """Frames in display order, each with whether it is whole; those that give no picture at all are left out.

    A damaged frame takes along what is predicted from it: all frames decoded after it up to the next keyframe, and, in
    open groups, those decoded behind that keyframe but shown before it. They decode without an error, and are wrong.
    With intra-refresh a "keyframe" is itself predicted, and pictures are whole again only at the next one.

    Args:
        packets: of one video stream, in decoding order, the empty one at the end included. Without time stamps nothing
            after a damaged frame counts as whole, since a frame that is missing moves the others.
    """
    damaged: set[int | None] = set()
    group = _Group()
    group_of: dict[int | None, _Group] = {}
    for packet in packets:
        if packet.is_keyframe and packet.pts is not None:
            group = _Group(key=packet.pts, before=group, leading_broken=group.broken)
        leads = _leads(packet.pts, group)
        try:
            frames = packet.decode()
            bad = packet.is_corrupt
        except av.FFmpegError:
            frames, bad = [], True
        if packet.size:
            group_of[packet.pts] = group
        if leads:
            group.leading_broken |= bad
        else:
            group.broken |= bad
        if group.broken or (leads and group.leading_broken):
            damaged.add(packet.pts)
        for frame in frames:
            assert isinstance(frame, av.VideoFrame)
            own = group_of.pop(frame.pts, group)
            if frame.is_corrupt:
                damaged.add(frame.pts)
                if not _leads(frame.pts, own):
                    own.broken = group.broken = True
            before = own.before
            if before is not None and frame.pts == own.key:
                own.inherits = frame.pict_type in _PREDICTED and (before.broken or before.inherits)
                own.before = None
            lost = own.inherits or (before is not None and before.inherits)
            yield frame, not lost and frame.pts not in damaged


def _leads(time: int | None, group: _Group) -> bool:
    """Whether a frame of a group is shown before its keyframe."""
    return group.key is not None and time is not None and time < group.key
