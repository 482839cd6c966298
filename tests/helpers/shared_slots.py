"""longreel.parallel.peer_mailbox.Transport on CPU processes: memory-mapped files, and streams that are threads.

As on a GPU, what is enqueued runs later, in its own time; `Stream` stands for a CUDA stream, the compute stream
included. Slots start as NaN.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from longreel.parallel import comm, symmetric
from longreel.parallel.peer_mailbox import NUM_SLOTS

WAIT_S = 20.0
# Between two looks at a signal.
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 2e-5, 1e-3


class Stalled(RuntimeError):
    """A signal did not come, or was raised while it was up."""


class Event:
    """A point in a stream."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Block the calling thread until the stream has come here."""
        assert self.reached.wait(2 * WAIT_S)
        if self.error is not None:
            raise self.error


class Stream:
    """Work in order on a thread of its own; after an error all that follows reports it."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def add(self, work: Callable[[], None]) -> None:
        """Enqueue."""
        self._work.put(work)

    def record(self) -> Event:
        """The end of what is enqueued now."""
        event = Event()

        def reach() -> None:
            event.error = self.error
            event.reached.set()

        # Reached even after an error.
        reach.always = True  # type: ignore[attr-defined]
        self._work.put(reach)
        return event

    def end(self) -> None:
        """End the thread after what is enqueued."""
        self._work.put(None)

    def _run(self) -> None:
        torch.set_num_threads(1)
        while (work := self._work.get()) is not None:
            if self.error is None or hasattr(work, "always"):
                try:
                    work()
                except BaseException as error:  # noqa: BLE001 - told to whoever waits
                    self.error = error


class Behaviour:
    """What a transport does beside the protocol.

    Args:
        delay: seconds before the named step (`fill`, `read`, `signal`, `wait`), drawn anew each time.
        omitted: steps that do nothing: `wait-ready`, `wait-read`, `signal-ready`, `signal-read`, `after-compute`,
            `arrival`.
        compute: the compute stream; None: the calling thread is.
    """

    def __init__(
        self,
        delay: Callable[[str], float] = lambda step: 0.0,
        omitted: frozenset[str] = frozenset(),
        compute: Stream | None = None,
        wait_s: float = WAIT_S,
    ) -> None:
        self.delay, self.omitted, self.compute, self.wait_s = delay, omitted, compute, wait_s
        self.opened: list[SharedSlots] = []
        self.bytes_read = 0


class _Arrival:
    """An event that makes the compute stream wait."""

    def __init__(self, event: Event, behaviour: Behaviour) -> None:
        self._event, self._behaviour = event, behaviour

    def wait(self) -> None:
        if "arrival" in self._behaviour.omitted:
            return
        compute = self._behaviour.compute
        if compute is None:
            self._event.wait()
        else:
            compute.add(self._event.wait)


class SharedSlots:
    """Slots and signals in one file per rank that all map; a signal is a byte with one writer at a time."""

    def __init__(self, folder: Path, group: str, slot_bytes: int, behaviour: Behaviour) -> None:
        self._rank, size = comm.group_rank(group), comm.group_size(group)
        # Groups of other ranks may have the same name.
        first = int(min(comm.over_ranks(float(dist.get_rank()), group)))
        name = f"{group}-{first}-{len(behaviour.opened)}"
        self.slot_bytes, self._behaviour, self._stream = slot_bytes, behaviour, Stream()
        signals = 2 * NUM_SLOTS * size
        total = NUM_SLOTS * slot_bytes + signals
        own = folder / f"{name}-{self._rank}"
        # 0xff throughout is NaN in every floating dtype.
        own.write_bytes(b"\xff" * (NUM_SLOTS * slot_bytes) + b"\0" * signals)
        comm.over_ranks(0.0, group)
        maps = [
            torch.from_file(str(folder / f"{name}-{rank}"), shared=True, size=total, dtype=torch.uint8)
            for rank in range(size)
        ]
        self._slots = [mapped[: NUM_SLOTS * slot_bytes].view(NUM_SLOTS, slot_bytes) for mapped in maps]
        self._signals = [mapped[NUM_SLOTS * slot_bytes :].view(2 * NUM_SLOTS, size) for mapped in maps]

    def after_compute(self) -> None:
        if self._behaviour.compute is not None and "after-compute" not in self._behaviour.omitted:
            self._stream.add(self._behaviour.compute.record().wait)

    def fill(self, slot: int, x: Tensor) -> None:
        self._copy("fill", self._rank, slot, x)

    def read(self, owner: int, slot: int, out: Tensor) -> None:
        self._behaviour.bytes_read += out.numel() * out.element_size()
        self._copy("read", owner, slot, out)

    def _copy(self, step: str, rank: int, slot: int, tensor: Tensor) -> None:
        flat = tensor.detach().flatten().view(torch.uint8)
        # flatten() of a contiguous tensor is the tensor.
        assert flat.data_ptr() == tensor.data_ptr()
        place = self._slots[rank][slot][: flat.numel()]
        target, source = (place, flat) if step == "fill" else (flat, place)

        def copy() -> None:
            time.sleep(self._behaviour.delay(step))
            target.copy_(source)

        self._stream.add(copy)

    def signal(self, peer: int, channel: int) -> None:
        if f"signal-{kind_of(channel)}" not in self._behaviour.omitted:
            self._stream.add(lambda: self._flip("signal", self._signals[peer], channel, self._rank, 0, 1))

    def wait(self, peer: int, channel: int) -> None:
        if f"wait-{kind_of(channel)}" not in self._behaviour.omitted:
            self._stream.add(lambda: self._flip("wait", self._signals[self._rank], channel, peer, 1, 0))

    def _flip(self, step: str, signals: Tensor, channel: int, rank: int, before: int, after: int) -> None:
        time.sleep(self._behaviour.delay(step))
        deadline, pause = time.monotonic() + self._behaviour.wait_s, SHORTEST_PAUSE_S
        while int(signals[channel, rank]) != before:
            if time.monotonic() > deadline:
                raise Stalled(f"rank {self._rank} stalled at a {step} of {kind_of(channel)}, with rank {rank}")
            # Looking without end would take the cores from whoever is to raise the signal.
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        signals[channel, rank] = after

    def mark(self) -> _Arrival:
        return _Arrival(self._stream.record(), self._behaviour)

    def finish(self) -> None:
        self._stream.record().wait()

    def end(self) -> None:
        self._stream.end()


def kind_of(channel: int) -> str:
    """Which of the protocol's two signals a channel is."""
    return "ready" if channel < NUM_SLOTS else "read"


