"""ColossalAI's ZeRO-2 against fsdp2's on the same model and data: `python bench/engine_steps.py --out DIR`.

Loss, speed and memory of a training step on one GPU (or one per rank, under torchrun). Each engine first trains alone,
for its losses and its peak memory; then both are timed in turns. One record per engine goes into DIR/records.jsonl.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longreel.bench import gate, op_provenance
from longreel.bench.cases import Point
from longreel.bench.folder import prepare_folder
from longreel.bench.provenance import stamped
from longreel.models.config import DiTConfig, preset
from longreel.parallel import comm
from longreel.parallel.config import Engine, ParallelConfig, Policy, Precision
from longreel.parallel.launch import run_script
from longreel.parallel.mesh import build_mesh
from longreel.parallel.parallelize import Batch, ParallelDiT
from longreel.parallel.predict.flops import useful_flops
from longreel.reports import store
from longreel.reports.records import Record
from longreel.reports.turns import Comparison, compare, quantile

# The first one is the baseline.
PAIR: tuple[Engine, Engine] = ("fsdp2-zero2", "colossalai")
# Losses of the same weights and data differ by rounding, which AdamW's steps add up: relative, by precision.
LOSS_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """ColossalAI's ZeRO-2 against fsdp2's.

    Args:
        out: folder of records.jsonl.
        model: preset. depth: its blocks; the preset's if not given.
        seq_len: video tokens of a rank's sample. policy: activation policy. precision: of the step.
        attention: provider. learning_rate: of AdamW.
        steps: that each engine trains alone. rounds: timed steps of each, in turns.
        commit: the commit of this tree, for a copy that is no git checkout.
    """

    out: Path
    model: str = "dit-xl-2"
    depth: int | None = None
    seq_len: int = 16_384
    policy: Policy = "full"
    precision: Precision = "bf16"
    attention: str = "sdpa-flash"
    learning_rate: float = 1e-4
    steps: int = 20
    rounds: int = 10
    commit: str | None = None

    def __post_init__(self) -> None:
        for name in ("seq_len", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")
        preset(self.model)

    @property
    def dit(self) -> DiTConfig:
        """The model."""
        depth: dict[str, Any] = {} if self.depth is None else {"depth": self.depth}
        return preset(self.model, conditioning="cross", **depth)


@dataclass(slots=True)
class Trained:
    """One engine. losses: of its steps alone. memory: peak of a step, bytes. samples_s: in turns with the other."""

    losses: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    samples_s: list[float] = field(default_factory=list)


class Run:
    """A model under one engine, with its data."""

    def __init__(self, config: EngineConfig, dit: DiTConfig, engine: Engine, device: torch.device) -> None:
        self.device = device
        mesh = build_mesh(sp_degree=1, device_type=device.type)
        parallel = ParallelConfig(
            engine=engine, policy=config.policy, precision=config.precision, attention_provider=config.attention
        )
        self.model = ParallelDiT(gate.build_model(dit, 0).to(device), mesh, parallel)
        self.model.engine.attach(torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate))
        sample = gate.make_sample(dit, config.seq_len, index=mesh.dp_rank, seed=0).to(device)
        self.batch = Batch(
            latents=sample.latents,
            noise=sample.noise,
            timestep=sample.timestep,
            text=sample.text,
            global_samples=mesh.dp_degree,
        )

    def step(self) -> torch.Tensor:
        """One training step; its loss."""
        loss = self.model.loss(self.batch)
        self.model.engine.backward(loss)
        self.model.engine.step()
        return loss.detach()


def compare_engines(config: EngineConfig, dit: DiTConfig, device: torch.device) -> dict[Engine, Trained]:
    """Train both engines alone, then time them in turns; every rank of the default group calls it."""
    found: dict[Engine, Trained] = {engine: Trained() for engine in PAIR}
    cuda = device.type == "cuda"
    # ColossalAI first: where it cannot run, nothing else has to.
    for engine, trained in reversed(found.items()):
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        run = Run(config, dit, engine, device)
        for i in range(config.steps):
            if i == 1 and cuda:
                # From the second step on the optimizer's states are there.
                torch.cuda.reset_peak_memory_stats(device)
            trained.losses.append(statistics.mean(comm.over_ranks(run.step().item(), comm.world(), device)))
        if cuda:
            trained.memory = {
                "allocated": torch.cuda.max_memory_allocated(device),
                "reserved": torch.cuda.max_memory_reserved(device),
            }
        del run
    runs = {engine: Run(config, dit, engine, device) for engine in PAIR}
    for run in runs.values():
        run.step()
    for i in range(config.rounds):
        for engine in PAIR[:: 1 if i % 2 == 0 else -1]:
            found[engine].samples_s.append(_timed(runs[engine]))
    return found


def _timed(run: Run) -> float:
    """Seconds of a step on the slowest rank."""
    comm.over_ranks(0.0, comm.world(), run.device)
    _wait(run.device)
    start = time.perf_counter()
    run.step()
    _wait(run.device)
    return max(comm.over_ranks(time.perf_counter() - start, comm.world(), run.device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loss_difference(found: dict[Engine, Trained]) -> float:
    """Largest relative difference of any step's loss to the baseline engine's."""
    first, second = (found[engine].losses for engine in PAIR)
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def records(
    config: EngineConfig, dit: DiTConfig, found: dict[Engine, Trained], device: torch.device, provenance: dict[str, Any]
) -> list[Record]:
    """One record per engine: loss against the baseline's as its error, and the verdict of the times.

    An engine whose losses are off by more than rounding is `wrong`: it has no verdict.
    """
    ranks = dist.get_world_size()
    timed = compare(found[PAIR[1]].samples_s, found[PAIR[0]].samples_s)
    tolerance = LOSS_TOLERANCE[config.precision]
    made = []
    for engine, trained in found.items():
        point = Point(
            kind="measured",
            model=dit,
            model_name=config.model if config.depth is None else f"{config.model} of depth {config.depth}",
            parallel=ParallelConfig(
                engine=engine, policy=config.policy, precision=config.precision, attention_provider=config.attention
            ),
            num_devices=ranks,
            device=op_provenance.device_words(device),
            device_type="cuda" if device.type == "cuda" else "cpu",
            seq_len=config.seq_len,
            is_baseline=engine == PAIR[0],
        )
        off = 0.0 if point.is_baseline else loss_difference(found)
        reason = None if off <= tolerance else f"loss differs by {off:.1e} from {PAIR[0]}'s, more than {tolerance:.0e}"
        made.append(
            point.record(
                "ok" if reason is None else "wrong",
                reason=reason,
                samples_s=tuple(trained.samples_s),
                step_s=statistics.median(trained.samples_s),
                interval_s=(quantile(trained.samples_s, 0.2), quantile(trained.samples_s, 0.8)),
                memory=trained.memory,
                flops=float(ranks * useful_flops(dit, num_video=config.seq_len)),
                error={"loss": off, "tolerance": tolerance},
                comparison={} if point.is_baseline or reason else _words(timed),
                provenance=stamped(provenance, losses=trained.losses, steps_alone=config.steps),
            )
        )
    return made


def _words(timed: Comparison) -> dict[str, Any]:
    return {"verdict": timed.verdict, "ratio": timed.ratio, "low": timed.low, "high": timed.high}


def work(config: EngineConfig, device: torch.device) -> None:
    """Compare, write and print; every rank calls it."""
    found = compare_engines(config, config.dit, device)
    if dist.get_rank() != 0:
        return
    folder = config.out.expanduser()
    prepare_folder(folder)
    provenance = op_provenance.gather(["bench/engine_steps.py", *sys.argv[1:]], device, commit=config.commit)
    for record in records(config, config.dit, found, device, provenance):
        store.append(folder / "records.jsonl", record)
    print("\n".join(lines(found, LOSS_TOLERANCE[config.precision])))


def lines(found: dict[Engine, Trained], tolerance: float) -> list[str]:
    """What is printed."""
    told = []
    for engine, trained in found.items():
        memory = f", peak {trained.memory['allocated'] / 2**30:.2f} GiB" if trained.memory else ""
        told.append(
            f"{engine:12} loss {trained.losses[0]:.5f} to {trained.losses[-1]:.5f}, "
            f"{statistics.median(trained.samples_s) * 1e3:.1f} ms a step{memory}"
        )
    timed = compare(found[PAIR[1]].samples_s, found[PAIR[0]].samples_s)
    wrong = "" if loss_difference(found) <= tolerance else f": WRONG, more than {tolerance:.0e}"
    told.append(
        f"{PAIR[1]} over {PAIR[0]}: time {timed.ratio:.3f} ({timed.low:.3f} to {timed.high:.3f}, {timed.verdict}), "
        f"loss differs by {loss_difference(found):.1e} at most{wrong}"
    )
    return told


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one `error:` line."""
    return run_script(work, EngineConfig, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    raise SystemExit(main())
