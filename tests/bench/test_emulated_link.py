"""longreel.bench.emulated_link and emulated_hold on CUDA: what is put on which stream, and how it compiles."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longreel.bench import emulated_hold
from longreel.bench.emulated_group import emulated_world
from longreel.bench.emulated_link import CallLog, CudaLane, Link, link_of
from longreel.kernels.triton_aot import compile_kernel
from longreel.parallel import comm
from longreel.parallel.mesh import build_mesh
from longreel.parallel.predict.hardware import COLLECTIVE_LATENCY, get_profile


class Streams:
    """Stands for torch.cuda's streams: what is done on each, in the order of the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str]] = []
        self.default = self.current = _Stream(self, "main")
        self._events = 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: _Stream(self, f"side{priority}"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: self.default)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(emulated_hold, "start_clock", lambda ns: self.do("clock"))
        monkeypatch.setattr(emulated_hold, "hold_from", lambda ns, seconds: self.do(f"hold {seconds:g}"))

    def do(self, what: str) -> None:
        self.log.append((self.current.name, what))

    @contextlib.contextmanager
    def on(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def event(self, enable_timing: bool = False) -> _Event:
        self._events += 1
        return _Event(self, f"{'timed' if enable_timing else 'done'}")


class _Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self._streams, self.name = streams, name

    def wait_stream(self, other: _Stream) -> None:
        self._streams.log.append((self.name, f"waits for {other.name}"))

    def wait_event(self, event: _Event) -> None:
        self._streams.log.append((self.name, f"waits for {event.name}"))


class _Event:
    def __init__(self, streams: Streams, name: str) -> None:
        self._streams, self.name = streams, name

    def record(self, stream: _Stream) -> None:
        self._streams.log.append((stream.name, f"records {self.name}"))

    def elapsed_time(self, other: _Event) -> float:
        return 250.0


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


def test_the_background_is_a_stream_of_its_own_that_computation_waits_for(streams: Streams) -> None:
    log = CallLog()
    lane = CudaLane("sequence", log, torch.device("cpu"))
    wait = lane.run(lambda: streams.do("copy"), 2.0, background=True)
    # Behind what was computed so far, and held from before its copies.
    assert streams.log == [
        ("side-1", "waits for main"),
        ("side-1", "clock"),
        ("side-1", "copy"),
        ("side-1", "hold 2"),
        ("side-1", "records done"),
    ]
    assert not log.waits
    streams.log.clear()
    wait()
    assert streams.log == [("main", "records timed"), ("main", "waits for done"), ("main", "records timed")]
    assert log.waited_s() == {"sequence": 0.25}


def test_what_is_not_in_the_background_holds_the_stream_it_is_on(streams: Streams) -> None:
    log = CallLog()
    lane = CudaLane("sharding", log, torch.device("cpu"))
    lane.run(lambda: streams.do("copy"), 2.0, background=False)()
    assert [what for where, what in streams.log if where == "main"] == [
        "records timed",
        "clock",
        "copy",
        "hold 2",
        "records timed",
    ]
    assert log.waited_s() == {"sharding": 0.25}
    # On a stream of FSDP2's computation does not stand still for it.
    log.clear()
    with streams.on(_Stream(streams, "fsdp")):
        lane.run(lambda: streams.do("copy"), 2.0, background=False)()
    assert not log.waits


def test_nothing_is_held_where_nothing_leaves(streams: Streams) -> None:
    lane = CudaLane("sequence", CallLog(), torch.device("cpu"))
    lane.run(lambda: streams.do("copy"), 0.0, background=True)
    assert [what for _, what in streams.log] == ["waits for main", "copy", "records done"]


def test_links_are_those_of_prediction() -> None:
    profile = get_profile("H800")
    link = link_of(profile)
    assert link.seconds(0) == 0.0
    assert link.seconds(10**9) == pytest.approx(COLLECTIVE_LATENCY.value + 10**9 / profile.link.value)
    assert "GB/s (assumed" in link.source


def test_the_hold_reads_the_gpus_clock_until_its_time() -> None:
    arguments: dict[str, Any] = {"started_ptr": torch.int64, "nanoseconds": 2**40}
    ptx = compile_kernel(emulated_hold.hold_kernel, arguments, num_warps=1).ptx
    # Once before the loop and once in it, which a branch ends.
    assert ptx.count("%globaltimer") == 2
    loop = re.search(r"(\$L__BB0_\d+):(?:(?!ret;).)*?globaltimer(?:(?!ret;).)*?bra\s+\1", ptx, re.DOTALL)
    assert loop is not None
    # Nothing of it is left out for being unused.
    assert "st.global" in ptx


@pytest.mark.gpu
def test_on_a_gpu_a_link_holds_its_stream_and_hides_behind_computation() -> None:
    link = Link(latency_s=0.0, byte_s=1e6, source="of this test")
    device = torch.device("cuda")
    with emulated_world(4, link=link) as log:
        group = build_mesh(sp_degree=4, device_type="cuda").sp_group
        # 48 kB leave at 1 MB/s: 48 ms.
        x = torch.randn(4, 4000, device=device)
        comm.start_all_to_all(x, torch.empty_like(x), group).wait()
        torch.cuda.synchronize()
        log.clear()
        start = time.perf_counter()
        received = comm.start_all_to_all(x, torch.empty_like(x), group).wait()
        torch.cuda.synchronize()
        alone = time.perf_counter() - start
        assert torch.equal(received, x)
        assert 0.048 <= alone < 0.07 and 0.04 < log.waited_s()["sequence"] < 0.07
        # Computation that takes longer hides it.
        weight = torch.randn(8192, 8192, device=device)
        log.clear()
        flight = comm.start_all_to_all(x, torch.empty_like(x), group)
        for _ in range(20):
            weight @ weight
        flight.wait()
        torch.cuda.synchronize()
        assert log.waited_s()["sequence"] < 0.01


@pytest.mark.gpu
def test_on_a_gpu_the_allocator_is_capped_and_running_out_is_a_result() -> None:
    from longreel.bench.cases import Point
    from longreel.bench.emulated_result import Plan
    from longreel.bench.emulation import emulate_point
    from longreel.models.config import dit_xl_2
    from longreel.parallel.config import ParallelConfig

    point = Point(
        kind="emulated",
        model=dit_xl_2(conditioning="cross"),
        model_name="DiT-XL/2",
        parallel=ParallelConfig(policy="none", precision="bf16", attention_provider="sdpa-flash"),
        num_devices=8,
        device="this GPU",
        target="A100",
        seq_len=65_536,
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    found = emulate_point(point, Plan(depths=(28,), samples=1, warm_up=False), "cuda")
    torch.distributed.destroy_process_group()
    assert found.oom is not None and "OutOfMemoryError" in found.oom
