"""No sequence parallelism: one rank holds the whole sequence. The oracle of every other strategy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from longreel.kernels import attention, attention_packed
from longreel.models.sequence import AttentionShape, SequenceLengths, Traffic
from longreel.parallel.strategies.segments import kernel_offsets


@dataclass(frozen=True, kw_only=True, slots=True)
class Local:
    """P = 1, without a process group."""

    provider: str = "auto"

    @property
    def degree(self) -> int:
        """P = 1."""
        return 1

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """x itself."""
        return x

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """x itself."""
        return x

    def self_attention(self, x: Tensor, qkv: nn.Linear, *, num_heads: int, lengths: SequenceLengths) -> Tensor:
        """See longreel.models.sequence.SequenceParallel."""
        _check_unpadded(lengths)
        cu_seqlens = kernel_offsets(lengths.offsets, x)
        projected = qkv(x).unflatten(-1, (3, num_heads, -1))
        out, _ = attention_packed(projected, cu_seqlens=cu_seqlens, provider=self.provider)
        return out.flatten(2)

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
        _check_unpadded(lengths)
        _check_unpadded(text_lengths)
        k, v = kv(text).unflatten(-1, (2, num_heads, -1)).unbind(2)
        out, _ = attention(q(x).unflatten(-1, (num_heads, -1)), k, v, provider=self.provider)
        return out.flatten(2)

    def traffic(self, shape: AttentionShape) -> Traffic:
        """Nothing is sent."""
        return Traffic()


def _check_unpadded(lengths: SequenceLengths) -> None:
    # One rank divides every length, so nothing ever needs padding here.
    assert lengths.valid == lengths.padded, lengths
