"""Times of a call that can be trusted: cold caches, every sample kept, candidates and baselines in alternation.

On CUDA a sample lies between two events on the stream. Before it the L2 cache is overwritten, and the stream is held
back until the host has launched everything, so that launches do not count as device time. Elsewhere the host's clock
is read, caches as they are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from longreel.bench.nvml import Monitor, Reading
from longreel.reports.turns import quantile

# The stream is held back for this many times the host's launch time, plus a constant, and never longer than the cap.
_HOLD_FACTOR, _HOLD_EXTRA_S, _HOLD_MOST_S = 2.0, 20e-6, 10e-3
# torch.cuda._sleep counts cycles; at the highest clock of current parts this is at least the time asked for.
_CYCLES_PER_S = 2.0e9
_CALLS_PER_LOOK = 32
# The buffer that pushes everything else out of L2 is this many times its size.
_FLUSH_FACTOR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TimingRule:
    """How many samples are taken.

    Args:
        min_samples, max_samples: of each candidate; between the two, until budget_s of each was timed.
        budget_s: seconds of timed work per candidate.
        wall_cap_s: seconds for all candidates together, warm-up included; once passed, sampling stops with what there
            is, at least one sample each (an iteration may take 30 s).
        warm_up_s: each candidate is run untimed for this long, at least once.
    """

    min_samples: int = 5
    max_samples: int = 50
    budget_s: float = 0.2
    wall_cap_s: float = 60.0
    warm_up_s: float = 0.05

    def __post_init__(self) -> None:
        if not 1 <= self.min_samples <= self.max_samples:
            raise ValueError(f"need 1 <= min_samples <= max_samples, got {self.min_samples} and {self.max_samples}")
        for name in ("budget_s", "wall_cap_s", "warm_up_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be seconds, 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is timed: run(prepare()). prepare runs before the clock starts; what run returns is dropped after it.

    warm_up: run it untimed first.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    warm_up: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Samples of one candidate, seconds, in the order taken.

    Args:
        samples_s: all of them. host_s: median time the host took to launch one.
        warm_up: untimed runs before. stopped_by: `budget`, `max_samples` or `wall_cap`.
        readings: clocks and the like beside each sample; see Monitor.
    """

    samples_s: tuple[float, ...]
    host_s: float
    warm_up: int
    stopped_by: str
    readings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median_s(self) -> float:
        """Median sample."""
        return statistics.median(self.samples_s)

    @property
    def interval_s(self) -> tuple[float, float]:
        """20th and 80th percentile."""
        return quantile(self.samples_s, 0.2), quantile(self.samples_s, 0.8)


class Clock(Protocol):
    """Takes one sample: (seconds, seconds the host took to launch)."""

    def sample(self, work: Work, host_s: float) -> tuple[float, float]:
        """host_s: what the last sample's launch took, 0 if unknown."""
        ...


class HostClock:
    """The host's clock, for devices without a queue."""

    def sample(self, work: Work, host_s: float) -> tuple[float, float]:
        """See Clock."""
        state = work.prepare()
        start = time.perf_counter()
        kept = work.run(state)
        seconds = time.perf_counter() - start
        del kept
        return seconds, seconds


class CudaClock:
    """Events on the current stream of a CUDA device, L2 overwritten before each sample."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(_FLUSH_FACTOR * l2_bytes, dtype=torch.int8, device=device)

    def sample(self, work: Work, host_s: float) -> tuple[float, float]:
        """See Clock."""
        state = work.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        self._flush.zero_()
        hold_s = min(_HOLD_FACTOR * host_s + _HOLD_EXTRA_S, _HOLD_MOST_S)
        torch.cuda._sleep(int(hold_s * _CYCLES_PER_S))
        start.record()
        launch = time.perf_counter()
        kept = work.run(state)
        launched_s = time.perf_counter() - launch
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end) * 1e-3, launched_s


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def measure(
    works: Mapping[str, Work], *, clock: Clock, rule: TimingRule, monitor: Monitor | None = None
) -> dict[str, Timing]:
    """Time candidates against each other: rounds in alternating order (A B, B A, ...), as many samples of each.

    Args:
        works: what to time, by name. clock: see clock_for. rule: how long.
        monitor: running monitor whose latest reading is kept beside each sample.

    Raises:
        ValueError: there is nothing to time.
    """
    if not works:
        raise ValueError("works is empty; give at least one call to time")
    deadline = time.monotonic() + rule.wall_cap_s
    host: dict[str, list[float]] = {name: [] for name in works}
    warm_up = {
        name: _warm_up(work, clock, rule, deadline, host[name]) if work.warm_up else 0 for name, work in works.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in works}
    readings: dict[str, list[Reading | None]] = {name: [] for name in works}
    order, stopped_by = list(works), "max_samples"
    for num_rounds in range(rule.max_samples):
        spent = sum(map(sum, samples.values()))
        if num_rounds >= rule.min_samples and spent >= rule.budget_s * len(works):
            stopped_by = "budget"
            break
        for name in order:
            if num_rounds and time.monotonic() > deadline:
                break
            seconds, launched_s = clock.sample(works[name], host[name][-1] if host[name] else 0.0)
            samples[name].append(seconds)
            host[name].append(launched_s)
            readings[name].append(None if monitor is None else monitor.latest)
        if time.monotonic() > deadline:
            stopped_by = "wall_cap"
            break
        order.reverse()
    return {
        name: Timing(
            samples_s=tuple(samples[name]),
            host_s=statistics.median(host[name][warm_up[name] :]),
            warm_up=warm_up[name],
            stopped_by=stopped_by,
            readings={} if monitor is None else monitor.summarise(readings[name]),
        )
        for name in works
    }


def _warm_up(work: Work, clock: Clock, rule: TimingRule, deadline: float, host: list[float]) -> int:
    """Runs without a sample: compilation, clocks that rise, caches of the allocator."""
    end = min(time.monotonic() + rule.warm_up_s, deadline)
    while not host or time.monotonic() < end:
        # The first launch may compile: its time would hold the stream back for nothing.
        host.append(clock.sample(work, host[-1] if len(host) > 1 else 0.0)[1])
    return len(host)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sustained:
    """One call over and over without a pause. energy_j: of one call, None for windows too short."""

    seconds: float
    calls: int
    energy_j: float | None
    readings: Mapping[str, Any]

    @property
    def rate(self) -> float:
        """Calls per second."""
        return self.calls / self.seconds


def sustain(work: Work, seconds: float, *, device: torch.device, monitor: Monitor) -> Sustained:
    """Run work back to back for this long: clocks and power as they settle under load.

    Args:
        work: prepared once. seconds: the window; energy wants more than nvml.MIN_ENERGY_WINDOW_S.
        device: whose queue is waited for. monitor: running.
    """
    state = work.prepare()
    readings: list[Reading | None] = []
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    work.run(state)
    wait()
    calls, energy_before, start = 0, monitor.energy_j(), time.monotonic()
    while True:
        # Many calls between two looks at the clock: the queue runs empty for some microseconds at each.
        for _ in range(_CALLS_PER_LOOK):
            work.run(state)
        calls += _CALLS_PER_LOOK
        wait()
        readings.append(monitor.latest)
        if time.monotonic() - start >= seconds:
            break
    elapsed, energy_after = time.monotonic() - start, monitor.energy_j()
    energy = monitor.window_energy_j(energy_before, energy_after, elapsed)
    return Sustained(
        seconds=elapsed,
        calls=calls,
        energy_j=None if energy is None else energy / calls,
        readings=monitor.summarise(readings),
    )
