"""Tokens to heads and back in chunks of heads, so that exchanges are in flight while attention runs.

A rank's h heads are exchanged in K chunks of h / K: chunk j of rank r holds heads (j P + r) h / K and on, so that one
pass packs all chunks, each chunk is one all-to-all, and one pass unpacks them again. All exchanges of a tensor start at
once and run in order; chunk j is attended to while the chunks after it arrive and those before it return.
With a, w and b the times of one chunk's way in, its work and its way back, chunk j is done at
e_j = max(e_(j-1), (j + 1) a) + w and back at r_j = max(r_(j-1), e_j, K a) + b; the layer takes r_(K-1).
Without a group for the heads there is nothing to exchange: tokens stay where they are.
"""

from __future__ import annotations

from itertools import starmap

import torch
from torch import Tensor

from longreel.kernels import pack_heads, pack_tokens, resolve_pointwise_provider, unpack_heads, unpack_tokens
from longreel.kernels.reference import compute_dtype
from longreel.kernels.sp_layout import sp_pack_heads_backward_op
from longreel.parallel import comm
from longreel.parallel.strategies.layout import pad_tokens


class ToHeads:
    """x [B, s, G, H, D] of this rank's tokens, plus bias [G H D], on its way to [B, P s, G, h / K, D] K times.

    Args:
        group: that splits the heads, "" for none. chunks: K, which divides h.
    """

    def __init__(self, x: Tensor, bias: Tensor | None, group: str, chunks: int) -> None:
        self._chunks: list[Tensor | comm.Exchange]
        self._received: Tensor | None = None
        if not group:
            self._chunks = [x if bias is None else x + bias.view(x.shape[2:])]
            return
        packed = pack_heads(x, num_ranks=chunks * comm.group_size(group), bias=bias)
        self._received = torch.empty_like(packed)
        parts = zip(packed.chunk(chunks), self._received.chunk(chunks), strict=True)
        self._chunks = list(starmap(lambda sent, received: comm.start_all_to_all(sent, received, group), parts))

    def wait(self, chunk: int) -> Tensor:
        """The chunk: [B, P s, G, h / K, D], a view of what was received where B = 1."""
        flight = self._chunks[chunk]
        if isinstance(flight, comm.Exchange):
            flight = self._chunks[chunk] = unpack_tokens(flight.wait())
        return flight

    def stacked(self) -> Tensor:
        """All chunks, which have been waited for: [K, B, P s, G, h / K, D]; a copy only where B > 1 and K > 1."""
        first = self.wait(0)
        if len(self._chunks) == 1:
            return first.unsqueeze(0)
        if first.shape[0] == 1 and self._received is not None:
            return self._received.view(len(self._chunks), *first.shape)
        return torch.stack([self.wait(chunk) for chunk in range(len(self._chunks))])


class ToTokens:
    """[B, T, G, h / K, D] of this rank's heads K times on its way to [B, s, G, H, D] of this rank's tokens.

    Args:
        rows: s; rows of zeros stand for the tokens that T is short of P s.
        group, chunks: as of ToHeads.
    """

    def __init__(self, rows: int, group: str, chunks: int) -> None:
        self._rows, self._group, self._num_chunks = rows, group, chunks
        self._flights: list[comm.Exchange] = []
        self._received = torch.empty(0)

    def send(self, x: Tensor) -> None:
        """Start the way back of the next chunk."""
        if not self._group:
            self._received = x
            return
        packed = pack_tokens(x, num_ranks=comm.group_size(self._group), rows=self._rows)
        if not self._flights:
            self._received = packed.new_empty(self._num_chunks, *packed.shape)
        received = self._received[len(self._flights)]
        self._flights.append(comm.start_all_to_all(packed, received, self._group))

    def tokens(self) -> Tensor:
        """[B, s, G, H, D]."""
        if not self._group:
            return pad_tokens(self._received, self._rows)
        return unpack_heads(self._wait())

    def tokens_and_bias(self) -> tuple[Tensor, Tensor]:
        """Gradients of ToHeads: [B, s, G, H, D], and [G H D] of the bias."""
        if not self._group:
            dtype = self._received.dtype
            return self.tokens(), self._received.sum((0, 1), dtype=compute_dtype(dtype)).to(dtype).flatten()
        received = self._wait()
        return sp_pack_heads_backward_op(received, resolve_pointwise_provider("auto", received))

    def _wait(self) -> Tensor:
        # Each sent buffer is free once its exchange is over.
        while self._flights:
            self._flights.pop(0).wait()
        return self._received.flatten(0, 1)
