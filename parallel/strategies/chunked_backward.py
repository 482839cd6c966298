"""FastSeq's backward with attention in the order in which chunks are done, so that transfers hide behind attention too.

Each of P steps works off one chunk, that of r + 1, r + 2, ... and this rank's own as the last (chunk_plan.py): its
queries against the keys of all chunks that are left, and the other queries that are left against its keys. Then dQ, dK
and dV of that chunk are complete: its share of dX leaves for the owner and its share of dW is added while the next
step's attention runs; the x of the next owner arrives meanwhile. Work per step shrinks from (2 P - 1) / P^2 of the
attention to 1 / P^2.
Gradients of queries and keys are summed in fp32, in a fixed order: results do not depend on arrival.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longreel.kernels.attention import attention_backward_op
from longreel.kernels.reference import compute_dtype
from longreel.parallel import comm
from longreel.parallel.strategies.chunk_plan import Pair, plan_departures
from longreel.parallel.strategies.gather_project import own_heads, spread_heads
from longreel.parallel.strategies.segments import kernel_offsets


def attend_project_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor,
    num_heads: int,
    offsets: Sequence[int],
    scale: float,
    provider: str,
    group: str,
    *,
    gathered: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [B, s, C] summed over the ranks, and this rank's share of dweight and dbias (zero outside its heads).

    Args:
        dout: [B, P s, h, D], gradient of this rank's heads' output. qkv: [B, P s, 3, h, D]. out: [B, S, h, D]. lse:
            [B, h, S]. S tokens exist.
        x: [B, s, C]. weight: [3 C, C]. offsets: cu_seqlens of the whole sequence, on the host.
        gathered: every rank's x, [P, B, s, C], or None to gather it again.
    """
    size, rank = comm.group_size(group), comm.group_rank(group)
    batch, rows, _ = x.shape
    gradients = _Gradients(dout, qkv, out, lse, scale, provider)
    matrix, _ = own_heads(weight, None, 3, num_heads, group)
    dtype = compute_dtype(x.dtype)
    dmatrix = torch.zeros(matrix.shape, dtype=dtype, device=x.device)
    dbias = torch.zeros(matrix.shape[0], dtype=dtype, device=x.device)
    dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
    x = x.contiguous()
    arriving = _fetch(x, 1, group) if gathered is None and size > 1 else None
    leaving: comm.Exchange | None = None
    for step, pairs in enumerate(plan_departures(tuple(offsets), size, rank, rows), 1):
        owner = (rank + step) % size
        for pair in pairs:
            gradients.add(pair)
        done = gradients.sums.narrow(1, owner * rows, rows).view(batch, rows, -1).to(x.dtype)
        if owner == rank:
            chunk = x
        elif gathered is not None:
            chunk = gathered[owner]
        else:
            assert arriving is not None
            chunk = arriving.wait()
            arriving = _fetch(x, step + 1, group) if step + 1 < size else None
        share = done @ matrix
        if leaving is not None:
            dx += leaving.wait()
        if owner == rank:
            dx += share
        else:
            leaving = comm.start_exchange(share, torch.empty_like(share), step=step, group=group)
        dmatrix += done.flatten(0, 1).t() @ chunk.flatten(0, 1)
        dbias += done.sum((0, 1), dtype=dtype)
        del chunk, share, done
    dweight = spread_heads(dmatrix, weight, 3, num_heads, group)
    return dx.to(x.dtype), dweight, spread_heads(dbias, weight[:, 0], 3, num_heads, group)


def _fetch(x: Tensor, step: int, group: str) -> comm.Exchange:
    """The x of rank r + step, on its way; this rank's goes to r - step."""
    return comm.start_exchange(x, torch.empty_like(x), step=comm.group_size(group) - step, group=group)


class _Gradients:
    """dQ, dK and dV of this rank's heads, by pairs of query and key ranges, in fp32."""

    def __init__(self, dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float, provider: str) -> None:
        self._dout, self._qkv, self._out, self._lse = dout, qkv, out, lse
        self._scale, self._provider = scale, provider
        self.sums = torch.zeros(qkv.shape, dtype=compute_dtype(qkv.dtype), device=qkv.device)

    def add(self, pair: Pair) -> None:
        """What the pair's queries and keys owe each other."""
        queries, keys = pair.queries, pair.keys
        dq, dk, dv = attention_backward_op(
            self._dout[:, queries],
            None,
            self._qkv[:, queries, 0],
            self._qkv[:, keys, 1],
            self._qkv[:, keys, 2],
            self._out[:, queries],
            self._lse[:, :, queries].contiguous(),
            self._scale,
            kernel_offsets(pair.offsets_q, self._qkv),
            kernel_offsets(pair.offsets_k, self._qkv),
            self._provider,
        )
        self.sums[:, queries, 0] += dq
        self.sums[:, keys, 1] += dk
        self.sums[:, keys, 2] += dv
