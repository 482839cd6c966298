"""longreel.bench.rank_device and measure: a rank on a GPU, with a stand-in for CUDA and rehearsed on a CPU."""

from __future__ import annotations

import time
import types
from dataclasses import replace
from unittest import mock

import pytest
import torch

from longreel.bench import gate, measure, nvml
from longreel.bench.cases import Point, Timing
from longreel.bench.grids import MeasuredGrid, measured_points
from longreel.bench.measure import RankResult, measure_points
from longreel.bench.nvml import Monitor, Reading
from longreel.bench.presets import small_dit
from longreel.bench.rank_device import CpuRank, CudaRank, Held, rank_device

pytestmark = pytest.mark.slow

GiB = 2**30
MODEL = small_dit(depth=2, hidden_size=32)
TIMING = Timing(min_samples=4, max_samples=4, budget_s=0.0)


class FakeCuda:
    """The allocator of a device of 80 GiB, of which the driver and other processes take 1."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.allocated = self.peak = self.reserved = 0
        # Of blocks that are partly taken, which the allocator keeps.
        self.gaps = 0

    def take(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.allocated + self.gaps)

    def give(self, size: int) -> None:
        self.allocated -= size

    def install(self, monkeypatch) -> None:
        def empty_cache() -> None:
            self.calls.append("empty_cache")
            self.reserved = self.allocated + self.gaps

        def reset(device) -> None:
            self.calls.append("reset")
            self.peak = self.allocated

        members = {
            "get_device_properties": lambda device: types.SimpleNamespace(total_memory=80 * GiB),
            "synchronize": lambda device: self.calls.append("synchronize"),
            "empty_cache": empty_cache,
            "reset_peak_memory_stats": reset,
            "memory_allocated": lambda device: self.allocated,
            "memory_reserved": lambda device: self.reserved,
            "max_memory_allocated": lambda device: self.peak,
            "max_memory_reserved": lambda device: self.reserved,
            "mem_get_info": lambda device: (79 * GiB - self.reserved, 80 * GiB),
        }
        for name, member in members.items():
            monkeypatch.setattr(torch.cuda, name, member)


def test_three_memory_figures_are_the_points_own(monkeypatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    device = rank_device("cuda", 3)
    assert isinstance(device, CudaRank)
    assert (device.torch_device, device.limit) == (torch.device("cuda", 3), 80 * GiB)
    # An earlier, larger point has left its blocks; another one's weights stay beside this one's.
    cuda.take(40 * GiB)
    cuda.give(40 * GiB)
    cuda.take(2 * GiB)
    cuda.take(3 * GiB)
    device.start_peak(parked=Held(2 * GiB, 2 * GiB))
    cuda.take(10 * GiB)
    cuda.give(10 * GiB)
    assert device.peak() == {"allocated": 13 * GiB, "reserved": 13 * GiB, "device": 14 * GiB}
    # What is queued belongs to the step before.
    assert cuda.calls == ["synchronize", "empty_cache", "reset"]


def test_gaps_in_blocks_of_points_beside_it_are_not_the_points(monkeypatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    device = rank_device("cuda", 0)
    cuda.take(2 * GiB)
    cuda.gaps = GiB
    parked = device.resident()
    assert parked == Held(2 * GiB, 3 * GiB)
    cuda.take(3 * GiB)
    device.start_peak(parked)
    cuda.take(4 * GiB)
    # And 1 GiB of the driver's.
    assert device.peak() == {"allocated": 7 * GiB, "reserved": 7 * GiB, "device": 8 * GiB}


def test_a_cpu_rank_tells_what_its_process_took() -> None:
    device = rank_device("cpu", 0)
    assert isinstance(device, CpuRank)
    assert device.limit is None
    device.start_peak(parked=Held())
    kept = torch.ones(2**22)
    peak = device.peak()
    assert peak["process"] - peak["process_before"] >= kept.nbytes
    assert "VmHWM" in device.memory_source or "ru_maxrss" in device.memory_source


def points(policies=("none",), **changes) -> list[Point]:
    grid = MeasuredGrid(
        seq_lens=(512,),
        ranks=(2,),
        sp_degrees=(2,),
        strategies=("ulysses", "fastseq"),
        model=MODEL,
        policies=policies,
        timing=TIMING,
    )
    return measured_points(replace(grid, **changes), device="CPU")


def test_gpu_points_rehearsed_on_a_cpu_are_gated_shallow_and_short_and_timed_whole(run_distributed, tmp_path) -> None:
    path = str(tmp_path / "oracle.pt")
    wanted = [replace(point, gate_depth=1, gate_len=96) for point in points(precision="bf16")]
    run_distributed(gate.write_oracle, 1, replace(MODEL, depth=1), 96, 2, 0, path, "bf16")
    for results in run_distributed(measure_points, 2, wanted, path):
        for point, result in zip(wanted, results, strict=True):
            assert result.reason is None, (point.strategy, result.reason)
            assert result.gated.startswith("1 blocks, 96 tokens")
            # Half precision: what one device computing in it is off by, twice; not fp32's.
            assert 1e-3 < result.verdict.tolerance < 0.2
            assert 1e-5 < result.verdict.grad <= result.verdict.tolerance
            assert len(result.samples_s) == 4
            assert result.memory["process"] > result.memory["process_before"]
            # Counted whole: two blocks of 512 tokens, in half precision.
            sequence = {name: sent for name, sent in result.traffic.items() if name.startswith("sequence.")}
            assert sum(sequence.values()) == sum(result.traffic_formula.values())
            if point.strategy == "ulysses":
                assert result.traffic["sequence.all_to_all"] == 2 * 2 * 4 * 512 * 32 * 2 // 4


def order_of_steps(wanted: list[Point], path: str) -> list[str]:
    """Strategies in the order of their timed steps (in a worker)."""
    seen: list[str] = []
    step = measure._step

    def seeing(model, batch) -> None:
        seen.append(model.config.strategy)
        step(model, batch)

    with mock.patch.object(measure, "_step", seeing):
        results = measure_points(wanted, path)
    assert all(result.reason is None for result in results)
    return seen


def test_samples_are_taken_in_turns_back_and_forth(run_distributed, tmp_path) -> None:
    path = str(tmp_path / "oracle.pt")
    gate.write_oracle(MODEL, 512, 2, 0, path)
    for seen in run_distributed(order_of_steps, 2, points(), path):
        there = ["local", "ulysses", "fastseq"]
        # An untimed step of each, then rounds.
        assert seen == [*there, *there, *there[::-1], *there, *there[::-1]]


def test_wall_cap_ends_sampling_with_two_samples_at_least(run_distributed, tmp_path) -> None:
    path = str(tmp_path / "oracle.pt")
    gate.write_oracle(MODEL, 512, 2, 0, path)
    rule = Timing(min_samples=5, max_samples=9, budget_s=60.0, wall_cap_s=0.0)
    results: list[list[RankResult]] = run_distributed(
        measure_points, 2, [replace(point, timing=rule) for point in points()[:1]], path
    )
    assert [len(result.samples_s) for (result,) in results] == [2, 2]


def test_published_layout_is_gated_with_its_own_traffic(run_distributed, tmp_path) -> None:
    model = small_dit(depth=1, hidden_size=32, text_only=True, published=True)
    path = str(tmp_path / "oracle.pt")
    gate.write_oracle(model, 512, 2, 0, path)
    wanted = points(model=model, policies=("keep_attention", "full"))
    for results in run_distributed(measure_points, 2, wanted, path):
        for point, result in zip(wanted, results, strict=True):
            assert result.reason is None, (point.strategy, point.parallel.policy, result.reason)
            assert (sum(result.traffic_formula.values()) > 0) == (point.strategy != "local")


class FakeMonitor(Monitor):
    """Counts the energy of 500 W; in windows that are long enough here."""

    def __enter__(self) -> FakeMonitor:
        self.latest = Reading(sm_clock_mhz=1500, power_w=500.0, temperature_c=60, throttle=())
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def energy_j(self) -> float | None:
        return 500.0 * time.perf_counter()


def measure_with_energy(wanted: list[Point], path: str) -> list[RankResult]:
    """measure_points on a device whose energy can be read (in a worker)."""
    with (
        mock.patch.object(measure, "Monitor", FakeMonitor),
        mock.patch.object(nvml, "MIN_ENERGY_WINDOW_S", 0.05),
        mock.patch.object(measure, "MIN_ENERGY_WINDOW_S", 0.05),
    ):
        return measure_points(wanted, path)


def test_energy_of_a_short_step_is_that_of_a_window_of_many(run_distributed, tmp_path) -> None:
    path = str(tmp_path / "oracle.pt")
    gate.write_oracle(MODEL, 512, 2, 0, path)
    for results in run_distributed(measure_with_energy, 2, points()[:2], path):
        for result in results:
            assert result.telemetry["sm_clock_mhz"] == [1500] * 4
            # 500 W for about as long as a step takes.
            assert 0.2 * 500 * min(result.samples_s) < result.energy_j < 5 * 500 * max(result.samples_s)
