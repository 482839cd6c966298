"""The GPU that the code generation report predicts for: an H200 SXM, as figures with their sources."""

from __future__ import annotations

# Multiprocessors, and the clock at which they make the datasheet's 989 TFLOP/s in bf16.
PROCESSORS = 132
CLOCK = 1.83e9
# An 8192^3 product of random bf16 on one H200 reached 769 to 798 TFLOP/s of it.
REACHED = 798 / 989
# Bytes per cycle and multiprocessor that a device-to-device copy moved on one H200, read and written: 4.3 TB/s.
COPY_BYTES = 4.3e12 / PROCESSORS / CLOCK
# Assumed: cycles from a load of memory to its value while memory is busy, twice what an idle one is said to take.
LATENCY = 1000.0
# Assumed: bytes per cycle that all L2 slices together can read; NVIDIA's A100 paper says 5120, Hopper's says nothing.
L2_BYTES = 5120.0 / PROCESSORS
# L2 of an H200, bytes.
L2_SIZE = 50e6
# Instructions per cycle of a multiprocessor, one for each scheduler, and special function results per cycle.
SCHEDULERS = 4
SPECIAL_PER_CYCLE = 16
