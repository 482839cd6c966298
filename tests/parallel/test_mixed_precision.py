"""Half precision: what stays in fp32, how good gradients are on many ranks, and the loss scale of fp16."""

from __future__ import annotations

from typing import Any
from unittest import mock

import gradient_cases as cases
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longreel.kernels.numerics import gradient_errors
from longreel.models.dit import DiT
from longreel.parallel.config import ParallelConfig
from longreel.parallel.engine import full_gradients
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import Batch, ParallelDiT


def bf16_inputs() -> dict[str, Any]:
    mesh = build_mesh(sp_degree=2)
    model = cases.randomised_dit(cases.tiny_config("cross"), torch.float32)
    seen: dict[str, Any] = {}
    model.time_embed.register_forward_pre_hook(lambda module, args: seen.update(timestep=args[0]))
    parallel = ParallelConfig(strategy="ulysses", sp_degree=2, precision="bf16")
    spread = ParallelDiT(model, mesh, parallel)
    spread.module.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0], coords=args[1]))
    spread.module.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0]))
    data = cases.samples(2, torch.float32) | {"timestep": torch.tensor([0.999, 0.25])}
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
    model = cases.randomised_dit(cases.tiny_config("cross"), torch.float32)
    data = cases.samples(2, torch.float32)
    _, _, reference = cases.one_device(model, data)
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
    model = cases.randomised_dit(cases.tiny_config("cross"), torch.float32)
    spread = ParallelDiT(model, build_mesh(sp_degree=degree), parallel)
    spread.engine.attach(torch.optim.AdamW(spread.parameters(), lr=1e-2))
    return spread


def fp16_gradient_error(strategy: str, degree: int) -> tuple[float, float]:
    """Worst gradient of an fp16 step against fp32 on one device, and the scale of its loss."""
    data = cases.samples(2, torch.float32)
    _, _, reference = cases.one_device(cases.randomised_dit(cases.tiny_config("cross"), torch.float32), data)
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
    data = cases.samples(2, torch.float32)
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
    model = DiT(cases.tiny_config("adaln"))
    spread = ParallelDiT(model, mesh, ParallelConfig(precision="bf16"))
    data = cases.samples(1, torch.float32)
    loss = spread.loss(Batch(**data, global_samples=1))
    return loss.item(), (data["noise"] - data["latents"]).double().square().mean().item()


def test_bf16_targets_are_not_rounded(run_distributed):
    # Rounding the target to bf16 moves the loss by 1e-3 of itself.
    loss, expected = run_distributed(zero_output_loss, 1)[0]
    assert loss == pytest.approx(expected, rel=1e-6)
