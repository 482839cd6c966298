"""Frames of a video by their index, each of them whole: what a seek spoils is looked at again from further back."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import av

from longreel.data.video import VideoError, VideoInfo, frames_from, keyframe_before, open_video


class WholeFrames:
    """One video's frames; forwards without seeking.

    Seeking lands where the container thinks best, and a decoder that starts in the middle lacks what came before: in
    open groups, with intra-refresh and in program streams, frames are then missing or damaged that are whole in the
    file. So one is only called so if it is from the start of the file on, after a try from one keyframe earlier.

    Args:
        path: video file. info: what scan or probe returned.
    """

    def __init__(self, path: Path, info: VideoInfo) -> None:
        self._path, self._info = path, info
        self._pass: _Pass | None = None
        # The one from the start stays where it is when it finds damage, so that all damage costs one pass of the file.
        self._from_start: _Pass | None = None

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        for opened in (self._pass, self._from_start):
            if opened is not None:
                opened.close()
        self._pass = self._from_start = None

    def read(self, index: int) -> av.VideoFrame:
        """Frame `index`; cheap where indices rise.

        Raises:
            VideoError: it cannot be decoded or is damaged; reading can go on at another index.
        """
        first = keyframe_before(self._info, index)
        keyframes = [first, first - 1]
        if self._pass is not None and self._pass.reached <= index:
            if frame := self._pass.read(index):
                return frame
            keyframes = [keyframe for keyframe in keyframes if keyframe < self._pass.keyframe]
        for keyframe in keyframes:
            if keyframe > 0 and (frame := self._start(index, keyframe).read(index)):
                return frame
        judge = self._start(index, 0)
        if frame := judge.read(index):
            return frame
        # Behind the damage a seek is cheaper, and gets past what a container cannot.
        self._pass = None
        raise VideoError(f"{self._path}: frame {index} {judge.problem}")

    def _start(self, index: int, keyframe: int) -> _Pass:
        """The pass to go on with: one from a keyframe, or the one from the start if it is not yet past `index`."""
        if self._pass is not None and self._pass is not self._from_start:
            self._pass.close()
            self._pass = None
        if keyframe > 0:
            self._pass = _Pass(self._path, self._info, index, keyframe)
        elif self._from_start is not None and self._from_start.reached <= index:
            self._pass = self._from_start
        else:
            if self._from_start is not None:
                self._from_start.close()
            self._pass = self._from_start = _Pass(self._path, self._info, 0, 0)
        return self._pass


class _Pass:
    """One way through a file, from a keyframe on.

    Attributes:
        keyframe: its number. reached: the first frame that can still be read. problem: of the last one that could not.
    """

    def __init__(self, path: Path, info: VideoInfo, start: int, keyframe: int) -> None:
        self.keyframe = keyframe
        self.reached: float = 0
        self.problem = ""
        self._open = ExitStack()
        container, stream = self._open.enter_context(open_video(path))
        self._frames = frames_from(container, stream, info, start, keyframe)
        self._last: tuple[int, av.VideoFrame, bool] | None = None

    def close(self) -> None:
        self._frames.close()
        self._open.close()

    def read(self, index: int) -> av.VideoFrame | None:
        """Frame `index`, or None with `problem` set."""
        try:
            while self._last is None or self._last[0] < index:
                self._last = next(self._frames)
                self.reached = self._last[0]
        except StopIteration:
            self.reached = float("inf")
            self.problem = "cannot be decoded"
            return None
        except (av.FFmpegError, OSError) as error:
            self.reached = float("inf")
            self.problem = f"cannot be decoded: {getattr(error, 'strerror', None) or error}"
            return None
        found, frame, whole = self._last
        self.problem = "cannot be decoded" if found > index else "is damaged"
        return frame if found == index and whole else None
