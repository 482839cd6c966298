"""How a micro-batch is made of samples: their clips, and what is random about each.

Everything follows from (seed, sample, step), nothing from the rank: however a step's samples are spread over dp groups
and micro-batches, the step is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longreel.data.clips import per_sample_generator
from longreel.data.samples import Clip, ClipSource
from longreel.data.shard_files import ShardError
from longreel.data.video import VideoError
from longreel.models.objective import Objective
from longreel.parallel.broken_clips import BrokenClips, UnreadableClips
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.parallelize import Batch, PackedBatch

NULL_CAPTION = ""
AnyBatch = Batch | PackedBatch


class Encoder(Protocol):
    """Text features of captions."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """[B, L, text_dim]."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What is random about one sample of one step.

    Args:
        caption: which of the clip's captions; None: dropped.
        timestep: [1] in the objective's units. noise: of the latents' size. fp32, whatever the run's precision, so that
            runs compare.
    """

    caption: int | None
    timestep: Tensor
    noise: Tensor


def draw_sample(
    seed: int,
    sample: int,
    step: int,
    *,
    num_captions: int,
    caption_dropout: float,
    size: tuple[int, ...],
    objective: Objective,
) -> Draw:
    """Draw one sample of one step.

    Args:
        seed: of the run. sample: position in the global batch. step: from 0.
        num_captions: of the clip; one is drawn. caption_dropout: chance of the null caption instead.
        size: of the noise. objective: draws the timestep.
    """
    generator = per_sample_generator(seed, sample, step)
    choice = int(torch.randint(num_captions, (), generator=generator))
    dropped = bool(torch.rand((), generator=generator) < caption_dropout)
    timestep = objective.draw_timestep(generator)
    noise = torch.randn(size, generator=generator)
    return Draw(caption=None if dropped else choice, timestep=timestep, noise=noise)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """How the samples of a run are made.

    Args:
        clips: all clips, the same on every rank. encoder: of captions, where the clips bring no features.
        null_text: features [L, text_dim] of the null caption, where they do.
        objective: draws timesteps. seed: of the run. caption_dropout: share of samples with the null caption.
        mesh: says which samples are this rank's. device: where batches go.
        broken: clips that others take the place of, if any may break.
    """

    clips: ClipSource
    encoder: Encoder | None
    null_text: Tensor | None = None
    objective: Objective
    seed: int
    caption_dropout: float
    mesh: ParallelMesh
    device: torch.device
    broken: BrokenClips | None = None

    def clip_at(self, clip: int, step: int) -> int:
        """The clip that a step trains where its sample is `clip`: another where that one is broken."""
        return clip if self.broken is None else self.broken.in_place_of(clip, step)

    def draw(self, step: int, sample: int, clip: Clip) -> Draw:
        """What is random about a clip that is the sample at a position of a step."""
        return draw_sample(
            self.seed,
            sample,
            step,
            num_captions=len(clip.captions),
            caption_dropout=self.caption_dropout,
            size=tuple(clip.latents.shape),
            objective=self.objective,
        )

    def batch(self, step: int, places: Sequence[tuple[int, int]], global_samples: int, *, packed: bool) -> AnyBatch:
        """A micro-batch of a step.

        Args:
            step: from 0. places: (position in the step, clip) of each sample. global_samples: of the whole step.
            packed: into one sequence; otherwise all clips are of one size.

        Raises:
            UnreadableClips: some of them cannot be read.
        """
        clips, reasons = [], {}
        for _, index in places:
            try:
                clips.append(self.clips[index])
            except (VideoError, ShardError) as error:
                reasons[index] = str(error)
        if reasons:
            raise UnreadableClips(reasons)
        draws = [self.draw(step, sample, clip) for (sample, _), clip in zip(places, clips, strict=True)]
        shared: dict[str, Any] = {
            "timestep": torch.cat([draw.timestep for draw in draws]).to(self.device),
            "text": torch.cat([self._text(clip, draw) for clip, draw in zip(clips, draws, strict=True)]).to(
                self.device
            ),
            "global_samples": global_samples,
        }
        latents = [clip.latents.to(self.device) for clip in clips]
        noises = [draw.noise.to(self.device) for draw in draws]
        if packed:
            return PackedBatch(latents=tuple(latents), noise=tuple(noises), **shared)
        return Batch(latents=torch.stack(latents), noise=torch.stack(noises), **shared)

    def describe(self, step: int, groups: Sequence[Sequence[tuple[int, int]]]) -> list[dict[str, Any]]:
        """Every sample of a step for people and JSON, from the (position, clip) that each dp rank trains."""
        told = []
        for dp_rank, places in enumerate(groups):
            for sample, index in places:
                try:
                    clip = self.clips[index]
                except (VideoError, ShardError) as error:
                    # It was read when the step was built, and has broken since.
                    told.append({"position": sample, "clip": index, "unreadable": str(error), "dp_rank": dp_rank})
                    continue
                draw = self.draw(step, sample, clip)
                told.append(
                    {
                        "position": sample,
                        "clip": index,
                        "file": clip.source,
                        "first_frame": clip.start,
                        "caption": NULL_CAPTION if draw.caption is None else clip.captions[draw.caption],
                        "timestep": float(draw.timestep),
                        "dp_rank": dp_rank,
                    }
                )
        return told

    def _text(self, clip: Clip, draw: Draw) -> Tensor:
        """[1, L, text_dim]."""
        if clip.text is None:
            assert self.encoder is not None
            return self.encoder.encode([NULL_CAPTION if draw.caption is None else clip.captions[draw.caption]])
        text = self.null_text if draw.caption is None else clip.text[draw.caption]
        assert text is not None
        return text[None]
