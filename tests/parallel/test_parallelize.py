"""longreel.parallel.parallelize: loss, dX and every dW of a spread DiT equal those of one device."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longreel.kernels import reference
from longreel.kernels.numerics import PARALLEL_TOLERANCE, gradient_errors, relative_error
from longreel.models.config import DiTConfig
from longreel.models.dit import DiT
from longreel.models.patches import grid_coords, patchify
from longreel.models.sequence import SequenceLengths
from longreel.parallel.config import ParallelConfig
from longreel.parallel.engine import full_gradients
from longreel.parallel.mesh import build_mesh
from longreel.parallel.offload import HostStore
from longreel.parallel.parallelize import Batch, PackedBatch, ParallelDiT
from longreel.parallel.strategies import Local

# 45 video tokens, and 51 with the text in the sequence: neither divides by 2, 4 or 8; text does not by 4 or 8.
LATENT_SHAPE = (3, 6, 10, 4)
TEXT_TOKENS = 6

STRATEGIES = ["ulysses", "fastseq", "ring", "usp"]
CONDITIONINGS: dict[str, dict[str, Any]] = {
    "adaln": {"conditioning": "adaln"},
    "cross": {"conditioning": "cross"},
    "in_context": {"conditioning": "in_context"},
    "text_only": {"conditioning": "cross", "text_only": True},
    "published": {"conditioning": "cross", "text_only": True, "cross_layout": "published"},
    "cross_published": {"conditioning": "cross", "cross_layout": "published"},
}


def tiny_config(conditioning: str, **overrides: Any) -> DiTConfig:
    fields = {"depth": 2, "hidden_size": 64, "num_heads": 8, "mlp_ratio": 2.0, "text_dim": 16}
    return DiTConfig(**(fields | {"max_text_tokens": TEXT_TOKENS} | CONDITIONINGS[conditioning] | overrides))


def randomised_dit(config: DiTConfig, dtype: torch.dtype) -> DiT:
    """At initialisation the gates are zero and so is every gradient before the last layer: nothing would be tested."""
    torch.manual_seed(0)
    model = DiT(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def samples(count: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "latents": torch.randn(count, *LATENT_SHAPE, dtype=dtype),
        "noise": torch.randn(count, *LATENT_SHAPE, dtype=dtype),
        "timestep": torch.rand(count, dtype=dtype),
        "text": torch.randn(count, TEXT_TOKENS, 16, dtype=dtype),
    }


def one_device(model: DiT, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient of the latents and of every parameter, written out without longreel.parallel's splitting."""
    model = copy.deepcopy(model)
    latents = data["latents"].clone().requires_grad_()
    t = data["timestep"].reshape(-1, 1, 1, 1, 1)
    noised = patchify((1 - t) * latents + t * data["noise"], model.config.patch_size)
    grid = model.config.grid(*latents.shape[1:4])
    num_tokens = noised.shape[1]
    in_sequence = TEXT_TOKENS if model.config.conditioning == "in_context" else 0
    whole = SequenceLengths(valid=num_tokens + in_sequence, padded=num_tokens + in_sequence)
    prediction = model(
        noised,
        grid_coords(grid, 0, num_tokens, dtype=noised.dtype),
        data["timestep"] * 1000,
        text=data["text"],
        sp=Local(provider="torch"),
        lengths=whole,
        text_lengths=SequenceLengths(valid=TEXT_TOKENS, padded=TEXT_TOKENS),
    )
    target = patchify(data["noise"] - latents, model.config.patch_size)
    loss = (prediction - target).square().mean()
    loss.backward()
    return loss.detach(), latents.grad, {name: p.grad for name, p in model.named_parameters()}


