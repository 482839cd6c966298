"""What an emulated point runs in its worker: one rank of P for real, at depth after depth.

A step is timed by the wall clock, from a device that is idle to a device that is idle. Collectives hold their streams
for the target's link time (emulated_link.py), so nothing is added to that time and nothing is taken off it: copies run
inside the link's time, as NCCL's would.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from longreel.bench import gate
from longreel.bench.cases import Point
from longreel.bench.emulated_group import emulated_world
from longreel.bench.emulated_link import Call, CallLog, link_of
from longreel.bench.emulated_result import DepthRun, Emulated, Plan, continued
from longreel.bench.measure import silence_fsdp
from longreel.bench.nvml import Monitor, Reading
from longreel.bench.process_memory import PeakMemory
from longreel.parallel.mesh import ParallelMesh, build_mesh
from longreel.parallel.parallelize import Batch, ParallelDiT
from longreel.parallel.predict.hardware import FIXED_RESERVE_BYTES, get_profile
from longreel.parallel.predict.predict import trace_shape

_LEARNING_RATE = 1e-4
# Tokens of the step that compiles kernels and is looked at for numbers that are not finite: long enough for every
# kernel's constants of long sequences, and for what eight ranks do by chunks.
SHORT_LEN = 32_768


class _Stop(Exception):
    """Ends a point early: the message goes into the result's field `kind`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def emulate_point(point: Point, plan: Plan, device_name: str, deadline: float | None = None) -> Emulated:
    """Run one rank of a point. The worker's own process group makes room and comes back.

    Args:
        point: kind `emulated`, with a target. plan: depths and samples.
        device_name: torch device. deadline: time.monotonic() after which no step starts.

    Raises:
        ValueError: the device has less memory than the target, or the point cannot be emulated.
    """
    reason = cannot_emulate(point)
    if reason is not None:
        raise ValueError(reason)
    dist.destroy_process_group()
    silence_fsdp()
    try:
        return _Rank(point, plan, _indexed(torch.device(device_name)), deadline).run()
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def cannot_emulate(point: Point) -> str | None:
    """Why a point cannot be emulated on any machine; None when it can."""
    parallel = point.parallel
    if parallel.exchange == "symmetric":
        return (
            "exchange 'symmetric' cannot be emulated: it reads the memory of peers, and there are none; use exchange "
            "'p2p', which moves the same bytes"
        )
    if not parallel.engine.startswith("fsdp2"):
        return f"engine {parallel.engine!r} cannot be emulated; use fsdp2-zero2 or fsdp2-zero3"
    return None


def allocator_cap(target: str, device: torch.device) -> int | None:
    """Bytes that the caching allocator may take, so that the device is the target: its memory less what is not the
    allocator's (context, driver, NCCL's buffers: an assumed reserve). None on a CPU.

    Raises:
        ValueError: the device has less memory than the target.
    """
    if device.type != "cuda":
        return None
    profile = get_profile(target)
    total = torch.cuda.get_device_properties(device).total_memory
    # What a data sheet calls 80 GB the driver shows as a little less than 80 GiB.
    if total < 0.97 * profile.memory_bytes:
        raise ValueError(
            f"target {target} has {profile.memory_bytes / 2**30:.0f} GiB, more than the {total / 2**30:.0f} GiB of "
            f"{torch.cuda.get_device_name(device)}: emulate a target with less memory"
        )
    return profile.memory_bytes - FIXED_RESERVE_BYTES


