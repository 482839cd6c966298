"""Attention of one rank's heads over the whole sequence, the middle of every head-splitting strategy.

q_heads [B, S_pad, G, h, D] holds q, k and v (G = 3, self-attention) or q alone (G = 1) beside kv_heads
[B, T_pad, 2, h, D]. An absent tensor inside an op is an empty one: op outputs cannot be optional.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longreel.kernels.attention import (
    attention_backward_op,
    attention_op,
    attention_packed_backward_op,
    attention_packed_op,
)
from longreel.parallel.strategies.segments import kernel_offsets, score_pairs


def attend(
    q_heads: Tensor,
    kv_heads: Tensor,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    """out [B, S, h, D] and lse [B, h, S] of the S tokens that exist; rows of padding take no part.

    Args:
        offsets_q, offsets_k: cu_seqlens of the sequences, on the host (see segments.py).
    """
    queries = q_heads[:, : offsets_q[-1]]
    cu_seqlens_q = kernel_offsets(offsets_q, q_heads)
    if q_heads.shape[2] == 3:
        return attention_packed_op(queries, scale, cu_seqlens_q, provider)
    k, v = kv_heads[:, : offsets_k[-1]].unbind(2)
    cu_seqlens_k = kernel_offsets(offsets_k, q_heads)
    return attention_op(queries[:, :, 0], k, v, scale, cu_seqlens_q, cu_seqlens_k, provider)


def attend_backward(
    dout: Tensor,
    q_heads: Tensor,
    kv_heads: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the valid rows of q_heads and kv_heads, which padding has none of; dout is [B, S_pad, h, D]."""
    dout, queries = dout[:, : offsets_q[-1]], q_heads[:, : offsets_q[-1]]
    cu_seqlens_q = kernel_offsets(offsets_q, q_heads)
    if q_heads.shape[2] == 3:
        return attention_packed_backward_op(dout, None, queries, out, lse, scale, cu_seqlens_q, provider), kv_heads
    k, v = kv_heads[:, : offsets_k[-1]].unbind(2)
    cu_seqlens_k = kernel_offsets(offsets_k, q_heads)
    dq, dk, dv = attention_backward_op(
        dout, None, queries[:, :, 0], k, v, out, lse, scale, cu_seqlens_q, cu_seqlens_k, provider
    )
    return dq.unsqueeze(2), torch.stack((dk, dv), dim=2)


def attend_flops(
    batch: int, heads: int, head_dim: int, offsets_q: Sequence[int], offsets_k: Sequence[int], products: int
) -> int:
    """FLOPs of `products` matrix products over this rank's heads and the tokens that meet; a multiply-add is 2."""
    return 2 * products * batch * heads * head_dim * score_pairs(offsets_q, offsets_k)
