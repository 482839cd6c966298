"""longreel.parallel.parallelize: what a spread DiT takes, refuses and returns; test_gradient_grid.py has the rest."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import gradient_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longreel.kernels import reference
from longreel.kernels.numerics import PARALLEL_TOLERANCE, relative_error
from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import Batch, PackedBatch, ParallelDiT

STRATEGIES = ["ulysses", "fastseq", "ring", "usp"]


def check(
    run_distributed,
    config: DiTConfig,
    parallel: ParallelConfig,
    counts: tuple[int, ...],
    dtype: torch.dtype,
    shape: tuple[int, ...] | None = cases.LATENT_SHAPE,
):
    world = parallel.sp_degree * len(counts)
    for errors in run_distributed(cases.parity, world, config, parallel, counts, dtype, shape):
        assert max(errors.values()) <= PARALLEL_TOLERANCE[dtype], errors


@pytest.mark.parametrize("conditioning", ["text_only", "published", "cross_published"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_the_published_regime_equal_one_device(run_distributed, strategy, conditioning):
    check(run_distributed, cases.tiny_config(conditioning), cases.fp64(strategy, 4), (1, 2), torch.float64)


# Each policy, engine and regime once; all of them together are slow.
PUBLISHED = {
    "ulysses": ("published", "full", "ddp"),
    "fastseq": ("cross_published", "keep_attention", "fsdp2-zero3"),
    "ring": ("text_only", "offload", "ddp"),
    "usp": ("cross_published", "full", "fsdp2-zero2"),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_published_regime_goes_with_policies_and_engines(run_distributed, strategy):
    conditioning, policy, engine = PUBLISHED[strategy]
    parallel = cases.fp64(strategy, 2, engine, policy)
    check(run_distributed, cases.tiny_config(conditioning), parallel, (1, 2), torch.float64)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("conditioning", ["text_only", "published", "cross_published"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "ulysses-chunks", "fastseq-attention"])
def test_the_published_regime_goes_with_every_policy_and_engine(run_distributed, strategy, conditioning):
    together = [
        (cases.tiny_config(conditioning), cases.fp64(strategy, 4, engine, policy), (1, 2), cases.LATENT_SHAPE)
        for engine in ("fsdp2-zero2", "fsdp2-zero3", "ddp")
        for policy in ("none", "full", "keep_attention", "offload")
    ]
    for of_rank in run_distributed(cases.parities, 8, together, timeout=1500.0):
        for case, errors in zip(together, of_rank, strict=True):
            assert max(errors.values()) <= PARALLEL_TOLERANCE[torch.float64], (case, errors)


@pytest.mark.parametrize("policy", ["full", "keep_attention", "offload"])
@pytest.mark.parametrize("engine", ["fsdp2-zero2", "fsdp2-zero3", "ddp"])
def test_policies_without_sequence_parallelism_equal_one_device(run_distributed, engine, policy):
    check(
        run_distributed, cases.tiny_config("in_context"), cases.fp64("local", 1, engine, policy), (2, 1), torch.float64
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_clips_attend_to_their_own_text_only(run_distributed, strategy):
    check(run_distributed, cases.tiny_config("text_only"), cases.fp64(strategy, 4), (3, 2), torch.float64, None)


@pytest.mark.parametrize("shape", [cases.LATENT_SHAPE, None], ids=["dense", "packed"])
@pytest.mark.parametrize("policy", ["none", "keep_attention"])
@pytest.mark.parametrize("conditioning", ["adaln", "cross"])
def test_tiled_mlp_gradients_equal_one_device(run_distributed, conditioning, policy, shape):
    # Tiles of 5 rows: neither the rows of a rank nor those of both cases.samples divide.
    parallel = replace(cases.fp64("fastseq", 2, policy=policy), mlp_tile=5)
    check(run_distributed, cases.tiny_config(conditioning), parallel, (2, 1), torch.float64, shape)


def test_packed_clips_and_the_published_layout_exclude_each_other(run_distributed):
    arguments = cases.tiny_config("published"), cases.fp64("ulysses", 2), (5,), torch.float64, None
    with pytest.raises(RuntimeError, match="cross_layout 'published' takes no packed batch; use cross_layout"):
        run_distributed(cases.parity, 2, *arguments)


def packed_differently(by_rank: list[list[tuple[int, ...]]], num_text: list[int | None]) -> str:
    """What a rank says that packs zeros of the shapes, and as many text tokens, at its place."""
    mesh = build_mesh(sp_degree=dist.get_world_size())
    spread = ParallelDiT(
        cases.randomised_dit(cases.tiny_config("adaln"), torch.float64), mesh, cases.fp64("ring", mesh.sp_degree)
    )
    clips, tokens = tuple(torch.zeros(shape) for shape in by_rank[mesh.sp_rank]), num_text[mesh.sp_rank]
    batch = PackedBatch(
        latents=clips,
        noise=clips,
        timestep=torch.zeros(len(clips)),
        text=None if tokens is None else torch.zeros(len(clips), tokens, 16),
        global_samples=len(clips),
    )
    with pytest.raises(ValueError, match="of the packed clips") as caught:
        spread.loss(batch)
    return str(caught.value)


def test_ranks_that_pack_other_clips_all_say_so(run_distributed):
    first, second, taller = (2, 4, 4, 4), (2, 6, 4, 4), (2, 8, 4, 4)
    said = set(
        run_distributed(packed_differently, 4, [[first, other] for other in (second, taller, second, second)], [6] * 4)
    )
    assert said == {
        "cu_seqlens of the packed clips (their number, [T, H, W, C_in] of each, text [N, L, text_dim], labels [N], "
        "-1 for none, samples of the step, 1 if packed, timestep [N]) differ between the 4 ranks of a group, which "
        "must hold the same: "
        "ranks 0, 2, 3: [2, 2, 4, 4, 4, 2, 6, 4, 4, 2, 6, 16, ...] (16 values, from index 0); "
        "rank 1: [2, 2, 4, 4, 4, 2, 8, 4, 4, 2, 6, 16, ...] (16 values, from index 0)"
    }


@pytest.mark.parametrize(
    ("clips", "tokens"),
    [
        pytest.param([(1, 2, 2, 4)], 6, id="fewer-tokens-than-ranks"),
        pytest.param([(2, 5, 4, 4)], 6, id="no-multiple-of-the-patch"),
        pytest.param([(2, 4, 8, 4)], 6, id="as-many-tokens"),
        pytest.param([(2, 8, 4, 3)], 6, id="other-channels"),
        pytest.param([(2, 8, 4, 4)] * 2, 6, id="another-number"),
        pytest.param([(2, 8, 4, 4)], 5, id="other-text"),
        pytest.param([(2, 8, 4, 4)], None, id="no-text"),
    ],
)
def test_a_rank_whose_batch_is_wrong_by_itself_leaves_none_waiting(run_distributed, clips, tokens):
    # Rank 0 would raise by itself, or in the model, before the others have heard of it.
    (message,) = set(run_distributed(packed_differently, 2, [clips, [(2, 8, 4, 4)]], [tokens, 6], timeout=20.0))
    assert "differ between the 2 ranks of a group" in message


def differing_batch(by_rank: list[tuple[tuple[int, ...], int, int]], sample: bool) -> str:
    """What a rank says that holds zeros of a shape, text tokens and samples of a step, at its place."""
    mesh = build_mesh(sp_degree=dist.get_world_size())
    spread = ParallelDiT(
        cases.randomised_dit(cases.tiny_config("cross"), torch.float64), mesh, cases.fp64("ulysses", mesh.sp_degree)
    )
    # The first step agrees.
    data = cases.samples(2, torch.float64)
    with torch.no_grad():
        spread.loss(Batch(**data, global_samples=2))
    shape, tokens, global_samples = by_rank[mesh.sp_rank]
    latents, text = torch.zeros(shape), torch.zeros(shape[0], tokens, 16)
    fields = {"latents": latents, "timestep": torch.zeros(shape[0]), "text": text}
    with pytest.raises(ValueError, match="sizes of the batch") as caught:
        spread.output(**fields) if sample else spread.loss(
            Batch(**fields, noise=latents, global_samples=global_samples)
        )
    return str(caught.value)


USUAL = (2, 4, 8, 4, 4), 6, 2
OTHERS = {
    "as-many-tokens": ((2, 4, 4, 8, 4), 6, 2),
    "fewer-samples": ((1, 4, 8, 4, 4), 6, 2),
    "no-multiple-of-the-patch": ((2, 5, 8, 3, 4), 6, 2),
    "other-text": ((2, 4, 8, 4, 4), 5, 2),
    # Which sampling does not know of.
    "other-step": ((2, 4, 8, 4, 4), 6, 3),
}


@pytest.mark.parametrize(
    ("other", "sample"),
    [(other, False) for other in OTHERS] + [(other, True) for other in OTHERS if other != "other-step"],
)
def test_a_dense_batch_that_differs_on_one_rank_is_an_error_of_all(run_distributed, other, sample):
    batches = [USUAL, USUAL, OTHERS[other], USUAL]
    (message,) = set(run_distributed(differing_batch, 4, batches, sample, timeout=20.0))
    assert "differ between the 4 ranks of a group" in message
    assert "ranks 0, 1, 3: " in message and "; rank 2: " in message


def differing_kind(packs: list[bool], steps: list[int]) -> str:
    """What a rank says that packs its clips or not, with so many timesteps, under a layout that packs none."""
    mesh = build_mesh(sp_degree=dist.get_world_size())
    spread = ParallelDiT(
        cases.randomised_dit(cases.tiny_config("published"), torch.float64), mesh, cases.fp64("ulysses", mesh.sp_degree)
    )
    latents, steps_of = torch.zeros(2, 4, 8, 4, 4), torch.zeros(steps[mesh.sp_rank])
    kind = PackedBatch if packs[mesh.sp_rank] else Batch
    clips = tuple(latents) if packs[mesh.sp_rank] else latents
    with pytest.raises(ValueError, match="timestep") as caught:
        spread.loss(kind(latents=clips, noise=clips, timestep=steps_of, text=torch.zeros(2, 6, 16), global_samples=2))
    return str(caught.value)


@pytest.mark.parametrize(
    ("packs", "steps", "told"),
    [
        pytest.param([True, False], [2, 2], "differ between the 2 ranks of a group", id="one-packs"),
        pytest.param([False, False], [2, 1], "differ between the 2 ranks of a group", id="one-has-fewer-timesteps"),
        pytest.param([False, False], [1, 1], r"one row for each of 2 samples, got [1]", id="all-have-fewer-timesteps"),
    ],
)
def test_another_kind_of_batch_leaves_none_waiting(run_distributed, packs, steps, told):
    messages = run_distributed(differing_kind, 2, packs, steps, timeout=20.0)
    assert all(told in message for message in messages), messages


def more_ranks_than_tokens() -> None:
    mesh = build_mesh(sp_degree=4)
    spread = ParallelDiT(cases.randomised_dit(cases.tiny_config("adaln"), torch.float64), mesh, cases.fp64("ring", 4))
    clip = torch.zeros(1, 1, 2, 6, 4)
    spread.loss(
        Batch(
            latents=clip,
            noise=clip,
            timestep=torch.zeros(1),
            text=torch.zeros(1, cases.TEXT_TOKENS, 16),
            global_samples=1,
        )
    )


def test_more_ranks_than_tokens_is_an_error(run_distributed):
    with pytest.raises(
        RuntimeError, match=r"sp_degree 4 is more ranks than the sequence has tokens \(3\); use sp_degree 3"
    ):
        run_distributed(more_ranks_than_tokens, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": ()}, "N >= 1 clips"),
        ({"noise": (torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4))}, r"sizes, got latents .* and noise"),
        ({"timestep": torch.zeros(3)}, r"timestep must have one row for each of 2 clips, got \[3\]"),
    ],
)
def test_packed_batches_are_checked(changes, message):
    clips = (torch.zeros(1, 2, 2, 4), torch.zeros(2, 2, 2, 4))
    with pytest.raises(ValueError, match=message):
        PackedBatch(**({"latents": clips, "noise": clips, "timestep": torch.zeros(2), "global_samples": 2} | changes))


def attention_runs(strategy: str, degree: int, policy: str) -> tuple[int, int]:
    """(attention forwards, backwards) of one training step, counted at the kernel's specification."""
    parallel = cases.fp64(strategy, degree, policy=policy)
    mesh = build_mesh(sp_degree=degree, ulysses_degree=parallel.ulysses_degree)
    spread = ParallelDiT(cases.randomised_dit(cases.tiny_config("adaln"), torch.float64), mesh, parallel)
    with (
        mock.patch.object(reference, "attention_fwd", wraps=reference.attention_fwd) as forward,
        mock.patch.object(reference, "attention_bwd", wraps=reference.attention_bwd) as backward,
    ):
        spread.loss(Batch(**cases.samples(1, torch.float64), global_samples=1)).backward()
    return forward.call_count, backward.call_count


