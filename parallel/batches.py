"""The batches of a step: which samples exist, and which of them this rank trains.

The ranks of one SP group build the same batch, see longreel.parallel.sample_batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from longreel.data.clips import sample_ids
from longreel.data.packing import Schedule
from longreel.data.samples import ClipSource
from longreel.parallel.comm import all_gather
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.sample_batches import AnyBatch, Samples


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
        """See Batches; UnreadableClips if a clip cannot be decoded."""
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
        ids = [self._samples.clip_at(clip, step) for clip in ids]
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
        """See Batches; UnreadableClips if a clip cannot be read."""
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
            clips = [self._samples.clip_at(clip, step) for clip in group]
            groups.append(list(enumerate(clips, start=position)))
            position += len(group)
        return groups


def check_same_clips(clips: ClipSource, mesh: ParallelMesh) -> None:
    """ValueError if ranks see different clips, as when a node lacks a file: their batches would differ in silence."""
    flat = mesh.flat
    mine = torch.tensor([int(clips.digest, 16), len(clips)], device=flat.device_type)
    everyone = all_gather(mine, flat.get_group().group_name)
    if not torch.equal(everyone, mine.expand_as(everyone)):
        counts = ", ".join(str(int(n)) for n in everyone[:, 1])
        raise ValueError(f"ranks see different videos (clips per rank: {counts}); give all of them the same files")
