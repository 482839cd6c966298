"""Policy `auto`: the cheapest activation policy whose predicted memory fits.

Every policy is tried by the storage-lifetime predictor (longreel.parallel.predict.step) on fake tensors, so that
nothing is allocated and no process group is needed; equal arguments choose the same on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig, Policy
from longreel.parallel.predict.hardware import PROFILES, GiB, GPUProfile
from longreel.parallel.predict.predict import trace_shape
from longreel.parallel.predict.roofline import step_time

# From what is recomputed and moved least to most: the order of cost where the GPU's rates are not known.
ORDER: tuple[Policy, ...] = ("none", "keep_attention", "full", "offload")
_TILE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyNeed:
    """What a step under one policy needs of one rank.

    Args:
        policy: its name. device_bytes: peak of live tensors. host_bytes: host memory for activations, whole slabs.
        seconds: predicted time of a step, None where the rates are not known.
        fits: both within their limits.
    """

    policy: Policy
    device_bytes: int
    host_bytes: int
    seconds: float | None
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyChoice:
    """The policy chosen, in one line why, and what was tried."""

    policy: Policy
    reason: str
    needs: tuple[PolicyNeed, ...]


def known_gpu(device_name: str, world_size: int) -> GPUProfile | None:
    """The profile of a CUDA device by the name its driver gives; None for others, and beyond the links of one node."""
    words = re.split(r"[^A-Z0-9]+", device_name.upper())
    profile = next((profile for name, profile in PROFILES.items() if name in words), None)
    return profile if profile is not None and world_size <= profile.gpus_per_node else None


def under_policy(parallel: ParallelConfig, policy: Policy, *, host_memory_gib: float | None = None) -> ParallelConfig:
    """A configuration of policy `auto` with the policy named, without what the policy does not take."""
    return replace(
        parallel,
        policy=policy,
        host_memory_gib=host_memory_gib,
        memory_limit_gib=None,
        fastseq_keep_gathered=parallel.fastseq_keep_gathered and policy in ("none", "full"),
    )


def choose_policy(
    model: DiTConfig,
    parallel: ParallelConfig,
    *,
    world_size: int,
    grid: tuple[int, int, int],
    batch: int,
    limit_bytes: int,
    host_limit_bytes: int,
    attention_provider: str = "sdpa-flash",
    fused_pointwise: bool = True,
    gpu: GPUProfile | None = None,
) -> PolicyChoice:
    """The cheapest policy that fits.

    Cheapest by predicted time where the GPU is known and precision is bf16, which its rates are of; else the first of
    ORDER.

    Args:
        model: the DiT. parallel: how it is spread, whatever its policy.
        world_size: ranks of the run. grid: patches (t, h, w) of a sample. batch: samples of an SP group, the largest.
        limit_bytes: memory that the tensors of one rank may take. host_limit_bytes: the same in host memory.
        attention_provider: `sdpa-flash` for any kernel that keeps no scores, `torch` for the eager specification.
        fused_pointwise: see longreel.parallel.predict.predict.PredictionCase.
        gpu: profile with the rates of the GPUs.

    Raises:
        ValueError: no policy fits; the engine or precision cannot be predicted; or a process group is initialised.
    """
    if not parallel.engine.startswith("fsdp2"):
        raise ValueError(
            f"policy 'auto' cannot foresee the memory of engine {parallel.engine!r}, which does not run on fake "
            f"tensors; name a policy ({', '.join(ORDER)}), or use engine fsdp2-zero2 or fsdp2-zero3"
        )
    if parallel.precision == "fp64":
        raise ValueError(
            f"policy 'auto' cannot foresee precision fp64, which has no fake run; name a policy ({', '.join(ORDER)})"
        )
    parallel.check_heads(model.num_heads)
    parallel.dp_degree(world_size)
    timed = gpu if parallel.precision == "bf16" else None
    needs: list[PolicyNeed] = []
    for policy in ORDER:
        tried = replace(under_policy(parallel, policy), attention_provider=attention_provider)
        trace = trace_shape(model, tried, world_size, grid, batch, fused_pointwise)
        seconds = None
        if timed is not None:
            seconds = step_time(trace.costs, timed, group_sizes=trace.group_sizes, host_bytes=trace.host_bytes).seconds
        fits = trace.peak <= limit_bytes and trace.pinned_bytes <= host_limit_bytes
        needs.append(
            PolicyNeed(
                policy=policy, device_bytes=trace.peak, host_bytes=trace.pinned_bytes, seconds=seconds, fits=fits
            )
        )
        if fits and timed is None:
            break
    fitting = [need for need in needs if need.fits]
    limits = f"{limit_bytes / GiB:.4g} GiB per rank"
    if not fitting:
        raise ValueError(
            f"policy 'auto': none fits {limits}: {_listed(needs)} ({host_limit_bytes / GiB:.4g} GiB of host memory "
            f"allowed); what would help: {', '.join(_helps(needs, parallel, world_size, batch, limit_bytes))}"
        )
    # Of equal times the one with less to recompute and to move, which comes first.
    chosen = min(fitting, key=lambda need: need.seconds or 0.0)
    measure = "least that is recomputed and moved" if timed is None else f"shortest predicted step on {timed.name}"
    reason = f"{chosen.policy}: fits {limits}, {measure}; predicted: {_listed(needs)}"
    return PolicyChoice(policy=chosen.policy, reason=reason, needs=tuple(needs))


def _listed(needs: Sequence[PolicyNeed]) -> str:
    """What each policy needs, in words."""
    parts = []
    for need in needs:
        text = f"{need.policy} {need.device_bytes / GiB:.4g} GiB"
        if need.host_bytes:
            text += f" and {need.host_bytes / GiB:.4g} GiB of host memory"
        parts.append(text + (f" in {need.seconds:.3g} s" if need.seconds is not None else ""))
    return ", ".join(parts)


def _helps(
    needs: Sequence[PolicyNeed], parallel: ParallelConfig, world_size: int, batch: int, limit_bytes: int
) -> list[str]:
    """What would lower the need, of what this run does not use yet."""
    helps = []
    if any(need.device_bytes <= limit_bytes for need in needs):
        helps.append("a larger host_memory_gib")
    if parallel.sp_degree < world_size:
        helps.append(f"an sp_degree up to {world_size}")
    helps.append("more ranks")
    if parallel.engine != "fsdp2-zero3":
        helps.append("engine fsdp2-zero3")
    if parallel.mlp_tile is None:
        helps.append(f"mlp_tile {_TILE}")
    if batch > 1:
        helps.append("a smaller batch_size")
    helps.append("shorter clips")
    return helps
