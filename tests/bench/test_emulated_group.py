"""longreel.bench.emulated_group: what each collective leaves in its buffers, how long it takes, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from longreel.bench import emulated_link
from longreel.bench.emulated_group import emulated_world
from longreel.bench.emulated_link import CallLog, Link
from longreel.parallel import comm
from longreel.parallel.agreement import check_agreement
from longreel.parallel.mesh import build_mesh

LINK = Link(latency_s=1.0, byte_s=16.0, source="of this test")


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(emulated_link.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(emulated_link.time, "sleep", self.advance)

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def world() -> Iterator[CallLog]:
    with emulated_world(4, rank=1) as log:
        yield log


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def _group() -> str:
    return build_mesh(sp_degree=4).sp_group


def test_collectives_give_own_data_in_their_lengths(world: CallLog) -> None:
    group = _group()
    x = torch.arange(8.0).view(4, 2)
    assert comm.group_size(group) == 4 and comm.group_rank(group) == 1
    assert torch.equal(comm.all_to_all(x, group), x)
    assert torch.equal(comm.all_gather(x[0], group), x[0].expand(4, 2))
    assert torch.equal(comm.reduce_scatter(x, group), x.sum(0))
    assert torch.equal(comm.all_reduce_sum(x, group), 4 * x)
    received = torch.full_like(x, float("nan"))
    assert torch.equal(comm.start_exchange(x, received, step=3, group=group).wait(), x)
    assert [(owner, chunk.tolist()) for owner, chunk in comm.ring_chunks(x[0], group)] == [
        (owner, x[0].tolist()) for owner in (1, 0, 3, 2)
    ]


@pytest.mark.parametrize(
    ("op", "expected"),
    [(dist.ReduceOp.AVG, [3.0, 4.0]), (dist.ReduceOp.MAX, [6.0, 7.0]), (dist.ReduceOp.MIN, [0.0, 1.0])],
)
def test_reductions_run_over_own_rows(world: CallLog, op: dist.ReduceOp, expected: list[float]) -> None:
    x, out = torch.arange(8.0), torch.empty(2)
    comm.dist.reduce_scatter_single(out, x, op=op)
    assert out.tolist() == expected
    dist.all_reduce(out, op=op)
    assert out.tolist() == expected


def test_unknown_reductions_are_refused(world: CallLog) -> None:
    with pytest.raises(ValueError, match="SUM, AVG, MAX and MIN"):
        comm.dist.reduce_scatter_single(torch.empty(2), torch.empty(8), op=dist.ReduceOp.PRODUCT)


def test_uneven_all_to_all_repeats_what_leaves(world: CallLog) -> None:
    x = torch.arange(6.0).view(3, 2)
    out = torch.full((5, 2), float("nan"))
    dist.all_to_all_single(out, x, output_split_sizes=[2, 1, 1, 1], input_split_sizes=[0, 1, 2, 0])
    assert out.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    # The own row does not leave.
    assert world.calls[-1].sent == 2 * 8
    dist.all_to_all_single(out, x[:0], output_split_sizes=[2, 1, 1, 1], input_split_sizes=[0, 0, 0, 0])
    assert not out.any()


def test_a_gather_into_a_buffer_that_holds_the_input(world: CallLog) -> None:
    buffer = torch.full((8,), float("nan"))
    own = buffer[2:4]
    own.copy_(torch.tensor([1.0, 2.0]))
    comm.dist.all_gather_single(buffer, own)
    assert buffer.tolist() == [1.0, 2.0] * 4


def test_lists_broadcasts_and_barriers(world: CallLog) -> None:
    x = torch.arange(2.0)
    outs = [torch.full((2,), float("nan")) for _ in range(4)]
    dist.all_gather(outs, x)
    assert all(torch.equal(out, x) for out in outs)
    dist.broadcast(x, src=1)
    dist.broadcast(x, src=0)
    dist.barrier()
    assert x.tolist() == [0.0, 1.0]
    # Only the sender's bytes leave.
    assert [call.sent for call in world.calls if call.name == "broadcast"] == [8, 0]


def test_receives_take_the_oldest_of_their_size_and_zeros_without_one(world: CallLog) -> None:
    small, large = torch.tensor([1.0]), torch.tensor([2.0, 3.0])
    into_large, into_small, alone = (torch.full((n,), float("nan")) for n in (2, 1, 1))
    sends = [dist.isend(small, 2), dist.isend(large, 2)]
    receives = [dist.irecv(into_large, 0), dist.irecv(into_small, 0), dist.irecv(alone, 0)]
    for work in (*sends, *receives):
        work.wait()
    assert (into_large.tolist(), into_small.tolist(), alone.tolist()) == ([2.0, 3.0], [1.0], [0.0])


def test_the_log_says_what_left_and_through_which_group(world: CallLog) -> None:
    group = _group()
    world.clear()
    x = torch.zeros(4, 2)
    comm.all_to_all(x, group)
    comm.all_gather(x, comm.world())
    told = [(call.part, call.name, call.size, call.sent, call.background) for call in world.calls]
    assert told == [("sequence", "all_to_all", 4, 24, True), ("sharding", "all_gather", 4, 96, False)]


def test_a_link_takes_its_time_where_a_rank_waits(clock: Clock) -> None:
    with emulated_world(4, link=LINK) as log:
        group = _group()
        log.clear()
        clock.now = 200.0
        x = torch.zeros(4, 4)
        # 48 of 64 bytes leave: 1 + 3 s. Three of them are computed meanwhile.
        flight = comm.start_all_to_all(x, torch.empty_like(x), group)
        assert clock.now == 200.0
        clock.advance(3.0)
        flight.wait()
        assert clock.now == 204.0
        # Two in flight go one after the other, and a group's exchanges do not wait for another group's.
        flights = [comm.start_all_to_all(x, torch.empty_like(x), group) for _ in range(2)]
        comm.all_gather(x[0], comm.world())
        assert clock.now == 208.0
        flights[1].wait()
        assert clock.now == 212.0
        flights[0].wait()
        assert clock.now == 212.0
        # A send and its receive are one transfer.
        comm.start_exchange(x, torch.empty_like(x), step=1, group=group).wait()
        assert clock.now == 217.0
        assert log.waited_s() == {"sequence": 1.0 + 4.0 + 5.0, "sharding": 4.0}
        assert sum(call.link_s for call in log.calls) == 4 + 2 * 4 + 4 + 5


def test_waiting_for_a_send_waits_for_its_transfer(clock: Clock) -> None:
    with emulated_world(4, link=LINK):
        x = torch.zeros(16, dtype=torch.uint8)
        works = [dist.isend(x, 2), dist.irecv(torch.empty_like(x), 0)]
        start = clock.now
        works[0].wait()
        assert clock.now == start + 2.0
        works[1].wait()
        assert clock.now == start + 2.0


def test_a_group_of_one_takes_no_link(clock: Clock) -> None:
    with emulated_world(1, link=LINK):
        x = torch.zeros(1, 4)
        comm.all_to_all(x, comm.world())
        comm.all_gather(x, comm.world())
    assert clock.now == 100.0


def test_a_world_is_refused_beside_another_and_for_a_rank_outside(world: CallLog) -> None:
    with pytest.raises(ValueError, match="is initialised"), emulated_world(2):
        pass
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="rank 4 is not one of a world of 4; use 0 to 3"), emulated_world(4, rank=4):
        pass
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_what_ranks_agree_on_waits_for_no_device(world):
    # Nothing on this device has values that could be read.
    check_agreement("cu_seqlens", [0, 5], _group(), "meta")
    assert world.calls