def parity(
    config: DiTConfig, parallel: ParallelConfig, counts: tuple[int, ...], dtype: torch.dtype
) -> dict[str, float]:
    """Largest errors of one step against one device; counts[d] samples are on dp rank d."""
    mesh = build_mesh(sp_degree=parallel.sp_degree, ulysses_degree=parallel.ulysses_degree)
    model = randomised_dit(config, dtype)
    data = samples(sum(counts), dtype)
    loss0, dx0, grads0 = one_device(model, data)

    first = sum(counts[: mesh.dp_rank])
    own = {name: value[first : first + counts[mesh.dp_rank]].clone() for name, value in data.items()}
    own["latents"].requires_grad_()
    # Tiny activations leave the device too.
    spread = ParallelDiT(model, mesh, parallel, store=HostStore(min_bytes=1))
    loss = spread.loss(Batch(**own, global_samples=sum(counts)))
    loss.backward()

    world = dist.get_world_size()
    dx = torch.zeros_like(dx0)
    dx[first : first + counts[mesh.dp_rank]] = own["latents"].grad / world
    dist.all_reduce(dx)
    total = loss.detach() / world
    dist.all_reduce(total)
    errors = gradient_errors(full_gradients(spread.module), grads0)
    return {"loss": relative_error(total, loss0), "dx": relative_error(dx, dx0), "dw": max(errors.values())}


# Clips of one packed sequence: of one token, of sizes that no degree divides, longer and shorter than a rank's part.
CLIP_SHAPES = [(3, 6, 10, 4), (1, 2, 2, 4), (2, 6, 4, 4), (5, 2, 6, 4), (1, 4, 2, 4)]


def packed_parity(
    config: DiTConfig, parallel: ParallelConfig, counts: tuple[int, ...], dtype: torch.dtype
) -> dict[str, float]:
    """Largest errors of one packed step against every clip alone on one device; counts[d] clips are on dp rank d."""
    mesh = build_mesh(sp_degree=parallel.sp_degree, ulysses_degree=parallel.ulysses_degree)
    model = randomised_dit(config, dtype)
    torch.manual_seed(1)
    shapes = CLIP_SHAPES[: sum(counts)]
    latents, noise = ([torch.randn(shape, dtype=dtype) for shape in shapes] for _ in range(2))
    rest = {
        "timestep": torch.rand(len(shapes), dtype=dtype),
        "text": torch.randn(len(shapes), TEXT_TOKENS, 16, dtype=dtype),
    }
    clips = range(len(shapes))
    alone = [
        one_device(
            model,
            {"latents": latents[i][None], "noise": noise[i][None]} | {k: v[i : i + 1] for k, v in rest.items()},
        )
        for i in clips
    ]
    loss0 = torch.stack([loss for loss, _, _ in alone]).mean()
    grads0 = {name: sum(grads[name] for _, _, grads in alone) / len(shapes) for name in alone[0][2]}

    first = sum(counts[: mesh.dp_rank])
    own = slice(first, first + counts[mesh.dp_rank])
    leaves = tuple(clip.clone().requires_grad_() for clip in latents[own])
    spread = ParallelDiT(model, mesh, parallel, store=HostStore(min_bytes=1))
    batch = PackedBatch(
        latents=leaves,
        noise=tuple(noise[own]),
        global_samples=len(shapes),
        **{name: value[own] for name, value in rest.items()},
    )
    loss = spread.loss(batch)
    loss.backward()

    world = dist.get_world_size()
    total = loss.detach() / world
    dist.all_reduce(total)
    dx_error = 0.0
    for i in clips:
        dx = leaves[i - first].grad / world if own.start <= i < own.stop else torch.zeros_like(latents[i])
        dist.all_reduce(dx)
        dx_error = max(dx_error, relative_error(dx, alone[i][1][0] / len(shapes)))
    errors = gradient_errors(full_gradients(spread.module), grads0)
    return {"loss": relative_error(total, loss0), "dx": dx_error, "dw": max(errors.values())}


def world_of(parallel: ParallelConfig, dp: int) -> int:
    return parallel.sp_degree * dp


