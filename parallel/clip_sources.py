"""Where a training run's clips come from: videos cut to one size, videos at their own sizes, shards, or drawn clips.

A source is opened before a run writes anything, and tells the model's sizes; ready() then gives the clips.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from longreel.data.captions import load_captions
from longreel.data.clips import ClipDataset
from longreel.data.cutting import CropConfig, CutConfig
from longreel.data.demo import make_demo_folder
from longreel.data.native import NativeClips
from longreel.data.packing import BucketSchedule, PackedSchedule, Schedule
from longreel.data.samples import Clip, ClipSource
from longreel.data.shards import ShardDataset
from longreel.models.autoencoders import Autoencoder, AutoencoderConfig, build_autoencoder
from longreel.models.config import DiTConfig
from longreel.models.objective import Objective
from longreel.models.text import TextEncoder, TextEncoderConfig, build_text_encoder
from longreel.parallel.batches import (
    Batches,
    DenseBatches,
    GroupedBatches,
    Samples,
    check_accumulation,
    split_samples,
)
from longreel.parallel.checkpoint import wait_for_all
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.run_config import TrainConfig

CACHE_BYTES = 256 << 20
Say = Callable[[str], None]


class Source(Protocol):
    """Clips and how they become batches."""

    @property
    def config(self) -> TrainConfig:
        """The run, with what shards say of their compression and text."""
        ...

    @property
    def model(self) -> DiTConfig:
        """The model whose ends fit the clips."""
        ...

    @property
    def clips(self) -> ClipSource | None:
        """The clips, or None if they are not drawn yet."""
        ...

    @property
    def fewest_tokens(self) -> int:
        """Video tokens of the shortest sequence that there may be."""
        ...

    @property
    def clip_size(self) -> dict[str, int]:
        """num_frames, height and width in pixels of a clip: what sampling makes if it is told nothing else."""
        ...

    @property
    def told(self) -> str:
        """How many tokens clips have, for people."""
        ...

    def ready(self) -> ClipSource:
        """The clips; every rank calls it, once `out` may be written."""
        ...

    def batches(self, objective: Objective, device: torch.device) -> Batches:
        """Batches of the clips, after ready()."""
        ...


class FixedSizeClips:
    """A ClipSource of clips of one size; latents are made where first used and kept.

    Args:
        clips: pixels. autoencoder: of videos. cache_bytes: memory for latents; the least recently used ones go first.
    """

    def __init__(self, clips: ClipDataset, autoencoder: Autoencoder, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._clips, self._autoencoder, self._cache_bytes = clips, autoencoder, cache_bytes
        frames, height, width = clips.size
        space = autoencoder.space_factor
        self.sizes = [(frames // autoencoder.time_factor, height // space, width // space)] * len(clips)
        self.channels = autoencoder.channels
        self._cache: OrderedDict[int, Clip] = OrderedDict()

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Clip:
        """See ClipSource; VideoError if its frames cannot be decoded."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        video, captions = self._clips[index]
        latents = video if self._autoencoder.name == "raw" else self._autoencoder.encode(video[None])[0].cpu()
        source, start = self._clips.locate(index)
        clip = Clip(latents=latents, captions=captions, text=None, fps=0.0, source=source, start=start)
        # Pixels are kept as bytes by what decodes them.
        if self._autoencoder.name != "raw":
            while self._cache and (len(self._cache) + 1) * latents.nbytes > self._cache_bytes:
                self._cache.popitem(last=False)
            self._cache[index] = clip
        return clip

    @property
    def digest(self) -> str:
        """See ClipSource."""
        return self._clips.digest


