"""Sequence parallelism of other projects in a strategy's place: their public packages, imported where they are used.

Each is a strategy of ours whose self-attention is theirs, with the same model, engine, data and gate around it. They
run for real or not at all: their code does not run on fake tensors, so nothing predicts or emulates them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from longreel.kernels import attention
from longreel.models.sequence import SequenceLengths, SequenceParallel
from longreel.parallel.config import ParallelConfig, Policy, Precision
from longreel.parallel.mesh import ParallelMesh
from longreel.parallel.strategies import USP

# q, k, v [B, s, H, D] of this rank's tokens -> attention's output, of the same shape.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """An implementation of another project.

    Args:
        packages: what is imported, of the peer and beside it.
        hybrid: splits heads and goes round a ring (as `usp`), else heads only (as `ulysses`).
        needs_cuda: its kernels run on CUDA alone. attention: what attends inside a rank.
        attend: builds its attention for the ranks of a strategy of ours.
        policies: activation policies under which it keeps or recomputes what ours does.
    """

    packages: tuple[str, ...]
    hybrid: bool
    needs_cuda: bool
    attention: str
    attend: Callable[[USP, ParallelMesh], Attend]
    policies: tuple[Policy, ...] = ("none", "full")

    def parallel(self, degree: int, num_heads: int, policy: Policy, precision: Precision) -> ParallelConfig | None:
        """The configuration of ours that it stands in for; None where the degree leaves no ring."""
        hybrids = [u for u in range(2, degree) if degree % u == 0 and num_heads % u == 0]
        if self.hybrid and not hybrids:
            return None
        return ParallelConfig(
            strategy="usp" if self.hybrid else "ulysses",
            sp_degree=degree,
            ulysses_degree=max(hybrids) if self.hybrid else None,
            policy=policy,
            precision=precision,
            attention_provider="sdpa-flash",
        )

    def unavailable(self, device_type: str) -> str | None:
        """Why it cannot run here, None where it can."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} not installed (pip install {' '.join(missing)})"
        if self.needs_cuda and device_type != "cuda":
            return f"attention of {self.packages[0]} runs on CUDA only"
        return None


def _deepspeed(strategy: USP, mesh: ParallelMesh) -> Attend:
    """deepspeed.sequence.layer.DistributedAttention: one all-to-all each for q, k, v and the output."""
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention

    if not deepspeed.comm.is_initialized():
        deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)

    class LocalAttention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return attention(q, k, v, provider=strategy.provider)[0]

    layer = DistributedAttention(LocalAttention(), mesh.grid["sp"].get_group(), scatter_idx=2, gather_idx=1)
    # 0: which dim is the batch.
    return lambda q, k, v: layer(q, k, v, 0)


def _yunchang(strategy: USP, mesh: ParallelMesh) -> Attend:
    """yunchang's LongContextAttention: all-to-alls inside, flash-attn round a ring outside.

    Its ring over PyTorch's own kernels is no choice: in 0.6.4 the backward of that one raises.
    """
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    set_seq_parallel_pg(strategy.ulysses_degree, strategy.ring_degree, dist.get_rank(), dist.get_world_size())
    layer = LongContextAttention(ring_impl_type="basic", attn_type=AttnType.FA)
    return lambda q, k, v: layer(q, k, v, causal=False)


PEERS: dict[str, Peer] = {
    "deepspeed-ulysses": Peer(
        packages=("deepspeed",), hybrid=False, needs_cuda=False, attention="sdpa-flash", attend=_deepspeed
    ),
    "yunchang-usp": Peer(
        packages=("yunchang", "flash_attn"), hybrid=True, needs_cuda=True, attention="flash-attn", attend=_yunchang
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerStrategy(USP):
    """A strategy of ours with another project's self-attention, `theirs`."""

    theirs: Attend

    def self_attention(self, x: Tensor, qkv: nn.Linear, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        """See longreel.models.sequence.SequenceParallel; ValueError for a length that the ranks do not divide."""
        if lengths.valid != lengths.padded:
            raise ValueError(f"seq_len {lengths.valid} is not a multiple of {self.degree} ranks, as a peer needs")
        q, k, v = qkv(x).unflatten(-1, (3, num_heads, -1)).unbind(2)
        return self.theirs(q.contiguous(), k.contiguous(), v.contiguous()).flatten(2)


def peer_strategy(name: str, ours: SequenceParallel, mesh: ParallelMesh) -> PeerStrategy:
    """The peer over the groups of a strategy of ours; every rank of the mesh calls it."""
    assert isinstance(ours, USP)
    shared = {field.name: getattr(ours, field.name) for field in fields(ours)}
    return PeerStrategy(**shared, theirs=PEERS[name].attend(ours, mesh))


def relabelled(counted: dict[str, int]) -> dict[str, int]:
    """Traffic counted around a peer: its exchanges are the sequence's, which their caller does not tell."""
    found = dict(counted)
    for collective in ("all_to_all", "send"):
        if sent := found.pop(f"sharding.{collective}", 0):
            found[f"sequence.{collective}"] = found.get(f"sequence.{collective}", 0) + sent
    return found
