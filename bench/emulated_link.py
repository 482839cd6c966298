"""The link of an emulated rank: how long a collective would take on the target's, and who holds a stream that long.

On CUDA a collective keeps its stream from its start until its copies are done and the link's time is over: what hides
behind computation then hides by the schedule that really runs, and what does not is in the step's wall clock. Elsewhere
the host waits, at the point where a real rank would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from longreel.parallel.predict.hardware import COLLECTIVE_LATENCY, GPUProfile


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A link between ranks, as prediction prices it: latency + bytes / bandwidth.

    Args:
        latency_s: of one collective. byte_s: bytes per second that a rank sends.
        source: where the figures come from, in words.
    """

    latency_s: float
    byte_s: float
    source: str

    def seconds(self, sent: int) -> float:
        """Time of a collective in which a rank sends this many bytes; none where nothing leaves the rank."""
        return self.latency_s + sent / self.byte_s if sent else 0.0


def link_of(profile: GPUProfile) -> Link:
    """The link of a target by its profile."""
    rate = profile.link
    return Link(
        latency_s=COLLECTIVE_LATENCY.value,
        byte_s=rate.value,
        source=f"{rate.value / 1e9:.0f} GB/s ({rate.provenance}: {rate.source}); "
        f"{COLLECTIVE_LATENCY.value * 1e6:.0f} us ({COLLECTIVE_LATENCY.provenance}: {COLLECTIVE_LATENCY.source})",
    )


@dataclass(frozen=True, slots=True)
class Call:
    """One collective of the emulated rank.

    Args:
        part: `sequence` or `sharding`. name: as in records' traffic. size: ranks of the group.
        sent: bytes that leave this rank. link_s: time on the link. background: others compute meanwhile.
    """

    part: str
    name: str
    size: int
    sent: int
    link_s: float
    background: bool


@dataclass(slots=True)
class CallLog:
    """What the groups of an emulated world did since the last clear().

    Args:
        calls: in their order. waits: (part, seconds or a pair of CUDA events) of every wait for a collective.
    """

    calls: list[Call] = field(default_factory=list)
    waits: list[tuple[str, Any]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget everything."""
        self.calls.clear()
        self.waits.clear()

    def waited_s(self) -> dict[str, float]:
        """Seconds that the computing stream stood still for collectives, by part; the device must be done."""
        total: dict[str, float] = {}
        for part, wait in self.waits:
            seconds = wait if isinstance(wait, float) else wait[0].elapsed_time(wait[1]) * 1e-3
            total[part] = total.get(part, 0.0) + seconds
        return total


class Work(dist._Work):
    """A collective in flight. wait() makes what follows wait for it and lets go of its buffers.

    Args:
        finish: waits for it. buffers: kept until then, as NCCL keeps them.
    """

    def __init__(self, finish: Callable[[], None], buffers: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._finish: Callable[[], None] | None = finish
        self._buffers = buffers

    def wait(self, timeout: Any = None) -> bool:
        """See torch.distributed.Work."""
        if self._finish is not None:
            self._finish()
            self._finish, self._buffers = None, ()
        return True

    def is_completed(self) -> bool:
        """Whether it was waited for."""
        return self._finish is None


class Lane(Protocol):
    """Where the collectives of one group run, one after the other."""

    def run(self, copy: Callable[[], object], seconds: float, *, background: bool) -> Callable[[], None]:
        """Run copy and take `seconds` at least.

        Args:
            copy: launches the copies.
            seconds: time on the link.
            background: beside what is computed; else what is computed next waits at once.

        Returns:
            Waits for it; called once or never.
        """
        ...


class HostLane:
    """A lane of a device without streams: copies run at once, and the host sleeps where a rank would wait."""

    def __init__(self, part: str, log: CallLog) -> None:
        self._part, self._log = part, log
        self._free_at = 0.0

    def run(self, copy: Callable[[], object], seconds: float, *, background: bool) -> Callable[[], None]:
        """See Lane."""
        start = max(time.perf_counter(), self._free_at)
        copy()
        done_at = self._free_at = start + seconds

        def wait() -> None:
            left = done_at - time.perf_counter()
            if left > 0:
                time.sleep(left)
            self._log.waits.append((self._part, max(0.0, left)))

        if background:
            return wait
        wait()
        return lambda: None


class CudaLane:
    """A lane of a CUDA device: a stream of its own for what runs in the background, as a communicator of NCCL has.

    What is not in the background runs on the current stream: NCCL does so too, and FSDP2 has streams for it.
    """

    def __init__(self, part: str, log: CallLog, device: torch.device) -> None:
        self._part, self._log, self._device = part, log, device
        # NCCL's kernels and FSDP2's streams go first too: behind kernels in the queue they would start too late.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._started_ns = torch.zeros(1, dtype=torch.int64, device=device)

    def run(self, copy: Callable[[], object], seconds: float, *, background: bool) -> Callable[[], None]:
        """See Lane."""
        current = torch.cuda.current_stream(self._device)
        if not background:
            begin, end = self._events()
            begin.record(current)
            # A buffer of its own: on another stream than the last one, which may still be held.
            self._occupy(copy, seconds, torch.empty_like(self._started_ns))
            end.record(current)
            if current == torch.cuda.default_stream(self._device):
                self._log.waits.append((self._part, (begin, end)))
            return lambda: None
        self._stream.wait_stream(current)
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._occupy(copy, seconds, self._started_ns)
            done.record(self._stream)

        def wait() -> None:
            stream = torch.cuda.current_stream(self._device)
            begin, end = self._events()
            begin.record(stream)
            stream.wait_event(done)
            end.record(stream)
            self._log.waits.append((self._part, (begin, end)))

        return wait

    @staticmethod
    def _occupy(copy: Callable[[], object], seconds: float, started_ns: Tensor) -> None:
        if seconds:
            from longreel.bench.emulated_hold import hold_from, start_clock

            start_clock(started_ns)
            copy()
            hold_from(started_ns, seconds)
        else:
            copy()

    @staticmethod
    def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
