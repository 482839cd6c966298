"""Where a training run's clips come from: videos cut to one size, videos at their own sizes, shards, or drawn clips.

A source is opened before a run writes anything, and tells the model's sizes; ready() then gives the clips.
"""

from __future__ import annotations

from typing import Protocol

import torch

from longreel.data.samples import ClipSource
from longreel.models.config import DiTConfig
from longreel.models.objective import Objective
from longreel.parallel.batches import Batches
from longreel.parallel.broken_clips import BrokenClips
from longreel.parallel.fixed_size_source import FixedSizeSource
from longreel.parallel.many_sizes_source import ManySizesSource
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.run_config import TrainConfig
from longreel.parallel.video_folder import Say


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
    def encoder_weights(self) -> dict[str, str]:
        """Digests of the weights of `autoencoder` and `text_encoder`, empty where there are none."""
        ...

    @property
    def same_size(self) -> bool:
        """Whether a clip's place in a batch can be taken by one of its own size alone."""
        ...

    @property
    def told(self) -> str:
        """How many tokens clips have, for people."""
        ...

    def ready(self) -> ClipSource:
        """The clips; every rank calls it, once `out` may be written."""
        ...

    def batches(self, objective: Objective, device: torch.device, broken: BrokenClips | None = None) -> Batches:
        """Batches of the clips, after ready(); `broken` says which are left out."""
        ...


def open_source(config: TrainConfig, device: torch.device, mesh: ParallelMesh, say: Say) -> Source:
    """The source that a configuration names, see FixedSizeSource."""
    return (ManySizesSource if config.many_sizes else FixedSizeSource)(config, device, mesh, say)
