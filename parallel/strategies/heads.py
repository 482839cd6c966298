"""Attention of one rank's heads over the whole sequence, the middle of every head-splitting strategy.

q_heads [B, S_pad, G, h, D] holds q, k and v (G = 3, self-attention) or q alone (G = 1) beside kv_heads
[B, T_pad, 2, h, D]. An absent tensor inside an op is an empty one: op outputs cannot be optional.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longreel.kernels.attention import (
    attention_backward_op,
    attention_flops,
    attention_op,
    attention_packed_backward_op,
    attention_packed_op,
)


def attend(
    q_heads: Tensor, kv_heads: Tensor, valid_q: int, valid_k: int, scale: float, provider: str
) -> tuple[Tensor, Tensor]:
    """out [B, valid_q, h, D] and lse [B, h, valid_q]; rows of padding take no part."""
    if q_heads.shape[2] == 3:
        return attention_packed_op(q_heads[:, :valid_q], scale, None, provider)
    k, v = kv_heads[:, :valid_k].unbind(2)
    return attention_op(q_heads[:, :valid_q, 0], k, v, scale, None, None, provider)


def attend_backward(
    dout: Tensor,
    q_heads: Tensor,
    kv_heads: Tensor,
    out: Tensor,
    lse: Tensor,
    valid_q: int,
    valid_k: int,
    scale: float,
    provider: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the valid rows of q_heads and kv_heads, which padding has none of; dout is [B, S_pad, h, D]."""
    dout = dout[:, :valid_q]
    if q_heads.shape[2] == 3:
        dqkv = attention_packed_backward_op(dout, None, q_heads[:, :valid_q], out, lse, scale, None, provider)
        return dqkv, kv_heads
    k, v = kv_heads[:, :valid_k].unbind(2)
    dq, dk, dv = attention_backward_op(dout, None, q_heads[:, :valid_q, 0], k, v, out, lse, scale, None, None, provider)
    return dq.unsqueeze(2), torch.stack((dk, dv), dim=2)


def attend_flops(batch: int, heads: int, head_dim: int, valid_q: int, valid_k: int, products: int) -> int:
    """FLOPs of `products` matrix products over this rank's heads and the valid tokens."""
    return attention_flops((batch, valid_q, heads, head_dim), (batch, valid_k, heads, head_dim), products)
