"""The batch of a step: which samples exist, which of them this rank trains, and what is random about each.

Everything follows from (seed, sample, step), nothing from the rank: the ranks of one SP group build the same batch, and
however a step's samples are spread over dp groups, the step is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longreel.data.clips import ClipDataset, per_sample_generator, sample_ids
from longreel.models.flow import sample_timesteps
from longreel.models.text import ByteTextEncoder
from longreel.parallel.comm import all_gather
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.parallelize import Batch

NULL_CAPTION = ""


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


def draw_sample(
    seed: int, sample: int, step: int, *, captions: tuple[str, ...], caption_dropout: float, size: tuple[int, ...]
) -> tuple[str, Tensor, Tensor]:
    """What is random about one sample of one step.

    Args:
        seed: of the run. sample: position in the global batch. step: from 0.
        captions: of the clip; one is drawn. caption_dropout: chance of the null caption instead.
        size: of the noise.

    Returns:
        (caption, timestep [1], noise of that size), fp32 whatever the run's precision, so that runs compare.
    """
    generator = per_sample_generator(seed, sample, step)
    choice = int(torch.randint(len(captions), (), generator=generator))
    dropped = bool(torch.rand((), generator=generator) < caption_dropout)
    timestep = sample_timesteps(generator, 1)
    noise = torch.randn(size, generator=generator)
    return NULL_CAPTION if dropped else captions[choice], timestep, noise


def build_batch(
    clips: ClipDataset,
    encoder: ByteTextEncoder,
    *,
    seed: int,
    step: int,
    batch_size: int,
    caption_dropout: float,
    mesh: ParallelMesh,
    device: torch.device,
) -> Batch:
    """This rank's batch of one step.

    Args:
        clips: all clips, the same on every rank. encoder: of captions.
        seed: of the run. step: from 0. batch_size: samples of the step over all ranks.
        caption_dropout: share of samples with the null caption.
        mesh: says which samples are this rank's. device: where the batch goes.

    Raises:
        VideoError: a clip cannot be decoded.
    """
    ids = sample_ids(seed, step, batch_size, len(clips))
    videos, captions, timesteps, noises = [], [], [], []
    for sample in split_samples(batch_size, mesh.dp_degree, mesh.dp_rank):
        video, choices = clips[ids[sample]]
        caption, timestep, noise = draw_sample(
            seed, sample, step, captions=choices, caption_dropout=caption_dropout, size=tuple(video.shape)
        )
        videos.append(video)
        captions.append(caption)
        timesteps.append(timestep)
        noises.append(noise)
    return Batch(
        latents=torch.stack(videos).to(device),
        noise=torch.stack(noises).to(device),
        timestep=torch.cat(timesteps).to(device),
        text=encoder.encode(captions).to(device),
        global_samples=batch_size,
    )


def check_same_clips(clips: ClipDataset, mesh: ParallelMesh) -> None:
    """ValueError if ranks see different clips, as when a node lacks a file: their batches would differ in silence."""
    flat = mesh.flat
    mine = torch.tensor([int(clips.digest, 16), len(clips)], device=flat.device_type)
    everyone = all_gather(mine, flat.get_group().group_name)
    if not torch.equal(everyone, mine.expand_as(everyone)):
        counts = ", ".join(str(int(n)) for n in everyone[:, 1])
        raise ValueError(f"ranks see different videos (clips per rank: {counts}); give all of them the same files")
