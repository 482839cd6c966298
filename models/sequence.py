"""What the model asks of sequence parallelism: the protocol every strategy implements, and its host-side data.

The model calls these methods and never asks about ranks; longreel.parallel implements them.
Shape letters: B batch, S tokens of the whole sequence, s tokens of this rank, C hidden size, L text tokens, N clips
packed into one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLengths:
    """Host-side lengths of one sharded sequence, the same on every rank of the group.

    Args:
        valid: S, tokens of the whole sequence that exist.
        padded: S rounded up to a multiple of the ranks; rows from `valid` on are padding and are masked by length.
        cu_seqlens: N + 1 offsets of the clips packed into the sequence, from 0 to `valid`: tokens attend within their
            clip. None: the sequence is one.
    """

    valid: int
    padded: int
    cu_seqlens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.valid <= self.padded:
            raise ValueError(f"valid = {self.valid} must be at least 1 and at most padded = {self.padded}")
        ends = self.offsets
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != self.valid or any(b < a for a, b in pairwise(ends)):
            raise ValueError(f"cu_seqlens must start at 0, never fall and end at valid = {self.valid}, got {ends}")

    @property
    def offsets(self) -> tuple[int, ...]:
        """cu_seqlens, those of one segment if the sequence is not packed."""
        return (0, self.valid) if self.cu_seqlens is None else self.cu_seqlens


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """Where the N clips of a packed batch lie among the rows of this rank; all offsets are int64, on the device.

    Args:
        segments: [N + 1] offsets of the clips among this rank's rows of the sequence. Clips of other ranks are empty;
            padding belongs to the last clip.
        video_segments: the same among its video rows; `segments` itself unless text is in the sequence.
        text_segments: [N + 1] offsets of the clips among the text of a cross attention, or None.
        order: [s], for every row of the sequence its place in [text rows, video rows] (`in_context`), or None.
        video_rows: which rows of the sequence are video (`in_context`), or None.
    """

    segments: Tensor
    video_segments: Tensor
    text_segments: Tensor | None = None
    order: Tensor | None = None
    video_rows: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Global shape of one attention layer, for traffic formulas.

    Args:
        batch: B, samples that this SP group holds.
        seq_len: S, tokens per sample; padded up to a multiple of the ranks as the strategy does.
        num_heads, head_dim: H and D.
        element_size: bytes of one element of the activations.
        kv_len: L, text tokens per sample of a cross attention in the published layout; None for self-attention.
    """

    batch: int
    seq_len: int
    num_heads: int
    head_dim: int
    element_size: int
    kv_len: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes this rank sends to other ranks, per collective, for one layer's attention stretch."""

    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)

    @property
    def forward_bytes(self) -> int:
        """Bytes sent in forward, all collectives together."""
        return sum(self.forward.values())

    @property
    def backward_bytes(self) -> int:
        """Bytes sent in backward, all collectives together."""
        return sum(self.backward.values())


class SequenceParallel(Protocol):
    """One way of splitting the sequence dim over a group of ranks (activations are [B, s, C] between calls)."""

    @property
    def degree(self) -> int:
        """P, ranks of the group."""
        ...

    @property
    def provider(self) -> str:
        """Attention implementation, see longreel.kernels.attention."""
        ...

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's equal slice of x along dim; backward pads with zeros: no scaling, no collective."""
        ...

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' slices, concatenated along dim; backward reduce-scatters the sum."""
        ...

    def self_attention(self, x: Tensor, qkv: nn.Linear, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        """Self-attention from normed hidden states x [B, s, C] to heads' outputs [B, s, C], before the projection."""
        ...

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
        """Cross attention in the published layout: x [B, s, C] over sharded text [B, l, C], heads split over ranks."""
        ...

    def traffic(self, shape: AttentionShape) -> Traffic:
        """Bytes this rank sends in one attention layer of this shape."""
        ...
