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
    owners = [(first, last)] if first <= last else [(0, last), (first, size - 1)]
    found = (slice(a * rows, min((b + 1) * rows, valid)) for a, b in owners)
    return [tokens for tokens in found if tokens.start < tokens.stop]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention of this rank's heads over every rank's tokens, chunk by chunk on arrival.

    Args:
        x: [B, s, C], this rank's tokens. weight, bias: [3 h D, C] and [3 h D] or None, of this rank's heads.
        heads: h. offsets: cu_seqlens of the whole sequence, on the host; it has S tokens that exist.
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
        chunks[:, place] = F.linear(chunk, weight, bias)
        for new in token_ranges(place, place, size, rows, valid):
            for keys in token_ranges(place, last, size, rows, valid):
                merged.attend(new, keys, scale, provider)
            for earlier in token_ranges((place + 1) % size, last, size, rows, valid) if step else ():
                merged.attend(earlier, new, scale, provider)
    out, lse = merged.out.to(x.dtype), merged.lse
    if first:
        shift = first * rows
        out, lse = out.roll(shift, 1), lse.roll(shift, 2)
        qkv = qkv.roll(shift, 1) if keep_qkv else qkv
    return qkv, out, lse


class _Merged:
    """Attention over the pairs of query and key ranges so far, in fp32."""

    def __init__(self, qkv: Tensor, offsets: Sequence[int]) -> None:
        batch, _, _, heads, head_dim = qkv.shape
        valid = offsets[-1]
        dtype = compute_dtype(qkv.dtype)
        self._q, self._k, self._v = qkv.unbind(2)
        self._offsets = offsets
        self._merge = resolve_pointwise_provider("auto", qkv)
        self._seen: set[int] = set()
        # What a range holds until keys of its segments come.
        self.out = torch.zeros(batch, valid, heads, head_dim, dtype=dtype, device=qkv.device)
        self.lse = torch.full((batch, heads, valid), float("-inf"), dtype=dtype, device=qkv.device)

    def attend(self, queries: slice, keys: slice, scale: float, provider: str) -> None:
        segments: tuple[Tensor | None, Tensor | None] = None, None
        # A single segment has all tokens of any range: this runs P times as often as there are layers.
        if len(self._offsets) > 2:
            offsets_q = window(self._offsets, queries.start, queries.stop)
            offsets_k = window(self._offsets, keys.start, keys.stop)
            if not score_pairs(offsets_q, offsets_k):
                return
            device = self._q.device
            segments = kernel_offsets(offsets_q, device), kernel_offsets(offsets_k, device)
        rows, columns = (queries.start, queries.stop - queries.start), (keys.start, keys.stop - keys.start)
        q, k, v = self._q.narrow(1, *rows), self._k.narrow(1, *columns), self._v.narrow(1, *columns)
        out, lse = attention_op(q, k, v, scale, *segments, provider)
        out_before, lse_before = self.out.narrow(1, *rows), self.lse.narrow(2, *rows)
        if queries.start in self._seen:
            before = out_before.contiguous(), lse_before.contiguous()
            out, lse = merge_attention_op(*before, out.to(self.out.dtype), lse, self._merge)
        self._seen.add(queries.start)
        out_before.copy_(out)
        lse_before.copy_(lse)