def check(run_distributed, config: DiTConfig, parallel: ParallelConfig, counts: tuple[int, ...], dtype: torch.dtype):
    for errors in run_distributed(parity, world_of(parallel, len(counts)), config, parallel, counts, dtype):
        assert max(errors.values()) <= PARALLEL_TOLERANCE[dtype], errors


def fp64(strategy: str, degree: int, engine: str = "fsdp2-zero2", policy: str = "none") -> ParallelConfig:
    return ParallelConfig(
        strategy=strategy,
        sp_degree=degree,
        ulysses_degree=max(degree // 2, 1) if strategy == "usp" else None,
        engine=engine,
        policy=policy,
        precision="fp64",
        attention_provider="torch",
    )


# (P, samples of each dp rank): dp ranks hold different numbers of clips.
GRID = [(2, (2,)), (2, (2, 1)), (4, (2,)), (4, (1, 2)), (8, (2,))]
GRID_IDS = [f"P{p}-dp{len(counts)}" for p, counts in GRID]


@pytest.mark.parametrize(("degree", "counts"), GRID, ids=GRID_IDS)
@pytest.mark.parametrize("engine", ["fsdp2-zero2", "ddp"])
@pytest.mark.parametrize("conditioning", ["adaln", "cross", "in_context"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_equal_one_device(run_distributed, strategy, conditioning, engine, degree, counts):
    check(run_distributed, tiny_config(conditioning), fp64(strategy, degree, engine), counts, torch.float64)


@pytest.mark.parametrize("conditioning", ["text_only", "published", "cross_published"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_the_published_regime_equal_one_device(run_distributed, strategy, conditioning):
    check(run_distributed, tiny_config(conditioning), fp64(strategy, 4), (1, 2), torch.float64)


@pytest.mark.parametrize("policy", ["none", "full", "keep_attention", "offload"])
@pytest.mark.parametrize("engine", ["fsdp2-zero2", "fsdp2-zero3", "ddp"])
@pytest.mark.parametrize(("strategy", "degree"), [("local", 1), *((name, 2) for name in STRATEGIES)])
def test_engines_and_policies_equal_one_device(run_distributed, strategy, degree, engine, policy):
    check(run_distributed, tiny_config("in_context"), fp64(strategy, degree, engine, policy), (2, 1), torch.float64)


@pytest.mark.parametrize("policy", ["none", "keep_attention"])
@pytest.mark.parametrize("conditioning", ["adaln", "cross"])
def test_tiled_mlp_gradients_equal_one_device(run_distributed, conditioning, policy):
    # Tiles of 5 rows: neither the rows of a rank nor those of both samples divide.
    parallel = replace(fp64("fastseq", 2, policy=policy), mlp_tile=5)
    check(run_distributed, tiny_config(conditioning), parallel, (2, 1), torch.float64)


@pytest.mark.parametrize(("degree", "counts"), [(2, (5,)), (4, (3, 2)), (8, (5,))], ids=["P2-dp1", "P4-dp2", "P8-dp1"])
@pytest.mark.parametrize("conditioning", ["adaln", "cross", "in_context", "text_only"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_packed_clips_have_the_gradients_of_each_alone(run_distributed, strategy, conditioning, degree, counts):
    arguments = tiny_config(conditioning), fp64(strategy, degree), counts, torch.float64
    for errors in run_distributed(packed_parity, degree * len(counts), *arguments):
        assert max(errors.values()) <= PARALLEL_TOLERANCE[torch.float64], errors


@pytest.mark.parametrize("policy", ["none", "full", "keep_attention", "offload"])
@pytest.mark.parametrize(("strategy", "degree"), [("local", 1), *((name, 2) for name in STRATEGIES)])
def test_packed_clips_under_every_policy(run_distributed, strategy, degree, policy):
    parallel = replace(fp64(strategy, degree, policy=policy), fastseq_overlap="attention", mlp_tile=7)
    for errors in run_distributed(
        packed_parity, 2 * degree, tiny_config("in_context"), parallel, (2, 3), torch.float64
    ):
        assert max(errors.values()) <= PARALLEL_TOLERANCE[torch.float64], errors


def test_packed_clips_and_the_published_layout_exclude_each_other(run_distributed):
    arguments = tiny_config("published"), fp64("ulysses", 2), (5,), torch.float64
    with pytest.raises(RuntimeError, match="cross_layout 'published' takes no packed batch; use cross_layout"):
        run_distributed(packed_parity, 2, *arguments)


def packed_differently(shape: tuple[int, ...]) -> str:
    """What a rank says when rank 1 holds a clip of another shape than the rest."""
    mesh = build_mesh(sp_degree=dist.get_world_size())
    spread = ParallelDiT(randomised_dit(tiny_config("adaln"), torch.float64), mesh, fp64("ring", mesh.sp_degree))
    clips = tuple(torch.zeros(size) for size in ((2, 4, 4, 4), shape if mesh.sp_rank == 1 else (2, 6, 4, 4)))
    batch = PackedBatch(
        latents=clips, noise=clips, timestep=torch.zeros(2), text=torch.zeros(2, TEXT_TOKENS, 16), global_samples=2
    )
    with pytest.raises(ValueError, match="of the packed clips differ") as caught:
        spread.loss(batch)
    return str(caught.value)


def test_ranks_that_pack_other_clips_all_say_so(run_distributed):
    said = set(run_distributed(packed_differently, 4, (2, 8, 4, 4)))
    assert said == {
        "cu_seqlens of the packed clips differ between the 4 ranks of a group, which must hold the same: "
        "ranks 0, 2, 3: [0, 8, 20]; rank 1: [0, 8, 24]"
    }
    # As many tokens, another shape.
    (message,) = set(run_distributed(packed_differently, 4, (2, 4, 6, 4)))
    assert "patches (t, h, w) of the packed clips differ" in message


def more_ranks_than_tokens() -> None:
    mesh = build_mesh(sp_degree=4)
    spread = ParallelDiT(randomised_dit(tiny_config("adaln"), torch.float64), mesh, fp64("ring", 4))
    clip = torch.zeros(1, 1, 2, 6, 4)
    spread.loss(
        Batch(latents=clip, noise=clip, timestep=torch.zeros(1), text=torch.zeros(1, TEXT_TOKENS, 16), global_samples=1)
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
    parallel = fp64(strategy, degree, policy=policy)
    mesh = build_mesh(sp_degree=degree, ulysses_degree=parallel.ulysses_degree)
    spread = ParallelDiT(randomised_dit(tiny_config("adaln"), torch.float64), mesh, parallel)
    with (
        mock.patch.object(reference, "attention_fwd", wraps=reference.attention_fwd) as forward,
        mock.patch.object(reference, "attention_bwd", wraps=reference.attention_bwd) as backward,
    ):
        spread.loss(Batch(**samples(1, torch.float64), global_samples=1)).backward()
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
    parallel = replace(fp64(strategy, 4), precision="fp32")
    check(run_distributed, tiny_config("cross"), parallel, (2, 1), torch.float32)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_rank_may_hold_padding_only(run_distributed, strategy):
    # 9 video tokens on 8 ranks: 2 rows each, ranks 5 to 7 hold none that exists.
    config = tiny_config("adaln", patch_size=(1, 2, 10))
    check(run_distributed, config, fp64(strategy, 8), (2,), torch.float64)


def bf16_inputs() -> dict[str, Any]:
    mesh = build_mesh(sp_degree=2)
    model = randomised_dit(tiny_config("cross"), torch.float32)
    seen: dict[str, Any] = {}
    model.time_embed.register_forward_pre_hook(lambda module, args: seen.update(timestep=args[0]))
    parallel = ParallelConfig(strategy="ulysses", sp_degree=2, precision="bf16")
    spread = ParallelDiT(model, mesh, parallel)
    spread.module.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0], coords=args[1]))
    spread.module.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0]))
    data = samples(2, torch.float32) | {"timestep": torch.tensor([0.999, 0.25])}
    # A clean sample without noise: what is left of the loss is the target, to fp32 accuracy or not.
    loss = spread.loss(Batch(**data, global_samples=2))
    loss.backward()
    return {
        "timestep": seen["timestep"].tolist(),
        "dtypes": {name: value.dtype for name, value in seen.items()},
        "loss": loss.dtype,
        "grad": next(spread.parameters()).grad.dtype,
        "master": next(spread.parameters()).dtype,
    }


def test_bf16_keeps_timesteps_positions_and_targets_in_fp32(run_distributed):
    for seen in run_distributed(bf16_inputs, 2):
        assert seen["timestep"] == pytest.approx([999.0, 250.0], abs=1e-3)
        assert seen["dtypes"] == {
            "timestep": torch.float32,
            "tokens": torch.float32,
            "coords": torch.float32,
            "hidden": torch.bfloat16,
        }
        assert (seen["loss"], seen["grad"], seen["master"]) == (torch.float32,) * 3


def bf16_gradient_error(strategy: str, degree: int) -> tuple[float, set[torch.dtype]]:
    """Worst gradient of a bf16 step against fp32 on one device, and the dtypes gradients are reduced in."""
    model = randomised_dit(tiny_config("cross"), torch.float32)
    data = samples(2, torch.float32)
    _, _, reference = one_device(model, data)
    parallel = ParallelConfig(strategy=strategy, sp_degree=degree, precision="bf16", attention_provider="torch")
    spread = ParallelDiT(model, build_mesh(sp_degree=degree), parallel)
    seen: set[torch.dtype] = set()
    # PyTorch 2.13 renamed the collective.
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    reduce_scatter, sharding = getattr(dist, name), spread.mesh.flat.get_group()

    def watch(*args: Any, **kwargs: Any):
        if kwargs.get("group") is sharding:
            seen.update(value.dtype for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return reduce_scatter(*args, **kwargs)

    with mock.patch.object(dist, name, watch):
        spread.loss(Batch(**data, global_samples=2)).backward()
    return max(gradient_errors(full_gradients(spread.module), reference).values()), seen


def test_bf16_gradients_are_as_good_on_many_ranks_as_on_one(run_distributed):
    one, _ = run_distributed(bf16_gradient_error, 1, "local", 1)[0]
    for strategy in ("ulysses", "fastseq"):
        for error, reduced_in in run_distributed(bf16_gradient_error, 8, strategy, 8):
            assert error <= 1.5 * one, strategy
            assert reduced_in == {torch.float32}, strategy


def fp16_engine(strategy: str = "ulysses", degree: int = 2) -> ParallelDiT:
    parallel = ParallelConfig(strategy=strategy, sp_degree=degree, precision="fp16", attention_provider="torch")
    model = randomised_dit(tiny_config("cross"), torch.float32)
    spread = ParallelDiT(model, build_mesh(sp_degree=degree), parallel)
    spread.engine.attach(torch.optim.AdamW(spread.parameters(), lr=1e-2))
    return spread


def fp16_gradient_error(strategy: str, degree: int) -> tuple[float, float]:
    """Worst gradient of an fp16 step against fp32 on one device, and the scale of its loss."""
    data = samples(2, torch.float32)
    _, _, reference = one_device(randomised_dit(tiny_config("cross"), torch.float32), data)
    spread = fp16_engine(strategy, degree)
    spread.engine.backward(spread.loss(Batch(**data, global_samples=2)))
    scale = spread.engine.loss_scale
    assert scale is not None
    return max(gradient_errors(spread.engine.full_gradients(), reference).values()), scale


def test_fp16_gradients_are_as_good_on_many_ranks_as_on_one(run_distributed):
    one, _ = run_distributed(fp16_gradient_error, 1, "local", 1)[0]
    for strategy in ("ulysses", "fastseq"):
        for error, scale in run_distributed(fp16_gradient_error, 4, strategy, 4):
            assert error <= 1.5 * one < 0.02, strategy
            assert scale == 2**16


def fp16_overflow_on_one_shard() -> tuple[bool, bool, list[float]]:
    """Whether parameters moved in a step that overflowed on rank 1 alone, whether in the next, and scales."""
    spread = fp16_engine()
    data = samples(2, torch.float32)
    before = [p.to_local().clone() for p in spread.parameters()]
    scales, moved = [spread.engine.loss_scale], []
    for overflows in (True, False):
        spread.engine.backward(spread.loss(Batch(**data, global_samples=2)))
        if overflows and spread.mesh.sp_rank == 1:
            next(spread.parameters()).grad.to_local().view(-1)[0] = float("inf")
        spread.engine.step()
        moved.append(any(not torch.equal(p.to_local(), q) for p, q in zip(spread.parameters(), before, strict=True)))
        scales.append(spread.engine.loss_scale)
    return *moved, scales


def test_an_fp16_overflow_on_one_shard_skips_the_step_on_all(run_distributed):
    for result in run_distributed(fp16_overflow_on_one_shard, 2):
        assert result == (False, True, [2.0**16, 2.0**15, 2.0**15])


def zero_output_loss() -> tuple[float, float]:
    """At initialisation the model predicts zero, so the loss is the mean square of the target alone."""
    mesh = build_mesh(sp_degree=1)
    torch.manual_seed(0)
    model = DiT(tiny_config("adaln"))
    spread = ParallelDiT(model, mesh, ParallelConfig(precision="bf16"))
    data = samples(1, torch.float32)
    loss = spread.loss(Batch(**data, global_samples=1))
    return loss.item(), (data["noise"] - data["latents"]).double().square().mean().item()


def test_bf16_targets_are_not_rounded(run_distributed):
    # Rounding the target to bf16 moves the loss by 1e-3 of itself.
    loss, expected = run_distributed(zero_output_loss, 1)[0]
    assert loss == pytest.approx(expected, rel=1e-6)


def whole_velocity(config: DiTConfig, strategy: str, degree: int) -> Tensor:
    model = randomised_dit(config, torch.float64)
    parallel = fp64(strategy, degree)
    data = samples(2, torch.float64)
    mesh = build_mesh(sp_degree=degree, ulysses_degree=parallel.ulysses_degree)
    spread = ParallelDiT(model, mesh, parallel)
    return spread.velocity(data["latents"], data["timestep"], data["text"])


@pytest.mark.parametrize("conditioning", ["adaln", "in_context", "published"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_velocity_is_whole_and_equal_on_every_rank(run_distributed, strategy, conditioning):
    config = tiny_config(conditioning, learn_sigma=conditioning == "adaln")
    reference = run_distributed(whole_velocity, 1, config, "local", 1)[0]
    assert reference.shape == (2, *LATENT_SHAPE)
    for velocity in run_distributed(whole_velocity, 4, config, strategy, 4):
        assert relative_error(velocity, reference) <= PARALLEL_TOLERANCE[torch.float64]


def mismatched_mesh() -> None:
    ParallelDiT(DiT(tiny_config("adaln")), build_mesh(sp_degree=1), fp64("ulysses", 2))


def indivisible_world() -> None:
    build_mesh(sp_degree=2)


def test_a_mesh_that_does_not_fit_is_an_error(run_distributed):
    with pytest.raises(RuntimeError, match="ValueError: the mesh has sp_degree 1, the configuration 2"):
        run_distributed(mismatched_mesh, 2)
    with pytest.raises(RuntimeError, match="sp_degree 2 does not divide the world size 3; degrees that do: 1, 3"):
        run_distributed(indivisible_world, 3)
