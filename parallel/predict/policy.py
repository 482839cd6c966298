"""Policy `auto`: the cheapest activation policy whose predicted memory fits.

Every policy is tried by the storage-lifetime predictor (longreel.parallel.predict.step) on fake tensors, so that
nothing is allocated and no process group is needed; equal arguments choose the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig, Policy
from longreel.parallel.predict.hardware import GiB, GPUProfile, profile_of_device
from longreel.parallel.predict.needs import Need, Setting

# From what is recomputed and moved least to most: the order of cost where the GPU's rates are not known.
ORDER: tuple[Policy, ...] = ("none", "keep_attention", "full", "offload")
_TILE = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyChoice:
    """The policy chosen, in one line why, and what was tried."""

    policy: Policy
    reason: str
    needs: tuple[Need, ...]


def known_gpu(device_name: str, world_size: int) -> GPUProfile | None:
    """The profile of a CUDA device by the name its driver gives; None for others, and for parts of several nodes."""
    profile = profile_of_device(device_name)
    if profile is None or (world_size > profile.gpus_per_node and world_size % profile.gpus_per_node):
        return None
    return profile


def under_policy(parallel: ParallelConfig, policy: Policy, *, host_memory_gib: float | None = None) -> ParallelConfig:
    """A configuration of policy `auto` with the policy named, without what the policy does not take."""
    return replace(
        parallel,
        policy=policy,
        host_memory_gib=host_memory_gib,
        memory_limit_gib=None,
        fastseq_keep_gathered=parallel.fastseq_keep_gathered and policy in ("none", "full"),
    )


def check_foreseeable(parallel: ParallelConfig, option: str) -> None:
    """ValueError for an engine or a precision that does not run on tensors without data; option names who asks."""
    if not parallel.engine.startswith("fsdp2"):
        raise ValueError(
            f"{option} cannot foresee the memory of engine {parallel.engine!r}, which does not run on fake "
            f"tensors; name a policy ({', '.join(ORDER)}), or use engine fsdp2-zero2 or fsdp2-zero3"
        )
    if parallel.precision == "fp64":
        raise ValueError(
            f"{option} cannot foresee precision fp64, which has no fake run; name a policy ({', '.join(ORDER)})"
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
        limit_bytes, host_limit_bytes, attention_provider, fused_pointwise, gpu: see longreel.parallel.predict.needs.

    Raises:
        ValueError: no policy fits; the engine or precision cannot be predicted; or a process group is initialised.
    """
    check_foreseeable(parallel, "policy 'auto'")
    parallel.check_heads(model.num_heads)
    setting = Setting(
        model=model,
        world_size=world_size,
        grid=grid,
        samples=batch * parallel.dp_degree(world_size),
        limit_bytes=limit_bytes,
        host_limit_bytes=host_limit_bytes,
        attention_provider=attention_provider,
        fused_pointwise=fused_pointwise,
        gpu=gpu,
    )
    timed = setting.gpu if setting.is_timed(parallel) else None
    needs: list[Need] = []
    for policy in ORDER:
        need = setting.need(under_policy(parallel, policy))
        needs.append(need)
        if need.fits and timed is None:
            break
    fitting = [need for need in needs if need.fits]
    limits = f"{setting.limit_bytes / GiB:.4g} GiB per rank"
    if not fitting:
        raise ValueError(
            f"policy 'auto': none fits {limits}: {_listed(needs)} ({setting.host_limit_bytes / GiB:.4g} GiB of host "
            f"memory allowed); what would help: {', '.join(_helps(needs, parallel, setting))}"
        )
    # Of equal times the one with less to recompute and to move, which comes first.
    chosen = min(fitting, key=lambda need: need.seconds or 0.0)
    measure = "least that is recomputed and moved" if timed is None else f"shortest predicted step on {timed.name}"
    reason = f"{chosen.policy}: fits {limits}, {measure}; predicted: {_listed(needs)}"
    return PolicyChoice(policy=chosen.policy, reason=reason, needs=tuple(needs))


def _listed(needs: Sequence[Need]) -> str:
    """What each policy needs, in words."""
    parts = []
    for need in needs:
        text = f"{need.policy} {need.device_bytes / GiB:.4g} GiB"
        if need.host_bytes:
            text += f" and {need.host_bytes / GiB:.4g} GiB of host memory"
        parts.append(text + (f" in {need.seconds:.3g} s" if need.seconds is not None else ""))
    return ", ".join(parts)


def _helps(needs: Sequence[Need], parallel: ParallelConfig, setting: Setting) -> list[str]:
    """What would lower the need, of what this run does not use yet."""
    helps = []
    if any(need.device_bytes <= setting.limit_bytes for need in needs):
        helps.append("a larger host_memory_gib")
    if parallel.sp_degree < setting.world_size:
        helps.append(f"an sp_degree up to {setting.world_size}")
    helps.append("more ranks")
    if parallel.engine != "fsdp2-zero3":
        helps.append("engine fsdp2-zero3")
    if parallel.mlp_tile is None:
        helps.append(f"mlp_tile {_TILE}")
    if setting.samples_of(parallel) > parallel.dp_degree(setting.world_size):
        helps.append("a smaller batch_size")
    helps.append("shorter clips")
    return helps
