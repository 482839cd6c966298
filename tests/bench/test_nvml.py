"""The monitor against a stand-in for NVML, and where there is none."""

from __future__ import annotations

import sys
import time
import types

import pytest
import torch

from longreel.bench import nvml
from longreel.bench.nvml import MIN_ENERGY_WINDOW_S, Monitor


class FakeError(Exception):
    pass


def fake_pynvml(**changes: object) -> types.ModuleType:
    """What Monitor asks of pynvml, on a GPU that draws 500 W at 1,500 MHz and is power-capped."""
    module = types.ModuleType("pynvml")
    energy = iter(range(0, 10**9, 1_000_000))
    members = {
        "NVMLError": FakeError,
        "NVML_CLOCK_SM": 1,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlClocksThrottleReasonNone": 0,
        "nvmlClocksThrottleReasonAll": 0xFF,
        "nvmlClocksThrottleReasonSwPowerCap": 4,
        "nvmlClocksThrottleReasonHwSlowdown": 8,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1500,
        "nvmlDeviceGetPowerUsage": lambda handle: 500_000,
        "nvmlDeviceGetTemperature": lambda handle, kind: 60,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 4,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: next(energy),
    }
    vars(module).update(members | changes)
    return module


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(nvml.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="u-1"))

    def install(**changes: object) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(**changes))

    return install


def test_a_side_thread_keeps_the_latest_reading_fresh(on_a_gpu):
    clocks = iter(range(1000, 10**6))
    handles = []
    on_a_gpu(
        nvmlDeviceGetClockInfo=lambda handle, kind: next(clocks),
        nvmlDeviceGetHandleByUUID=lambda uuid: handles.append(uuid) or uuid,
    )
    with Monitor(torch.device("cuda"), period_s=0.001) as monitor:
        first = monitor.latest
        deadline = time.monotonic() + 5
        while monitor.latest == first and time.monotonic() < deadline:
            time.sleep(0.001)
        assert monitor.latest.sm_clock_mhz > first.sm_clock_mhz
        assert monitor.unavailable is None
    assert handles == ["GPU-u-1"]
    assert first.throttle == ("SwPowerCap",)
    assert (first.power_w, first.temperature_c) == (500.0, 60)


def test_energy_only_of_windows_long_enough(on_a_gpu):
    on_a_gpu()
    with Monitor(torch.device("cuda")) as monitor:
        before, after = monitor.energy_j(), monitor.energy_j()
    assert Monitor.window_energy_j(before, after, MIN_ENERGY_WINDOW_S) == 1000.0
    assert Monitor.window_energy_j(before, after, MIN_ENERGY_WINDOW_S / 2) is None
    assert Monitor.window_energy_j(None, after, 10.0) is None


def test_why_there_are_no_readings(on_a_gpu, monkeypatch):
    def no_driver() -> None:
        raise FakeError("Driver Not Loaded")

    on_a_gpu(nvmlInit=no_driver)
    with Monitor(torch.device("cuda")) as monitor:
        assert monitor.summarise([monitor.latest]) == {"unavailable": "NVML: Driver Not Loaded"}
        assert monitor.energy_j() is None
    monkeypatch.setattr(nvml.importlib.util, "find_spec", lambda name: None)
    with Monitor(torch.device("cuda")) as monitor:
        assert monitor.unavailable == "nvidia-ml-py is not installed"
    assert nvml.driver_version() is None
