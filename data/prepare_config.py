"""What `python data/prepare.py` is asked to do, and how the work is cut into groups: the same for every process."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from longreel.data.cutting import CropConfig, CutConfig, check_clip_length
from longreel.data.sources import SourceVideo
from longreel.models.autoencoders import DTYPES, Autoencoder, AutoencoderConfig
from longreel.models.text import TextEncoder, TextEncoderConfig

# A long video is cut into pieces of about this size, so that several processes share it.
_PIECE_BYTES = 64 << 20
# Groups of a folder, if it is not so large that they would be over _GROUP_BYTES: enough for many processes.
_GROUPS = 64
_GROUP_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Cut a folder of videos into clips, encode clips and captions, and write shards to train from.

    Interrupted or killed, the same command goes on where it was. The result is the same, byte for byte, whatever the
    number of processes and ranks.

    Args:
        videos: folder of video files.
        captions: .json, .jsonl or .csv that says which captions belong to which file.
        out: folder to write; see docs/data.md for what it holds then.
        processes: at work at a time on this rank; as many as there are cores if not given.
        rank: of this machine or launcher among `world` that share the work; torchrun's if not given.
        world: how many there are.
        device: cpu, cuda or cuda:N; auto takes a GPU if there is one and the autoencoder or text encoder uses it.
        patch_size: (frames, height, width) of the model's patches, in latent elements: sizes of clips become multiples.
        latent_dtype: of stored latents and text features; pixels of `raw` are stored as bytes, losing nothing.
        shard_mib: latents of a shard at most, unless one clip has more.
        sheet_clips: clips shown on the contact sheet.
        cut: how clips are cut.
        compression: what videos are encoded by.
        text: what captions are encoded by; `bytes` encodes them in training, which costs nothing.
    """

    videos: Annotated[Path, tyro.conf.Positional]
    captions: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    processes: int | None = None
    rank: int | None = None
    world: int | None = None
    device: str = "auto"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    latent_dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    shard_mib: int = 256
    sheet_clips: int = 24
    cut: CutConfig = field(default_factory=CutConfig)
    compression: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)

    def __post_init__(self) -> None:
        for name in ("processes", "world", "shard_mib", "sheet_clips"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        stores_floats = (self.compression.autoencoder, self.text.text_encoder) != ("raw", "bytes")
        if self.latent_dtype != "fp16" and not stores_floats:
            raise ValueError(
                f"latent_dtype {self.latent_dtype} has no effect with autoencoder 'raw', whose pixels are stored as "
                "bytes, and text_encoder 'bytes', which stores nothing; leave it out"
            )
        if min(self.patch_size) < 1:
            raise ValueError(f"patch_size must be three positive sizes (frames, height, width), got {self.patch_size}")
        if (self.rank is None) != (self.world is None):
            raise ValueError(f"give rank and world together, got {self.rank} and {self.world}")
        rank, world = self.place
        if not 0 <= rank < world:
            raise ValueError(f"rank must be 0 to world - 1 = {world - 1}, got {rank}")

    @property
    def place(self) -> tuple[int, int]:
        """(rank, world): as given, or torchrun's, or alone."""
        if self.rank is not None and self.world is not None:
            return self.rank, self.world
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    @property
    def num_processes(self) -> int:
        """Processes of this rank: as given, or its share of the machine's cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.processes or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    @property
    def torch_device(self) -> torch.device:
        """Where the networks run; on a machine of several GPUs each rank takes its own."""
        on_cuda = (self.compression.autoencoder, self.text.text_encoder) != ("raw", "bytes")
        automatic = "cuda" if on_cuda and torch.cuda.is_available() else "cpu"
        device = torch.device(automatic if self.device == "auto" else self.device)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", self.place[0]))
            return torch.device("cuda", local % torch.cuda.device_count())
        return device

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of latents in shards."""
        return torch.uint8 if self.compression.autoencoder == "raw" else DTYPES[self.latent_dtype]

    def crop(self, autoencoder: Autoencoder) -> CropConfig:
        """Multiples that sizes of clips must be; ValueError if clip_frames is none."""
        frames, height, width = self.patch_size
        space = autoencoder.space_factor
        crop = CropConfig(frames=autoencoder.time_factor * frames, height=space * height, width=space * width)
        check_clip_length(self.cut, crop)
        return crop


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One of `count` equal stretches of a video."""

    video: int
    number: int
    count: int


def plan_groups(videos: Sequence[SourceVideo], cut: CutConfig) -> list[tuple[Piece, ...]]:
    """Groups of pieces that one process works off and writes; a function of the files' sizes alone.

    Whole videos as clips, and scenes, are not cut into pieces: a piece's edge would be a cut.
    """
    whole = cut.clip_frames is None or cut.scene_threshold is not None
    limit = min(_GROUP_BYTES, max(1, sum(video.size for video in videos) // _GROUPS))
    groups: list[tuple[Piece, ...]] = []
    filling: list[Piece] = []
    size = 0.0
    for index, video in enumerate(videos):
        count = 1 if whole else max(1, video.size // _PIECE_BYTES)
        for number in range(count):
            filling.append(Piece(video=index, number=number, count=count))
            size += video.size / count
            if size >= limit:
                groups.append(tuple(filling))
                filling, size = [], 0.0
    return [*groups, tuple(filling)] if filling else groups


def describe(
    config: PrepareConfig, videos: Sequence[SourceVideo], autoencoder: Autoencoder, encoder: TextEncoder
) -> dict[str, Any]:
    """dataset.json: what training must know, and a fingerprint of everything that decides the bytes of the folder."""
    from longreel.data.shard_files import FORMAT

    made = {
        "patch_size": list(config.patch_size),
        "latent_dtype": str(config.stored_dtype).removeprefix("torch."),
        "shard_mib": config.shard_mib,
        "cut": asdict(config.cut),
        "compression": asdict(config.compression),
        "autoencoder_weights": autoencoder.digest,
        "text": asdict(config.text),
        "text_weights": encoder.digest,
    }
    listing = json.dumps([made_by(made), [asdict(video) for video in videos]], sort_keys=True)
    return made | {
        "format": FORMAT,
        "fingerprint": hashlib.blake2b(listing.encode(), digest_size=16).hexdigest(),
        "channels": autoencoder.channels,
        "time_factor": autoencoder.time_factor,
        "space_factor": autoencoder.space_factor,
        "text_stored": config.text.text_encoder != "bytes",
        "text_dim": encoder.text_dim,
        "max_text_tokens": encoder.max_tokens,
    }


def made_by(info: Mapping[str, Any]) -> dict[str, Any]:
    """What of dataset.json decides the bytes of shards.

    How many frames or captions go through a network at a time does not, nor where its weights lie: their digests say
    which they are.
    """
    names = ("patch_size", "latent_dtype", "shard_mib", "cut", "autoencoder_weights", "text_weights")
    free = {"autoencoder_path", "frame_batch", "text_path", "text_batch"}
    nested = {name: info.get(name) for name in ("compression", "text")}
    return {name: info.get(name) for name in names} | {
        name: {key: value for key, value in fields.items() if key not in free} if isinstance(fields, dict) else fields
        for name, fields in nested.items()
    }
