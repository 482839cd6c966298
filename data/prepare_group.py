"""What one process does with one group of videos: decode, cut, encode, write shards, then the group's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longreel.data.cutting import CropConfig, chosen_frames, clip_fps
from longreel.data.native import FrameReader, LostFrames, Pixels, encode_pixels, read_clips
from longreel.data.prepare_config import Piece, PrepareConfig
from longreel.data.shard_files import PARTS, StoredClip, write_rows, write_shard
from longreel.data.sources import SourceVideo, inside
from longreel.data.video import VideoError, VideoInfo, scan
from longreel.models.autoencoders import DTYPES, Autoencoder, build_autoencoder
from longreel.models.text import TextEncoder, build_text_encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A whole preparation, as every process knows it."""

    config: PrepareConfig
    videos: tuple[SourceVideo, ...]
    groups: tuple[tuple[Piece, ...], ...]
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What a group gave, for the progress bar."""

    group: int
    clips: int
    frames: int


class GroupWorker:
    """Works off groups of a job; one per process.

    Args:
        job: what to do. device: where the networks run.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        config = job.config
        self.job = job
        self.autoencoder: Autoencoder = build_autoencoder(config.compression, device=device)
        self.encoder: TextEncoder = build_text_encoder(config.text, device=device)
        self.crop: CropConfig = config.crop(self.autoencoder)

    def run(self, index: int) -> Done:
        """Prepare one group; OSError if its files cannot be written. A broken video costs itself alone."""
        group = _Group(self, index)
        for piece in self.job.groups[index]:
            group.add(piece)
        return group.finish()


class _Group:
    def __init__(self, worker: GroupWorker, index: int) -> None:
        self.worker, self.index = worker, index
        self.config = worker.job.config
        self.rows: list[dict[str, Any]] = []
        self.waiting: list[StoredClip] = []
        self.problems: list[dict[str, Any]] = []
        self.shards = 0

    def add(self, piece: Piece) -> None:
        source = self.worker.job.videos[piece.video]
        try:
            path = inside(self.config.videos, source.file)
            info = scan(path)
            with FrameReader(path, info, self.worker.crop) as reader:
                frames = self._stretch(chosen_frames(info, self.config.cut), piece)
                text: Tensor | None = None
                for found in read_clips(reader, frames, self.config.cut, self.worker.crop):
                    if isinstance(found, LostFrames):
                        self._lost(source, found, path)
                        continue
                    if text is None:
                        text = self._text(source.captions)
                    self._clip(source, info, found, text)
        except VideoError as error:
            self._problem("unreadable", source, str(error).removeprefix(f"{self.config.videos / source.file}: "))

    def finish(self) -> Done:
        self._flush()
        notes = {"fingerprint": self.worker.job.fingerprint, "problems": self.problems}
        write_rows(part_path(self.config.out, self.index), self.rows, notes)
        return Done(group=self.index, clips=len(self.rows), frames=sum(row["frames"] for row in self.rows))

    def _stretch(self, frames: list[int], piece: Piece) -> Sequence[int]:
        """The piece's share of a video's frames: whole clips."""
        length = self.config.cut.clip_frames or len(frames)
        clips = -(-len(frames) // length)
        first, last = (clips * number // piece.count for number in (piece.number, piece.number + 1))
        return frames[first * length : last * length]

    def _text(self, captions: tuple[str, ...]) -> Tensor | None:
        if self.config.text.text_encoder == "bytes":
            return None
        return self.worker.encoder.encode(captions).to(DTYPES[self.config.latent_dtype])

    def _clip(self, source: SourceVideo, info: VideoInfo, found: Pixels, text: Tensor | None) -> None:
        # Of raw pixels nothing is lost: a shard holds them as they were decoded.
        raw = self.config.compression.autoencoder == "raw"
        latents = (found.pixels if raw else encode_pixels(self.worker.autoencoder, found.pixels)).to(
            self.config.stored_dtype
        )
        frames, height, width = found.pixels.shape[:3]
        sizes = latents.shape[:3]
        t, h, w = (size // patch for size, patch in zip(sizes, self.config.patch_size, strict=True))
        row = {
            "path": source.file,
            # Parquet holds UTF-8; lone surrogates are what JSON escapes may say and UTF-8 cannot.
            "captions": [caption.encode(errors="replace").decode() for caption in source.captions],
            "start": found.frames[0],
            "frames": frames,
            "fps": clip_fps(info, self.config.cut),
            "height": height,
            "width": width,
            "latent_frames": sizes[0],
            "latent_height": sizes[1],
            "latent_width": sizes[2],
            "tokens": t * h * w,
        }
        limit = self.config.shard_mib << 20
        if self.waiting and sum(clip.latents.nbytes for clip in self.waiting) + latents.nbytes > limit:
            self._flush()
        self.waiting.append(StoredClip(row=row, latents=latents, text=text))

    def _flush(self) -> None:
        if self.waiting:
            name = f"{self.index:05d}-{self.shards:02d}.safetensors"
            self.rows += write_shard(self.config.out, name, self.waiting)
            self.waiting = []
            self.shards += 1

    def _lost(self, source: SourceVideo, lost: LostFrames, path: Path) -> None:
        kind = "too_short" if lost.too_short else "damaged"
        self._problem(kind, source, lost.reason.removeprefix(f"{path}: "), lost.count)

    def _problem(self, kind: str, source: SourceVideo, reason: str, frames: int = 0) -> None:
        self.problems.append({"kind": kind, "path": source.file, "reason": reason, "frames": frames})


def part_path(out: Path, group: int) -> Path:
    """Rows of one group; there once the group is done."""
    return out / PARTS / f"{group:05d}.parquet"
