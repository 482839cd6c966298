"""Which ranges of tokens meet in which step of FastSeq's attention by chunks: worked out once for a set of lengths.

Every layer of every step asks again, and a packed sequence has P^2 pairs of chunks, so plans are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from longreel.parallel.strategies.segments import score_pairs, window

# Plans of so many sets of lengths: those of one batch, backward and forward, and of some batches before it.
_KEPT = 32


@dataclass(frozen=True, slots=True)
class Pair:
    """Queries and keys of one attention: ranges of tokens in the buffer.

    Args:
        offsets_q, offsets_k: cu_seqlens of the segments among them; None if all tokens are of one.
    """

    queries: slice
    keys: slice
    offsets_q: tuple[int, ...] | None
    offsets_k: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Attention as chunks arrive: in step s of P that of rank r - s.

    Args:
        places: by owner, the tokens of its chunk that exist, as they lie in the buffer.
        shift: places that tokens lie before their own in the sequence, modulo its tokens.
        steps: pairs of each step, new queries first.
    """

    places: tuple[slice, ...]
    shift: int
    steps: tuple[tuple[Pair, ...], ...]


@lru_cache(_KEPT)
def plan_arrivals(offsets: tuple[int, ...], size: int, rank: int, rows: int) -> Arrivals:
    """Attention of one of `size` ranks on chunks of `rows` tokens in the order in which they arrive.

    Tokens of one segment lie in the order of arrival, the last chunk first: what is there is one range. Those of more
    lie in their own order, which keeps segments in one piece, and what is there is two ranges where it wraps.
    """
    valid = offsets[-1]
    if len(offsets) > 2:
        steps = []
        for step in range(size):
            owner = (rank - step) % size
            pairs = []
            for new in _ranges(owner, owner, size, rows, valid):
                pairs += [(new, keys) for keys in _ranges(owner, rank, size, rows, valid)]
                if step:
                    pairs += [(earlier, new) for earlier in _ranges((owner + 1) % size, rank, size, rows, valid)]
            steps.append(_meeting(pairs, offsets))
        places = tuple(slice(min(owner * rows, valid), min((owner + 1) * rows, valid)) for owner in range(size))
        return Arrivals(places, 0, tuple(steps))
    found: dict[int, slice] = {}
    steps, there = [], valid
    for step in range(size):
        owner = (rank - step) % size
        new = found[owner] = slice(there - min(max(valid - owner * rows, 0), rows), there)
        pairs = [(new, slice(new.start, valid)), (slice(there, valid), new)]
        steps.append(_meeting([pair for pair in pairs if all(part.start < part.stop for part in pair)], offsets))
        there = new.start
    shift = min((rank + 1) % size * rows, valid) % max(valid, 1)
    return Arrivals(tuple(found[owner] for owner in range(size)), shift, tuple(steps))


@lru_cache(_KEPT)
def plan_departures(offsets: tuple[int, ...], size: int, rank: int, rows: int) -> tuple[tuple[Pair, ...], ...]:
    """Attention's backward so that in step s = 0 .. P - 1 the gradients of rank r + s + 1's chunk become complete.

    Its queries meet the keys of all chunks that are left, the other queries that are left its keys. Chunks lie in their
    own order.
    """
    valid = offsets[-1]
    steps = []
    for step in range(1, size + 1):
        owner = (rank + step) % size
        pairs = []
        for own in _ranges(owner, owner, size, rows, valid):
            pairs += [(own, keys) for keys in _ranges(owner, rank, size, rows, valid)]
            if owner != rank:
                pairs += [(queries, own) for queries in _ranges((owner + 1) % size, rank, size, rows, valid)]
        steps.append(_meeting(pairs, offsets))
    return tuple(steps)


def _ranges(first: int, last: int, size: int, rows: int, valid: int) -> list[slice]:
    """Existing tokens of the chunks first, first + 1, ..., last (modulo size): one range, or two where they wrap."""
    if first <= last:
        start, stop = first * rows, min((last + 1) * rows, valid)
        return [slice(start, stop)] if start < stop else []
    return [*_ranges(0, last, size, rows, valid), *_ranges(first, size - 1, size, rows, valid)]


def _meeting(pairs: list[tuple[slice, slice]], offsets: tuple[int, ...]) -> tuple[Pair, ...]:
    """The pairs of ranges that share a segment."""
    if len(offsets) == 2:
        return tuple(Pair(queries, keys, None, None) for queries, keys in pairs)
    found = []
    for queries, keys in pairs:
        both = window(offsets, queries.start, queries.stop), window(offsets, keys.start, keys.stop)
        if score_pairs(*both):
            found.append(Pair(queries, keys, *both))
    return tuple(found)