class FixedSizeSource:
    """Clips of one size, from videos or drawn.

    Args:
        config: the run. device: of the encoders. mesh: of the run. say: where remarks go.

    Raises:
        ValueError: sizes that do not fit, too few samples for the ranks, or no video that can be used.
        OSError: files cannot be read.
    """

    def __init__(self, config: TrainConfig, device: torch.device, mesh: ParallelMesh, say: Say) -> None:
        self.config, self._mesh, self._say = config, mesh, say
        split_samples(config.batch_size, mesh.dp_degree, mesh.dp_rank)
        check_accumulation(config.batch_size, mesh.dp_degree, config.optimizer.accumulation)
        self._autoencoder = build_autoencoder(config.compression, device=device)
        self._encoder = build_text_encoder(config.text, device=device)
        self.model = config.dit(self._autoencoder, self._encoder)
        self.fewest_tokens = math.prod(self.model.grid(*config.latent_size(self._autoencoder)))
        self.clip_size = {name: getattr(config, name) for name in ("num_frames", "height", "width")}
        self.clips: ClipSource | None = None if config.demo else self._open(*video_folder(config))

    @property
    def told(self) -> str:
        """See Source."""
        return f"{self.fewest_tokens} tokens each"

    def ready(self) -> ClipSource:
        """See Source; draws the clips of a demo."""
        if self.clips is None:
            folder = self.config.out / "demo"
            if self._mesh.flat.get_rank() == 0:
                make_demo_folder(folder)
            wait_for_all(self._mesh.flat)
            self.clips = self._open(folder, folder / "captions.json")
        return self.clips

    def batches(self, objective: Objective, device: torch.device) -> Batches:
        """See Source."""
        return DenseBatches(
            Samples(
                clips=self.ready(),
                encoder=self._encoder,
                objective=objective,
                seed=self.config.seed,
                caption_dropout=self.config.caption_dropout,
                mesh=self._mesh,
                device=device,
            ),
            batch_size=self.config.batch_size,
            accumulation=self.config.optimizer.accumulation,
            tokens=self.fewest_tokens,
        )

    def _open(self, folder: Path, captions: Path) -> ClipSource:
        config = self.config
        files = load_captions(captions)
        clips = ClipDataset(
            folder,
            files,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            stride=config.frame_stride,
        )
        say_skipped(clips.skipped, len(files), self._say)
        return FixedSizeClips(clips, self._autoencoder)


