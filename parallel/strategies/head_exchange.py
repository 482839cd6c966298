"""Tokens to heads and back in chunks of heads, so that exchanges are in flight while attention runs.

A rank's h heads are exchanged in K chunks of h / K: chunk j of rank r holds heads (j P + r) h / K and on, so that each
chunk is one all-to-all of P h / K consecutive heads, and one pass unpacks what returns. Chunk j + 1 starts on its way
when chunk j is there, and arrives while j is attended to; no more than those two are in memory, unless all are kept.
With a, w and b the times of one chunk's way in, its work and its way back, the link carries in 0, in 1, back 0, in 2,
back 1, ..., each when it is free and the rank asks: chunk j begins at t_j = max(t_(j-1) + w, arrival of j), which is
when j + 1 is asked for, and its way back at t_j + w.
Without a group for the heads there is nothing to exchange: tokens stay where they are.
"""

from __future__ import annotations

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
        x: or G tensors [B, s, H, D], which are stacked one chunk at a time.
        group: that splits the heads, "" for none. chunks: K, which divides h.
        keep: hold all chunks, for stacked().
    """

    def __init__(
        self, x: Tensor | tuple[Tensor, ...], bias: Tensor | None, group: str, chunks: int, *, keep: bool = False
    ) -> None:
        self._x, self._bias, self._group, self._num_chunks, self._keep = x, bias, group, chunks, keep
        self._received: Tensor | None = None
        self._arrived: list[Tensor] = []
        self._flight: comm.Exchange | None = self._start(0) if group else None

    def wait(self) -> Tensor:
        """The next chunk: [B, P s, G, h / K, D], a view of what was received where B = 1; the one after it starts."""
        chunk = len(self._arrived)
        if self._flight is None:
            x = torch.stack(self._x, dim=2) if isinstance(self._x, tuple) else self._x
            found = x if self._bias is None else x + self._bias.view(x.shape[2:])
        else:
            # The next is laid out before the wait, so that the link is not idle meanwhile.
            following = self._pack(chunk + 1) if chunk + 1 < self._num_chunks else None
            received = self._flight.wait()
            self._flight = None if following is None else self._start(chunk + 1, following)
            found = unpack_tokens(received)
        self._arrived.append(found if self._keep else found.new_empty(0))
        return found

    def stacked(self) -> Tensor:
        """All chunks, which have been waited for: [K, B, P s, G, h / K, D]; a copy only where B > 1 and K > 1."""
        first = self._arrived[0]
        if self._num_chunks == 1:
            return first.unsqueeze(0)
        if first.shape[0] == 1 and self._received is not None:
            return self._received.view(self._num_chunks, *first.shape)
        return torch.stack(self._arrived)

    def _pack(self, chunk: int) -> Tensor:
        """The chunk's heads as its all-to-all takes them, [P, B, s, G, h / K, D]."""
        size = comm.group_size(self._group)
        x, bias = self._x, self._bias
        if self._num_chunks == 1:
            x = torch.stack(x, dim=2) if isinstance(x, tuple) else x
            return pack_heads(x, num_ranks=size, bias=bias)
        if isinstance(x, tuple):
            x = torch.stack([self._heads(part, chunk) for part in x], dim=2)
        else:
            parts, num_heads = x.shape[2:4]
            bias = None if bias is None else self._heads(bias.view(parts, num_heads, -1), chunk).flatten()
            x = self._heads(x, chunk).contiguous()
        return pack_heads(x, num_ranks=size, bias=bias)

    def _heads(self, x: Tensor, chunk: int) -> Tensor:
        """The heads [..., P h / K, D] of a chunk."""
        size = x.shape[-2] // self._num_chunks
        return x.narrow(-2, chunk * size, size)

    def _start(self, chunk: int, packed: Tensor | None = None) -> comm.Exchange:
        packed = self._pack(chunk) if packed is None else packed
        if not self._keep:
            return comm.start_all_to_all(packed, torch.empty_like(packed), self._group)
        if self._received is None:
            self._received = packed.new_empty(self._num_chunks, *packed.shape)
        return comm.start_all_to_all(packed, self._received[chunk], self._group)


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
