"""FastSeq's forward with attention on the chunks that are there, so that the gather hides behind attention too.

In step s the chunk of rank r - s has arrived: it is projected, its queries attend to all keys so far and the earlier
queries attend to its keys, while the chunk of r - s - 1 is in flight. Partial outputs are merged by their lse in fp32,
in the order of the steps: results do not depend on when a chunk arrives. What is left to wait for at the end is one
P-th of the projection and (2 P - 1) / P^2 of the attention.

A step launches two attentions and one merge, more where what is there wraps or is packed (chunk_plan.py). Where chunks
lie in the order of arrival, tokens are put in their own order at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longreel.kernels.attention import attention_op
from longreel.kernels.lse_merge import merge_attention_op
from longreel.kernels.pointwise import resolve_pointwise_provider
from longreel.kernels.reference import compute_dtype
from longreel.parallel import comm
from longreel.parallel.strategies.chunk_plan import Pair, plan_arrivals
from longreel.parallel.strategies.segments import kernel_offsets


def gather_project_attend(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    offsets: Sequence[int],
    scale: float,
    provider: str,
    group: str,
    *,
    keep_qkv: bool,
    gathered: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention of this rank's heads over every rank's tokens, chunk by chunk on arrival.

    Args:
        x: [B, s, C], this rank's tokens. weight, bias: [3 h D, C] and [3 h D] or None, of this rank's heads.
        heads: h. offsets: cu_seqlens of the whole sequence, on the host; it has S tokens that exist.
        gathered: [P, B, s, C], where every rank's x is kept, or None.
        keep_qkv: whether q_heads are wanted; without, they are what was there last, in any order.

    Returns:
        q_heads [B, P s, 3, h, D] with zeros in the padding, out [B, S, h, D] and lse [B, h, S].
    """
    size, rank = comm.group_size(group), comm.group_rank(group)
    batch, rows, _ = x.shape
    qkv = x.new_empty(batch, size * rows, 3, heads, weight.shape[0] // (3 * heads))
    projected = qkv.flatten(2)
    plan = plan_arrivals(tuple(offsets), size, rank, rows)
    merged = _Merged(qkv, offsets[-1], scale, provider)
    arriving = comm.ring_chunks(x, group)
    for pairs, (owner, chunk) in zip(plan.steps, arriving, strict=True):
        place = plan.places[owner]
        num_new = place.stop - place.start
        projected.narrow(1, place.start, num_new).copy_(F.linear(chunk.narrow(1, 0, num_new), weight, bias))
        if gathered is not None:
            gathered.select(0, owner).copy_(chunk)
        # Not held while the one after next comes.
        del chunk
        for pair in pairs:
            merged.attend(pair)
    out, lse = merged.result()
    out = out.to(x.dtype)
    if plan.shift:
        out, lse = out.roll(plan.shift, 1), lse.roll(plan.shift, 2)
    if keep_qkv:
        qkv = _in_order(qkv, plan.shift, offsets[-1])
    return qkv, out, lse


def _in_order(qkv: Tensor, shift: int, valid: int) -> Tensor:
    """Its first `valid` rows moved on by `shift`, those at the end to the front; zeros in the other rows."""
    padding = qkv.shape[1] - valid
    if shift and not padding:
        return qkv.roll(shift, 1)
    if shift:
        moved = torch.empty_like(qkv)
        moved.narrow(1, shift, valid - shift).copy_(qkv.narrow(1, 0, valid - shift))
        moved.narrow(1, 0, shift).copy_(qkv.narrow(1, valid - shift, shift))
        qkv = moved
    if padding:
        qkv.narrow(1, valid, padding).zero_()
    return qkv


class _Merged:
    """Attention over the pairs of query and key ranges so far, in fp32, in pieces that grow together."""

    def __init__(self, qkv: Tensor, valid: int, scale: float, provider: str) -> None:
        self._q, self._k, self._v = qkv.unbind(2)
        self._valid, self._scale, self._provider = valid, scale, provider
        self._dtype = compute_dtype(qkv.dtype)
        self._merge = resolve_pointwise_provider("auto", qkv)
        # By first token: out and lse.
        self._pieces: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, pair: Pair) -> None:
        """Add the pair's keys to what its queries have seen. Pieces that queries touch lie within them."""
        start, stop = pair.queries.start, pair.queries.stop
        first, num_keys = pair.keys.start, pair.keys.stop - pair.keys.start
        q = self._q.narrow(1, start, stop - start)
        k, v = self._k.narrow(1, first, num_keys), self._v.narrow(1, first, num_keys)
        segments = kernel_offsets(pair.offsets_q, q), kernel_offsets(pair.offsets_k, q)
        out, lse = attention_op(q, k, v, self._scale, *segments, self._provider)
        if out.dtype != self._dtype:
            out = out.to(self._dtype)
        if (before := self._take(start, stop)) is not None:
            out, lse = merge_attention_op(*before, out, lse, self._merge)
        self._pieces[start] = out, lse

    def result(self) -> tuple[Tensor, Tensor]:
        """out and lse of all tokens."""
        whole = self._take(0, self._valid)
        assert whole is not None
        return whole

    def _take(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """The pieces from start to stop as one, removed; None where there are none. They leave no gap between them."""
        outs, lses = [], []
        for first in sorted(first for first in self._pieces if start <= first < stop):
            out, lse = self._pieces.pop(first)
            outs.append(out)
            lses.append(lse)
        if not outs:
            return None
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 1), torch.cat(lses, 2))
