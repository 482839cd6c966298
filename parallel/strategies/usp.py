"""Ulysses, ring, and USP, which is both: heads split over U ranks, keys and values going round R, P = U R.

The projections run without their biases: these are added, and their gradients summed, in the passes that lay the
tokens out for the exchange (longreel.kernels.sp_layout).

Sent per layer and rank, M = B S C elements:
Ulysses (R = 1): q, k, v in and o out, 4 M (P - 1) / P^2 forward and as much backward.
Ring (U = 1): 2 M (P - 1) / P forward, 4 M (P - 1) / P backward.
USP: 4 (M / P) (U - 1) / U in all-to-alls each way, 2 (M / P) (R - 1) round the ring forward, twice that backward.
Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv:2309.14509); Liu et al. 2023, Ring Attention (arXiv:2310.01889);
Fang and Zhao 2024, USP (arXiv:2405.07719).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from longreel.models.sequence import AttentionShape, SequenceLengths, Traffic
from longreel.parallel.config import check_head_chunks, check_heads
from longreel.parallel.strategies.base import SequenceGroup
from longreel.parallel.strategies.exchange import exchange_attention_op

# Assumed: with fewer tokens attention on part of the heads would leave much of a GPU idle; more chunks hide little.
CHUNKS_FROM = 4096
MAX_CHUNKS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class USP(SequenceGroup):
    """Heads split over one group of ranks, keys and values passed round another; either may be left out.

    Args:
        group, degree: all P ranks that share the sequence.
        ulysses_group, ulysses_degree: U consecutive ranks that split the heads; "" and 1 for a plain ring.
        ring_group: the R = P / U ranks that hold the same heads; "" for plain Ulysses.
        lean: save only attention's out and lse for backward, which exchanges q, k, v and out again.
        head_chunks: K, parts that a rank's heads are exchanged and attended in, so that exchanges hide behind attention
            (head_exchange.py). None: the most that divides a rank's heads, up to MAX_CHUNKS, where a rank holds
            CHUNKS_FROM tokens of one sample, else 1.
    """

    ulysses_group: str
    ulysses_degree: int
    ring_group: str
    lean: bool = False
    head_chunks: int | None = None

    @property
    def ring_degree(self) -> int:
        """R, ranks that keys and values go round."""
        return self.degree // self.ulysses_degree

    def self_attention(self, x: Tensor, qkv: nn.Linear, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        """See longreel.models.sequence.SequenceParallel."""
        projected = F.linear(x, qkv.weight).unflatten(-1, (3, num_heads, -1))
        return self._attend(projected, qkv.bias, None, None, lengths.offsets, lengths.offsets)

    def cross_attention(
        self,
        x: Tensor,
        text: Tensor,
        q: nn.Linear,
        kv: nn.Linear,
        *,
        num_heads: int,
        lengths: SequenceLengths,
        text_lengths: SequenceLengths,
    ) -> Tensor:
        """See longreel.models.sequence.SequenceParallel."""
        q_tokens = F.linear(x, q.weight).unflatten(-1, (1, num_heads, -1))
        kv_tokens = F.linear(text, kv.weight).unflatten(-1, (2, num_heads, -1))
        return self._attend(q_tokens, q.bias, kv_tokens, kv.bias, lengths.offsets, text_lengths.offsets)

    def _attend(
        self,
        q: Tensor,
        q_bias: Tensor | None,
        kv: Tensor | None,
        kv_bias: Tensor | None,
        offsets_q: Sequence[int],
        offsets_k: Sequence[int],
    ) -> Tensor:
        hybrid_degree = self.degree if self.ring_degree > 1 else None
        check_heads(q.shape[3], self.ulysses_degree, hybrid_degree=hybrid_degree)
        scale = q.shape[-1] ** -0.5
        provider = self.resolved_provider(q)
        groups = self.ulysses_group, self.ring_group
        out, *_ = exchange_attention_op(
            q,
            q_bias,
            kv,
            kv_bias,
            offsets_q,
            offsets_k,
            scale,
            provider,
            *groups,
            self._saves_inputs,
            self._chunks(q),
        )
        return out.flatten(2)

    def _chunks(self, q: Tensor) -> int:
        heads = q.shape[3] // self.ulysses_degree
        if self.head_chunks is not None:
            check_head_chunks(self.head_chunks, heads)
            return self.head_chunks
        # More samples than one would be stacked in a pass of their own.
        if self.ulysses_degree == 1 or q.shape[0] > 1 or q.shape[1] < CHUNKS_FROM:
            return 1
        return max(n for n in range(1, MAX_CHUNKS + 1) if heads % n == 0)

    @property
    def _saves_inputs(self) -> bool:
        # Without an all-to-all there is nothing between the inputs and what attention reads.
        return self.lean or not self.ulysses_group

    def traffic(self, shape: AttentionShape) -> Traffic:
        """All-to-alls: q and o of the tokens, k and v of the tokens or the text. Ring: k and v, their gradients back.

        Lean backward exchanges q, k, v and o once more.
        """
        width = shape.batch * shape.num_heads * shape.head_dim * shape.element_size
        rows = self.rows(shape.seq_len)
        kv_rows = rows if shape.kv_len is None else self.rows(shape.kv_len)
        # Every exchange of q, k, v takes one part of o.
        exchanged = (2 * rows + 2 * kv_rows) * width * (self.ulysses_degree - 1) // self.ulysses_degree
        passed = 2 * kv_rows * width * (self.ring_degree - 1)
        forward, backward = {}, {}
        if self.ulysses_degree > 1:
            forward["all_to_all"], backward["all_to_all"] = exchanged, exchanged * (2 if self.lean else 1)
        if self.ring_degree > 1:
            forward["send_recv"], backward["send_recv"] = passed, 2 * passed
        return Traffic(forward=forward, backward=backward)