def opener(folder: Path, group: str, behaviour: Behaviour) -> Callable[[int], SharedSlots]:
    """open_transport of a group's Mailbox."""

    def open_transport(slot_bytes: int) -> SharedSlots:
        made = SharedSlots(folder, group, slot_bytes, behaviour)
        behaviour.opened.append(made)
        return made

    return open_transport


@contextmanager
def shared_memory_groups(folder: Path, behaviour: Behaviour) -> Iterator[None]:
    """Groups with exchange back end `symmetric` exchange through SharedSlots."""
    with (
        mock.patch.object(
            symmetric,
            "open_transport",
            lambda group, device, slot_bytes: opener(folder, group, behaviour)(slot_bytes),
        ),
        mock.patch.object(symmetric, "_open", {}),
    ):
        try:
            yield
            # What peers wait for still has to run.
            for made in behaviour.opened:
                made.finish()
        finally:
            end_streams(behaviour)


def end_streams(behaviour: Behaviour) -> None:
    """End the threads of all transports."""
    for made in behaviour.opened:
        made.end()


def random_delays(seed: int, longest_s: float) -> Callable[[str], float]:
    """Mostly nothing, sometimes up to longest_s."""
    rng = random.Random(seed)
    return lambda step: rng.choice((0.0, 0.0, rng.uniform(0, longest_s)))