@pytest.mark.parametrize(("strategy", "degree"), [("local", 1), *((name, 2) for name in STRATEGIES)])
def test_keep_attention_runs_attention_once(run_distributed, strategy, degree):
    # Two blocks; a ring of two ranks attends to each of two chunks.
    per_step = 4 if strategy in ("ring", "usp") else 2
    for policy, repeats in (("none", 1), ("full", 2), ("keep_attention", 1), ("offload", 1)):
        for forwards, backwards in run_distributed(attention_runs, degree, strategy, degree, policy):
            assert (forwards, backwards) == (per_step * repeats, per_step)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp32_gradients_equal_one_device(run_distributed, strategy):
    parallel = replace(cases.fp64(strategy, 4), precision="fp32")
    check(run_distributed, cases.tiny_config("cross"), parallel, (2, 1), torch.float32)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_may_hold_padding_only(run_distributed, strategy):
    # 9 video tokens on 8 ranks: 2 rows each, ranks 5 to 7 hold none that exists.
    config = cases.tiny_config("adaln", patch_size=(1, 2, 10))
    check(run_distributed, config, cases.fp64(strategy, 8), (2,), torch.float64)


def whole_output(config: DiTConfig, strategy: str, degree: int) -> Tensor:
    model = cases.randomised_dit(config, torch.float64)
    parallel = cases.fp64(strategy, degree)
    data = cases.samples(2, torch.float64)
    mesh = build_mesh(sp_degree=degree, ulysses_degree=parallel.ulysses_degree)
    spread = ParallelDiT(model, mesh, parallel)
    return spread.output(data["latents"], data["timestep"], data["text"])


@pytest.mark.parametrize("conditioning", ["adaln", "cross", "in_context", "published"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_output_is_whole_and_equal_on_every_rank(run_distributed, strategy, conditioning):
    config = cases.tiny_config(conditioning, learn_sigma=conditioning == "adaln")
    reference = run_distributed(whole_output, 1, config, "local", 1)[0]
    assert reference.shape == (2, *cases.LATENT_SHAPE[:-1], config.out_channels)
    for output in run_distributed(whole_output, 4, config, strategy, 4):
        assert relative_error(output, reference) <= PARALLEL_TOLERANCE[torch.float64]


def mismatched_mesh() -> None:
    ParallelDiT(DiT(cases.tiny_config("adaln")), build_mesh(sp_degree=1), cases.fp64("ulysses", 2))


def indivisible_world() -> None:
    build_mesh(sp_degree=2)


def test_a_mesh_that_does_not_fit_is_an_error(run_distributed):
    with pytest.raises(RuntimeError, match="ValueError: the mesh has sp_degree 1, the configuration 2"):
        run_distributed(mismatched_mesh, 2)
    with pytest.raises(RuntimeError, match="sp_degree 2 does not divide the world size 3; degrees that do: 1, 3"):
        run_distributed(indivisible_world, 3)
