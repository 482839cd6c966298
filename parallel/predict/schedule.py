"""How long a strategy waits for its exchange, by its schedule: critical paths, in closed form or by their recurrences.

One layer of one rank among equal ones, or as many layers as its seconds are of. tests/parallel/test_overlap.py holds
each function equal to the strategy's real code on a clock of its own. Every one returns seconds that are exposed: the
critical path less the work.
"""

from __future__ import annotations


def ulysses_waits(chunks: int, exchange: float, work: float, *, share_in: float) -> float:
    """Heads in chunks: the link carries in 0, in 1, back 0, in 2, back 1, ...; in j + 1 is asked for when j begins.

    Args:
        chunks: K. exchange: seconds of all-to-alls. work: of attention. share_in: of the exchange that goes in.
    """
    way_in, each, way_back = exchange * share_in / chunks, work / chunks, exchange * (1 - share_in) / chunks
    done, link = 0.0, way_in
    arrival = link
    for chunk in range(chunks):
        begun = max(done, arrival)
        if chunk + 1 < chunks:
            arrival = link = max(link, begun) + way_in
        done = begun + each
        link = max(link, done) + way_back
    return link - work


def ring_waits(degree: int, exchange: float, work: float) -> float:
    """Work on each chunk, a P-th, while the next one arrives: a ring, or FastSeq where only projections are in chunks.

    Args:
        degree: P. exchange: seconds of P - 1 transfers. work: of P equal parts of computation.
    """
    return max(0.0, exchange - work * (degree - 1) / degree)


def fastseq_waits(degree: int, exchange: float, projection: float, attention: float) -> float:
    """The gather of forward, attended to chunk by chunk: work on chunk s while chunk s + 1 arrives.

    Args:
        degree: P. exchange: seconds of the gather's P - 1 transfers. projection, attention: of all chunks.
    """
    one = exchange / (degree - 1)
    work = (projection / degree + attention * (2 * s + 1) / degree**2 for s in range(degree - 1))
    return sum(max(0.0, one - w) for w in work)


def fastseq_backward_waits(degree: int, exchange: float, projection: float, attention: float) -> float:
    """Backward by chunks: attention on what is left while the next x arrives and a share of dX leaves, on one link.

    Args:
        degree: P. exchange: seconds of P - 1 arrivals and as many shares. projection, attention: of all chunks.
    """
    one = exchange / (2 * (degree - 1))
    now, left = 0.0, 0.0
    arrived = link = one
    for step in range(1, degree + 1):
        now += projection / degree + attention * (2 * (degree - step) + 1) / degree**2
        if step < degree:
            now = max(now, arrived)
        if step + 1 < degree:
            arrived = link = max(link, now) + one
        now = max(now, left)
        if step < degree:
            left = link = max(link, now) + one
    return now - projection - attention
