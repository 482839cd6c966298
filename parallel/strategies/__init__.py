"""Sequence-parallel strategies: implementations of longreel.models.sequence.SequenceParallel."""

from __future__ import annotations

import torch

from longreel.models.sequence import SequenceParallel
from longreel.parallel.comm import symmetric_key
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.peer_access import require_peer_access
from longreel.parallel.strategies.fastseq import FastSeq
from longreel.parallel.strategies.local import Local
from longreel.parallel.strategies.usp import USP

__all__ = ["SELF_ATTENTION_OPS", "USP", "FastSeq", "Local", "build_strategy"]

# What runs self-attention under each strategy: the ops that an activation policy may keep the results of.
SELF_ATTENTION_OPS = (
    torch.ops.longreel.attention_packed.default,
    torch.ops.longreel.exchange_attention.default,
    torch.ops.longreel.fastseq_attention.default,
)


def build_strategy(config: ParallelConfig, mesh: ParallelMesh) -> SequenceParallel:
    """The strategy that config names, over the mesh's `sp` axis.

    Raises:
        ValueError: the ranks cannot read each other's memory, which exchange `symmetric` needs.
    """
    if config.strategy == "local":
        return Local(provider=config.attention_provider)
    group, degree, provider = mesh.sp_group, mesh.sp_degree, config.attention_provider
    lean = config.policy in ("keep_attention", "offload")
    # The group that chunks go round in.
    chunks_group = mesh.ring_group if config.strategy == "usp" else group
    if config.exchange == "symmetric":
        require_peer_access(chunks_group)
        chunks_group = symmetric_key(chunks_group)
    if config.strategy == "fastseq":
        return FastSeq(
            group=chunks_group,
            degree=degree,
            provider=provider,
            lean=lean,
            overlap=config.fastseq_overlap,
            keep_gathered=config.fastseq_keep_gathered,
        )
    ulysses_group, ring_group = {
        "ulysses": (group, ""),
        "ring": ("", chunks_group),
        "usp": (mesh.ulysses_group, chunks_group),
    }[config.strategy]
    return USP(
        group=group,
        degree=degree,
        provider=provider,
        ulysses_group=ulysses_group,
        ulysses_degree=config.heads_degree,
        ring_group=ring_group,
        lean=lean,
        head_chunks=config.head_chunks,
    )
