"""FastSeq's forward with attention on the chunks that are there, so that the gather hides behind attention too.

In step s the chunk of rank r - s has arrived: it is projected, its queries attend to all keys so far and the earlier
queries attend to its keys, while the chunk of r - s - 1 is in flight. Partial outputs are merged by their lse in fp32,
in the order of the steps: results do not depend on when a chunk arrives. What is left to wait for at the end is one
P-th of the projection and (2 P - 1) / P^2 of the attention.

Where chunks are whole and of one segment they lie in the order of arrival, the last one first: what is there is one
range of tokens, so that a step launches two attentions and one merge. At the end tokens are put in their own order.
Elsewhere they lie in their own order from the start, and what is there is two ranges where it wraps.
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
from longreel.parallel.strategies.segments import kernel_offsets, score_pairs, window


def token_ranges(first: int, last: int, size: int, rows: int, valid: int) -> list[slice]:
    """Existing tokens of the owners first, first + 1, ..., last (modulo size): one range, or two where they wrap."""
    if first <= last:
        start, stop = first * rows, min((last + 1) * rows, valid)
        return [slice(start, stop)] if start < stop else []
    return [*token_ranges(0, last, size, rows, valid), *token_ranges(first, size - 1, size, rows, valid)]


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
        q_heads [B, P s, 3, h, D], out [B, S, h, D] and lse [B, h, S].
    """
    size, rank = comm.group_size(group), comm.group_rank(group)
    batch, rows, _ = x.shape
    qkv = x.new_empty(batch, size * rows, 3, heads, weight.shape[0] // (3 * heads))
    chunks = qkv.view(batch, size, rows, -1)
    valid = offsets[-1]
    merged = _Merged(qkv, offsets)
    # The owner in the first place of the buffer; its own chunk is the last one where places are by arrival.
    first = (rank + 1) % size if len(offsets) == 2 and valid == size * rows else 0
    last = (rank - first) % size
    for step, (owner, chunk) in enumerate(comm.ring_chunks(x, group)):
        place = (owner - first) % size
        chunks.select(1, place).copy_(F.linear(chunk, weight, bias))
        if gathered is not None:
            gathered.select(0, owner).copy_(chunk)
        for new in token_ranges(place, place, size, rows, valid):
            for keys in token_ranges(place, last, size, rows, valid):
                merged.attend(new, keys, scale, provider)
            for earlier in token_ranges((place + 1) % size, last, size, rows, valid) if step else ():
                merged.attend(earlier, new, scale, provider)
    out, lse = merged.result()
    out = out.to(x.dtype)
    if first:
        shift = first * rows
        out, lse = out.roll(shift, 1), lse.roll(shift, 2)
        qkv = qkv.roll(shift, 1) if keep_qkv else qkv
    return qkv, out, lse


class _Merged:
    """Attention over the pairs of query and key ranges so far, in fp32, in pieces that grow together."""

    def __init__(self, qkv: Tensor, offsets: Sequence[int]) -> None:
        self._q, self._k, self._v = qkv.unbind(2)
        self._offsets = offsets
        self._dtype = compute_dtype(qkv.dtype)
        self._merge = resolve_pointwise_provider("auto", qkv)
        # By first token: end, out and lse.
        self._pieces: dict[int, tuple[int, Tensor, Tensor]] = {}

    def attend(self, queries: slice, keys: slice, scale: float, provider: str) -> None:
        """Add the keys to what the queries have seen. Pieces that queries touch lie within them."""
        segments: tuple[Tensor | None, Tensor | None] = None, None
        # A single segment has all tokens of any range: this runs 2 P - 1 times in every layer.
        if len(self._offsets) > 2:
            offsets_q = window(self._offsets, queries.start, queries.stop)
            offsets_k = window(self._offsets, keys.start, keys.stop)
            if not score_pairs(offsets_q, offsets_k):
                return
            device = self._q.device
            segments = kernel_offsets(offsets_q, device), kernel_offsets(offsets_k, device)
        q = self._q.narrow(1, queries.start, queries.stop - queries.start)
        num_keys = keys.stop - keys.start
        k, v = self._k.narrow(1, keys.start, num_keys), self._v.narrow(1, keys.start, num_keys)
        out, lse = attention_op(q, k, v, scale, *segments, provider)
        out = out.to(self._dtype)
        if (before := self._take(queries.start, queries.stop)) is not None:
            out, lse = merge_attention_op(*before, out, lse, self._merge)
        self._pieces[queries.start] = queries.stop, out, lse

    def result(self) -> tuple[Tensor, Tensor]:
        """out and lse of all tokens."""
        valid = self._offsets[-1]
        return self._take(0, valid) or self._nothing(valid)

    def _take(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """The pieces from start to stop as one, removed; None where there are none."""
        outs, lses, at = [], [], start
        for first in sorted(first for first in self._pieces if start <= first < stop):
            end, out, lse = self._pieces.pop(first)
            gap = (self._nothing(first - at),) if first > at else ()
            for a, b in (*gap, (out, lse)):
                outs.append(a)
                lses.append(b)
            at = end
        if not outs:
            return None
        if at < stop:
            a, b = self._nothing(stop - at)
            outs.append(a)
            lses.append(b)
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 1), torch.cat(lses, 2))

    def _nothing(self, rows: int) -> tuple[Tensor, Tensor]:
        """out and lse of queries that have seen no key."""
        batch, _, heads, head_dim = self._q.shape
        device = self._q.device
        out = torch.zeros(batch, rows, heads, head_dim, dtype=self._dtype, device=device)
        return out, torch.full((batch, heads, rows), float("-inf"), dtype=self._dtype, device=device)
