"""Sequence-parallel strategies: implementations of longreel.models.sequence.SequenceParallel."""

from __future__ import annotations

from longreel.models.sequence import SequenceParallel
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.strategies.fastseq import FastSeq
from longreel.parallel.strategies.local import Local
from longreel.parallel.strategies.ulysses import Ulysses

__all__ = ["FastSeq", "Local", "Ulysses", "build_strategy"]


def build_strategy(config: ParallelConfig, mesh: ParallelMesh) -> SequenceParallel:
    """The strategy that config names, over the mesh's `sp` axis."""
    if config.strategy == "local":
        return Local(provider=config.attention_provider)
    kind = Ulysses if config.strategy == "ulysses" else FastSeq
    return kind(group=mesh.sp_group, degree=mesh.sp_degree, provider=config.attention_provider)
