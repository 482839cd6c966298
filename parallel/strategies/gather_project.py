"""Projection of gathered hidden states to one rank's heads, and its backward, chunk by chunk as they arrive."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from longreel.kernels.reference import compute_dtype
from longreel.parallel import comm


def gather_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    parts: int,
    num_heads: int,
    group: str,
    *,
    gathered: Tensor | None = None,
) -> Tensor:
    """Projection of every rank's x [B, s, C] to this rank's heads: [B, P s, G, h, D], chunk by chunk on arrival.

    Args:
        weight: [G H D, C], rows ordered [G, H, D]. bias: [G H D] or None.
        parts: G.
        gathered: [P, B, s, C], where every rank's x is kept, or None.
    """
    size = comm.group_size(group)
    batch, s, _ = x.shape
    matrix, offset = own_heads(weight, bias, parts, num_heads, group)
    y = x.new_empty(batch, size, s, matrix.shape[0])
    for owner, chunk in comm.ring_chunks(x, group):
        y[:, owner] = F.linear(chunk, matrix, offset)
        if gathered is not None:
            gathered[owner] = chunk
        # Not held while the one after next comes.
        del chunk
    return y.view(batch, size * s, parts, num_heads // size, -1)


def gather_project_backward(
    dy: Tensor, x: Tensor, weight: Tensor, num_heads: int, group: str, *, gathered: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [B, s, C] summed over the ranks, and this rank's share of dweight and dbias (zero outside its heads).

    Args:
        dy: [B, P s, G, h, D], gradient of gather_project's result.
        gathered: what gather_project kept; None gathers x again.
    """
    size, rank = comm.group_size(group), comm.group_rank(group)
    batch, s, _ = x.shape
    parts = dy.shape[2]
    by_owner = dy.reshape(batch, size, s, -1)
    matrix, _ = own_heads(weight, None, parts, num_heads, group)
    # Shares are summed in fp32: P roundings to half precision would lose what one device's GEMM keeps.
    dtype = compute_dtype(x.dtype)
    dmatrix = torch.zeros(matrix.shape, dtype=dtype, device=x.device)
    dx = (by_owner[:, rank] @ matrix).to(dtype)
    # Nothing holds on to a chunk while the next comes: enumerate would.
    for owner, chunk in comm.ring_chunks(x, group) if gathered is None else _kept_chunks(gathered, rank):
        step, flight = (rank - owner) % size, None
        if step:
            share = by_owner[:, (rank + step) % size] @ matrix
            flight = comm.start_exchange(share, torch.empty_like(share), step=step, group=group)
        dmatrix += by_owner[:, owner].flatten(0, 1).t() @ chunk.flatten(0, 1)
        del chunk
        if flight is not None:
            dx += flight.wait()
            del share, flight
    dweight = spread_heads(dmatrix, weight, parts, num_heads, group)
    dbias = spread_heads(dy.sum((0, 1), dtype=dtype), weight[:, 0], parts, num_heads, group)
    return dx.to(x.dtype), dweight, dbias


def _kept_chunks(gathered: Tensor, rank: int) -> Iterator[tuple[int, Tensor]]:
    """What comm.ring_chunks yields, in its order."""
    for step in range(len(gathered)):
        owner = (rank - step) % len(gathered)
        yield owner, gathered[owner]


def own_heads(
    weight: Tensor, bias: Tensor | None, parts: int, num_heads: int, group: str
) -> tuple[Tensor, Tensor | None]:
    """Rows of this rank's heads: [G h D, C] of weight [G H D, C], and [G h D] of bias."""
    matrix = _head_slice(weight, parts, num_heads, group).reshape(-1, weight.shape[1])
    return matrix, None if bias is None else _head_slice(bias, parts, num_heads, group).reshape(-1)


def spread_heads(own: Tensor, like: Tensor, parts: int, num_heads: int, group: str) -> Tensor:
    """A gradient of `like`'s shape and dtype that holds `own` in the rows of this rank's heads, and zeros elsewhere."""
    whole = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    part = _head_slice(whole, parts, num_heads, group)
    part.copy_(own.view(part.shape))
    return whole


def _head_slice(value: Tensor, parts: int, num_heads: int, group: str) -> Tensor:
    """View of this rank's heads in rows ordered [G, H, D]: [G, h, D, ...]."""
    heads = num_heads // comm.group_size(group)
    return value.unflatten(0, (parts, num_heads, -1)).narrow(1, comm.group_rank(group) * heads, heads)
