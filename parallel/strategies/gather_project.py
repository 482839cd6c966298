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
    batch, s, channels = x.shape
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
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    _head_slice(dweight, parts, num_heads, group).copy_(dmatrix.view(*dy.shape[2:], channels))
    dbias = weight.new_zeros(weight.shape[0])
    _head_slice(dbias, parts, num_heads, group).copy_(dy.sum((0, 1), dtype=dtype))
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


def _head_slice(value: Tensor, parts: int, num_heads: int, group: str) -> Tensor:
    """View of this rank's heads in rows ordered [G, H, D]: [G, h, D, ...]."""
    heads = num_heads // comm.group_size(group)
    return value.unflatten(0, (parts, num_heads, -1)).narrow(1, comm.group_rank(group) * heads, heads)
