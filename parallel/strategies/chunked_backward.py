"""FastSeq's backward with attention in the order in which chunks are done, so that transfers hide behind attention too.

Step s of P works off owner r + s + 1, this rank's own chunk being the last: its queries against the keys of all chunks
that are left, and the other queries that are left against its keys. Then dQ, dK and dV of that chunk are complete: its
share of dX leaves for the owner and its share of dW is added while the next step's attention runs; the x of the next
owner arrives meanwhile. Work per step shrinks from (2 P - 1) / P^2 of the attention to 1 / P^2.
Gradients of queries and keys are summed in fp32, in a fixed order: results do not depend on arrival.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longreel.kernels.attention import attention_backward_op
from longreel.kernels.reference import compute_dtype
from longreel.parallel import comm
from longreel.parallel.strategies.chunked_attention import token_ranges
from longreel.parallel.strategies.gather_project import own_heads, spread_heads
from longreel.parallel.strategies.segments import kernel_offsets, score_pairs, window


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
    gradients = _Gradients(dout, qkv, out, lse, offsets, scale, provider)
    matrix, _ = own_heads(weight, None, 3, num_heads, group)
    dtype = compute_dtype(x.dtype)
    dmatrix = torch.zeros(matrix.shape, dtype=dtype, device=x.device)
    dbias = torch.zeros(matrix.shape[0], dtype=dtype, device=x.device)
    dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
    x = x.contiguous()
    arriving = _fetch(x, 1, group) if gathered is None and size > 1 else None
    leaving: comm.Exchange | None = None
    for step in range(1, size + 1):
        owner = (rank + step) % size
        done = gradients.work_off(owner, rank, size, rows).view(batch, rows, -1).to(x.dtype)
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

    def __init__(
        self,
        dout: Tensor,
        qkv: Tensor,
        out: Tensor,
        lse: Tensor,
        offsets: Sequence[int],
        scale: float,
        provider: str,
    ) -> None:
        self._dout, self._qkv, self._out, self._lse = dout, qkv, out, lse
        self._offsets, self._scale, self._provider = offsets, scale, provider
        self._sums = torch.zeros(qkv.shape, dtype=compute_dtype(qkv.dtype), device=qkv.device)

    def work_off(self, owner: int, last: int, size: int, rows: int) -> Tensor:
        """Gradients of the owner's tokens, [B, rows, 3, h, D], complete when called for each owner up to the last."""
        valid = self._offsets[-1]
        others = token_ranges((owner + 1) % size, last, size, rows, valid) if owner != last else []
        for own in token_ranges(owner, owner, size, rows, valid):
            for keys in token_ranges(owner, last, size, rows, valid):
                self._add(own, keys)
            for queries in others:
                self._add(queries, own)
        return self._sums.narrow(1, owner * rows, rows)

    def _add(self, queries: slice, keys: slice) -> None:
        offsets_q = window(self._offsets, queries.start, queries.stop)
        offsets_k = window(self._offsets, keys.start, keys.stop)
        if not score_pairs(offsets_q, offsets_k):
            return
        device = self._qkv.device
        dq, dk, dv = attention_backward_op(
            self._dout[:, queries],
            None,
            self._qkv[:, queries, 0],
            self._qkv[:, keys, 1],
            self._qkv[:, keys, 2],
            self._out[:, queries],
            self._lse[:, :, queries].contiguous(),
            self._scale,
            kernel_offsets(offsets_q, device),
            kernel_offsets(offsets_k, device),
            self._provider,
        )
        self._sums[:, queries, 0] += dq
        self._sums[:, keys, 1] += dk
        self._sums[:, keys, 2] += dv
