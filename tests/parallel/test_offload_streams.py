"""The CUDA half of longreel.parallel.offload: what its streams wait for.

Without a GPU the streams are fakes that keep vector clocks, and a dispatch mode notes which bytes every op reads and
writes on which of them. Two accesses to the same bytes, one of them a write, that no wait puts in order are a race;
memory let go counts as written by the stream it was allocated on, in order with those it was recorded on.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longreel.parallel import offload
from longreel.parallel.offload import HostStore

Clock = dict[int, int]


class FakeEvent:
    def __init__(self, clock: Clock) -> None:
        self.clock = dict(clock)


class FakeStream:
    def __init__(self, number: int) -> None:
        self.number = number
        self.clock: Clock = {number: 0}

    def tick(self) -> Clock:
        self.clock[self.number] += 1
        return dict(self.clock)

    def record_event(self) -> FakeEvent:
        return FakeEvent(self.clock)

    def join(self, clock: Clock) -> None:
        for number, time in clock.items():
            self.clock[number] = max(self.clock.get(number, 0), time)

    def wait_event(self, event: FakeEvent) -> None:
        self.join(event.clock)

    def wait_stream(self, other: FakeStream) -> None:
        self.join(other.clock)


class FakeDevice(TorchDispatchMode):
    """Accesses to memory by stream, and the races between them."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = [FakeStream(0)]
        self.current = self.streams[0]
        self.pinned: list[int] = []
        self.races: list[str] = []
        self._named: dict[int, tuple[list[Any], list[FakeStream]]] = {}

    def stream(self, device: Any = None) -> FakeStream:
        self.streams.append(FakeStream(len(self.streams)))
        return self.streams[-1]

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def record(self, tensor: Tensor, stream: FakeStream) -> None:
        self._of(tensor)[1].append(stream)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            writes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
            for i, tensor in enumerate(args):
                if isinstance(tensor, Tensor):
                    self._access(tensor, writes[i], str(func))
            if isinstance(result, Tensor) and not any(writes):
                # Allocated on this stream; made, not written, by empty.
                self._of(result)
                if func is not torch.ops.aten.empty.memory_format:
                    self._access(result, True, str(func))
        return result

    def _of(self, tensor: Tensor) -> tuple[list[Any], list[FakeStream]]:
        """Accesses to a storage, and the streams that it is recorded on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._named:
            accesses: list[Any] = []
            recorded: list[FakeStream] = []
            self._named[key] = accesses, recorded
            home = self.current
            weakref.finalize(storage, self._let_go, key, home, accesses, recorded)
        return self._named[key]

    def _access(self, tensor: Tensor, write: bool, name: str) -> None:
        low = tensor.storage_offset() * tensor.element_size()
        high = low + tensor.numel() * tensor.element_size()
        self._note(self._of(tensor)[0], low, high, write, self.current, name)

    def _let_go(self, key: int, home: FakeStream, accesses: list[Any], recorded: list[FakeStream]) -> None:
        del self._named[key]
        reuse = FakeStream(home.number)
        for stream in (home, *recorded):
            reuse.join(stream.clock)
        self._note(accesses, 0, 1 << 62, True, reuse, "memory let go")

    def _note(self, accesses: list[Any], low: int, high: int, write: bool, stream: FakeStream, name: str) -> None:
        clock = stream.tick()
        for from_, to, written, number, time, earlier in accesses:
            if (write or written) and from_ < high and low < to and clock.get(number, 0) < time:
                self.races.append(f"{earlier} on stream {number}, then {name} on stream {stream.number}")
        accesses.append((low, high, write, stream.number, clock[stream.number], name))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake, empty = FakeDevice(), torch.empty

    def unpinned(*size: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if pin_memory:
            fake.pinned.append(size[0])
        return empty(*size, **kwargs)

    monkeypatch.setattr(offload, "on_streams", lambda device: True)
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "Stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.current)
    monkeypatch.setattr(torch.cuda, "stream", fake.on)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: fake.record(tensor, stream))
    return fake


def steps(device: FakeDevice) -> HostStore:
    """Three steps of three blocks with two tensors each, their memory let go and reused as a training step does.

    The second step ends early, while what it fetched ahead is on its way.
    """
    store = HostStore(min_bytes=1, slab_bytes=1024)
    with device:
        for step in range(3):
            kept, expected = [], []
            for block in range(3):
                store.next_block()
                for i in range(2):
                    x = torch.full((20, 20 - i), float(10 * step + block)).T
                    kept.append(store.put(x))
                    expected.append(float(10 * step + block))
                    del x
            while kept:
                back = store.get(kept.pop())
                assert (back + 1).sum().item() == back.numel() * (expected.pop() + 1)
                del back
                if step == 1:
                    kept.clear()
    del kept
    gc.collect()
    return store


def test_every_access_is_in_order(device: FakeDevice) -> None:
    store = steps(device)
    assert device.races == []
    assert len(device.streams) == 3
    # All slabs are pinned, in the size asked for.
    assert device.pinned == [1024] * (store.pinned_bytes // 1024)
    assert store.num_bytes == 0


@pytest.mark.parametrize(
    ("stream", "race"),
    [
        pytest.param(2, "copy_.default on stream 1, then aten.copy_.default on stream 2", id="back-out"),
        pytest.param(0, "copy_.default on stream 2, then aten.add.Tensor on stream 0", id="use-back"),
    ],
)
def test_a_mutant_without_an_event_races(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, stream: int, race: str
) -> None:
    original = FakeStream.wait_event

    def mutant(waiting: FakeStream, event: FakeEvent) -> None:
        if waiting.number != stream:
            original(waiting, event)

    monkeypatch.setattr(FakeStream, "wait_event", mutant)
    steps(device)
    assert any(race in found for found in device.races)


@pytest.mark.parametrize(
    ("waited_for", "race"),
    [
        pytest.param(0, "aten.full.default on stream 0, then aten.copy_.default on stream 1", id="out-made"),
        pytest.param(2, "copy_.default on stream 2, then aten.copy_.default on stream 1", id="reuse-back"),
    ],
)
def test_a_mutant_without_a_wait_for_a_stream_races(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, waited_for: int, race: str
) -> None:
    original = FakeStream.wait_stream

    def mutant(stream: FakeStream, other: FakeStream) -> None:
        if other.number != waited_for:
            original(stream, other)

    monkeypatch.setattr(FakeStream, "wait_stream", mutant)
    steps(device)
    assert any(race in found for found in device.races)


@pytest.mark.parametrize(
    ("on", "race"),
    [
        pytest.param(1, "copy_.default on stream 1, then memory let go on stream 0", id="left"),
        pytest.param(0, "on stream 0, then memory let go on stream 2", id="returned"),
    ],
)
def test_a_mutant_that_records_no_stream_races(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, on: int, race: str
) -> None:
    def mutant(tensor: Tensor, stream: FakeStream) -> None:
        if stream.number != on:
            device.record(tensor, stream)

    monkeypatch.setattr(Tensor, "record_stream", mutant)
    steps(device)
    assert any(race in found for found in device.races)


def test_a_graph_dropped_before_its_backward_gives_its_memory_back(device: FakeDevice) -> None:
    """Only copies out have run then; the next forward reuses their memory."""
    store = HostStore(min_bytes=1, slab_bytes=1024)
    with device:
        for _ in range(2):
            store.next_block()
            kept = [store.put(torch.randn(100)) for _ in range(3)]
            assert store.num_bytes == 3 * 512
            del kept
    assert store.num_bytes == 0
    assert store.pinned_bytes == 2048
    assert device.races == []


@pytest.mark.gpu
def test_what_left_a_gpu_comes_back_through_pinned_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cuda = torch.device("cuda")
    store = HostStore(min_bytes=1, slab_bytes=1 << 20)
    for step in range(3):
        kept, expected = [], []
        for _block in range(4):
            store.next_block()
            for length in (3_000_000, 700_001 + step):
                x = torch.randn(length, device=cuda, dtype=torch.bfloat16)
                expected.append(x.cpu())
                # What was put is let go at once, and the next tensor written where the allocator finds room.
                kept.append(store.put(x * 1))
                del x
                torch.full((length,), float("nan"), device=cuda, dtype=torch.bfloat16)
        while kept:
            back = store.get(kept.pop())
            assert torch.equal(back.cpu(), expected.pop()), (step, len(kept))
            del back
        gc.collect()
    assert store.num_bytes == 0
    assert all(slab.is_pinned() for slab in store._slabs.pieces([(0, store.pinned_bytes)]))
    # What was held at once, to a slab.
    assert store.pinned_bytes - store.peak_bytes < 1 << 20
