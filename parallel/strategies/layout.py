"""The layout changes around all-to-all: between tokens split over ranks and heads split over ranks.

Shapes: [B, s, G, H, D] holds this rank's s tokens of all H heads, [B, S, G, h, D] all S = P s tokens of this rank's
h = H / P heads; G counts tensors that travel together (3 for q, k, v). [P, B, s, G, h, D] is what is exchanged. The
changes themselves are ops: longreel.kernels.sp_layout.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from longreel.kernels import pack_heads, pack_tokens, unpack_heads, unpack_tokens
from longreel.parallel import comm


def scatter_heads(x: Tensor, group: str) -> Tensor:
    """[B, s, G, H, D] of this rank's tokens -> [B, S, G, h, D] of this rank's heads.

    Sends B s G H D (P - 1) / P.
    """
    packed = pack_heads(x, num_ranks=comm.group_size(group))
    return unpack_tokens(comm.all_to_all(packed, group))


def gather_heads(x: Tensor, group: str, rows: int | None = None) -> Tensor:
    """[B, T, G, h, D] of this rank's heads -> [B, s, G, H, D] of this rank's tokens: the inverse of scatter_heads.

    Args:
        rows: s. Rows of zeros stand for the tokens that x has fewer than P s. T / P, rounded up, when None.
    """
    packed = pack_tokens(x, num_ranks=comm.group_size(group), rows=rows)
    return unpack_heads(comm.all_to_all(packed, group))


def pad_tokens(x: Tensor, padded: int) -> Tensor:
    """x [B, S, ...] with rows of zeros up to `padded` tokens; x itself when there is nothing to add."""
    missing = padded - x.shape[1]
    if missing == 0:
        return x
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
