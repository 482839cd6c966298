"""FastSeq: gather the normed hidden states while projecting each rank's part to this rank's heads as it arrives.

Forward, in step s of P: project the chunk of rank r - s to this rank's slice of the heads, and attend with what is
there (chunked_attention.py), while the chunk of r - s - 1 is in flight; or attention of whole sequences once all
chunks are projected; then an all-to-all from heads back to tokens.
Backward: all-to-all of the output's gradient, attention backward, then for every chunk its share of dW (x gathered
again, chunk by chunk) while dX shares travel to their owners, who sum them in a fixed order: a reduce-scatter. Where
forward attends chunk by chunk, so does backward, and both transfers hide behind attention (chunked_backward.py); not
where it is lean and the sums which that takes are large (fastseq_attention.py).

Sent per layer and rank, M = B S C elements: forward M (P - 1) / P + M (P - 1) / P^2 (gather x, o back); backward
2 M (P - 1) / P + M (P - 1) / P^2 (gather x again, dX shares, dO), M (P - 1) / P less where x was kept.
Source: Open-Sora, March 2024 (FastSeq), which overlaps for P = 2 only and leaves out the sum of dX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from longreel.models.sequence import AttentionShape, SequenceLengths, Traffic
from longreel.parallel.config import FastSeqOverlap
from longreel.parallel.strategies.base import SequenceGroup
from longreel.parallel.strategies.fastseq_attention import fastseq_attention_op

# Assumed: below, attention on single chunks would leave much of a GPU idle.
ATTENTION_FROM = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class FastSeq(SequenceGroup):
    """Heads split over the ranks of a group, hidden states gathered instead of q, k, v exchanged.

    Args:
        lean: save only attention's out and lse for backward, which gathers, projects and exchanges out again.
        overlap: what the gather of forward hides behind: the `projection` of the chunks, `attention` on them as well,
            or `auto`: attention from chunks of ATTENTION_FROM tokens.
        keep_gathered: keep every rank's x from forward to backward, P times the memory of its own, instead of gathering
            it again; the text of a cross attention is gathered again all the same. Not with lean.
    """

    lean: bool = False
    overlap: FastSeqOverlap = "auto"
    keep_gathered: bool = False

    def self_attention(self, x: Tensor, qkv: nn.Linear, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        """See longreel.models.sequence.SequenceParallel."""
        return self._attend(x, qkv, None, None, num_heads, lengths.offsets, lengths.offsets)

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
        return self._attend(x, q, text, kv, num_heads, lengths.offsets, text_lengths.offsets)

    def _attend(
        self,
        x: Tensor,
        query: nn.Linear,
        text: Tensor | None,
        kv: nn.Linear | None,
        num_heads: int,
        offsets_q: Sequence[int],
        offsets_k: Sequence[int],
    ) -> Tensor:
        self.check_heads(num_heads)
        scale = (x.shape[-1] // num_heads) ** -0.5
        out, *_ = fastseq_attention_op(
            x,
            query.weight,
            query.bias,
            text,
            None if kv is None else kv.weight,
            None if kv is None else kv.bias,
            num_heads,
            offsets_q,
            offsets_k,
            scale,
            self.resolved_provider(x),
            self.group,
            self.lean,
            text is None and self._attends_in_chunks(x.shape[1]),
            self.keep_gathered,
        )
        return out.flatten(2)

    def _attends_in_chunks(self, rows: int) -> bool:
        if self.degree == 1 or self.overlap == "projection":
            return False
        return self.overlap == "attention" or rows >= ATTENTION_FROM

    def traffic(self, shape: AttentionShape) -> Traffic:
        """Gathered x (and text) and the exchange of o; backward gathers again and scatters the sum of dX.

        Lean backward gathers once more, to project, and exchanges o with its gradient. x that was kept is not gathered
        again.
        """
        away = self.degree - 1
        width = shape.batch * shape.num_heads * shape.head_dim * shape.element_size
        gathered = away * width * (self.rows(shape.seq_len) + self.rows(shape.kv_len or 0))
        exchanged = away * width * self.rows(shape.seq_len) // self.degree
        again = 2 if self.lean else 1
        gathered_again = again * gathered
        if self.keep_gathered:
            gathered_again -= away * width * self.rows(shape.seq_len)
        return Traffic(
            forward={"all_gather": gathered, "all_to_all": exchanged},
            backward={
                "all_gather": gathered_again,
                "all_to_all": again * exchanged,
                "reduce_scatter": gathered,
            },
        )
