"""Clips in the size and length that videos have, decoded frame by frame: nothing is scaled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from longreel.data.cutting import CropConfig, CutConfig, usable_length
from longreel.data.pictures import to_float, upright_picture
from longreel.data.video import VideoError, VideoInfo, errors_about
from longreel.data.whole_frames import WholeFrames
from longreel.models.autoencoders import Autoencoder

# Frames are compared for scene cuts at this size.
_THUMBNAIL = (27, 48)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pixels:
    """Frames of one clip: [T, H, W, 3] uint8, and their indices in the video."""

    frames: tuple[int, ...]
    pixels: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LostFrames:
    """Frames that gave no clip, and why."""

    count: int
    reason: str
    too_short: bool = False


class FrameReader:
    """Upright pictures of one video in its own size, cropped around the centre; forwards without seeking.

    Args:
        path: video file. info: what scan or probe returned. crop: multiples of height and width.

    Raises:
        VideoError: the picture is smaller than those multiples.
    """

    def __init__(self, path: Path, info: VideoInfo, crop: CropConfig) -> None:
        self.path, self.info = path, info
        self.shown = info.shown_size
        self.size = crop.size(*self.shown)
        if 0 in self.size:
            raise VideoError(
                f"{path}: its picture of {self.shown[1]}x{self.shown[0]} pixels is smaller than {crop.width}x"
                f"{crop.height}, the least that autoencoder and patches need"
            )
        self._frames = WholeFrames(path, info)
        self._last: tuple[int, np.ndarray] | None = None

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        self._frames.close()
        self._last = None

    def read(self, index: int) -> np.ndarray:
        """Frame `index` as [H, W, 3] uint8; cheap where indices rise.

        Raises:
            VideoError: it cannot be decoded; reading can go on at another index.
        """
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        frame = self._frames.read(index)
        with errors_about(f"{self.path}: frame {index} cannot be shown"):
            picture = self._crop(frame, index)
        self._last = index, picture
        return picture

    def _crop(self, frame: av.VideoFrame, index: int) -> np.ndarray:
        if (frame.height, frame.width) != (self.info.height, self.info.width):
            raise VideoError(
                f"{self.path}: frame {index} is {frame.width}x{frame.height} where the video is "
                f"{self.info.width}x{self.info.height}; a clip has one size"
            )
        picture = upright_picture(frame, *self.shown, self.info.pixel_aspect)
        (height, width), (whole_height, whole_width) = self.size, self.shown
        top, left = (whole_height - height) // 2, (whole_width - width) // 2
        return np.ascontiguousarray(picture[top : top + height, left : left + width])


def read_clips(
    reader: FrameReader, frames: Sequence[int], cut: CutConfig, crop: CropConfig
) -> Iterator[Pixels | LostFrames]:
    """Cut frames of a video into clips in one pass.

    Args:
        reader: of the video. frames: indices, rising. cut, crop: see there.

    Yields:
        Clips in order; in their places, runs of frames that gave none: too short, or one of them cannot be decoded
        (then the whole clip goes, and the next one starts where it would have).
    """
    length = cut.clip_frames or len(frames)
    position = 0
    while position < len(frames):
        # A clip begins here; how far it goes depends on scenes.
        pictures: list[np.ndarray] = []
        before: np.ndarray | None = None
        error: VideoError | None = None
        end = min(position + length, len(frames))
        for place in range(position, end):
            try:
                picture = reader.read(frames[place])
            except VideoError as caught:
                error = caught
                break
            if cut.scene_threshold is not None:
                small = thumbnail(picture)
                if before is not None and np.abs(small - before).mean() > cut.scene_threshold:
                    end = place
                    break
                before = small
            pictures.append(picture)
        if error is not None:
            yield LostFrames(count=end - position, reason=str(error))
        elif kept := usable_length(len(pictures), cut, crop):
            yield Pixels(
                frames=tuple(frames[position : position + kept]), pixels=torch.from_numpy(np.stack(pictures[:kept]))
            )
        else:
            least = max(cut.min_frames, crop.frames)
            reason = f"{reader.path}: {len(pictures)} frames from frame {frames[position]} on; a clip needs {least}"
            yield LostFrames(count=len(pictures), reason=reason, too_short=True)
        position = end


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """[27, 48, 3] fp32 means of a picture [H, W, 3], smaller where it is."""
    height, width = picture.shape[:2]
    rows = np.linspace(0, height, min(height, _THUMBNAIL[0]), endpoint=False).astype(int)
    columns = np.linspace(0, width, min(width, _THUMBNAIL[1]), endpoint=False).astype(int)
    sums = np.add.reduceat(np.add.reduceat(picture.astype(np.float32), rows, axis=0), columns, axis=1)
    areas = np.diff([*rows, height])[:, None] * np.diff([*columns, width])[None]
    return sums / areas[..., None].astype(np.float32)


def encode_pixels(autoencoder: Autoencoder, pixels: Tensor) -> Tensor:
    """Latents [T', H', W', C] fp32, on the CPU, of pixels [T, H, W, 3] uint8."""
    return autoencoder.encode(to_float(pixels)[None])[0].cpu()
