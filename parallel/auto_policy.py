"""The activation policy of a run that asks for `auto`, from the ranks and the memory there are.

It is settled before the process group exists: predictions need a process without one.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from longreel.kernels import resolve_attention_provider
from longreel.parallel.config import DTYPES
from longreel.parallel.predict.hardware import FIXED_RESERVE_BYTES, FRAGMENTATION_SHARE, GiB
from longreel.parallel.predict.policy import choose_policy, known_gpu, under_policy

if TYPE_CHECKING:
    from longreel.parallel.run_config import TrainConfig

# Of the node's memory for activations, if nothing else is said: the rest is for data, caches and the processes.
HOST_SHARE = 0.5


def with_policy(config: TrainConfig) -> TrainConfig:
    """The run with policy `auto` replaced by the one chosen, and the reason noted; other runs as they are.

    Ranks, and how many of them are on this node, are those torchrun says; one without it.

    Raises:
        ValueError: no policy fits, there is no memory to go by (a CPU without memory_limit_gib), or this
            configuration cannot be predicted.
    """
    parallel = config.parallel
    if parallel.policy != "auto":
        return config
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    gib = parallel.memory_limit_gib
    if gib is None and not cuda:
        raise ValueError(
            "policy 'auto' has no device memory to fit on a CPU; give memory_limit_gib (--memory-limit-gib), or name a "
            "policy"
        )
    name = ""
    limit = int((gib or 0) * GiB)
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        name = properties.name
        if gib is None:
            limit = int(properties.total_memory * (1 - FRAGMENTATION_SHARE)) - FIXED_RESERVE_BYTES
    host = parallel.host_memory_gib
    host_limit = _host_share() if host is None else int(host * GiB)
    model = config.model.build()
    provider = resolve_attention_provider(parallel.attention_provider, device, DTYPES[parallel.precision])
    with warnings.catch_warnings():
        # As in longreel.parallel.launch: nothing here writes into a prediction.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        choice = choose_policy(
            model,
            parallel,
            world_size=world_size,
            grid=model.grid(config.num_frames, config.height, config.width),
            batch=-(-config.batch_size // parallel.dp_degree(world_size)),
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


def _host_share() -> int:
    """Bytes of this node's memory that one of its ranks may hold activations in."""
    node = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(HOST_SHARE * node / int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
