"""What a measured point runs on every rank: one gated step against the oracle, an untimed one, then timed steps."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from longreel.bench import gate, traffic
from longreel.bench.cases import Point
from longreel.bench.process_memory import PeakMemory
from longreel.models.sequence import AttentionShape
from longreel.parallel import comm
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import Batch, ParallelDiT

_LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class RankResult:
    """What one rank saw of a point.

    Args:
        verdict: of the gate, the same on every rank. reason: why there are no samples, None where there are.
        traffic: bytes sent in one step, by part and collective. traffic_formula: by the strategy's formula.
        flops: counted in the gate's step, recomputation and padding included.
        samples_s: step times of the slowest rank. warm_up: the untimed step before them, in words.
        memory: `process` (peak over the timed steps) and `process_before` where known, bytes.
        memory_source: what these figures are.
    """

    verdict: gate.Verdict
    reason: str | None
    traffic: dict[str, int]
    traffic_formula: dict[str, int]
    flops: int
    samples_s: tuple[float, ...] = ()
    warm_up: str = ""
    memory: dict[str, int]
    memory_source: str = ""


def measure_point(point: Point, oracle_path: str) -> RankResult:
    """Gate one point, and time it if the gate is open. Every rank of the default group calls this.

    Args:
        point: the point; num_devices is the size of the group.
        oracle_path: written by gate.write_oracle for this model, length and seed.
    """
    silence_fsdp()
    mesh = build_mesh(sp_degree=point.parallel.sp_degree, ulysses_degree=point.parallel.ulysses_degree)
    everyone = mesh.flat.get_group().group_name
    model = ParallelDiT(gate.build_model(point.model, point.seed), mesh, point.parallel)
    engine = model.engine
    engine.attach(torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE))

    gate_len = gate.gate_length(point.seq_len, mesh.dp_rank)
    batch = _batch(point, mesh.dp_rank, gate_len)
    with traffic.counted_traffic() as counted, FlopCounterMode(display=False) as flops:
        loss = model.loss(batch)
        engine.backward(loss)
    verdict = gate.compare(
        sum(comm.over_ranks(loss.item(), everyone)) / mesh.flat.size(),
        engine.full_gradients(),
        oracle_path,
        dp_degree=mesh.dp_degree,
    )
    shape = AttentionShape(
        batch=point.batch_per_group,
        seq_len=gate_len,
        num_heads=point.model.num_heads,
        head_dim=point.model.head_dim,
        element_size=batch.latents.element_size(),
    )
    expected = traffic.formula(model.strategy, shape, num_layers=point.model.depth, policy=point.parallel.policy)
    reason = verdict.reason or traffic.disagreement(counted, expected)
    if any(comm.over_ranks(float(reason is not None), everyone)):
        return RankResult(
            verdict=verdict,
            reason=reason or "another rank's gate is closed",
            traffic=dict(counted),
            traffic_formula=expected,
            flops=flops.get_total_flops(),
            memory={},
        )

    # The gate's step ends here: the optimizer's states exist from now on.
    engine.step()
    warm_up = "1 step (the gate's)"
    if mesh.dp_degree > 1:
        # All groups but the first have seen a short sample only: their memory is not theirs yet, nor their speed.
        batch = _batch(point, mesh.dp_rank, point.seq_len)
        warm_up = "1 step after the gate's"
        _step(model, batch)
    memory = PeakMemory()
    samples = _timed_steps(point, model, batch, everyone)
    return RankResult(
        verdict=verdict,
        reason=None,
        traffic=dict(counted),
        traffic_formula=expected,
        flops=flops.get_total_flops(),
        samples_s=samples,
        warm_up=warm_up,
        memory={"process": memory.read()} | ({} if memory.before is None else {"process_before": memory.before}),
        memory_source=memory.source,
    )


def silence_fsdp() -> None:
    """Take off a warning about in-place use of the model's output, which the loss does not make."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _timed_steps(point: Point, model: ParallelDiT, batch: Batch, everyone: str) -> tuple[float, ...]:
    samples: list[float] = []
    while len(samples) < point.timing.min_samples or (
        len(samples) < point.timing.max_samples and sum(samples) < point.timing.budget_s
    ):
        dist.barrier()
        start = time.perf_counter()
        _step(model, batch)
        # Every rank keeps the slowest rank's time, so that all stop after the same step.
        samples.append(max(comm.over_ranks(time.perf_counter() - start, everyone)))
    return tuple(samples)


def _step(model: ParallelDiT, batch: Batch) -> None:
    model.engine.backward(model.loss(batch))
    model.engine.step()


def _batch(point: Point, dp_rank: int, seq_len: int) -> Batch:
    sample = gate.make_sample(point.model, seq_len, index=dp_rank, seed=point.seed)
    return Batch(
        latents=sample.latents,
        noise=sample.noise,
        timestep=sample.timestep,
        text=sample.text,
        global_samples=point.dp_degree,
    )
