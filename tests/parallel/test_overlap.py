"""What a schedule hides: a strategy's real forward on a clock of its own, transfers and computations of set length.

One process stands for one of P equal ranks. A computation moves the clock on; a transfer ends its duration after it
starts; waiting for it moves the clock to that moment, if that lies ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from longreel.models.sequence import SequenceLengths
from longreel.parallel import comm
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.predict.fake_world import fake_world
from longreel.parallel.predict.schedule import fastseq_backward_waits, fastseq_waits, ring_waits, ulysses_waits
from longreel.parallel.strategies import (
    build_strategy,
    chunked_attention,
    chunked_backward,
    gather_project,
    heads,
    ring,
)

HEADS, WIDTH, ROWS = 32, 256, 4


class Clock:
    """Time of one rank."""

    def __init__(self) -> None:
        self.now = 0.0
        self.computed = 0.0
        self.transferred = 0.0
        self._link_free = 0.0

    def compute(self, seconds: float) -> None:
        self.now += seconds
        self.computed += seconds

    def transfer(self, seconds: float) -> float:
        """The moment a transfer that is asked for now ends: after those asked for before it."""
        self.transferred += seconds
        self._link_free = max(self.now, self._link_free) + seconds
        return self._link_free


@contextmanager
def timed(clock: Clock, per_pair: float, per_row: float, per_byte: float) -> Iterator[None]:
    """Attention takes per_pair of (query, key), a projection per_row, a transfer per_byte; nothing else takes time."""

    class Flight(comm.Exchange):
        """An exchange that takes the clock's time and brings zeros."""

        def __init__(self, received: Tensor, num_bytes: float) -> None:
            super().__init__(received, (), received)
            object.__setattr__(self, "over", clock.transfer(per_byte * num_bytes))

        def wait(self) -> Tensor:
            clock.now = max(clock.now, self.over)
            return self.received.zero_()

    def exchange(send: Tensor, received: Tensor, *, step: int, group: str) -> comm.Exchange:
        return Flight(received, send.numel() * send.element_size())

    def all_to_all(send: Tensor, received: Tensor, group: str) -> comm.Exchange:
        size = comm.group_size(group)
        return Flight(received, send.numel() * send.element_size() * (size - 1) / size)

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        clock.compute(per_pair * q.shape[1] * k.shape[1] * q.shape[2])
        return torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=q.dtype)

    def packed(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return attention(*qkv.unbind(2))

    def attention_backward(dout: Tensor, dlse: None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        attention(q, k, v)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

    def packed_backward(dout: Tensor, dlse: None, qkv: Tensor, *_: Any) -> Tensor:
        attention(*qkv.unbind(2))
        return torch.zeros_like(qkv)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        clock.compute(per_row * x.shape[1])
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    with (
        mock.patch.object(comm, "start_exchange", exchange),
        mock.patch.object(comm, "start_all_to_all", all_to_all),
        mock.patch.object(chunked_attention, "attention_op", attention),
        mock.patch.object(ring, "attention_op", attention),
        mock.patch.object(heads, "attention_packed_op", packed),
        mock.patch.object(chunked_backward, "attention_backward_op", attention_backward),
        mock.patch.object(ring, "attention_backward_op", attention_backward),
        mock.patch.object(heads, "attention_packed_backward_op", packed_backward),
        mock.patch.object(chunked_attention.F, "linear", linear),
        mock.patch.object(gather_project.F, "linear", linear),
    ):
        yield


def forward(name: str, degree: int, ratio: float, *, linear_share: float = 0.01, **options: Any) -> Clock:
    """One attention layer's forward whose computation takes `ratio` times as long as its transfers, which take 1 s."""
    return layer(name, degree, ratio, linear_share, options, backward=False)


def backward(name: str, degree: int, ratio: float, **options: Any) -> Clock:
    """The same of its backward, where attention alone takes time."""
    return layer(name, degree, ratio, 0.0, options, backward=True)


def layer(
    name: str, degree: int, ratio: float, linear_share: float, options: dict[str, Any], *, backward: bool
) -> Clock:
    with fake_world(degree):
        config = ParallelConfig(strategy=name, sp_degree=degree, attention_provider="torch", **options)
        sp = build_strategy(config, build_mesh(sp_degree=degree))
        num_tokens = ROWS * degree
        lengths = SequenceLengths(valid=num_tokens, padded=num_tokens)

        def run(per_pair: float, per_row: float, per_byte: float) -> Clock:
            clock = Clock()
            with timed(clock, per_pair, per_row, per_byte):
                x = torch.zeros(1, ROWS, WIDTH, requires_grad=True)
                out = sp.self_attention(x, nn.Linear(WIDTH, 3 * WIDTH), num_heads=HEADS, lengths=lengths)
                if backward:
                    clock.__init__()
                    out.backward(torch.zeros_like(out))
            return clock

        # Units of work, so that the totals can be set.
        pairs, rows = run(1.0, 0.0, 0.0).computed, run(0.0, 1.0, 0.0).computed
        sent = run(0.0, 0.0, 1.0).transferred
        return run(ratio * (1 - linear_share) / pairs, ratio * linear_share / max(rows, 1.0), 1 / sent)


def fastseq_seconds(degree: int, ratio: float, *, attends: bool) -> float:
    """Forward of a layer whose transfers take 1 s: x, then a (P + 1)-th for the output."""
    output, projection = 1 / (degree + 1), 0.01 * ratio
    if attends:
        return ratio + output + fastseq_waits(degree, 1 - output, projection, ratio - projection)
    return ratio + output + ring_waits(degree, 1 - output, projection)


def fastseq_backward_seconds(degree: int, ratio: float) -> float:
    """The same of backward, with a (2 P + 1)-th for the output's gradient."""
    output = 1 / (2 * degree + 1)
    return ratio + output + fastseq_backward_waits(degree, 1 - output, 0.0, ratio)


def ulysses_seconds(chunks: int, ratio: float, share_in: float = 0.75) -> float:
    return ratio + ulysses_waits(chunks, 1.0, ratio, share_in=share_in)


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("degree", [2, 4, 8], ids=lambda p: f"P{p}")
@pytest.mark.parametrize("overlap", ["projection", "attention"])
def test_fastseq_takes_the_time_of_its_schedule(overlap, degree, ratio):
    clock = forward("fastseq", degree, ratio, fastseq_overlap=overlap)
    assert clock.transferred == pytest.approx(1)
    assert clock.computed == pytest.approx(ratio)
    assert clock.now == pytest.approx(fastseq_seconds(degree, ratio, attends=overlap == "attention"))


@pytest.mark.parametrize("degree", [2, 4, 8], ids=lambda p: f"P{p}")
def test_fastseq_hides_its_transfers_where_computation_is_four_times_as_long(degree):
    assert forward("fastseq", degree, 4.0, fastseq_overlap="attention").now <= 1.1 * 4.0
    # Behind the projection alone it cannot.
    assert forward("fastseq", degree, 4.0, fastseq_overlap="projection").now > 1.1 * 4.0


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("degree", [2, 4, 8], ids=lambda p: f"P{p}")
def test_fastseq_backward_takes_the_time_of_its_schedule(degree, ratio):
    clock = backward("fastseq", degree, ratio, fastseq_overlap="attention")
    assert clock.transferred == pytest.approx(1)
    assert clock.computed == pytest.approx(ratio)
    assert clock.now == pytest.approx(fastseq_backward_seconds(degree, ratio))


@pytest.mark.parametrize("degree", [2, 4, 8], ids=lambda p: f"P{p}")
def test_fastseq_backward_hides_its_transfers_where_computation_is_four_times_as_long(degree):
    assert backward("fastseq", degree, 4.0, fastseq_overlap="attention").now <= 1.1 * 4.0
    # Attention all at once has nothing beside it.
    assert backward("fastseq", degree, 4.0, fastseq_overlap="projection").now > 1.2 * 4.0


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("degree", [2, 4, 8], ids=lambda p: f"P{p}")
def test_a_ring_takes_the_longer_of_attention_and_transfer(degree, ratio):
    clock = forward("ring", degree, ratio, linear_share=0.0)
    assert clock.now == pytest.approx(ratio + ring_waits(degree, 1.0, ratio))


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("degree", [2, 4, 8], ids=lambda p: f"P{p}")
def test_ulysses_takes_the_time_of_its_schedule(degree, chunks, ratio):
    clock = forward("ulysses", degree, ratio, linear_share=0.0, head_chunks=chunks)
    assert clock.transferred == pytest.approx(1)
    assert clock.computed == pytest.approx(ratio)
    assert clock.now == pytest.approx(ulysses_seconds(chunks, ratio))


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("degree", [2, 4, 8], ids=lambda p: f"P{p}")
def test_ulysses_backward_takes_the_time_of_its_schedule(degree, chunks, ratio):
    clock = backward("ulysses", degree, ratio, head_chunks=chunks)
    # dO in, dQ, dK and dV back.
    assert clock.now == pytest.approx(ulysses_seconds(chunks, ratio, share_in=0.25))


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("chunks", [2, 4])
def test_asking_for_one_chunk_ahead_takes_no_longer_than_asking_for_all(chunks, ratio):
    way_in, work, way_back = 0.75 / chunks, ratio / chunks, 0.25 / chunks
    done, returned = 0.0, chunks * way_in
    for chunk in range(chunks):
        done = max(done, (chunk + 1) * way_in) + work
        returned = max(returned, done) + way_back
    assert ulysses_seconds(chunks, ratio) <= returned * (1 + 1e-12)


def test_ulysses_hides_what_chunks_can_hide():
    whole, four, sixteen = (
        forward("ulysses", 2, 4.0, linear_share=0.0, head_chunks=chunks).now for chunks in (1, 4, 16)
    )
    assert whole == pytest.approx(4 + 1)
    # What stays is the first chunk's way in and the last one's way back.
    assert four == pytest.approx(4 + 1 / 4)
    assert sixteen <= 1.1 * 4
