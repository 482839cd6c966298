"""The policy of a run that asks for `auto`, or its whole configuration by the planner, from ranks and memory there are.

It is settled before the process group exists: predictions need a process without one.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from longreel.kernels import resolve_attention_provider
from longreel.parallel.config import CHOSEN_BY_PLAN, DTYPES, ParallelConfig
from longreel.parallel.predict.hardware import FIXED_RESERVE_BYTES, FRAGMENTATION_SHARE, GiB, GPUProfile, get_profile
from longreel.parallel.predict.needs import Setting
from longreel.parallel.predict.planner import in_words, plan
from longreel.parallel.predict.policy import choose_policy, known_gpu, under_policy
from longreel.parallel.run_shape import run_shape

if TYPE_CHECKING:
    from longreel.parallel.run_config import TrainConfig

# Of the node's memory for activations, if nothing else is said: the rest is for data, caches and the processes.
HOST_SHARE = 0.5


def with_policy(config: TrainConfig) -> TrainConfig:
    """The run with policy or plan `auto` replaced by what is chosen, and the reason noted; other runs as they are.

    Ranks, and how many of them are on this node, are those torchrun says; one without it.

    Raises:
        ValueError: no policy fits, there is no memory to go by (a CPU without memory_limit_gib), or this
            configuration cannot be predicted.
    """
    parallel = config.parallel
    if config.plan is not None:
        return _planned(config)
    if parallel.policy != "auto":
        return config
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device, name, limit = _device(parallel, "policy 'auto'")
    cuda, host_limit = device.type == "cuda", _host_limit(parallel)
    shape = run_shape(config, parallel.dp_degree(world_size))
    provider = resolve_attention_provider(parallel.attention_provider, device, DTYPES[parallel.precision])
    with warnings.catch_warnings():
        # As in longreel.parallel.launch: nothing here writes into a prediction.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        choice = choose_policy(
            shape.model,
            parallel,
            world_size=world_size,
            grid=shape.grid,
            batch=shape.batch,
            limit_bytes=limit,
            host_limit_bytes=host_limit,
            attention_provider="torch" if provider == "torch" else "sdpa-flash",
            fused_pointwise=cuda,
            gpu=known_gpu(name, world_size),
        )
    # What the choice counted on is what the run is held to.
    budget = host_limit / GiB if choice.policy == "offload" else None
    chosen = under_policy(parallel, choice.policy, host_memory_gib=budget)
    return replace(config, parallel=chosen, policy_reason=choice.reason)


def _planned(config: TrainConfig) -> TrainConfig:
    """The run with the configuration that the planner takes at its own shapes.

    Raises:
        ValueError: nothing fits; there is no memory to go by; what the planner chooses was given as well.
    """
    parallel, default = config.parallel, ParallelConfig()
    for name in CHOSEN_BY_PLAN:
        value = getattr(parallel, name)
        if value != getattr(default, name) and (name, value) != ("policy", "auto"):
            raise ValueError(f"plan 'auto' chooses {name}; leave {name} {value!r} out, or the plan")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    target = None if config.target is None else get_profile(config.target)
    device, name, limit = _device(parallel, "plan 'auto'", target)
    shape = run_shape(config, 1)
    # A GPU that is only planned for has its own attention, whatever this machine would take.
    provider = parallel.attention_provider
    if target is None:
        provider = resolve_attention_provider(provider, device, DTYPES[parallel.precision])
    host_limit = _host_limit(parallel)
    setting = Setting(
        model=shape.model,
        world_size=world_size,
        grid=shape.grid,
        samples=config.batch_size,
        limit_bytes=limit,
        host_limit_bytes=host_limit,
        attention_provider="torch" if provider == "torch" else "sdpa-flash",
        fused_pointwise=target is not None or device.type == "cuda",
        gpu=target or known_gpu(name, world_size),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        found = plan(setting, parallel)
    best = found.best.parallel
    budget = host_limit / GiB if best.policy == "offload" else None
    return replace(
        config, parallel=replace(best, host_memory_gib=budget), policy_reason=f"by the plan: {in_words(found)}"
    )


def _device(parallel: ParallelConfig, option: str, target: GPUProfile | None = None) -> tuple[torch.device, str, int]:
    """This rank's device, the name that its driver gives, and the memory that tensors may take there."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    gib = parallel.memory_limit_gib
    if gib is not None:
        limit = int(gib * GiB)
    elif cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        limit = int(total * (1 - FRAGMENTATION_SHARE)) - FIXED_RESERVE_BYTES
    elif target is not None:
        limit = target.usable_bytes
    elif option.startswith("plan"):
        raise ValueError(
            f"{option} has no device memory to fit on a CPU; give a GPU to plan for (--target h800), or --policy auto "
            "with --memory-limit-gib"
        )
    else:
        raise ValueError(
            f"{option} has no device memory to fit on a CPU; give memory_limit_gib (--memory-limit-gib), or name a "
            "policy"
        )
    return device, torch.cuda.get_device_properties(device).name if cuda else "", limit


def _host_limit(parallel: ParallelConfig) -> int:
    """Bytes of host memory that one rank may hold activations in."""
    return _host_share() if parallel.host_memory_gib is None else int(parallel.host_memory_gib * GiB)


def _host_share() -> int:
    """Bytes of this node's memory that one of its ranks may hold activations in."""
    node = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(HOST_SHARE * node / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
