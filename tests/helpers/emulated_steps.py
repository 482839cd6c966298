"""Training steps that tests run on real gloo ranks and on an emulated one; test files import it by the tests' path."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from longreel.bench import gate
from longreel.bench.emulated_group import emulated_world
from longreel.bench.issued_calls import Issued, issued_calls
from longreel.bench.measure import silence_fsdp
from longreel.models.config import DiTConfig
from longreel.parallel.config import ParallelConfig
from longreel.parallel.mesh import build_mesh
from longreel.parallel.offload import HostStore
from longreel.parallel.parallelize import Batch, ParallelDiT

STRATEGIES: dict[str, dict[str, Any]] = {
    "ulysses": {"strategy": "ulysses"},
    "ulysses-chunks": {"strategy": "ulysses", "head_chunks": 2},
    "fastseq-projection": {"strategy": "fastseq", "fastseq_overlap": "projection"},
    "fastseq-attention": {"strategy": "fastseq", "fastseq_overlap": "attention"},
    "ring": {"strategy": "ring"},
    "usp": {"strategy": "usp"},
}


@dataclass(frozen=True)
class Case:
    """strategy: of STRATEGIES, or `local`. dp: SP groups of `degree` ranks each. attention: provider."""

    strategy: str
    degree: int
    policy: str
    engine: str
    seq_len: int
    dp: int = 1
    width: int = 128
    published: bool = False
    attention: str = "auto"

    @property
    def parallel(self) -> ParallelConfig:
        fields = dict(STRATEGIES.get(self.strategy, {"strategy": self.strategy}))
        if self.strategy == "usp":
            fields["ulysses_degree"] = max(1, self.degree // 2)
        fields |= {"policy": self.policy, "engine": self.engine, "attention_provider": self.attention}
        return ParallelConfig(sp_degree=self.degree, **fields)

    @property
    def model(self) -> DiTConfig:
        return DiTConfig(
            depth=2,
            hidden_size=self.width,
            num_heads=16,
            mlp_ratio=2.0,
            conditioning="cross",
            text_dim=16,
            max_text_tokens=8,
            text_only=self.published,
            cross_layout="published" if self.published else "replicated",
        )

    @property
    def ranks(self) -> int:
        return self.degree * self.dp


@dataclass(frozen=True)
class Step:
    """calls: of building and of two steps. peaks: bytes that each step after the first allocated at most."""

    calls: list[Issued]
    peaks: list[int]
    loss: float
    gradients: dict[str, Tensor]


def steps(cases: Sequence[Case], repeats: int = 0, rank: int | None = None) -> list[Step]:
    """Two steps of each case on this rank of the default group, or on one of an emulated world.

    Args:
        repeats: steps after the first whose memory is looked at; none: a second step without.
    """
    silence_fsdp()
    if rank is None:
        return [_run(case, repeats) for case in cases]
    found = []
    for case in cases:
        with emulated_world(case.ranks, rank=rank):
            found.append(_run(case, repeats))
    return found


def _run(case: Case, repeats: int) -> Step:
    assert dist.get_world_size() == case.ranks
    with issued_calls() as calls:
        mesh = build_mesh(sp_degree=case.degree, ulysses_degree=case.parallel.ulysses_degree)
        store = HostStore(min_bytes=1 << 10, slab_bytes=1 << 16)
        model = ParallelDiT(gate.build_model(case.model, 0), mesh, case.parallel, store=store)
        model.engine.attach(torch.optim.AdamW(model.parameters(), lr=1e-4))
        sample = gate.make_sample(case.model, case.seq_len, index=mesh.dp_rank, seed=0)
        batch = Batch(
            latents=sample.latents,
            noise=sample.noise,
            timestep=sample.timestep,
            text=sample.text,
            global_samples=case.dp,
        )
        loss = model.loss(batch)
        model.engine.backward(loss)
        gradients = model.engine.full_gradients() if case.ranks == 1 else {}
        model.engine.step()
        with _patient_waits():
            peaks = [_peak(model, batch) for _ in range(repeats)]
        if not repeats:
            _step(model, batch)
    return Step(list(calls), peaks, loss.item(), gradients)


def _step(model: ParallelDiT, batch: Batch) -> None:
    model.engine.backward(model.loss(batch))
    model.engine.step()


@contextmanager
def _patient_waits() -> Iterator[None]:
    """A thread of gloo's lets go of a collective's buffers some time after its wait() is over: that time is given here,
    so that they do not count as what a step needs."""
    wait = dist.Work.wait

    def patient(work: dist.Work, *arguments: Any) -> bool:
        over = wait(work, *arguments)
        time.sleep(0.002)
        return over

    with mock.patch.object(dist.Work, "wait", patient):
        yield


def _peak(model: ParallelDiT, batch: Batch) -> int:
    """Bytes, by every allocation that the profiler saw: not by anything that prediction or emulation keeps."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _step(model, batch)
    results = profiler.profiler
    assert results is not None
    live = peak = 0
    for event in sorted(
        (e for e in results.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
