"""Clocks, power, temperature and throttling of the GPU that is being timed, read by a side thread through NVML.

Where there is no NVIDIA GPU or no nvidia-ml-py, the monitor says so: `unavailable` holds the reason.
"""

from __future__ import annotations

import importlib.util
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

# The energy counter moves in steps of up to 100 ms: shorter windows would measure those.
MIN_ENERGY_WINDOW_S = 2.0
_PERIOD_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """One look at the device. throttle: why the clock is not higher, as NVML names it; `none` is not listed."""

    sm_clock_mhz: int
    power_w: float
    temperature_c: int
    throttle: tuple[str, ...]


class Monitor:
    """Context in which `latest` is a fresh Reading, or None with `unavailable` saying why.

    Args:
        device: what is timed. period_s: between two readings.
    """

    def __init__(self, device: torch.device, *, period_s: float = _PERIOD_S) -> None:
        self.unavailable: str | None = None
        self.latest: Reading | None = None
        self._period_s = period_s
        self._device = device
        self._nvml: Any = None
        self._handle: Any = None
        self._reasons: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Monitor:
        self.unavailable = self._open()
        if self.unavailable is None:
            self.latest = self._read()
            self._thread = threading.Thread(target=self._watch, name="nvml", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._nvml.nvmlShutdown()
            self._thread = None

    def _open(self) -> str | None:
        """None once readings can be taken, else why not."""
        if self._device.type != "cuda":
            return f"no NVML for device type {self._device.type}"
        if importlib.util.find_spec("pynvml") is None:
            return "nvidia-ml-py is not installed"
        import pynvml

        try:
            pynvml.nvmlInit()
            # CUDA's order of devices need not be NVML's.
            uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml
            self._reasons = _throttle_reasons(pynvml)
            self._read()
        except pynvml.NVMLError as error:
            return f"NVML: {error}"
        return None

    def _read(self) -> Reading:
        nvml, handle = self._nvml, self._handle
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return Reading(
            sm_clock_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            temperature_c=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            throttle=tuple(name for name, bit in self._reasons.items() if bits & bit),
        )

    def _watch(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                self.latest = self._read()
            except self._nvml.NVMLError as error:
                self.latest, self.unavailable = None, f"NVML: {error}"
                return

    def energy_j(self) -> float | None:
        """The device's energy counter, joules since the driver was loaded; None where there is none."""
        if self._handle is None or self.unavailable is not None:
            return None
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        except self._nvml.NVMLError:
            # Not every part has the counter, and a missing figure is None.
            return None

    @staticmethod
    def window_energy_j(before: float | None, after: float | None, seconds: float) -> float | None:
        """Energy between two readings of the counter, None for windows too short to trust."""
        if before is None or after is None or seconds < MIN_ENERGY_WINDOW_S:
            return None
        return after - before

    def summarise(self, readings: Sequence[Reading | None]) -> dict[str, Any]:
        """Readings beside samples as a record keeps them: SM clock of each, range of the rest; or why none."""
        found = [reading for reading in readings if reading is not None]
        if not found:
            return {"unavailable": self.unavailable or "no reading was taken"}
        return {
            "sm_clock_mhz": [reading.sm_clock_mhz for reading in found],
            "power_w": _range([reading.power_w for reading in found]),
            "temperature_c": _range([reading.temperature_c for reading in found]),
            "throttle": sorted({name for reading in found for name in reading.throttle}),
        }


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"low": min(values), "median": statistics.median(values), "high": max(values)}


def _throttle_reasons(nvml: Any) -> dict[str, int]:
    """Name -> bit of every reason NVML knows, without `none` and `all`."""
    prefix = "nvmlClocksThrottleReason"
    reasons = {name.removeprefix(prefix): getattr(nvml, name) for name in dir(nvml) if name.startswith(prefix)}
    return {name: bit for name, bit in reasons.items() if name not in ("None", "All") and isinstance(bit, int) and bit}


def driver_version() -> str | None:
    """Version of the NVIDIA driver, None where it cannot be asked for."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    return version.decode() if isinstance(version, bytes) else str(version)
