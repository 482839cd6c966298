"""What measured points run on every rank: each is gated against the oracle, then all are timed in turns.

Points of one call share a world and a length. Where the baseline is among them, its samples and theirs alternate
(A B C, C B A, ...), so that what the machine does meanwhile is done to all.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from longreel.bench import gate, traffic
from longreel.bench.cases import Point
from longreel.bench.nvml import MIN_ENERGY_WINDOW_S, Monitor, Reading
from longreel.bench.peers import peer_strategy, relabelled
from longreel.bench.rank_device import Held, RankDevice, rank_device
from longreel.models.config import DiTConfig
from longreel.parallel import comm
from longreel.parallel.config import DTYPES
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import Batch, ParallelDiT

_LEARNING_RATE = 1e-4
# Steps take tenths of seconds and more: a reading more often would say no more and cost the interpreter's time.
_READ_EVERY_S = 0.1
# A sample that is taken anyway, even where the wall cap has passed: one alone says nothing about its noise.
FEWEST_SAMPLES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RankResult:
    """What one rank saw of a point.

    Args:
        verdict: of the gate, the same on every rank. reason: why there are no samples, None where there are.
        gated: what the gate's step held, in words.
        traffic: bytes sent in one step, by part and collective. traffic_formula: by the strategy's formula.
        flops: counted in a step, recomputation and padding included.
        samples_s: step times of the slowest rank. warm_up: the untimed steps before them, in words.
        memory: peaks of one step, see RankDevice. memory_source: what these figures are. memory_limit: of the device.
        telemetry: see Monitor.summarise. energy_j: of one step on this rank's device.
    """

    verdict: gate.Verdict
    reason: str | None
    gated: str = ""
    traffic: dict[str, int]
    traffic_formula: dict[str, int]
    flops: int
    samples_s: tuple[float, ...] = ()
    warm_up: str = ""
    memory: dict[str, int]
    memory_source: str = ""
    memory_limit: int | None = None
    telemetry: dict[str, Any] = field(default_factory=dict)
    energy_j: float | None = None


@dataclass(kw_only=True, slots=True)
class _Prepared:
    """A point whose gate is open: its model and data, and what is known so far."""

    point: Point
    model: ParallelDiT
    batch: Batch
    result: dict[str, Any]
    # What it holds between steps.
    resident: Held = field(default_factory=Held)
    samples: list[float] = field(default_factory=list)
    readings: list[Reading | None] = field(default_factory=list)
    energy: list[float | None] = field(default_factory=list)


def measure_points(points: Sequence[Point], oracle_path: str, at_path: str | None = None) -> list[RankResult]:
    """Gate points and time those whose gate is open, in turns. Every rank of the default group calls this.

    Args:
        points: of one length; num_devices of each is the size of the group.
        oracle_path: written by gate.write_oracle for this model, the gate's length and seed.
        at_path: where the first rank notes the place of the point that it is at.

    Returns:
        A result per point.
    """
    silence_fsdp()
    device = rank_device(points[0].device_type, dist.get_rank())
    device.release()
    note = Path(at_path) if at_path is not None and dist.get_rank() == 0 else None
    found: list[RankResult | _Prepared] = []
    for i, point in enumerate(points):
        _note(note, i)
        found.append(_prepare(point, oracle_path, device, [p for p in found if isinstance(p, _Prepared)]))
    ready = {i: one for i, one in enumerate(found) if isinstance(one, _Prepared)}
    with Monitor(device.torch_device, period_s=_READ_EVERY_S) as monitor:
        _time_in_turns(ready, device, monitor, note)
        return [one if isinstance(one, RankResult) else _result(one, device, monitor) for one in found]


def _note(path: Path | None, place: int) -> None:
    if path is not None:
        # Whole or not at all: the process may be killed here, and another one reads it meanwhile.
        new = path.with_suffix(".new")
        new.write_text(str(place))
        new.replace(path)


def _prepare(point: Point, oracle_path: str, device: RankDevice, parked: Sequence[_Prepared]) -> RankResult | _Prepared:
    """Open the point's gate, then build it whole and run it untimed; a RankResult where the gate stays closed."""
    whole = point.gate_depth in (None, point.model.depth) and point.gate_len in (None, point.seq_len)
    config = replace(point.model, depth=point.gate_depth or point.model.depth)
    resident = device.resident()
    model = _build(point, config, device)
    mesh = model.mesh
    gate_len = gate.gate_length(point.gate_len or point.seq_len, mesh.dp_rank)
    with traffic.counted_traffic() as counted, FlopCounterMode(display=False) as flops:
        loss = model.loss(_batch(point, mesh.dp_rank, gate_len, device))
        model.engine.backward(loss)
    verdict = gate.compare(
        sum(_over_ranks(loss.item(), device)) / mesh.flat.size(),
        model.engine.full_gradients(),
        oracle_path,
        dp_degree=mesh.dp_degree,
    )
    sent, expected = _sent(point, model, config, gate_len, counted)
    reason = verdict.reason or (traffic.disagreement(sent, expected) if point.peer is None else None)
    result = {
        "verdict": verdict,
        "gated": f"{config.depth} blocks, {point.gate_len or point.seq_len:,} tokens, against fp32 on one device",
        "traffic": sent,
        "traffic_formula": expected,
        "flops": flops.get_total_flops(),
    }
    if any(_over_ranks(float(reason is not None), device)):
        return RankResult(**result, reason=reason or "another rank's gate is closed", memory={})
    # The gate's step ends here: the optimizer's states exist from now on.
    model.engine.step()
    steps = ["the gate's"]
    if not whole:
        del model, loss
        device.release()
        model = _build(point, point.model, device)
    batch = _batch(point, mesh.dp_rank, point.seq_len, device)
    if not whole:
        with traffic.counted_traffic() as counted, FlopCounterMode(display=False) as flops:
            _step(model, batch)
        result["traffic"], result["traffic_formula"] = _sent(point, model, point.model, point.seq_len, counted)
        result["flops"] = flops.get_total_flops()
        steps = ["1 counted"]
    # Memory is that of a step like the timed ones: whole, with the optimizer's states there before it.
    device.start_peak(Held(sum(one.resident.allocated for one in parked), sum(one.resident.reserved for one in parked)))
    _step(model, batch)
    device.synchronize()
    result |= {
        "memory": device.peak(),
        "memory_source": device.memory_source,
        "memory_limit": device.limit,
        "warm_up": f"{' and '.join([*steps, '1 whole'])} step",
    }
    dist.barrier()
    added = Held(*(max(0, now - before) for now, before in zip(device.resident(), resident, strict=True)))
    return _Prepared(point=point, model=model, batch=batch, result=result, resident=added)


