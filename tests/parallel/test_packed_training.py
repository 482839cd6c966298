"""Training clips of different sizes, packed or in buckets: loss and gradients of training them one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import gradient_cases as cases
import pytest
import torch
from torch import Tensor

from longreel.data.packing import BucketSchedule, PackedSchedule
from longreel.data.samples import Clip
from longreel.kernels.numerics import PARALLEL_TOLERANCE, gradient_errors
from longreel.models.flow import RectifiedFlow
from longreel.models.text import ByteTextEncoder
from longreel.parallel.batches import GroupedBatches
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import PackedBatch, ParallelDiT
from longreel.parallel.sample_batches import Samples

# (T, H, W) of latents; patches are (1, 2, 2). Tokens: 6, 12, 4, 24, 10, 8, 6, 20, 4.
SIZES = [(1, 4, 6), (2, 4, 6), (1, 4, 4), (2, 6, 8), (1, 4, 10), (2, 4, 4), (1, 4, 6), (5, 4, 4), (1, 4, 4)]
TOKENS = [t * h * w // 4 for t, h, w in SIZES]
BUDGET = 25
DIM, TEXT = 16, 5


class DrawnClips:
    """A ClipSource of random latents."""

    sizes = SIZES
    channels = 4
    digest = "0" * 14

    def __len__(self) -> int:
        return len(SIZES)

    def __getitem__(self, index: int) -> Clip:
        generator = torch.Generator().manual_seed(index)
        latents = torch.randn(*SIZES[index], self.channels, generator=generator)
        text = torch.randn(2, TEXT, DIM, generator=generator) if index % 2 else None
        return Clip(latents=latents, captions=("a", "b"), text=text, fps=8.0, source=f"{index}.mp4", start=0)


def samples(mesh: Any) -> Samples:
    return Samples(
        clips=DrawnClips(),
        encoder=ByteTextEncoder(DIM, TEXT),
        null_text=torch.zeros(TEXT, DIM),
        objective=RectifiedFlow(),
        seed=4,
        caption_dropout=0.3,
        mesh=mesh,
        device=torch.device("cpu"),
    )


def schedule(grouping: str) -> Any:
    if grouping == "packed":
        return PackedSchedule(TOKENS, budget=BUDGET, groups_per_step=4, seed=1)
    return BucketSchedule(SIZES, TOKENS, budget=BUDGET, groups_per_step=4, seed=1)


def spread(conditioning: str, strategy: str, degree: int) -> ParallelDiT:
    config = cases.tiny_config(conditioning, text_dim=DIM, max_text_tokens=TEXT)
    model = cases.randomised_dit(config, torch.float64)
    return ParallelDiT(model, build_mesh(sp_degree=degree), cases.fp64(strategy, degree))


def step_of(model: ParallelDiT, batches: Sequence[Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss over all ranks and whole gradients of one step."""
    losses = []
    for batch in batches:
        loss = model.loss(batch)
        model.engine.backward(loss)
        losses.append(loss.detach())
    total = torch.stack(losses).sum()
    torch.distributed.all_reduce(total)
    return float(total) / torch.distributed.get_world_size(), model.engine.full_gradients()


def grouped_step(grouping: str, conditioning: str, strategy: str, degree: int) -> Any:
    model = spread(conditioning, strategy, degree)
    batches = GroupedBatches(samples(model.mesh), schedule(grouping), packed=grouping == "packed", tokens=TOKENS)
    mine = batches.micro_batches(0)
    return step_of(model, mine), [len(batch.latents) for batch in mine]


def separate_step(grouping: str, conditioning: str) -> Any:
    """The same clips one by one on one device."""
    model = spread(conditioning, "local", 1)
    clips = [clip for group in schedule(grouping).step(0) for clip in group]
    made = samples(model.mesh)
    return step_of(model, [made.batch(0, [place], len(clips), packed=False) for place in enumerate(clips)])


@pytest.mark.parametrize("strategy", ["ulysses", "fastseq"])
@pytest.mark.parametrize(
    ("grouping", "conditioning"), [("packed", "in_context"), ("packed", "cross"), ("buckets", "adaln")]
)
def test_grouped_clips_train_as_separate_ones(
    run_distributed: Any, grouping: str, conditioning: str, strategy: str
) -> None:
    loss, gradients = run_distributed(separate_step, 1, grouping, conditioning)[0]
    ranks = run_distributed(grouped_step, 4, grouping, conditioning, strategy, 2)
    counts = [numbers for _, numbers in ranks[::2]]
    # dp 2 x sp 2, two micro-batches each: ranks and micro-batches hold different numbers of clips.
    assert [len(numbers) for numbers in counts] == [2, 2]
    assert len({number for numbers in counts for number in numbers}) > 1
    assert len({sum(numbers) for numbers in counts}) > 1
    tolerance = PARALLEL_TOLERANCE[torch.float64]
    for (found, grads), _ in ranks:
        assert found == pytest.approx(loss, rel=tolerance)
        errors = gradient_errors(grads, gradients)
        assert max(errors.values()) <= tolerance, errors


def test_every_clip_once_an_epoch_whatever_the_ranks() -> None:
    def clips(dp_degree: int) -> list[Any]:
        found = []
        for step in range(2):
            for rank in range(dp_degree):
                mesh = SimpleNamespace(dp_degree=dp_degree, dp_rank=rank)
                batches = GroupedBatches(samples(mesh), schedule("packed"), packed=True, tokens=TOKENS)
                for batch in batches.micro_batches(step):
                    assert isinstance(batch, PackedBatch)
                    assert sum(math.prod(x.shape[:3]) // 4 for x in batch.latents) <= BUDGET
                    found += [float(noise.sum()) for noise in batch.noise]
        return found

    assert clips(1) == clips(2) == clips(4)
    mesh = SimpleNamespace(dp_degree=2, dp_rank=0)
    batches = GroupedBatches(samples(mesh), schedule("packed"), packed=True, tokens=TOKENS)
    told = batches.describe(0)
    assert [sample["position"] for sample in told] == list(range(len(told)))
    assert {sample["dp_rank"] for sample in told} == {0, 1}
    counted = sum(tokens * number for tokens, number in batches.clips_by_tokens(0).items())
    assert counted == sum(TOKENS[sample["clip"]] for sample in told)
