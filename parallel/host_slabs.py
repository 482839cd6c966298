"""Host memory in slabs of one size, given out by the byte range.

PyTorch's allocator of pinned memory rounds every allocation up to a power of two (a tensor of 2.3 GB takes 4.3) and
keeps what it was given back. So memory is taken here in slabs that are a power of two, and a tensor lies on as many as
it needs, its end sharing a slab with the next one's beginning: what is pinned is what is held, rounded up to one slab.
Any freed range serves any later tensor, whatever their sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

# A copy of so much takes a millisecond or more of PCIe, a hundred times its launch.
SLAB_BYTES = 1 << 26
# Where ranges begin; unaligned copies over PCIe are slower.
ALIGNMENT = 512

Span = tuple[int, int]


def in_slabs(num_bytes: int, slab_bytes: int = SLAB_BYTES) -> int:
    """The memory that ranges of num_bytes in all take from the host: whole slabs."""
    return -(-num_bytes // slab_bytes) * slab_bytes


class HostSlabs:
    """Slabs, and which byte ranges of them are free.

    Ranges count from the start of the first slab through all of them.

    Args:
        slab_bytes: a power of two, at least ALIGNMENT.
        limit_bytes: memory that all slabs may take; None for no limit.
        allocate: a buffer of slab_bytes that many bytes long.

    Attributes:
        num_bytes, peak_bytes: given out now, and at most so far.

    Raises:
        ValueError: slab_bytes is none.
    """

    def __init__(self, *, slab_bytes: int, limit_bytes: int | None, allocate: Callable[[int], Any]) -> None:
        if slab_bytes < ALIGNMENT or slab_bytes & (slab_bytes - 1):
            raise ValueError(f"slab_bytes must be a power of two from {ALIGNMENT}, such as {SLAB_BYTES}: {slab_bytes}")
        self.slab_bytes = slab_bytes
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self.peak_bytes = 0
        self._allocate = allocate
        self._slabs: list[Any] = []
        # In order, apart from each other.
        self._free: list[Span] = []

    @property
    def pinned_bytes(self) -> int:
        """Memory taken from the host. It stays for reuse, so it never falls."""
        return len(self._slabs) * self.slab_bytes

    def take(self, num_bytes: int) -> list[Span]:
        """Ranges of num_bytes in all, rounded up to ALIGNMENT; more slabs if the free ones do not do.

        Raises:
            MemoryError: the limit does not allow them. Nothing is taken then.
        """
        missing = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        free = self.pinned_bytes - self.num_bytes
        grown = self.pinned_bytes + in_slabs(max(0, missing - free), self.slab_bytes)
        if self.limit_bytes is not None and grown > self.limit_bytes:
            raise MemoryError(
                f"{num_bytes:,} bytes of host memory beyond the {self.num_bytes:,} held, {grown:,} with what is whole "
                f"slabs of {self.slab_bytes:,}"
            )
        while self.pinned_bytes < grown:
            self._slabs.append(self._allocate(self.slab_bytes))
            self._release([(self.pinned_bytes - self.slab_bytes, self.pinned_bytes)])
        self.num_bytes += missing
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        taken = []
        while missing:
            start, end = self._free.pop(0)
            stop = min(end, start + missing)
            taken.append((start, stop))
            if stop < end:
                self._free.insert(0, (stop, end))
            missing -= stop - start
        return taken

    def give_back(self, spans: Sequence[Span]) -> None:
        """Ranges that take() gave are free again."""
        self.num_bytes -= sum(end - start for start, end in spans)
        self._release(spans)

    def pieces(self, spans: Sequence[Span]) -> Iterator[Any]:
        """The buffers behind ranges, in their order, cut where slabs end."""
        for start, end in spans:
            while start < end:
                slab, offset = divmod(start, self.slab_bytes)
                length = min(end - start, self.slab_bytes - offset)
                yield self._slabs[slab][offset : offset + length]
                start += length

    def _release(self, spans: Sequence[Span]) -> None:
        merged: list[Span] = []
        for start, end in sorted([*self._free, *spans]):
            if merged and merged[-1][1] == start:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((start, end))
        self._free = merged
