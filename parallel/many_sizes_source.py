"""Clips of their own sizes, from shards or decoded while training: packed into sequences, or in buckets of one size."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from longreel.data.captions import load_captions
from longreel.data.cutting import CropConfig, CutConfig
from longreel.data.native_clips import NativeClips
from longreel.data.packing import BucketSchedule, PackedSchedule, Schedule
from longreel.data.samples import ClipSource
from longreel.data.shards import ShardDataset
from longreel.models.autoencoders import Autoencoder, AutoencoderConfig, build_autoencoder
from longreel.models.objective import Objective
from longreel.models.text import TextEncoder, TextEncoderConfig, build_text_encoder
from longreel.parallel.batches import Batches, GroupedBatches
from longreel.parallel.broken_clips import BrokenClips
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.sample_batches import Samples
from longreel.parallel.video_folder import Say, say_skipped, video_folder, videos_known


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
            self.encoder_weights = {
                "autoencoder": shards.info["autoencoder_weights"],
                "text_encoder": shards.info["text_weights"],
            }
            if not shards.info["text_stored"]:
                self._encoder = build_text_encoder(config.text, device=device)
        else:
            self.config = config
            autoencoder = build_autoencoder(config.compression, device=device)
            self._encoder = build_text_encoder(config.text, device=device)
            self.encoder_weights = {"autoencoder": autoencoder.digest, "text_encoder": self._encoder.digest}
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
    def same_size(self) -> bool:
        """See Source."""
        return self.config.grouping != "packed"

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

    def batches(self, objective: Objective, device: torch.device, broken: BrokenClips | None = None) -> Batches:
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
            broken=broken,
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
            known=videos_known(config),
        )
        say_skipped(clips.skipped, len(files), say)
        return clips


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
