"""Ring attention, not causal: queries stay, keys and values go round the ranks while attention runs.

Forward, in step s of P: attention over the keys of rank r - s, which go on to r + 1 meanwhile; partial outputs are
merged by their lse in step order, in fp32. Backward sends keys and values round again; each rank computes its
queries' share of dK and dV of every chunk and returns it to the owner, who sums the shares in step order, in fp32.
(Accumulators that travel with the chunk would go one step further and, in fp32, weigh twice as much.)

Sent per layer and rank, M = B S C elements: forward 2 M (P - 1) / P, backward 4 M (P - 1) / P.
Source: Liu et al. 2023, Ring Attention (arXiv:2310.01889), for the rotation; FlashAttention's algebra for the merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from longreel.kernels.attention import attention_backward_op, attention_op
from longreel.kernels.lse_merge import merge_attention_op
from longreel.kernels.pointwise import resolve_pointwise_provider
from longreel.kernels.reference import compute_dtype
from longreel.parallel import comm
from longreel.parallel.strategies.layout import pad_tokens
from longreel.parallel.strategies.segments import kernel_offsets, part_offsets, score_pairs

# Parts of so many sets of lengths.
_KEPT = 32


def ring_attend(
    q: Tensor,
    kv: Tensor,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over all ranks' keys.

    Args:
        q: [B, n, H, D], queries that exist; n may differ between ranks and be 0.
        kv: [B, l, 2, H, D], this rank's keys and values, padded to one length on all ranks.
        offsets_q: cu_seqlens, on the host, of this rank's queries. offsets_k: of the keys of all ranks.

    Returns:
        out [B, n, H, D] and lse [B, H, n].
    """
    dtype = compute_dtype(q.dtype)
    merge = resolve_pointwise_provider("auto", q)
    parts = _meeting_parts(tuple(offsets_q), tuple(offsets_k), kv.shape[1], comm.group_size(group))
    segments_q = kernel_offsets(offsets_q, q)
    merged: tuple[Tensor, Tensor] | None = None
    for owner, chunk in comm.rotating_chunks(kv, group):
        chunk_k = parts[owner]
        if chunk_k is None:
            continue
        k, v = chunk.narrow(1, 0, chunk_k[-1]).unbind(2)
        out, lse = attention_op(q, k, v, scale, segments_q, kernel_offsets(chunk_k, q), provider)
        if out.dtype != dtype:
            out = out.to(dtype)
        merged = (out, lse) if merged is None else merge_attention_op(*merged, out, lse, merge)
    if merged is None:
        batch, rows, heads, _ = q.shape
        nothing = torch.full((batch, heads, rows), float("-inf"), dtype=dtype, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), nothing
    out, lse = merged
    return out.to(q.dtype), lse


@lru_cache(_KEPT)
def _meeting_parts(
    offsets_q: tuple[int, ...], offsets_k: tuple[int, ...], rows: int, size: int
) -> tuple[tuple[int, ...] | None, ...]:
    """Of each rank's part of `rows` keys its offsets, or None where no query of offsets_q meets one of them."""
    parts = [part_offsets(offsets_k, rows, owner) for owner in range(size)]
    return tuple(part if score_pairs(offsets_q, part) else None for part in parts)


def ring_attend_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
    group: str,
) -> tuple[Tensor, Tensor]:
    """dq [B, n, H, D] and dkv [B, l, 2, H, D] of ring_attend, dkv summed over the ranks, 0 in the padding.

    Args:
        dout: [B, n, H, D]. out, lse: of the whole attention: each chunk's probabilities are exp(score - lse).
    """
    size = comm.group_size(group)
    dtype = compute_dtype(q.dtype)
    parts = _meeting_parts(tuple(offsets_q), tuple(offsets_k), kv.shape[1], size)
    segments_q = kernel_offsets(offsets_q, q)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    dkv = torch.zeros(kv.shape, dtype=dtype, device=kv.device)
    flight: comm.Exchange | None = None
    for step, (owner, chunk) in enumerate(comm.rotating_chunks(kv, group)):
        chunk_k = parts[owner]
        if chunk_k is not None:
            k, v = chunk[:, : chunk_k[-1]].unbind(2)
            segments = segments_q, kernel_offsets(chunk_k, q)
            dq_share, *dkv_share = attention_backward_op(dout, None, q, k, v, out, lse, scale, *segments, provider)
            dq += dq_share
            share = pad_tokens(torch.stack(dkv_share, dim=2), kv.shape[1])
        else:
            share = torch.zeros(kv.shape, dtype=kv.dtype, device=kv.device)
        if flight is not None:
            dkv += flight.wait()
        if step:
            # To the owner, r - step; in its place comes this rank's own share from r + step.
            flight = comm.start_exchange(share, torch.empty_like(share), step=size - step, group=group)
        else:
            dkv += share
    if flight is not None:
        dkv += flight.wait()
    return dq.to(q.dtype), dkv.to(kv.dtype)
