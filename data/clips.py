"""Clips of one size cut from captioned videos, and which of them a training step reads."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from longreel.data.captions import CaptionedFile
from longreel.data.pictures import decode_clip, to_float
from longreel.data.sources import inside
from longreel.data.video import VideoError, VideoInfo, probe


class ClipDataset:
    """Clips [T, H, W, 3] of captioned videos, cut one after the other without overlap.

    Videos that are missing, unreadable or too short are left out: `skipped` holds (file, reason) of each.

    Args:
        folder: folder of the videos. files: entries of the captions file, see load_captions.
        num_frames, height, width: size of every clip.
        stride: distance between two frames of a clip, in frames of the video.
        cache_bytes: memory for decoded clips, kept as bytes; the least recently used ones go first.
        known: files that are not looked at again, and what they held.

    Raises:
        ValueError: no video can be used; says how many were left out and why the first one was.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[CaptionedFile],
        *,
        num_frames: int,
        height: int,
        width: int,
        stride: int = 1,
        cache_bytes: int = 256 << 20,
        known: Mapping[str, VideoInfo] | None = None,
    ) -> None:
        self.size = (num_frames, height, width)
        self.stride = stride
        self.cache_bytes = cache_bytes
        self.skipped: list[tuple[str, str]] = []
        self._folder = folder
        self._videos: list[tuple[CaptionedFile, VideoInfo]] = []
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
        counts: list[int] = []
        self._span = (num_frames - 1) * stride + 1
        for file in files:
            try:
                path = inside(folder, file.file)
                info = (known or {}).get(file.file) or probe(path)
            except VideoError as error:
                self.skipped.append((file.file, str(error).removeprefix(f"{folder / file.file}: ")))
                continue
            if info.num_frames < self._span:
                need = f"{num_frames} frames" + (f" at stride {stride}" if stride > 1 else "")
                self.skipped.append((file.file, f"has {info.num_frames} frames; a clip of {need} spans {self._span}"))
                continue
            self._videos.append((file, info))
            counts.append(info.num_frames // self._span)
        if not self._videos:
            why = ": ".join(self.skipped[0]) if self.skipped else "no files given"
            raise ValueError(
                f"{folder}: none of {len(files)} videos gives clips of {num_frames} frames; the first: {why}"
            )
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[str, int]:
        """(file, first frame) of a clip."""
        file, _, start = self._find(index)
        return file.file, start

    def video(self, index: int) -> tuple[str, VideoInfo]:
        """(file, what it holds) of the video that a clip is cut from."""
        file, info, _ = self._find(index)
        return file.file, info

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of a clip, without decoding it."""
        return self._find(index)[0].captions

    @property
    def digest(self) -> str:
        """14 hex digits that name the clips and captions in their order: files, lengths, cuts; not where they lie."""
        listing = repr([(*self.locate(i), self._find(i)[0].captions) for i in range(len(self))])
        return hashlib.blake2b(listing.encode(errors="surrogatepass"), digest_size=7).hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[str, ...]]:
        """Video [T, H, W, 3] float32 in [-1, 1] and its captions; VideoError if its frames cannot be decoded."""
        file, info, start = self._find(index)
        clip = self._cache.pop(index, None)
        if clip is None:
            clip = decode_clip(self._folder / file.file, *self.size, start=start, stride=self.stride, info=info)
            while self._cache and (len(self._cache) + 1) * clip.numel() > self.cache_bytes:
                self._cache.popitem(last=False)
        if clip.numel() <= self.cache_bytes:
            self._cache[index] = clip
        return to_float(clip), file.captions

    def _find(self, index: int) -> tuple[CaptionedFile, VideoInfo, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        which = bisect_right(self._ends, index)
        before = self._ends[which - 1] if which else 0
        return *self._videos[which], (index - before) * self._span


def sample_ids(seed: int, step: int, batch_size: int, num_clips: int) -> list[int]:
    """Clips of the global batch of one step: epoch after epoch, each clip once per epoch in a fresh order.

    Args:
        seed: of the run. step: from 0. batch_size: samples of the whole step, over all ranks.
        num_clips: clips in the data set.

    Returns:
        batch_size clip indices, a function of the arguments alone and so the same on every rank.
    """
    for name, value, least in (("step", step, 0), ("batch_size", batch_size, 1), ("num_clips", num_clips, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    ids: list[int] = []
    position, end = step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, offset = divmod(position, num_clips)
        order = torch.randperm(num_clips, generator=seeded_generator("order", seed, epoch))
        taken = order[offset : offset + end - position].tolist()
        ids += taken
        position += len(taken)
    return ids


def per_sample_generator(seed: int, sample: int, step: int) -> torch.Generator:
    """Source of everything random about one sample of one step: caption, dropout, timestep, noise.

    Args:
        seed: of the run. sample: position in the global batch, so that a clip drawn twice gets two noises.
        step: from 0.

    Returns:
        A CPU generator that depends on the arguments alone, never on a rank: a sample is the same wherever it lands.
    """
    return seeded_generator("sample", seed, sample, step)


def seeded_generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator for one purpose and these numbers, unrelated to that of any other purpose or numbers."""
    # A hash, since sums such as seed + step would give neighbouring steps and samples the same numbers.
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