class ManySizesSource:
    """Clips of their own sizes, from shards or decoded while training; packed, or in buckets.

    Args: see FixedSizeSource.

    Raises:
        ValueError: sizes, budget or ranks that do not fit, or no clip that can be used.
        OSError: files cannot be read.
    """

    def __init__(self, config: TrainConfig, device: torch.device, mesh: ParallelMesh, say: Say) -> None:
        if config.batch_size % mesh.dp_degree:
            raise ValueError(
                f"batch_size {config.batch_size} counts packed sequences here, and the {mesh.dp_degree} data-parallel "
                f"groups of ranks take the same number each; use a multiple of {mesh.dp_degree}"
            )
        self._mesh = mesh
        self._encoder: TextEncoder | None = None
        self._null_text = None
        if config.shards is not None:
            shards = ShardDataset(config.shards)
            self.config = config = with_encoders_of(config, shards)
            factors = shards.info["time_factor"], shards.info["space_factor"]
            self._null_text = shards.null_text
            self.clips: ClipSource = shards
            text_sizes = {name: shards.info[name] for name in ("text_dim", "max_text_tokens")}
            if not shards.info["text_stored"]:
                self._encoder = build_text_encoder(config.text, device=device)
        else:
            self.config = config
            autoencoder = build_autoencoder(config.compression, device=device)
            self._encoder = build_text_encoder(config.text, device=device)
            factors = autoencoder.time_factor, autoencoder.space_factor
            self.clips = self._open(autoencoder, say)
            text_sizes = {"text_dim": self._encoder.text_dim, "max_text_tokens": self._encoder.max_tokens}
        self.model = config.model.build(
            in_channels=self.clips.channels,
            raw=config.compression.autoencoder == "raw",
            learn_sigma=config.objective.build().learn_sigma,
            **text_sizes,
        )
        self._tokens = [math.prod(self.model.grid(*size)) for size in self.clips.sizes]
        self.fewest_tokens = min(self._tokens)
        time, space = factors
        frames, height, width = self.clips.sizes[0]
        self.clip_size = {"num_frames": frames * time, "height": height * space, "width": width * space}
        self._schedule = self._build_schedule()

    @property
    def told(self) -> str:
        """See Source."""
        few, many = min(self._tokens), max(self._tokens)
        how = "packed into" if self.config.grouping == "packed" else "in buckets of at most"
        return (
            f"{few} to {many} tokens, {how} {self.config.token_budget} "
            f"({self._schedule.waste(0):.1%} of the first epoch's are padding)"
        )

    def ready(self) -> ClipSource:
        """See Source."""
        return self.clips

    def batches(self, objective: Objective, device: torch.device) -> Batches:
        """See Source."""
        samples = Samples(
            clips=self.clips,
            encoder=self._encoder,
            null_text=self._null_text,
            objective=objective,
            seed=self.config.seed,
            caption_dropout=self.config.caption_dropout,
            mesh=self._mesh,
            device=device,
        )
        return GroupedBatches(samples, self._schedule, packed=self.config.grouping == "packed", tokens=self._tokens)

    def _build_schedule(self) -> Schedule:
        budget, groups, seed = self.config.token_budget, self.config.batch_size, self.config.seed
        assert budget is not None
        if self.config.grouping == "packed":
            return PackedSchedule(self._tokens, budget=budget, groups_per_step=groups, seed=seed)
        return BucketSchedule(self.clips.sizes, self._tokens, budget=budget, groups_per_step=groups, seed=seed)

    def _open(self, autoencoder: Autoencoder, say: Say) -> ClipSource:
        config = self.config
        folder, captions = video_folder(config)
        files = load_captions(captions)
        raw = autoencoder.name == "raw"
        frames, height, width = config.model.build(raw=raw).patch_size
        space = autoencoder.space_factor
        clips = NativeClips(
            folder,
            files,
            cut=CutConfig(clip_frames=config.num_frames, frame_stride=config.frame_stride),
            crop=CropConfig(frames=frames * autoencoder.time_factor, height=height * space, width=width * space),
            autoencoder=autoencoder,
        )
        say_skipped(clips.skipped, len(files), say)
        return clips


def open_source(config: TrainConfig, device: torch.device, mesh: ParallelMesh, say: Say) -> Source:
    """The source that a configuration names, see FixedSizeSource."""
    return (ManySizesSource if config.many_sizes else FixedSizeSource)(config, device, mesh, say)


def with_encoders_of(config: TrainConfig, shards: ShardDataset) -> TrainConfig:
    """The run with the compression and the text encoder that shards were made with.

    Raises:
        ValueError: the command line asks for others.
    """
    compression = AutoencoderConfig(**shards.info["compression"])
    text = TextEncoderConfig(**shards.info["text"])
    for name, asked, made, default in (
        ("compression", config.compression, compression, AutoencoderConfig()),
        ("text", config.text, text, TextEncoderConfig()),
    ):
        if asked not in (default, made):
            raise ValueError(
                f"{name} is what the shards were made with ({made}); leave its options out, or prepare the videos again"
            )
    return replace(config, compression=compression, text=text)


def video_folder(config: TrainConfig) -> tuple[Path, Path]:
    """(folder of videos, captions file)."""
    folder = config.videos
    assert folder is not None
    if not folder.is_dir():
        raise ValueError(f"videos: {folder} is not a folder")
    return folder, config.captions or folder / "captions.json"


def say_skipped(skipped: list[tuple[str, str]], number: int, say: Say) -> None:
    """Name videos that were left out, and why."""
    if skipped:
        say(f"skipped {len(skipped)} of {number} videos:")
        for name, reason in skipped:
            say(f"  {name}: {reason}")
