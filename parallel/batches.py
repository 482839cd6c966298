"""The batches of a step: which samples exist, which of them this rank trains, and what is random about each.

Everything follows from (seed, sample, step), nothing from the rank: the ranks of one SP group build the same batch, and
however a step's samples are spread over dp groups and micro-batches, the step is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from longreel.data.clips import per_sample_generator, sample_ids
from longreel.data.packing import Schedule
from longreel.data.samples import Clip, ClipSource
from longreel.models.objective import Objective
from longreel.parallel.comm import all_gather
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.parallelize import Batch, PackedBatch

NULL_CAPTION = ""
AnyBatch = Batch | PackedBatch


class Encoder(Protocol):
    """Text features of captions."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """[B, L, text_dim]."""
        ...


class Batches(Protocol):
    """The batches of every step."""

    def micro_batches(self, step: int) -> list[AnyBatch]:
        """This rank's part of a step, counted from 0; every rank has the same number of micro-batches."""
        ...

    def clips_by_tokens(self, step: int) -> dict[int, int]:
        """{video tokens: number of clips} of the whole step."""
        ...

    def describe(self, step: int) -> list[dict[str, Any]]:
        """Every sample of the whole step: position, clip, file, first frame, caption, timestep, data-parallel rank."""
        ...


def split_samples(num_samples: int, dp_degree: int, dp_rank: int) -> range:
    """Positions in the global batch that one dp rank trains: contiguous, the first ranks take one more if need be.

    Raises:
        ValueError: there are fewer samples than dp ranks.
    """
    if num_samples < dp_degree:
        raise ValueError(
            f"batch_size {num_samples} is less than the {dp_degree} data-parallel groups of ranks; "
            f"use batch_size {dp_degree} or more, or a larger sp_degree"
        )
    size, larger = divmod(num_samples, dp_degree)
    start = dp_rank * size + min(dp_rank, larger)
    return range(start, start + size + (dp_rank < larger))


def check_accumulation(num_samples: int, dp_degree: int, accumulation: int) -> None:
    """ValueError unless every dp rank has a sample for each of its micro-batches."""
    least = num_samples // dp_degree
    if least < accumulation:
        raise ValueError(
            f"accumulation {accumulation} is more micro-batches than the {least} samples that a data-parallel rank may "
            f"have of batch_size {num_samples}; use accumulation {max(least, 1)} or less, or batch_size "
            f"{accumulation * dp_degree} or more"
        )


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
    """

    clips: ClipSource
    encoder: Encoder | None
    null_text: Tensor | None = None
    objective: Objective
    seed: int
    caption_dropout: float
    mesh: ParallelMesh
    device: torch.device

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
            ValueError: a clip cannot be read.
        """
        clips = [self.clips[index] for _, index in places]
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
                clip = self.clips[index]
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


class DenseBatches:
    """Batches of clips of one size, each once per epoch in a fresh order.

    Args:
        samples: how they are made. batch_size: of a step over all ranks. accumulation: micro-batches of a rank.
        tokens: video tokens of a clip.
    """

    def __init__(self, samples: Samples, *, batch_size: int, accumulation: int = 1, tokens: int) -> None:
        self._samples, self._tokens = samples, tokens
        self._batch_size, self._accumulation = batch_size, accumulation

    def micro_batches(self, step: int) -> list[AnyBatch]:
        """See Batches; VideoError if a clip cannot be decoded."""
        mine = self._places(step)[self._samples.mesh.dp_rank]
        parts = [split_samples(len(mine), self._accumulation, i) for i in range(self._accumulation)]
        return [
            self._samples.batch(step, [mine[place] for place in part], self._batch_size, packed=False) for part in parts
        ]

    def clips_by_tokens(self, step: int) -> dict[int, int]:
        """See Batches."""
        return {self._tokens: self._batch_size}

    def describe(self, step: int) -> list[dict[str, Any]]:
        """See Batches."""
        return self._samples.describe(step, self._places(step))

    def _places(self, step: int) -> list[list[tuple[int, int]]]:
        """(position, clip) of each dp rank's samples."""
        ids = sample_ids(self._samples.seed, step, self._batch_size, len(self._samples.clips))
        dp = self._samples.mesh.dp_degree
        return [[(i, ids[i]) for i in split_samples(self._batch_size, dp, rank)] for rank in range(dp)]


