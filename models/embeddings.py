"""Sin-cos embeddings of timesteps and patch positions, computed for any size: nothing is stored or looked up.

Shape letters: B batch, s tokens of this rank, C hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longreel.models.config import PositionEmbedding

MAX_PERIOD = 10_000

# Rows computed at a time in fp64: bounds the scratch memory to ROW_BLOCK * C * 8 bytes per intermediate.
ROW_BLOCK = 16_384


def embedding_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype embeddings are computed in before the cast to the weights' dtype: fp64 for fp64 weights, else fp32."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32


def timestep_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """[cos(t f_i), sin(t f_i)] with f_i = MAX_PERIOD ** (-i / (dim / 2)).

    Args:
        t: [B], fp32 or fp64, in [0, 1000), fractions allowed. Half precision cannot hold it: bf16 turns 999 into 1000.
        dim: width of the embedding, even.

    Returns:
        [B, dim] in t's dtype.

    Raises:
        ValueError: dim is odd, or t is neither fp32 nor fp64.

    Source: Peebles and Xie 2022, DiT (arXiv:2212.09748), frequency embedding of the timestep embedder.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be even and at least 2, got {dim}")
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"t has dtype {t.dtype}; timesteps must be float32 or float64")
    half = dim // 2
    # The order of operations is the original's, so that fp32 frequencies are its frequencies to the last bit.
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = t[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def axis_widths(hidden_size: int, position: PositionEmbedding) -> tuple[tuple[int, int], ...]:
    """(column of coords, channels) of each part of the position embedding, in channel order.

    Args:
        hidden_size: C, a multiple of 4.
        position: `3d`: t, h, w, each an even share of C, t taking what does not divide by 6. `2d`: half of C each,
            **w first**: the original builds its grid with meshgrid(w, h), so its first half encodes the column.

    Raises:
        ValueError: hidden_size is not a multiple of 4, or below 8.
    """
    if hidden_size % 4 or hidden_size < 8:
        raise ValueError(
            f"hidden_size must be a multiple of 4 and at least 8 for a sin-cos embedding, got {hidden_size}"
        )
    if position == "2d":
        return (2, hidden_size // 2), (1, hidden_size // 2)
    spatial = 2 * (hidden_size // 6)
    return (0, hidden_size - 2 * spatial), (1, spatial), (2, spatial)


def position_embedding(coords: Tensor, hidden_size: int, position: PositionEmbedding, dtype: torch.dtype) -> Tensor:
    """Sin-cos embedding of patch coordinates; `2d` equals the original DiT's frozen table at every (h, w).

    Each axis of width d gives [sin(x f_i), cos(x f_i)], f_i = MAX_PERIOD ** (-i / (d / 2)). Angles, sines and cosines
    are computed in fp64 (as the original's table was), in blocks of rows, and rounded once.

    Args:
        coords: [s, 3] (t, h, w) in patches, fp32 or fp64.
        hidden_size: C.
        position: `3d` or `2d` (t is ignored), see axis_widths.
        dtype: of the result.

    Returns:
        [s, C].

    Raises:
        ValueError: coords is not [s, 3] of fp32 or fp64, or hidden_size does not split.

    Source: Peebles and Xie 2022, DiT (arXiv:2212.09748), after Vaswani et al. 2017 (arXiv:1706.03762).
    """
    if coords.dim() != 2 or coords.shape[1] != 3 or coords.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"coords must be [s, 3] in float32 or float64, got {list(coords.shape)} {coords.dtype}")
    axes = axis_widths(hidden_size, position)
    embedding = torch.empty(coords.shape[0], hidden_size, dtype=dtype, device=coords.device)
    for start in range(0, coords.shape[0], ROW_BLOCK):
        rows = coords[start : start + ROW_BLOCK].double()
        parts = [part for axis, width in axes for part in _sin_cos(rows[:, axis], width)]
        embedding[start : start + ROW_BLOCK] = torch.cat(parts, dim=-1).to(dtype)
    return embedding


def _sin_cos(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    half = width // 2
    omega = 1.0 / MAX_PERIOD ** (torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angles = x[:, None] * omega[None]
    return angles.sin(), angles.cos()
