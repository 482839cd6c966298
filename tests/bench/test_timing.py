"""bench.timing with clocks that a test winds: order, counts, limits, what is kept."""

from __future__ import annotations

import pytest
import torch

from longreel.bench import timing
from longreel.bench.nvml import Monitor, Reading
from longreel.bench.timing import HostClock, TimingRule, Work, measure, sustain


class FakeTime:
    """time.monotonic and a Clock in one: every sample takes what its work says."""

    def __init__(self) -> None:
        self.now = 100.0
        self.order: list[str] = []

    def monotonic(self) -> float:
        return self.now

    def sample(self, work: Work, host_s: float) -> tuple[float, float]:
        name, seconds = work.run(work.prepare())
        self.order.append(name)
        self.now += seconds
        return seconds, host_s + 1.0


@pytest.fixture
def clock(monkeypatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(timing.time, "monotonic", fake.monotonic)
    return fake


def works(**seconds: float) -> dict[str, Work]:
    return {name: Work(run=lambda _, n=name, s=s: (n, s)) for name, s in seconds.items()}


def test_candidates_take_turns_in_alternating_order(clock):
    rule = TimingRule(min_samples=4, max_samples=4, warm_up_s=0.0)
    found = measure(works(a=0.1, b=0.2), clock=clock, rule=rule)
    assert "".join(clock.order) == "ab" + "ab" + "ba" + "ab" + "ba"
    assert found["a"].samples_s == (0.1,) * 4
    assert (found["b"].warm_up, found["b"].stopped_by) == (1, "max_samples")


def test_sampling_ends_with_the_budget_of_each(clock):
    rule = TimingRule(min_samples=2, max_samples=50, budget_s=1.0, warm_up_s=0.5)
    found = measure(works(a=0.25, b=0.25), clock=clock, rule=rule)
    assert len(found["a"].samples_s) == len(found["b"].samples_s) == 4
    assert found["a"].warm_up == 2
    assert found["a"].stopped_by == "budget"


def test_an_iteration_longer_than_the_cap_still_gives_a_sample(clock):
    found = measure(works(slow=30.0, quick=1.0), clock=clock, rule=TimingRule(min_samples=5, wall_cap_s=20.0))
    assert found["slow"].samples_s == (30.0,)
    assert found["quick"].samples_s == (1.0,)
    assert found["slow"].stopped_by == "wall_cap"


def test_readings_stand_beside_the_samples(clock):
    monitor = Monitor(torch.device("cpu"))
    monitor.latest = Reading(sm_clock_mhz=1980, power_w=600.0, temperature_c=50, throttle=("SwPowerCap",))
    rule = TimingRule(min_samples=3, max_samples=3, warm_up_s=0.0)
    readings = measure(works(a=0.1), clock=clock, rule=rule, monitor=monitor)["a"].readings
    assert readings["sm_clock_mhz"] == [1980] * 3
    assert readings["power_w"] == {"low": 600.0, "median": 600.0, "high": 600.0}
    assert readings["throttle"] == ["SwPowerCap"]


def test_interval_is_the_20th_and_80th_percentile():
    found = timing.Timing(samples_s=(5.0, 1.0, 2.0, 3.0, 4.0, 6.0), host_s=0.0, warm_up=1, stopped_by="budget")
    assert found.median_s == 3.5
    assert found.interval_s == (2.0, 5.0)


def test_host_clock_times_the_run_and_not_its_preparation():
    def prepare() -> str:
        timing.time.sleep(0.05)
        return "ready"

    seen = []
    seconds, _ = HostClock().sample(Work(run=seen.append, prepare=prepare), 0.0)
    assert seen == ["ready"]
    assert seconds < 0.04


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_samples": 0}, "need 1 <= min_samples <= max_samples, got 0 and 50"),
        ({"min_samples": 51}, "got 51 and 50"),
        ({"wall_cap_s": -1.0}, "wall_cap_s must be seconds, 0 or more, got -1.0"),
    ],
)
def test_an_impossible_rule_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TimingRule(**changes)


def test_nothing_to_time_is_refused(clock):
    with pytest.raises(ValueError, match="works is empty"):
        measure({}, clock=clock, rule=TimingRule())


def test_sustained_load_counts_every_call():
    calls = []
    with Monitor(torch.device("cpu")) as monitor:
        found = sustain(Work(run=calls.append), 0.02, device=torch.device("cpu"), monitor=monitor)
    # One call more to warm up.
    assert len(calls) == found.calls + 1
    assert found.seconds >= 0.02
    assert found.energy_j is None
    assert found.readings == {"unavailable": "no NVML for device type cpu"}


def test_cuda_samples_lie_between_events_after_the_flush_and_the_hold(monkeypatch):
    """The order of what CudaClock puts on the stream, on a stand-in for torch.cuda."""
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    class Flush:
        def zero_(self) -> None:
            log.append("flush")

    sizes = []
    cuda = timing.torch.cuda
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: type("P", (), {"L2_cache_size": 1000}))
    monkeypatch.setattr(timing.torch, "empty", lambda size, **_: sizes.append(size) or Flush())
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "synchronize", lambda device: log.append("synchronize"))
    monkeypatch.setattr(cuda, "_sleep", lambda cycles: log.append(f"hold {cycles}"))
    work = Work(run=lambda state: log.append(f"run {state}"), prepare=lambda: log.append("prepare") or "state")
    seconds, launched_s = timing.CudaClock(torch.device("cuda")).sample(work, 0.001)
    assert seconds == 0.0025
    assert launched_s >= 0
    assert sizes == [2000]
    # Held for longer than the launch took last time.
    assert log == ["prepare", "synchronize", "flush", "hold 4040000", "record", "run state", "record", "wait"]
