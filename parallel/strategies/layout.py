"""The layout changes around all-to-all: between tokens split over ranks and heads split over ranks.

Shapes: [B, s, G, H, D] holds this rank's s tokens of all H heads, [B, S, G, h, D] all S = P s tokens of this rank's
h = H / P heads; G counts tensors that travel together (3 for q, k, v). [P, B, s, G, h, D] is what is exchanged.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from longreel.parallel import comm


def scatter_heads(x: Tensor, group: str) -> Tensor:
    """[B, s, G, H, D] of this rank's tokens -> [B, S, G, h, D] of this rank's heads. Sends B s G H D (P - 1) / P."""
    batch, s, parts, heads, head_dim = x.shape
    size = comm.group_size(group)
    packed = x.reshape(batch, s, parts, size, heads // size, head_dim).permute(3, 0, 1, 2, 4, 5).contiguous()
    return comm.all_to_all(packed, group).transpose(0, 1).reshape(batch, size * s, parts, heads // size, head_dim)


def gather_heads(x: Tensor, group: str) -> Tensor:
    """[B, S, G, h, D] of this rank's heads -> [B, s, G, H, D] of this rank's tokens: the inverse of scatter_heads."""
    batch, padded, parts, heads, head_dim = x.shape
    size = comm.group_size(group)
    s = padded // size
    packed = x.reshape(batch, size, s, parts, heads, head_dim).transpose(0, 1).contiguous()
    received = comm.all_to_all(packed, group)
    return received.permute(1, 2, 3, 0, 4, 5).reshape(batch, s, parts, size * heads, head_dim)


def pad_tokens(x: Tensor, padded: int) -> Tensor:
    """x [B, S, ...] with rows of zeros up to `padded` tokens; x itself when there is nothing to add."""
    missing = padded - x.shape[1]
    if missing == 0:
        return x
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
