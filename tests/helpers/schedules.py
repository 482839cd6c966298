"""Critical paths of the strategies' schedules, in closed form or by their recurrences; transfers take 1 s in all.

tests/parallel/test_overlap.py holds them equal to the real code on a clock of its own.
"""

from __future__ import annotations


def fastseq_seconds(degree: int, ratio: float, linear_share: float, *, attends: bool) -> float:
    """Critical path: T_s = T_(s-1) + max(work on chunk s - 1, transfer of chunk s), then the last chunk, then o."""
    one = degree / ((degree - 1) * (degree + 1))
    projection = ratio * linear_share / degree
    attention = [ratio * (1 - linear_share) * (2 * s + 1) / degree**2 for s in range(degree)]
    work = [projection + a if attends else projection for a in attention]
    now = sum(max(work[s], one) for s in range(degree - 1)) + work[-1]
    return now + (0 if attends else sum(attention)) + one * (degree - 1) / degree


def fastseq_backward_seconds(degree: int, ratio: float) -> float:
    """Critical path: dO, then in each step attention on what is left while the next x arrives and a share leaves."""
    chunk = degree / ((degree - 1) * (2 * degree + 1))
    now = chunk * (degree - 1) / degree
    arrived = link = now + chunk
    left = 0.0
    for step in range(1, degree + 1):
        now += ratio * (2 * (degree - step) + 1) / degree**2
        if step < degree:
            now = max(now, arrived)
        if step + 1 < degree:
            arrived = link = max(link, now) + chunk
        now = max(now, left)
        if step < degree:
            left = link = max(link, now) + chunk
    return now


def ulysses_seconds(chunks: int, ratio: float, share_in: float = 0.75) -> float:
    """Critical path: the link carries in 0, in 1, back 0, in 2, back 1, ...; in j + 1 is asked for when j begins."""
    way_in, work, way_back = share_in / chunks, ratio / chunks, (1 - share_in) / chunks
    done, link = 0.0, way_in
    arrival = link
    for chunk in range(chunks):
        begun = max(done, arrival)
        if chunk + 1 < chunks:
            arrival = link = max(link, begun) + way_in
        done = begun + work
        link = max(link, done) + way_back
    return link


def ring_seconds(degree: int, ratio: float) -> float:
    """Attention on each chunk while the next one arrives, then on the last."""
    one, work = 1 / (degree - 1), ratio / degree
    return (degree - 1) * max(one, work) + work
