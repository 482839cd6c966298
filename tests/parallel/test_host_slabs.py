"""longreel.parallel.host_slabs: ranges of slabs are given out once, reused whatever their sizes, within a limit."""

from __future__ import annotations

import random

import pytest
import torch

from longreel.parallel.host_slabs import ALIGNMENT, SLAB_BYTES, HostSlabs, in_slabs

SLAB = 4 * ALIGNMENT


def slabs(limit_bytes: int | None = None) -> HostSlabs:
    return HostSlabs(
        slab_bytes=SLAB, limit_bytes=limit_bytes, allocate=lambda size: torch.zeros(size, dtype=torch.uint8)
    )


def test_tensors_share_slabs_and_lie_on_several():
    pool = slabs()
    first, second = pool.take(SLAB + 1), pool.take(2 * SLAB)
    assert (first, second) == ([(0, SLAB + ALIGNMENT)], [(SLAB + ALIGNMENT, 3 * SLAB + ALIGNMENT)])
    assert pool.num_bytes == pool.peak_bytes == 3 * SLAB + ALIGNMENT
    assert pool.pinned_bytes == 4 * SLAB == in_slabs(pool.num_bytes, SLAB)
    assert [len(piece) for piece in pool.pieces(second)] == [SLAB - ALIGNMENT, SLAB, ALIGNMENT]


def test_any_freed_range_serves_any_size():
    """Random lengths one after the other: no byte is given twice, and no more is taken than was ever needed at once."""
    pool, rng, held = slabs(), random.Random(0), []
    for round_ in range(300):
        if held and (len(held) > 12 or rng.random() < 0.5):
            spans, value = held.pop(rng.randrange(len(held)))
            assert all((piece == value).all() for piece in pool.pieces(spans))
            pool.give_back(spans)
        spans = pool.take(rng.randint(1, 3 * SLAB))
        for piece in pool.pieces(spans):
            piece.fill_(round_ % 251)
        held.append((spans, round_ % 251))
        assert pool.pinned_bytes == in_slabs(pool.peak_bytes, SLAB)
    for spans, value in held:
        assert all((piece == value).all() for piece in pool.pieces(spans))
        pool.give_back(spans)
    assert pool.num_bytes == 0
    assert pool.take(pool.pinned_bytes) == [(0, pool.pinned_bytes)]


def test_the_limit_is_on_whole_slabs():
    pool = slabs(limit_bytes=2 * SLAB + ALIGNMENT)
    kept = pool.take(SLAB)
    with pytest.raises(MemoryError, match="2,049 bytes of host memory beyond the 2,048 held, 6,144 with what is whole"):
        pool.take(SLAB + 1)
    assert (pool.num_bytes, pool.pinned_bytes) == (SLAB, SLAB)
    pool.take(SLAB)
    pool.give_back(kept)
    pool.take(SLAB - 1)
    assert pool.pinned_bytes == 2 * SLAB


def test_slabs_are_what_pinning_rounds_to():
    assert SLAB_BYTES.bit_count() == 1
    with pytest.raises(ValueError, match="slab_bytes must be a power of two from 512, such as 67108864: 3000"):
        HostSlabs(slab_bytes=3000, limit_bytes=None, allocate=torch.empty)