def _build(point: Point, config: DiTConfig, device: RankDevice) -> ParallelDiT:
    mesh = build_mesh(
        sp_degree=point.parallel.sp_degree,
        ulysses_degree=point.parallel.ulysses_degree,
        device_type=device.torch_device.type,
    )
    model = ParallelDiT(gate.build_model(config, point.seed).to(device.torch_device), mesh, point.parallel)
    if point.peer is not None:
        model.strategy = peer_strategy(point.peer, model.strategy, mesh)
    model.engine.attach(torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE))
    return model


def _sent(
    point: Point, model: ParallelDiT, config: DiTConfig, seq_len: int, counted: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Traffic as counted, and by the formula of the strategy (none of a peer's)."""
    if point.peer is not None:
        return relabelled(counted), {}
    return dict(counted), traffic.formula(
        model.strategy,
        config,
        batch=point.batch_per_group,
        seq_len=seq_len,
        element_size=DTYPES[point.parallel.precision].itemsize,
        policy=point.parallel.policy,
    )


def silence_fsdp() -> None:
    """Take off a warning about in-place use of the model's output, which the loss does not make."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _over_ranks(value: float, device: RankDevice) -> list[float]:
    return comm.over_ranks(value, comm.world(), device.torch_device)


def _time_in_turns(ready: dict[int, _Prepared], device: RankDevice, monitor: Monitor, note: Path | None) -> None:
    """Rounds in alternating order until every point has its samples; all ranks decide by the same times."""
    order = list(ready)
    while waiting := [i for i in order if _wants_more(ready[i])]:
        for i in waiting:
            _note(note, i)
            one = ready[i]
            dist.barrier()
            device.synchronize()
            before, start = monitor.energy_j(), time.perf_counter()
            _step(one.model, one.batch)
            device.synchronize()
            seconds = time.perf_counter() - start
            one.energy.append(Monitor.window_energy_j(before, monitor.energy_j(), seconds))
            one.readings.append(monitor.latest)
            # Every rank keeps the slowest rank's time, so that all stop after the same step.
            one.samples.append(max(_over_ranks(seconds, device)))
        order.reverse()


def _wants_more(one: _Prepared) -> bool:
    rule, taken, spent = one.point.timing, len(one.samples), sum(one.samples)
    if taken >= rule.max_samples or (taken >= FEWEST_SAMPLES and spent >= rule.wall_cap_s):
        return False
    return taken < rule.min_samples or spent < rule.budget_s


def _result(one: _Prepared, device: RankDevice, monitor: Monitor) -> RankResult:
    energy = [joules for joules in one.energy if joules is not None]
    # All ranks take part or none: the step has collectives.
    if all(_over_ranks(float(not energy and monitor.energy_j() is not None), device)):
        energy = [joules for joules in [_energy_of_many(one, device, monitor)] if joules is not None]
    return RankResult(
        **one.result,
        reason=None,
        samples_s=tuple(one.samples),
        telemetry=monitor.summarise(one.readings),
        energy_j=sum(energy) / len(energy) if energy else None,
    )


def _energy_of_many(one: _Prepared, device: RankDevice, monitor: Monitor) -> float | None:
    """Joules of one step by a window of many, where one is too short for the energy counter."""
    count = int(1.25 * MIN_ENERGY_WINDOW_S / min(one.samples)) + 1
    before, start = monitor.energy_j(), time.perf_counter()
    for _ in range(count):
        _step(one.model, one.batch)
    device.synchronize()
    joules = Monitor.window_energy_j(before, monitor.energy_j(), time.perf_counter() - start)
    return None if joules is None else joules / count


def _step(model: ParallelDiT, batch: Batch) -> None:
    model.engine.backward(model.loss(batch))
    model.engine.step()


def _batch(point: Point, dp_rank: int, seq_len: int, device: RankDevice) -> Batch:
    sample = gate.make_sample(point.model, seq_len, index=dp_rank, seed=point.seed).to(device.torch_device)
    return Batch(
        latents=sample.latents,
        noise=sample.noise,
        timestep=sample.timestep,
        text=sample.text,
        global_samples=point.dp_degree,
    )
