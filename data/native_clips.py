"""Clips decoded on the fly in the size and length that their videos have."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from longreel.data.captions import CaptionedFile
from longreel.data.cutting import CropConfig, CutConfig, chosen_frames, clip_fps, cut_by_length
from longreel.data.native import FrameReader, encode_pixels
from longreel.data.samples import Clip
from longreel.data.sources import inside
from longreel.data.video import VideoError, VideoInfo, probe
from longreel.models.autoencoders import Autoencoder, RawPixels


class NativeClips:
    """A ClipSource decoded on the fly; clips have the size and length of their videos.

    Videos that cannot be used are left out: `skipped` holds (file, reason) of each.

    Args:
        folder: folder of the videos. files: entries of the captions file.
        cut: how clips are cut; scenes need a pass over every video first, so prepare.py cuts those.
        crop: multiples of sizes. autoencoder: what clips pass through.
        known: files that are not looked at again, and what they held.

    Raises:
        ValueError: no video can be used, or cut asks for scenes.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[CaptionedFile],
        *,
        cut: CutConfig,
        crop: CropConfig,
        autoencoder: Autoencoder | None = None,
        known: Mapping[str, VideoInfo] | None = None,
    ) -> None:
        if cut.scene_threshold is not None:
            raise ValueError("scene_threshold is for data/prepare.py; clips decoded on the fly are cut by length")
        self.autoencoder = autoencoder or RawPixels()
        self.channels = self.autoencoder.channels
        self.skipped: list[tuple[str, str]] = []
        self.sizes: list[tuple[int, int, int]] = []
        self._folder, self._cut, self._crop = folder, cut, crop
        self._clips: list[tuple[CaptionedFile, VideoInfo, tuple[int, ...]]] = []
        time, space = self.autoencoder.time_factor, self.autoencoder.space_factor
        for file in files:
            try:
                path = inside(folder, file.file)
                info = (known or {}).get(file.file) or probe(path)
                height, width = FrameReader(folder / file.file, info, crop).size
                clips = cut_by_length(chosen_frames(info, cut), cut, crop)
                if not clips:
                    raise VideoError(f"has {info.num_frames} frames; a clip needs {max(cut.min_frames, crop.frames)}")
            except VideoError as error:
                self.skipped.append((file.file, str(error).removeprefix(f"{folder / file.file}: ")))
                continue
            self._clips += [(file, info, frames) for frames in clips]
            self.sizes += [(len(frames) // time, height // space, width // space) for frames in clips]
        if not self._clips:
            why = ": ".join(self.skipped[0]) if self.skipped else "no files given"
            raise ValueError(f"{folder}: none of {len(files)} videos gives a clip; the first: {why}")

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def digest(self) -> str:
        """See ClipSource."""
        listing = [(file.file, frames, file.captions) for file, _, frames in self._clips]
        return hashlib.blake2b(repr((listing, self.sizes)).encode(errors="surrogatepass"), digest_size=7).hexdigest()

    def video(self, index: int) -> tuple[str, VideoInfo]:
        """See ClipSource."""
        file, info, _ = self._clips[index]
        return file.file, info

    def captions(self, index: int) -> tuple[str, ...]:
        """See ClipSource."""
        return self._clips[index][0].captions

    def __getitem__(self, index: int) -> Clip:
        """See ClipSource; VideoError if its frames cannot be decoded."""
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        file, info, frames = self._clips[index]
        with FrameReader(self._folder / file.file, info, self._crop) as reader:
            pixels = torch.from_numpy(np.stack([reader.read(frame) for frame in frames]))
        return Clip(
            latents=encode_pixels(self.autoencoder, pixels),
            captions=file.captions,
            text=None,
            fps=clip_fps(info, self._cut),
            source=file.file,
            start=frames[0],
        )