class _Rank:
    """The emulated rank of one point."""

    def __init__(self, point: Point, plan: Plan, device: torch.device, deadline: float | None) -> None:
        assert point.target is not None
        self.point, self.plan, self.device, self.deadline = point, plan, device, deadline
        self.link = link_of(get_profile(point.target))
        self.cap = allocator_cap(point.target, device)
        self.runs: dict[int, DepthRun] = {}
        self._warm: set[int] = set()
        self._host_memory: PeakMemory | None = None

    def run(self) -> Emulated:
        """All depths of the plan, or as far as memory and time go."""
        stopped: dict[str, str] = {}
        if self.cap is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.cap / total), self.device)
        hw_flops = self._hw_flops()
        try:
            with (
                emulated_world(self.point.num_devices, rank=self.plan.rank, link=self.link) as log,
                Monitor(self.device) as monitor,
            ):
                mesh = build_mesh(
                    sp_degree=self.point.parallel.sp_degree,
                    ulysses_degree=self.point.parallel.ulysses_degree,
                    device_type=self.device.type,
                )
                for depth, samples in self._order():
                    self._depth(depth, samples, mesh, log, monitor)
        except _Stop as stop:
            stopped = {stop.kind: str(stop)}
        except torch.OutOfMemoryError as error:
            stopped = {"oom": _first_line(error)}
        finally:
            self._release()
            if self.cap is not None:
                torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        return Emulated(
            runs=tuple(self.runs[depth] for depth in sorted(self.runs)),
            hw_flops=hw_flops,
            cap_bytes=self.cap,
            link=self.link.source,
            warm_up=f"1 step of {self._short_len:,} tokens" + (", 1 of full length" if self.plan.warm_up else ""),
            memory_source=(
                "peaks of the caching allocator, and the driver's figure after the step"
                if self.device.type == "cuda"
                else "peak of the process"
            ),
            **stopped,
        )

    def _hw_flops(self) -> float:
        """FLOPs by the formulas of the ops that a rank's step runs, counted without running it."""
        parallel = replace(self.point.parallel, attention_provider="sdpa-flash")
        grid = gate.token_grid(self.point.seq_len)
        trace = trace_shape(self.point.model, parallel, self.point.num_devices, grid, self.point.batch_per_group, True)
        return float(trace.flops)

    def _order(self) -> list[tuple[int, int]]:
        """(depth, samples) in turn: one sample at depths 1 and 2 tells whether the model's depth fits."""
        depths, samples = self.plan.depths, self.plan.samples
        if len(depths) == 1:
            return [(depths[0], samples)]
        turns = [(1, 1), (2, samples), (1, samples - 1)] if self.plan.is_doubtful else [(1, samples), (2, samples)]
        return [turn for turn in turns if turn[1]] + [(depth, self.plan.whole_samples) for depth in depths[2:]]

    @property
    def _short_len(self) -> int:
        return min(SHORT_LEN, self.point.seq_len)

    def _depth(self, depth: int, samples: int, mesh: ParallelMesh, log: CallLog, monitor: Monitor) -> None:
        self._release()
        run = self.runs.setdefault(depth, DepthRun(depth=depth))
        config = replace(self.point.model, depth=depth)
        # Drawn where they are: hundreds of millions of weights take a host seconds.
        with self.device:
            weights = gate.build_model(config, self.point.seed)
        model = ParallelDiT(weights, mesh, self.point.parallel)
        del weights
        model.engine.attach(torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE))
        if depth not in self._warm:
            self._check_finite(model, self._batch(mesh, self._short_len), depth)
            # What the short step left in the allocator's cache is not the long one's.
            self._release()
        batch = self._batch(mesh, self.point.seq_len)
        if self.plan.warms_up(depth) and depth not in self._warm:
            self._in_time(run)
            _step(model, batch)
        self._warm.add(depth)
        readings: list[Reading | None] = []
        for _ in range(samples):
            self._in_time(run)
            self._sample(run, model, batch, log, monitor)
            readings.append(monitor.latest)
            if depth == 2 and len(self.plan.depths) > 1:
                self._stop_if_too_large()
        run.telemetry = monitor.summarise(readings)
        bad = [name for name, p in model.module.named_parameters() if not bool(torch.isfinite(_local(p)).all())]
        if bad:
            raise _Stop("wrong", f"parameters are not finite after {samples} steps at depth {depth}: {bad[0]} ...")

    def _check_finite(self, model: ParallelDiT, batch: Batch, depth: int) -> None:
        """A short step, which also compiles kernels and makes the optimizer's states."""
        loss = model.loss(batch)
        model.engine.backward(loss)
        grads = {name: p.grad for name, p in model.module.named_parameters()}
        bad = [name for name, g in grads.items() if g is None or not bool(torch.isfinite(_local(g)).all())]
        if bad or not bool(torch.isfinite(loss)):
            raise _Stop("wrong", f"not finite at depth {depth}: {', '.join(bad[:3]) or 'the loss'}")
        model.engine.step()

    def _sample(self, run: DepthRun, model: ParallelDiT, batch: Batch, log: CallLog, monitor: Monitor) -> None:
        marks = _Marks(self.device)
        self._start_peak()
        log.clear()
        before = monitor.energy_j()
        _synchronize(self.device)
        start = time.perf_counter()
        marks.mark()
        loss = model.loss(batch)
        marks.mark()
        forward_calls = len(log.calls)
        model.engine.backward(loss)
        marks.mark()
        backward_calls = len(log.calls)
        model.engine.step()
        marks.mark()
        _synchronize(self.device)
        seconds = time.perf_counter() - start
        energy = Monitor.window_energy_j(before, monitor.energy_j(), seconds)
        run.samples_s.append(seconds)
        run.phases_s.append(dict(zip(("forward", "backward", "optimizer"), marks.seconds(), strict=True)))
        run.waited_s.append(log.waited_s())
        run.energy_j += [] if energy is None else [energy]
        for name, size in self._peak().items():
            run.memory[name] = max(run.memory.get(name, 0), size)
        run.calls = _by_collective(log.calls)
        sharding = [call.link_s if call.part == "sharding" else 0.0 for call in log.calls]
        run.forward_link_s = sum(sharding[:forward_calls])
        run.backward_link_s = sum(sharding[forward_calls:backward_calls])
        run.longest_link_s = max(sharding, default=0.0)
        if not bool(torch.isfinite(loss)):
            raise _Stop("wrong", f"the loss is not finite at depth {run.depth}: {loss.item()}")

    def _stop_if_too_large(self) -> None:
        depth = self.point.model.depth
        needed = continued(self.runs[1].memory.get("allocated", 0), self.runs[2].memory.get("allocated", 0), depth)
        if self.cap is not None and needed > self.cap:
            raise _Stop(
                "oom",
                f"needs {needed / 2**30:.1f} GiB at depth {depth} (continued from depths 1 and 2), more than the "
                f"{self.cap / 2**30:.1f} GiB that {get_profile(self.point.target or '').label} leaves the allocator",
            )

    def _in_time(self, run: DepthRun) -> None:
        """Ends the point where its next step would outlast the deadline, by the longest step so far per block."""
        if self.deadline is None:
            return
        per_block = max((max(r.samples_s) / r.depth for r in self.runs.values() if r.samples_s), default=0.0)
        if time.monotonic() + per_block * run.depth > self.deadline:
            raise _Stop("unfinished", f"no time left for another step at depth {run.depth}")

    def _batch(self, mesh: ParallelMesh, seq_len: int) -> Batch:
        samples = [
            gate.make_sample(self.point.model, seq_len, index=mesh.dp_rank * self.point.batch_per_group + i, seed=0)
            for i in range(self.point.batch_per_group)
        ]
        fields = {
            name: torch.cat([getattr(sample, name) for sample in samples]).to(self.device)
            for name in ("latents", "noise", "timestep", "text")
        }
        return Batch(**fields, global_samples=self.point.dp_degree * self.point.batch_per_group)

    def _start_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._host_memory = PeakMemory()

    def _peak(self) -> dict[str, int]:
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
                "device": total - free,
            }
        assert self._host_memory is not None
        before = self._host_memory.before
        return {"process": self._host_memory.read()} | ({} if before is None else {"process_before": before})

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _Marks:
    """Moments of a step on its device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Now, on the device."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between one mark and the next; the device must be done."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [a.elapsed_time(b) * 1e-3 if self._cuda else b - a for a, b in pairs]


def _by_collective(calls: Sequence[Call]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for call in calls:
        counts = found.setdefault(f"{call.part}.{call.name}", {"calls": 0, "bytes": 0, "link_s": 0.0})
        for name, amount in (("calls", 1), ("bytes", call.sent), ("link_s", call.link_s)):
            counts[name] += amount
    return found


def _step(model: ParallelDiT, batch: Batch) -> None:
    model.engine.backward(model.loss(batch))
    model.engine.step()


def _indexed(device: torch.device) -> torch.device:
    """The device with its index, which the allocator's cap wants."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