class GroupedBatches:
    """Batches of clips of many sizes: groups of a schedule, each one packed sequence or one bucket of equal clips.

    Args:
        samples: how they are made. schedule: of groups; those of a step are dealt out to dp ranks in equal numbers,
            one micro-batch each. packed: clips of a group are packed; otherwise they have one size.
        tokens: video tokens of each clip.
    """

    def __init__(self, samples: Samples, schedule: Schedule, *, packed: bool, tokens: Sequence[int]) -> None:
        self._samples, self._schedule = samples, schedule
        self._packed, self._tokens = packed, tokens

    def micro_batches(self, step: int) -> list[AnyBatch]:
        """See Batches; ValueError if a clip cannot be read."""
        groups = self._groups(step)
        number = sum(map(len, groups))
        mine = len(groups) // self._samples.mesh.dp_degree
        start = self._samples.mesh.dp_rank * mine
        return [self._samples.batch(step, group, number, packed=self._packed) for group in groups[start : start + mine]]

    def clips_by_tokens(self, step: int) -> dict[int, int]:
        """See Batches."""
        return dict(Counter(self._tokens[clip] for group in self._groups(step) for _, clip in group))

    def describe(self, step: int) -> list[dict[str, Any]]:
        """See Batches."""
        groups, dp = self._groups(step), self._samples.mesh.dp_degree
        mine = len(groups) // dp
        by_rank = [
            [place for group in groups[rank * mine : (rank + 1) * mine] for place in group] for rank in range(dp)
        ]
        return self._samples.describe(step, by_rank)

    def _groups(self, step: int) -> list[list[tuple[int, int]]]:
        """(position in the step, clip) of each group."""
        position, groups = 0, []
        for group in self._schedule.step(step):
            groups.append(list(enumerate(group, start=position)))
            position += len(group)
        return groups


class Prefetched:
    """Batches of which the next step's are built in a thread while this one's are trained.

    Args:
        batches: whose results are the same in any thread and order.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="longreel-batches")
        self._next: tuple[int, Future[list[AnyBatch]]] | None = None

    def micro_batches(self, step: int) -> list[AnyBatch]:
        """See Batches."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == step:
            batches = ahead[1].result()
        else:
            batches = self._thread.submit(self._batches.micro_batches, step).result()
        self._next = step + 1, self._thread.submit(self._batches.micro_batches, step + 1)
        return batches

    def clips_by_tokens(self, step: int) -> dict[int, int]:
        """See Batches."""
        return self._batches.clips_by_tokens(step)

    def describe(self, step: int) -> list[dict[str, Any]]:
        """See Batches; in the thread, which the clips' cache is used by."""
        return self._thread.submit(self._batches.describe, step).result()

    def close(self) -> None:
        """End the thread; what it is building is dropped."""
        self._next = None
        self._thread.shutdown(wait=True, cancel_futures=True)


def check_same_clips(clips: ClipSource, mesh: ParallelMesh) -> None:
    """ValueError if ranks see different clips, as when a node lacks a file: their batches would differ in silence."""
    flat = mesh.flat
    mine = torch.tensor([int(clips.digest, 16), len(clips)], device=flat.device_type)
    everyone = all_gather(mine, flat.get_group().group_name)
    if not torch.equal(everyone, mine.expand_as(everyone)):
        counts = ", ".join(str(int(n)) for n in everyone[:, 1])
        raise ValueError(f"ranks see different videos (clips per rank: {counts}); give all of them the same files")
