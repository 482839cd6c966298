"""Where an op record comes from, beyond bench.provenance: GPU, driver, versions of the peers, the source itself."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch

from longreel.bench import provenance
from longreel.bench.nvml import driver_version
from longreel.kernels.triton_common import interpreting

_PEERS = ("flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel")
# What decides an op's figure.
_SOURCE = ("kernels", "bench")


def device_words(device: torch.device) -> str:
    """The device in words, the same in every record made on it; interpreted kernels say so, as they say no speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = provenance.num_cores()
    return f"CPU with {cores} core{'s' if cores > 1 else ''}" + (", Triton interpreted" if interpreting() else "")


def gather(command: Sequence[str], device: torch.device, *, commit: str | None = None) -> dict[str, Any]:
    """Provenance of every op record of a process.

    Args:
        command: program and arguments. device: what is timed.
        commit: of the tree, for a copy of it that is no git checkout.
    """
    found = provenance.gather(command)
    if commit is not None and found["commit"].startswith("unknown"):
        found["commit"] = commit
    found["source"] = provenance.source_hash(_SOURCE)
    found["versions"] |= {name: version for name in _PEERS if (version := _version(name)) is not None}
    keep = ("cpu", "cores", "platform")
    found["environment"] = {name: found["environment"][name] for name in keep} | _device_facts(device)
    return found


def _device_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": device_words(device)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "device_memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver_version(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
